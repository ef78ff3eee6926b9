"""Dropout of the selected branch in training: drawn alike by every layout and by a resumed run, and not in validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_harness import metrics, tiny_config, train_here

from nsa_cp.testing import DistributedPool

pytestmark = pytest.mark.distributed

Workers = Callable[[int], DistributedPool]
COLUMNS = ("step", "loss", "grad_norm", "gate_selected", "val_loss")
DROPOUT = "nsa.selected_dropout=0.5"


@pytest.fixture(scope="module")
def one_process(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The tiny run with dropout on one process."""
    config = tiny_config(tmp_path_factory.mktemp("one"), DROPOUT)
    workers(1).run(train_here, config)
    return metrics(config, *COLUMNS)


def test_it_changes_the_run_and_leaves_the_gates_as_they_are(
    tmp_path: Path, workers: Workers, one_process: list[tuple[Any, ...]]
) -> None:
    config = tiny_config(tmp_path)
    workers(1).run(train_here, config)
    without = metrics(config, *COLUMNS)
    assert without[0][1] != one_process[0][1] and without[-1][4] != one_process[-1][4]
    # The first step's gates are those of equal weights, dropped or not.
    assert one_process[0][3] == pytest.approx(without[0][3], rel=1e-3)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, ["parallel.context=2"]),
        (4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence_parallel=true", "train.recompute=full"]),
    ],
    ids=["cp2", "tp2-sp-cp2-full-recompute"],
)
def test_layouts_and_recompute_drop_the_same_tokens_and_so_does_a_resumed_run(
    tmp_path: Path, workers: Workers, one_process: list[tuple[Any, ...]], world: int, overrides: list[str]
) -> None:
    config = tiny_config(tmp_path, DROPOUT, *overrides)
    workers(world).run(train_here, config)
    uncut = metrics(config, *COLUMNS)
    for row, alone in zip(uncut, one_process, strict=True):
        for value, wanted in zip(row, alone, strict=True):
            assert value == (None if wanted is None else pytest.approx(wanted, rel=2e-5)), (row, alone)
    (config.run_dir / "checkpoints" / "latest").write_text("step_00000002\n")
    workers(world).run(train_here, config, resume=True)
    assert metrics(config, *COLUMNS) == uncut
