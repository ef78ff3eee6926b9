"""A run that begins with the weights of another: on other lengths and layouts, with step, data and optimizer anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_harness import metrics, rewind, snapshot, tiny_config, train_here

from nsa_cp.testing import DistributedPool
from nsa_cp.training.config import RunConfig
from nsa_cp.training.errors import UserError
from nsa_cp.training.loop import prepare
from nsa_cp.training.manifest import MANIFEST

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
    """A window that sees everything is full attention; NSA, which is not, begins with what the dense model knows."""
    dense = finished(workers, tmp_path, "model.layer_pattern=[full]", "train.dtype=bf16")
    losses = {}
    for kind, world, parallel in (("window", 1, ()), ("nsa", 2, ("parallel.tensor=2",))):
        overrides = (f"name={kind}", f"model.layer_pattern=[{kind}]", "train.dtype=bf16", "nsa.window_size=64", *parallel)
        config = longer(tmp_path, dense.run_dir, *STANDING, *overrides)
        workers(world).run(train_here, config)
        losses[kind] = metrics(config, "val_loss")[0][0]
    untrained, expected = metrics(dense, "loss")[0][0], metrics(dense, "val_loss")[-1][0]
    assert losses["window"] == pytest.approx(expected, rel=1e-3)
    assert losses["nsa"] == pytest.approx(expected, abs=0.2 * (untrained - expected))
    assert prepare(longer(tmp_path, dense.run_dir, "name=later", "train.dtype=bf16", "train.selected_from_step=2")).initial
    refuse(longer(tmp_path, tmp_path / "window", "train.dtype=fp32"), "train.dtype = bf16, but the configuration has fp32")


def test_a_resumed_run_does_without_the_other(tmp_path: Path, workers: Workers, short: RunConfig) -> None:
    source = tmp_path / "source"
    shutil.copytree(short.run_dir, source)
    config = longer(tmp_path, source)
    workers(1).run(train_here, config)
    uncut = metrics(config, *COLUMNS)
    assert uncut[0] != metrics(short, *COLUMNS)[0]
    shutil.rmtree(source)
    rewind(config, 2)
    workers(1).run(train_here, config, resume=True)
    assert metrics(config, *COLUMNS) == uncut


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
    refuse(longer(tmp_path, tmp_path / "nothing"), "nothing is neither a checkpoint .* nor a run with one")
    own = tiny_config(short.runs_dir, "name=short", f"train.init_from={short.run_dir / 'checkpoints' / 'step_00000002'}")
    refuse(own, "step_00000002 is the run .*short itself; go on with --resume, or choose another name=", overwrite=True)
    damaged = tmp_path / "damaged"
    shutil.copytree(short.run_dir, damaged)
    (damaged / "checkpoints" / "step_00000004" / "common.pt").unlink()
    refuse(longer(tmp_path, damaged), "is truncated: common.pt is missing")
