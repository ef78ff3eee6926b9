"""A selected branch that opens gradually: every layout and a resumed run draw its dropout alike, and validation draws none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from training_harness import close, evaluate_here, metrics, rewind, tiny_config, train_here

from nsa_cp.testing import DistributedPool
from nsa_cp.training.config import TrainSection

pytestmark = pytest.mark.distributed

Workers = Callable[[int], DistributedPool]
COLUMNS = ("step", "loss", "grad_norm", "gate_selected", "val_loss")
GRADUAL = "train.selected_opening_steps=4"


def test_the_part_dropped_falls_from_all_to_none() -> None:
    assert [TrainSection(selected_opening_steps=4).selected_dropout(step) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert TrainSection().selected_dropout(0) == 0


@pytest.fixture(scope="module")
def one_process(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The tiny run, opening gradually, on one process."""
    config = tiny_config(tmp_path_factory.mktemp("one"), GRADUAL)
    workers(1).run(train_here, config)
    return metrics(config, *COLUMNS)


def test_it_changes_the_run_and_leaves_the_gates_as_they_are(
    tmp_path: Path, workers: Workers, one_process: list[tuple[Any, ...]]
) -> None:
    config = tiny_config(tmp_path)
    workers(1).run(train_here, config)
    without = metrics(config, *COLUMNS)
    assert without[0][1] != one_process[0][1] and without[-1][4] != one_process[-1][4]
    # The first step's gates are those of equal weights, and counted before any is dropped.
    assert one_process[0][3] == pytest.approx(without[0][3], rel=1e-3)


def _draw(rank: int, world_size: int, seed: int, step: int) -> float:
    from nsa_cp.megatron import cpu_compatibility
    from nsa_cp.training.step import seed_draws

    with cpu_compatibility():
        parallel_state.initialize_model_parallel()
        try:
            seed_draws(seed, step)
            return float(torch.rand(()))
        finally:
            parallel_state.destroy_model_parallel()


def test_draws_differ_between_steps_seeds_and_data_parallel_ranks_and_come_again(workers: Workers) -> None:
    draws = [workers(2).run(_draw, seed, step) for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert draws[3] == draws[0] and len({draw for pair in draws for draw in pair}) == 6


def test_validation_drops_nothing(tmp_path: Path, workers: Workers) -> None:
    """With three quarters of the tokens to drop in the next step, as without any."""
    config = tiny_config(tmp_path, GRADUAL, "train.eval_interval=1", "train.checkpoint_interval=1")
    workers(1).run(train_here, config)
    assert workers(1).run(evaluate_here, config, 1) == [metrics(config, "val_loss")[0][0]]


def test_layouts_and_recompute_drop_the_same_tokens(tmp_path: Path, workers: Workers, one_process: list[tuple[Any, ...]]) -> None:
    parallel = ("parallel.context=2", "parallel.tensor=2", "parallel.sequence_parallel=true", "train.recompute=full")
    config = tiny_config(tmp_path, GRADUAL, *parallel)
    workers(4).run(train_here, config)
    close(metrics(config, *COLUMNS), one_process, 2e-5)


def test_a_resumed_run_drops_what_the_uncut_one_does(
    tmp_path: Path, workers: Workers, one_process: list[tuple[Any, ...]]
) -> None:
    config = tiny_config(tmp_path, GRADUAL, "parallel.context=2")
    workers(2).run(train_here, config)
    uncut = metrics(config, *COLUMNS)
    close(uncut, one_process, 2e-5)
    rewind(config, 2)
    workers(2).run(train_here, config, resume=True)
    assert metrics(config, *COLUMNS) == uncut
    # One process has no random states of that layout to go on from: its draws follow from the step.
    rewind(config, 2)
    workers(1).run(train_here, tiny_config(tmp_path, GRADUAL), resume=True)
    close(metrics(config, *COLUMNS), one_process, 2e-5)
