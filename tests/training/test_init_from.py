"""A run that begins with the weights of another: on other lengths and layouts, with step, data and optimizer anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_harness import (
    evaluate_here,
    metrics,
    rewind,
    snapshot,
    tiny_config,
    train_from_steps_apart,
    train_here,
)  # fmt: skip

from nsa_cp.testing import DistributedPool
from nsa_cp.training.config import RunConfig
from nsa_cp.training.errors import UserError
from nsa_cp.training.manifest import MANIFEST, changed_settings
from nsa_cp.training.plan import prepare

pytestmark = pytest.mark.distributed

Workers = Callable[[int], DistributedPool]
COLUMNS = ("step", "loss", "grad_norm", "lr", "consumed_samples", "val_loss")
# A step that moves no weight: what is validated after it are the weights that the run began with.
STANDING = ("train.steps=1", "train.lr=1e-12", "train.min_lr=0", "train.weight_decay=0", "train.warmup_steps=0")


def finished(workers: Workers, folder: Path, *overrides: str) -> RunConfig:
    config = tiny_config(folder, "name=short", *overrides)
    workers(1).run(train_here, config)
    return config


@pytest.fixture(scope="module")
def short(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The tiny run, of four steps on 64 tokens."""
    return finished(workers, tmp_path_factory.mktemp("short"))


def longer(folder: Path, init_from: Path, *overrides: str) -> RunConfig:
    return tiny_config(folder, "name=long", f"train.init_from={init_from}", *overrides)


@pytest.mark.parametrize("overrides", [(), ("train.dtype=bf16",)], ids=["fp32", "bf16"])
def test_the_weights_are_the_other_runs(tmp_path: Path, workers: Workers, overrides: tuple[str, ...]) -> None:
    """Also the main weights of bf16, which would otherwise come back with the first step."""
    before = finished(workers, tmp_path, *overrides)
    config = longer(tmp_path, before.run_dir, *STANDING, *overrides)
    workers(1).run(train_here, config)
    ((step, loss, *_, samples, val_loss),) = metrics(config, *COLUMNS)
    assert (step, samples) == (1, 4)
    expected, untrained = metrics(before, *COLUMNS)[-1][-1], metrics(before, *COLUMNS)[0][1]
    assert val_loss == pytest.approx(expected, rel=1e-6)
    assert loss < untrained - 0.05


def test_any_layout_and_length_and_an_older_checkpoint(tmp_path: Path, workers: Workers, short: RunConfig) -> None:
    older = short.run_dir / "checkpoints" / "step_00000002"
    parallel = ("parallel.tensor=2", "parallel.context=2", "parallel.distributed_optimizer=true")
    same_length = longer(tmp_path, older, *STANDING, *parallel, "name=same")
    workers(4).run(train_here, same_length)
    assert metrics(same_length, "val_loss")[0][0] == pytest.approx(metrics(short, "val_loss")[1][0], rel=1e-5)
    longer_sequences = ("data.sequence_length=128", "model.rotary_base=50000", "nsa.num_selected_blocks=6", "seed=7")
    config = longer(tmp_path, older, *parallel, *longer_sequences)
    workers(4).run(train_here, config)
    assert [row[0] for row in metrics(config, "step")] == [1, 2, 3, 4]
    assert metrics(config, "loss")[0][0] < metrics(short, "loss")[0][0] - 0.02


def test_full_attention_becomes_another_kind(tmp_path: Path, workers: Workers) -> None:
    """A window that sees everything is full attention, and a layer that is NSA already stays as it is; NSA, which is neither,
    begins with what the dense model knows."""
    dense = finished(workers, tmp_path, "model.layer_pattern=[full, nsa]", "train.dtype=bf16", "nsa.window_size=64")
    losses, common = {}, ("train.dtype=bf16", "nsa.window_size=64")
    for name, pattern, world, parallel in (
        ("same", "[window, nsa]", 2, ("parallel.distributed_optimizer=true",)),
        ("pipeline", "[window, nsa]", 2, ("parallel.pipeline=2",)),
        ("sparse", "[nsa]", 2, ("parallel.tensor=2",)),
    ):
        overrides = (f"name={name}", f"model.layer_pattern={pattern}", *common, *parallel)
        config = longer(tmp_path, dense.run_dir, *STANDING, *overrides)
        workers(world).run(train_here, config)
        losses[name] = metrics(config, "val_loss")[0][0]
    untrained, expected = metrics(dense, "loss")[0][0], metrics(dense, "val_loss")[-1][0]
    assert losses["same"] == pytest.approx(expected, rel=1e-3) and losses["pipeline"] == pytest.approx(expected, rel=1e-3)
    assert losses["sparse"] == pytest.approx(expected, abs=0.2 * (untrained - expected))
    refuse(longer(tmp_path, tmp_path / "same", "train.dtype=fp32"), "train.dtype = bf16, but the configuration has fp32")


def test_a_dense_model_may_lose_its_window_and_begin_with_the_selected_branch_closed(tmp_path: Path, workers: Workers) -> None:
    dense = finished(workers, tmp_path, "model.layer_pattern=[window, full]", "train.steps=1")
    for overrides in (("nsa.window_size=0",), ("train.selected_from_step=1",)):
        config = longer(tmp_path, dense.run_dir, *STANDING, f"name=of_{overrides[0][-1]}", *overrides)
        workers(1).run(train_here, config)
        assert metrics(config, "val_loss")[0][0] == pytest.approx(metrics(dense, "val_loss")[0][0], rel=0.02)


def test_processes_that_find_different_checkpoints_stop(tmp_path: Path, workers: Workers, short: RunConfig) -> None:
    """As happens if the other run saves another one meanwhile."""
    config = longer(tmp_path, short.run_dir, "parallel.context=2")
    with pytest.raises(UserError, match="different newest checkpoints, step_00000002 and step_00000004, in train.init_from = "):
        workers(2).run(train_from_steps_apart, config)
    assert not config.run_dir.exists()


def test_a_resumed_run_does_without_the_other(tmp_path: Path, workers: Workers, short: RunConfig) -> None:
    source = tmp_path / "source"
    shutil.copytree(short.run_dir, source)
    config = longer(tmp_path, source)
    workers(1).run(train_here, config)
    uncut = metrics(config, *COLUMNS)
    assert uncut[0] != metrics(short, *COLUMNS)[0]
    shutil.rmtree(source)
    assert workers(1).run(evaluate_here, config, 4) == [uncut[3][5]]
    rewind(config, 2)
    workers(1).run(train_here, config, resume=True)
    assert metrics(config, *COLUMNS) == uncut
    begun_with = str(source / "checkpoints" / "step_00000004")
    assert metrics(config, "init_from") == [(begun_with,), (None,), (None,), (None,)]
    assert json.loads((config.run_dir / "summary.json").read_text())["init_from"] == begun_with


def refuse(config: RunConfig, pattern: str, **flags: Any) -> None:
    """Told in one sentence, with every file as it was."""
    before = snapshot(Path(config.runs_dir))
    with pytest.raises(UserError, match=pattern) as caught:
        prepare(config, **flags)
    assert "\n" not in str(caught.value)
    assert snapshot(Path(config.runs_dir)) == before


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("model.hidden_size=48", "hidden_size = 24, but the configuration has 48; begin with 24, or without train.init_from"),
        ("nsa.shared_kv=true", "nsa.shared_kv = False, but the configuration has True; begin with False"),
        ("model.layer_pattern=[full, nsa]", r"layer_pattern = \['nsa', 'nsa'\], but the configuration has \['full', 'nsa'\]"),
        ("train.dtype=bf16", "train.dtype = fp32, but the configuration has bf16; begin with fp32"),
        ("train.selected_from_step=2", "selected branch open, but with train.selected_from_step = 2 .* begins with it closed"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, short: RunConfig, override: str, pattern: str) -> None:
    refuse(longer(tmp_path, short.run_dir, override), pattern)


def test_a_branch_that_is_still_closed_is_opened_by_the_new_run(tmp_path: Path, short: RunConfig) -> None:
    """Its own projections have learned nothing: the new run must open it the way that gives it the window's."""
    source = tmp_path / "source"
    shutil.copytree(short.run_dir, source)
    manifest = source / "checkpoints" / "step_00000004" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "selected_from_step": 4}))
    refuse(longer(tmp_path, source), "selected branch closed, but .* = 0 the run begins with it open; set it to 1 or more")
    assert prepare(longer(tmp_path, source, "train.selected_from_step=1")).initial is not None


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, short: RunConfig) -> None:
    refuse(longer(tmp_path, tmp_path / "nothing"), "train.init_from = .*nothing does not exist; give the folder of a run or")
    (tmp_path / "empty").mkdir()
    refuse(longer(tmp_path, tmp_path / "empty"), "empty is neither a checkpoint .* nor a run with one")
    own = tiny_config(short.runs_dir, "name=short", f"train.init_from={short.run_dir / 'checkpoints' / 'step_00000002'}")
    refuse(own, "step_00000002 is the run .*short itself; go on with --resume, or choose another name=", overwrite=True)
    damaged = tmp_path / "damaged"
    shutil.copytree(short.run_dir, damaged)
    (damaged / "checkpoints" / "step_00000004" / "common.pt").unlink()
    refuse(longer(tmp_path, damaged), "is truncated: common.pt is missing")


def test_other_settings_than_the_checkpoints_are_said(tmp_path: Path, short: RunConfig) -> None:
    plan = prepare(longer(tmp_path, short.run_dir, "model.rotary_percent=0.5", "nsa.num_selected_blocks=5", "train.lr=1e-3"))
    changes = changed_settings(plan.initial[1], plan.config)
    assert changes == ["model.rotary_percent: 1.0 -> 0.5", "nsa.num_selected_blocks: 4 -> 5"]
