"""All settings that decide a run's result, and the identifiers (hashes) derived from them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from nsa_cp.study.model import ModelSettings
from nsa_cp.study.task import Task

# Raise it when a change of code makes the same settings give other results: runs of older code are then made again.
REVISION = 2
# Settings that were added after runs had been made, with the values that change nothing: they are left out then, so that those
# runs keep their identifiers.
_ADDED = {"gates_from": 0, "gate_temperature": 1.0}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a model is trained: AdamW, linear warm-up, cosine decay to a tenth of the peak rate.

    Args:
        eval_every: steps between validations.
        precision: of the forward and of attention; weights and optimizer are float32.

    Raises:
        ValueError: a number that is out of range.
    """

    warmup_steps: int = 50
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    eval_every: int = 50
    precision: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.eval_every < 1:
            raise ValueError(f"warmup_steps = {self.warmup_steps} and eval_every = {self.eval_every} must be at least 0 and 1")
        if not (0 <= self.weight_decay < math.inf and 0 < self.clip_norm):
            raise ValueError(f"weight_decay = {self.weight_decay} and clip_norm = {self.clip_norm} must be positive")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One run: a row of a study's table."""

    study: str
    scale: str
    arm: str
    lr: float
    seed: int
    model: ModelSettings
    train: TrainSettings
    task: Task

    @cached_property
    def run_id(self) -> str:
        """Twelve hexadecimal digits of a hash of all settings."""
        text = json.dumps([REVISION, self.as_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def table_id(self) -> str:
        """Eight hexadecimal digits of a hash of what is the same for all runs of one table."""
        common = [REVISION, self.study, self.scale, asdict(self.train), asdict(self.task)]
        return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def kernels(self) -> str:
        """A key of what the attention's kernels are compiled for. Runs with equal keys wait until the first has compiled them."""
        m = self.model
        if m.attention == "full":
            return ""
        heads = m.num_attention_heads // m.num_query_groups
        return repr((m.attention, m.selection, heads, m.kv_channels, m.nsa, self.train.precision))

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON values, but for those of ``_ADDED`` that change nothing."""
        return _without_neutral(asdict(self))


def _without_neutral(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_neutral(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in _ADDED or value != _ADDED[key]
    }
