"""A run small enough for tests, and how to start it in a pool's processes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from nsa_cp.training.config import RunConfig
from nsa_cp.training.config_load import build_config

# Odd numbers of heads a group, layers and validation sequences, so that nothing divides by accident.
TINY: dict[str, Any] = {
    "model": dict(num_layers=2, hidden_size=24, ffn_hidden_size=32, num_attention_heads=6, num_query_groups=2, kv_channels=8),
    "nsa": dict(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=12),
    "data": dict(sequence_length=64),
    "train": dict(
        steps=4,
        global_batch_size=4,
        warmup_steps=1,
        lr=3e-3,
        min_lr=3e-4,
        eval_interval=2,
        eval_sequences=3,
        checkpoint_interval=2,
        keep_checkpoints=9,
    ),
    "sample": dict(tokens=4, temperature=0),
}


def tiny_config(runs_dir: Path | str, *overrides: str) -> RunConfig:
    """The tiny run with ``section.key=value`` changes, below ``runs_dir``."""
    return build_config(copy.deepcopy(TINY), [f"runs_dir={runs_dir}", *overrides])


def train_here(
    rank: int, world_size: int, config: RunConfig, resume: bool = False, overwrite: bool = False
) -> dict[str, Any] | None:
    """Train inside a pool's process; quiet, and without leaving the CPU stand-ins behind for the next test."""
    from nsa_cp.megatron import cpu_compatibility
    from nsa_cp.training.loop import train

    with warnings.catch_warnings(), cpu_compatibility(), contextlib.redirect_stdout(io.StringIO()):
        return train(config, resume=resume, overwrite=overwrite)


def printed_here(rank: int, world_size: int, config: RunConfig, about: str, resume: bool = False) -> list[str]:
    """Train; the lines with ``about`` in them that this process prints."""
    from nsa_cp.megatron import cpu_compatibility
    from nsa_cp.training.loop import train

    with warnings.catch_warnings(), cpu_compatibility(), contextlib.redirect_stdout(io.StringIO()) as stream:
        train(config, resume=resume)
    return [line for line in stream.getvalue().splitlines() if about in line]


def train_from_steps_apart(rank: int, world_size: int, config: RunConfig, resume: bool = False) -> None:
    """Train where storage shows the first process step 2 as the newest checkpoint, and the second one step 4."""
    from nsa_cp.training import manifest, plan

    with pytest.MonkeyPatch.context() as patch:
        for module in (manifest, plan):
            patch.setattr(module, "find_latest", lambda folder: folder / f"step_0000000{2 + 2 * rank}")
        train_here(rank, world_size, config, resume=resume)


def rewind(config: RunConfig, step: int) -> None:
    """Make ``step`` the newest checkpoint, as if the run had been killed before the next one."""
    (config.run_dir / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


def figures_here(rank: int, world_size: int, config: RunConfig, step: int) -> dict[str, Any]:
    """What evaluation says of the checkpoint after ``step`` steps."""
    from nsa_cp.megatron import cpu_compatibility
    from nsa_cp.training.loop import evaluate

    with warnings.catch_warnings(), cpu_compatibility():
        return evaluate(config, config.run_dir / "checkpoints" / f"step_{step:08d}")


def evaluate_here(rank: int, world_size: int, config: RunConfig, step: int) -> float:
    """Validation loss of the checkpoint after ``step`` steps."""
    return figures_here(rank, world_size, config, step)["val_loss"]


def metrics(config: RunConfig, *names: str) -> list[tuple[Any, ...]]:
    """Columns of a run's metrics.jsonl, one tuple a step."""
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row.get(name) for name in names) for row in rows]


def close(actual: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], relative: float) -> None:
    """Two runs' columns, the step first, agree up to a relative difference."""
    assert [row[0] for row in actual] == [row[0] for row in expected]
    for row, other in zip(actual, expected, strict=True):
        for value, wanted in zip(row, other, strict=True):
            assert value == (None if wanted is None else pytest.approx(wanted, rel=relative)), (row, other)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time stamp and content of every file below ``folder``, to show that nothing was touched."""
    return {
        str(path.relative_to(folder)): (os.stat(path).st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
