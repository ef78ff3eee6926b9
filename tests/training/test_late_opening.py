"""A run whose selected branch opens late: cut anywhere it goes on the same, and its checkpoints are read as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from training_harness import evaluate_here, metrics, printed_here, rewind, snapshot, tiny_config, train_here

from nsa_cp.testing import DistributedPool
from nsa_cp.training.config import TrainSection
from nsa_cp.training.errors import UserError
from nsa_cp.training.loop import evaluate
from nsa_cp.training.plan import prepare

pytestmark = pytest.mark.distributed

Workers = Callable[[int], DistributedPool]
COLUMNS = ("step", "loss", "grad_norm", "val_loss", "gate_compressed", "gate_selected", "gate_window")
LATE = ("train.selected_from_step=2", "train.checkpoint_interval=1")


def test_closed_up_to_and_with_the_step() -> None:
    late, never = TrainSection(selected_from_step=2), TrainSection()
    assert [late.selected_is_closed(step) for step in range(5)] == [True, True, True, False, False]
    assert not any(never.selected_is_closed(step) for step in range(5))


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ["train.dtype=bf16"]),
        (2, ["train.dtype=bf16", "parallel.distributed_optimizer=true"]),
        (2, ["parallel.tensor=2", "nsa.gate=branch", "train.recompute=full"]),
        (2, ["model.num_layers=4", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.layer_pattern=[full, nsa]"]),
    ],
    ids=["one-bf16", "dp2-bf16-distributed-optimizer", "tp2-branch-recompute", "pp2-vpp2"],
)
def test_a_cut_run_opens_as_the_uncut_one(tmp_path: Path, workers: Workers, world: int, overrides: list[str]) -> None:
    config = tiny_config(tmp_path, *LATE, *overrides)
    said = workers(world).run(printed_here, config, "selected branch")
    assert said == [["selected branch opened after step 2, with the window's keys and values"], *[[]] * (world - 1)]
    uncut = metrics(config, *COLUMNS)
    assert [row[5] > 0 for row in uncut] == [False, False, True, True]
    # Several processes are cut where it matters.
    for step, lines in ((1, 1), (2, 1), (3, 0)) if world == 1 else ((2, 1),):
        rewind(config, step)
        assert len(workers(world).run(printed_here, config, "selected branch", resume=True)[0]) == lines
        assert metrics(config, *COLUMNS) == uncut, step


def test_it_is_another_run_than_one_that_is_open_from_the_start(tmp_path: Path, workers: Workers) -> None:
    late, early = tiny_config(tmp_path, "name=late", *LATE), tiny_config(tmp_path, "name=early")
    for config in (late, early):
        workers(1).run(train_here, config)
    assert all(row[1] != other[1] for row, other in zip(metrics(late, *COLUMNS), metrics(early, *COLUMNS), strict=True))


def test_shared_keys_and_values_open_too(tmp_path: Path, workers: Workers) -> None:
    config = tiny_config(tmp_path, *LATE, "nsa.shared_kv=true")
    assert workers(1).run(printed_here, config, "selected branch") == [["selected branch opened after step 2"]]
    assert [row[5] > 0 for row in metrics(config, *COLUMNS)] == [False, False, True, True]


def test_evaluation_knows_whether_it_was_closed(tmp_path: Path, workers: Workers) -> None:
    config = tiny_config(tmp_path, *LATE)
    workers(1).run(train_here, config)
    by_step = {row[0]: row[3] for row in metrics(config, *COLUMNS)}
    for step in (2, 4):
        assert workers(1).run(evaluate_here, config, step) == [by_step[step]]
    with pytest.raises(UserError, match="step 2 was written with train.selected_from_step = 2, its selected branch closed"):
        evaluate(tiny_config(tmp_path), config.run_dir / "checkpoints" / "step_00000002")
    # The same weights with the branch open are another model: a manifest of before there was the setting reads as open.
    path = config.run_dir / "checkpoints" / "step_00000002" / "nsa_cp_manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["selected_from_step"]
    path.write_text(json.dumps(manifest))
    [opened] = workers(1).run(evaluate_here, tiny_config(tmp_path), 2)
    assert abs(opened - by_step[2]) > 1e-6


def test_a_run_that_ends_closed_is_opened_by_resuming(tmp_path: Path, workers: Workers) -> None:
    """Nobody need know the step beforehand: closed to the end, then resumed with the end as the step."""
    config = tiny_config(tmp_path, "train.selected_from_step=4")
    [summary] = workers(1).run(train_here, config)
    assert [row[5] for row in metrics(config, *COLUMNS)] == [0, 0, 0, 0]
    [again] = workers(1).run(train_here, config, resume=True)
    assert again["val_loss"] == summary["val_loss"], "a finished run that is resumed stays closed"
    rewind(config, 2)
    before = snapshot(config.run_dir)
    for wrong, pattern in ((0, "use 4, or 2 to open it now"), (1, "its selected branch closed, but with 1 it would be open")):
        with pytest.raises(UserError, match=pattern):
            prepare(tiny_config(tmp_path, f"train.selected_from_step={wrong}"), resume=True)
    assert snapshot(config.run_dir) == before
    workers(1).run(train_here, tiny_config(tmp_path, "train.selected_from_step=2"), resume=True)
    assert [row[5] > 0 for row in metrics(config, *COLUMNS)] == [False, False, True, True]
    with pytest.raises(UserError, match="its selected branch open, but with 4 it would be closed there; use 2$"):
        prepare(tiny_config(tmp_path, "train.selected_from_step=4"), resume=True)
