"""The arms of the studies: native sparse attention, what it is compared with, and variants that test its defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nsa_cp.study.model import ModelSettings, count_parameters


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm of a study: a kind of attention.

    Args:
        description: a phrase for tables.
        model: fields of :class:`ModelSettings` that differ from the study's.
        nsa: fields of NSAConfig that differ from the study's.
        matched: widen the SwiGLU until the arm has as many parameters as the arm ``nsa``.
        tests_default: whether the arm differs from ``nsa`` only in a default (or in several, if its description says so).
    """

    name: str
    description: str
    model: dict[str, Any] = field(default_factory=dict)
    nsa: dict[str, Any] = field(default_factory=dict)
    matched: bool = False
    tests_default: bool = False


ARMS = (
    Arm(name="full", description="full attention, the same width", model={"attention": "full"}),
    Arm(name="full_params", description="full attention, as many parameters", model={"attention": "full"}, matched=True),
    Arm(name="nsa", description="native sparse attention with its defaults"),
    Arm(name="window", description="the window alone", model={"attention": "window"}, matched=True),
    Arm(
        name="compressed_window",
        description="compressed and window branches, nothing selected",
        model={"selection": "none"},
        matched=True,
    ),
    Arm(name="random_blocks", description="random blocks in place of the best", model={"selection": "random"}),
    Arm(name="shared_kv", description="one K/V for all branches", nsa={"shared_kv": True}, tests_default=True),
    Arm(name="compressor_mean", description="compression by the mean", nsa={"compressor": "mean"}, tests_default=True),
    Arm(name="compressor_linear", description="linear compression", nsa={"compressor": "linear"}, tests_default=True),
    Arm(name="rope_before", description="keys rotated before compression", nsa={"compressed_rope": "before"}, tests_default=True),
    Arm(
        name="apart_start",
        description="K/V projections of the branches that start with weights of their own",
        model={"equal_start": False},
        tests_default=True,
    ),
    Arm(name="gate_branch", description="one gate a branch for all heads", nsa={"gate": "branch"}, tests_default=True),
    Arm(
        name="slow_gates",
        description="gates of a tenth of the logits, which learn slowly",
        nsa={"gate_temperature": 10.0},
        tests_default=True,
    ),
)

# For text only: tells how much of sparse attention's gap to full attention is due to the choice of blocks.
DENSE_BLOCKS = Arm(
    name="dense_blocks",
    description="the blocks that dense attention with the selected branch's queries and keys weights most",
    model={"selection": "dense"},
)


def held_gates_arms(stage: int) -> tuple[Arm, ...]:
    """Arms whose gates are one half in the stages of training before ``stage``."""
    held = {"gates_from": stage}
    return (
        Arm(name="held_gates", description="gates held at one half on the shorter sequences", model=held, tests_default=True),
        Arm(name="held_gates_random", description="the same with random blocks", model={**held, "selection": "random"}),
    )


def from_full_arms(stage: int) -> tuple[Arm, ...]:
    """Arms with full attention in the stages of training before ``stage``, which then go on as sparse attention."""
    dense = {"dense_until": stage}
    return (
        Arm(
            name="from_full",
            description="full attention on the shorter sequences, then native sparse attention with its weights",
            model=dense,
            tests_default=True,
        ),
        Arm(name="from_full_random", description="the same with random blocks", model={**dense, "selection": "random"}),
    )


def late_arms(stage: int) -> tuple[Arm, ...]:
    """Arms whose selected branch opens at ``stage`` of training, after the compressed branch has learned where to look."""
    late = {"selected_from": stage}
    return (
        Arm(
            name="late_selection",
            description="the selected branch closed in the first stages of training",
            model=late,
            tests_default=True,
        ),
        Arm(
            name="late_slow_gates",
            description="the same with gates of a tenth of the logits",
            model=late,
            nsa={"gate_temperature": 10.0},
            tests_default=True,
        ),
        Arm(
            name="late_shared_kv",
            description="closed in the first stages, one K/V for all branches",
            model=late,
            nsa={"shared_kv": True},
            tests_default=True,
        ),
        Arm(name="late_random", description="closed in the first stages, random blocks", model={**late, "selection": "random"}),
    )


def model_of(arm: Arm, base: ModelSettings) -> ModelSettings:
    """The model of an arm, given that of ``nsa``. A matched arm has at least as many parameters, rounded up to 8 channels."""
    settings = replace(base, nsa=replace(base.nsa, **arm.nsa), **arm.model)
    if not arm.matched:
        return settings
    missing = count_parameters(base) - count_parameters(settings)
    per_channel = 3 * base.hidden_size * base.num_layers
    # Multiples of 8 channels, for the matrix units.
    wider = 8 * max(0, -(-missing // (8 * per_channel)))
    return replace(settings, ffn_hidden_size=settings.ffn_hidden_size + wider)
