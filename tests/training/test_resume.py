"""A run that is cut and resumed is the run that was never cut: bit for bit, on other layouts, after a signal, after a crash."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_harness import (
    close,
    figures_here,
    metrics,
    printed_here,
    rewind,
    snapshot,
    tiny_config,
    train_from_steps_apart,
    train_here,
)  # fmt: skip

from nsa_cp.testing import DistributedPool
from nsa_cp.training import checkpoint
from nsa_cp.training import step as training_step
from nsa_cp.training.config import RunConfig
from nsa_cp.training.errors import UserError
from nsa_cp.training.manifest import MANIFEST, find_latest, read_manifest
from nsa_cp.training.run_folder import RunFolder

pytestmark = pytest.mark.distributed

Workers = Callable[[int], DistributedPool]
COLUMNS = ("step", "loss", "grad_norm", "lr", "consumed_samples", "val_loss")


@pytest.fixture(scope="module")
def one_process(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The curve of the tiny run on one process."""
    config = tiny_config(tmp_path_factory.mktemp("one"))
    workers(1).run(train_here, config)
    return metrics(config, *COLUMNS)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ["train.dtype=bf16"]),
        (2, ["parallel.context=2"]),
        (2, ["parallel.distributed_optimizer=true"]),
        (2, ["parallel.tensor=2", "parallel.sequence_parallel=true", "nsa.compressor=linear", "nsa.gate=branch"]),
    ],
    ids=["one-bf16", "cp2", "dp2-distributed-optimizer", "tp2-sp"],
)
def test_resuming_continues_the_same_curve_bit_for_bit(
    tmp_path: Path, workers: Workers, one_process: list[tuple[Any, ...]], world: int, overrides: list[str]
) -> None:
    config = tiny_config(tmp_path, *overrides)
    workers(world).run(train_here, config)
    uncut = metrics(config, *COLUMNS)
    assert [row[0] for row in uncut] == [1, 2, 3, 4] and uncut[3][5] is not None
    rewind(config, 2)
    workers(world).run(train_here, config, resume=True)
    assert metrics(config, *COLUMNS) == uncut
    if not any(override.startswith(("train.dtype", "nsa.")) for override in overrides):
        close(uncut, one_process, 2e-5)
    assert find_latest(config.run_dir / "checkpoints").name == "step_00000004"


def test_a_checkpoint_of_one_layout_resumes_on_others(tmp_path: Path, workers: Workers) -> None:
    """TP2 x CP2, then CP4, then a single process, each from the other's checkpoint, against one process all the way."""
    alone = tiny_config(tmp_path, "name=alone", "train.steps=6")
    workers(1).run(train_here, alone)
    expected = metrics(alone, *COLUMNS)
    for world, step, overrides in [
        (4, 0, ["parallel.tensor=2", "parallel.context=2"]),
        (4, 2, ["parallel.context=4"]),
        (1, 4, []),
    ]:
        config = tiny_config(tmp_path, "name=moved", "train.steps=6", *overrides)
        if step:
            rewind(config, step)
        workers(world).run(train_here, config, resume=step > 0)
        close(metrics(config, *COLUMNS), expected, 2e-5)


def test_pipeline_checkpoints_resume_without_a_pipeline(tmp_path: Path, workers: Workers) -> None:
    """Interleaved stages with the distributed optimizer; the weights of two stages differ from those of one process."""
    fixed = ["model.num_layers=4", "parallel.distributed_optimizer=true", "model.layer_pattern=[nsa, full]"]
    config = tiny_config(tmp_path, *fixed, "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.context=2")
    workers(4).run(train_here, config)
    uncut = metrics(config, *COLUMNS)
    rewind(config, 2)
    workers(1).run(train_here, tiny_config(tmp_path, *fixed), resume=True)
    close(metrics(config, *COLUMNS), uncut, 2e-5)


def train_until_signal(rank: int, world_size: int, config: RunConfig, at_step: int) -> tuple[bool, str | None]:
    """Train; the last rank alone is sent SIGTERM during step ``at_step``. Returns whether it stopped, and the checkpoint."""
    original = training_step.run_schedule
    calls = 0

    def signalling(trainer: Any, *args: Any, train: bool, **kwargs: Any) -> Any:
        nonlocal calls
        calls += train
        if train and calls == at_step and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *args, train=train, **kwargs)

    training_step.run_schedule = signalling
    try:
        before = signal.getsignal(signal.SIGTERM)
        summary = train_here(rank, world_size, config)
        assert signal.getsignal(signal.SIGTERM) is before, "the handler must be put back"
    finally:
        training_step.run_schedule = original
    return summary is None, find_latest(config.run_dir / "checkpoints").name


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(tmp_path: Path, workers: Workers) -> None:
    uncut = tiny_config(tmp_path, "name=uncut", "parallel.context=2", "train.checkpoint_interval=0")
    workers(2).run(train_here, uncut)
    config = tiny_config(tmp_path, "name=cut", "parallel.context=2", "train.checkpoint_interval=0")
    assert workers(2).run(train_until_signal, config, 3) == [(True, "step_00000003")] * 2
    assert not (config.run_dir / "summary.json").exists()
    assert len(metrics(config, "step")) == 3
    workers(2).run(train_here, config, resume=True)
    assert metrics(config, *COLUMNS) == metrics(uncut, *COLUMNS)
    assert (config.run_dir / "summary.json").exists()


def train_with_failing_save(rank: int, world_size: int, config: RunConfig, written: bool) -> None:
    """Train; the second checkpoint fails half way, as on a full disk, or is ``written`` and then gone on the last process."""
    original = checkpoint.dist_checkpointing.save
    calls = 0

    def failing(state: Any, path: str) -> None:
        nonlocal calls
        calls += 1
        original(state, path)
        if calls < 2:
            return
        if not written:
            raise OSError(28, "No space left on device")
        if rank == world_size - 1:
            file = next(Path(path).glob(f"__{rank}_*"))
            file.unlink()
            file.symlink_to("nowhere")

    checkpoint.dist_checkpointing.save = failing
    try:
        train_here(rank, world_size, config)
    finally:
        checkpoint.dist_checkpointing.save = original


@pytest.mark.parametrize(
    ("world_size", "said"),
    [
        (1, "no space left on the disk while saving .*step_00000004"),
        (2, r"could not be read back: .*No such file.*; the one before is kept: go on with --resume"),
    ],
)
def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path: Path, workers: Workers, world_size: int, said: str) -> None:
    config = tiny_config(tmp_path, f"parallel.context={world_size}")
    with pytest.raises(UserError, match=said) as caught:
        workers(world_size).run(train_with_failing_save, config, world_size == 2)
    assert world_size == 1 or "1 other ranks failed too" in str(caught.value.__cause__)
    folder = config.run_dir / "checkpoints"
    assert find_latest(folder).name == "step_00000002"
    read_manifest(find_latest(folder))
    assert [item.name for item in folder.glob(".incomplete-*")] == [".incomplete-step_00000004"]
    workers(world_size).run(train_here, config, resume=True)
    assert sorted(item.name for item in folder.iterdir()) == ["latest", "step_00000002", "step_00000004"]


def test_processes_that_find_different_checkpoints_stop(tmp_path: Path, workers: Workers) -> None:
    config = tiny_config(tmp_path, "parallel.context=2")
    workers(2).run(train_here, config)
    before = metrics(config, *COLUMNS)
    with pytest.raises(UserError, match="different newest checkpoints, step_00000002 and step_00000004, in .*checkpoints; begin"):
        workers(2).run(train_from_steps_apart, config, resume=True)
    assert metrics(config, *COLUMNS) == before


def test_old_checkpoints_go_and_a_finished_run_can_be_resumed(tmp_path: Path, workers: Workers) -> None:
    config = tiny_config(tmp_path, "train.checkpoint_interval=1", "train.keep_checkpoints=2")
    [summary] = workers(1).run(train_here, config)
    folder = config.run_dir / "checkpoints"
    assert sorted(item.name for item in folder.iterdir()) == ["latest", "step_00000003", "step_00000004"]
    [again] = workers(1).run(train_here, config, resume=True)
    assert again["val_loss"] == summary["val_loss"] and again["tokens"] == summary["tokens"]
    shutil.rmtree(folder)
    [afresh] = workers(1).run(train_here, config, overwrite=True)
    assert afresh["val_loss"] == summary["val_loss"]


def test_a_resume_with_other_settings_says_which_and_keeps_the_file_before(tmp_path: Path) -> None:
    """Twice, and not at all where nothing changed; beginning again removes them."""
    folder, first = RunFolder(tmp_path / "tiny"), tiny_config(tmp_path)
    other = tiny_config(tmp_path, "nsa.num_selected_blocks=3", "train.lr=0.01")
    assert folder.begin(first, overwrite=False) == [] and folder.begin(first, overwrite=False) == []
    assert folder.begin(other, overwrite=False) == [
        f"nsa.num_selected_blocks: {first.nsa.num_selected_blocks} -> 3", f"train.lr: {first.train.lr} -> 0.01"
    ]  # fmt: skip
    assert len(folder.begin(first, overwrite=False)) == 2
    kept = sorted(path.name for path in folder.path.glob("config_before_*.yaml"))
    assert kept == ["config_before_1.yaml", "config_before_2.yaml"]
    assert [(folder.path / name).read_text() for name in kept] == [first.to_yaml(), other.to_yaml()]
    assert folder.config.read_text() == first.to_yaml()
    assert folder.begin(other, overwrite=True) == [] and not list(folder.path.glob("config_before_*.yaml"))
    for broken in ("", "[1", "3"):
        folder.config.write_text(broken)
        assert folder.begin(other, overwrite=False) and folder.config.read_text() == other.to_yaml()


def test_a_resume_with_data_that_has_changed_says_so(tmp_path: Path, workers: Workers) -> None:
    """Not where it has only moved, nor from a checkpoint of before, which has no fingerprint."""
    text, moved = tmp_path / "text.txt", tmp_path / "moved.txt"
    text.write_text("All that is gold does not glitter.\n" * 50)
    fixed = ("data.kind=text", "data.validation_fraction=0.2", "train.global_batch_size=1")
    config = tiny_config(tmp_path / "runs", *fixed, f"data.paths=[{text}]")
    workers(1).run(train_here, config)
    text.rename(moved)
    config = tiny_config(tmp_path / "runs", *fixed, f"data.paths=[{moved}]")
    rewind(config, 2)
    assert workers(1).run(printed_here, config, "content of the data", resume=True) == [[]]
    moved.write_text(moved.read_text().replace("gold", "bold", 1))
    rewind(config, 2)
    ((line,),) = workers(1).run(printed_here, config, "content of the data", resume=True)
    said = r"data: 1750 bytes with hash \w+ -> 1750 bytes with hash \w+, so "
    assert re.search(f"{said}text may come twice or be trained on", line)
    (figures,) = workers(1).run(figures_here, config, 2)
    assert re.search(f"{said}held-out text may have been trained on", "".join(figures["settings_unlike_the_checkpoints"]))
    manifest = config.run_dir / "checkpoints" / "step_00000002" / MANIFEST
    content = json.loads(manifest.read_text())
    del content["fingerprint"]
    manifest.write_text(json.dumps(content))
    rewind(config, 2)
    assert workers(1).run(printed_here, config, "content of the data", resume=True) == [[]]


def train_on_a_text_each(rank: int, world_size: int, runs_dir: Path, texts: list[Path]) -> None:
    train_here(rank, world_size, tiny_config(runs_dir, "parallel.context=2", "data.kind=text", f"data.paths=[{texts[rank]}]"))


def test_processes_that_read_different_data_stop(tmp_path: Path, workers: Workers) -> None:
    """As happens where one machine has an older copy of a file."""
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, word in zip(texts, ("gold", "bold"), strict=True):
        path.write_text(f"All that is {word} does not glitter.\n" * 50)
    found = r"different data, 1750 bytes with hash \w+ and 1750 bytes with hash \w+, under data.paths"
    with pytest.raises(UserError, match=found):
        workers(2).run(train_on_a_text_each, tmp_path / "runs", texts)
    assert not (tmp_path / "runs").exists()


def test_evaluation_wants_no_batch_and_no_steps_and_says_what_differs(tmp_path: Path, workers: Workers) -> None:
    config = tiny_config(tmp_path)
    workers(1).run(train_here, config)
    ((known,), others) = (
        workers(world).run(figures_here, tiny_config(tmp_path, *overrides), 4)
        for world, overrides in ((1, []), (2, ["nsa.num_selected_blocks=3", "train.global_batch_size=1", "train.steps=2"]))
    )
    assert known["val_loss"] == metrics(config, "val_loss")[-1][0] and "settings_unlike_the_checkpoints" not in known
    blocks = config.nsa.num_selected_blocks
    assert [each["settings_unlike_the_checkpoints"] for each in others] == [[f"nsa.num_selected_blocks: {blocks} -> 3"]] * 2
    assert others[0]["val_loss"] != known["val_loss"]
    with pytest.raises(UserError, match="model shape num_layers.*; evaluate with .* or another checkpoint"):
        workers(1).run(figures_here, tiny_config(tmp_path, "model.num_layers=4"), 4)


def test_a_second_process_is_kept_out_while_one_is_at_work(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first, second = RunFolder(tmp_path / "tiny"), RunFolder(tmp_path / "tiny")
    first.begin(config, overwrite=False)
    for overwrite in (False, True):
        before = snapshot(first.path)
        with pytest.raises(UserError, match="another process is at work on run .*tiny; wait for its end, or choose another"):
            second.begin(config, overwrite=overwrite)
        assert snapshot(first.path) == before
    first.close()
    assert second.begin(config, overwrite=False) == []
    second.close()


def test_a_run_that_ended_since_the_first_look_is_not_written_over(tmp_path: Path, workers: Workers) -> None:
    """The first look is without the lock, seconds before the first write: models are built in between."""
    config = tiny_config(tmp_path)
    late = RunFolder(config.run_dir)
    late.check_start(resume=False, overwrite=False)
    workers(1).run(train_here, config)
    before = snapshot(late.path)
    newest, older = late.checkpoints / "step_00000004", late.checkpoints / "step_00000002"
    with pytest.raises(UserError, match="exists; go on with --resume"):
        late.hold(checkpoint=None, overwrite=False)
    with pytest.raises(UserError, match="went on meanwhile, from step_00000002 to step_00000004; start again"):
        late.hold(checkpoint=older, overwrite=False)
    for given, overwrite in ((newest, False), (None, True)):
        late.hold(checkpoint=given, overwrite=overwrite)
    late.close()
    assert snapshot(late.path) == before


def test_evaluation_says_so_if_other_text_is_held_out(tmp_path: Path, workers: Workers) -> None:
    workers(1).run(train_here, tiny_config(tmp_path))
    (found,) = workers(1).run(figures_here, tiny_config(tmp_path, "data.validation_fraction=0.3"), 4)
    assert found["settings_unlike_the_checkpoints"] == [
        "data.validation_fraction: 0.05 -> 0.3, so text may be validated on that was trained on"
    ]


def test_copies_that_a_user_keeps_beside_checkpoints_are_left_alone(tmp_path: Path, workers: Workers) -> None:
    config = tiny_config(tmp_path, "train.keep_checkpoints=1", "train.steps=2", "train.checkpoint_interval=0")
    workers(1).run(train_here, config)
    folder = config.run_dir / "checkpoints"
    shutil.copytree(folder / "step_00000002", folder / "step_00000002_best")
    (folder / "step_00000001.tar.gz").write_text("an archive")
    workers(1).run(train_here, config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})}), True)
    assert sorted(item.name for item in folder.iterdir()) == [
        "latest", "step_00000001.tar.gz", "step_00000002_best", "step_00000003",
    ]  # fmt: skip


def test_lines_that_cannot_be_read_do_not_take_the_others_with_them(tmp_path: Path, workers: Workers) -> None:
    config = tiny_config(tmp_path)
    workers(1).run(train_here, config)
    rows, path = metrics(config, *COLUMNS), config.run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b'{"step": 2, "lo\n', b"\xff\xfe\n", b"{}\n", b"1\n", *lines[2:]]) + b'{"step": 5')
    damaged = path.read_bytes()
    folder = RunFolder(config.run_dir)
    (change,) = folder.begin(config, overwrite=False)
    folder.close()
    assert change.startswith("4 lines of metrics.jsonl cannot be read") and path.read_bytes() == damaged
    assert (config.run_dir / "metrics_damaged_1.jsonl").read_bytes() == damaged
    assert folder.keep_metrics_until(4) > 0 and metrics(config, *COLUMNS) == [rows[0], *rows[2:]]
    again = RunFolder(config.run_dir)
    assert again.begin(config, overwrite=True) == [] and not list(config.run_dir.glob("metrics*"))
    again.close()


@pytest.mark.parametrize(
    ("interval", "advice"), [(0, "and begin again"), (1, "and resume from the last checkpoint, or begin again")]
)
def test_a_run_that_diverges_is_told_to_resume_only_where_there_is_a_checkpoint(
    tmp_path: Path, workers: Workers, interval: int, advice: str
) -> None:
    config = tiny_config(tmp_path, "train.lr=1e30", "train.min_lr=0", f"train.checkpoint_interval={interval}")
    with pytest.raises(UserError, match=rf"at step \d are not finite; lower train.lr = 1e\+30 {advice} with --overwrite"):
        workers(1).run(train_here, config)
    assert (config.run_dir / "checkpoints" / "latest").is_file() == bool(interval)
