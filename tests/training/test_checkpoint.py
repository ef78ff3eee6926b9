"""Checkpoints that cannot be used are refused in one sentence, before a model or anything on disk is touched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException
from training_harness import evaluate_here, snapshot, tiny_config, train_here

from nsa_cp.testing import DistributedPool
from nsa_cp.training.checkpoint import full_disk_named
from nsa_cp.training.config import RunConfig
from nsa_cp.training.errors import UserError
from nsa_cp.training.manifest import MANIFEST, changed_settings, check_compatible, find_latest, read_manifest
from nsa_cp.training.plan import prepare
from nsa_cp.training.shards import check_shards

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def finished(workers: Callable[[int], DistributedPool], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_config(tmp_path_factory.mktemp("finished"), "train.steps=2", "train.global_batch_size=1")
    workers(1).run(train_here, config)
    return config


@pytest.fixture
def run(finished: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished.run_dir, tmp_path / "runs" / finished.name)
    return finished.model_copy(update={"runs_dir": str(tmp_path / "runs")})


def refuse(config: RunConfig, pattern: str) -> None:
    """``--resume`` fails with one sentence and leaves every file as it was."""
    before = snapshot(config.run_dir)
    with pytest.raises(UserError, match=pattern) as caught:
        prepare(config, resume=True)
    assert "\n" not in str(caught.value)
    assert snapshot(config.run_dir) == before


def changed(config: RunConfig, *overrides: str) -> RunConfig:
    return tiny_config(config.runs_dir, "train.steps=2", "train.global_batch_size=1", *overrides)


def test_an_intact_checkpoint_is_accepted(run: RunConfig) -> None:
    plan = prepare(run, resume=True)
    assert plan.checkpoint is not None
    path, manifest = plan.checkpoint
    assert path.name == "step_00000002" and manifest["step"] == 2 and manifest["consumed_samples"] == 2
    written = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert set(manifest["files"]) == written - {MANIFEST}


@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", ".metadata", "metadata.json"])
def test_a_truncated_file(run: RunConfig, name: str) -> None:
    file = find_latest(run.run_dir / "checkpoints") / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    refuse(run, f"is truncated: {name} has {size - 1} bytes where {size} bytes were written; use another checkpoint")


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json"])
def test_a_damaged_file(run: RunConfig, name: str) -> None:
    file = find_latest(run.run_dir / "checkpoints") / name
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    refuse(run, f"is damaged: {name} does not hold the bytes that were written; use another checkpoint$")


@pytest.mark.parametrize("world_size", [1, 2])
def test_damaged_weights(run: RunConfig, workers: Callable[[int], DistributedPool], world_size: int) -> None:
    """One bit of a large file: seen when it is read, by all processes, before anything on disk changes."""
    path = find_latest(run.run_dir / "checkpoints")
    shards = _shards_with_checksum(path)
    assert len(shards) > 1
    content = (path / shards[-1]).read_bytes()
    middle = len(content) // 2
    (path / shards[-1]).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    settings = ("train.steps=3", "train.global_batch_size=1", f"parallel.tensor={world_size}")
    longer = tiny_config(run.runs_dir, *settings)
    new = tiny_config(run.runs_dir, *settings, "name=new", f"train.init_from={run.run_dir}")
    before = snapshot(run.run_dir)
    said = f"step_00000002 is damaged: {shards[-1]} does not hold the bytes that were written; use another checkpoint$"
    for attempt, *arguments in ((train_here, longer, True), (train_here, new), (evaluate_here, longer, 2)):
        with pytest.raises(UserError, match=said) as caught:
            workers(world_size).run(attempt, *arguments)
        assert world_size == 1 or "1 other ranks failed too" in str(caught.value.__cause__)
    assert snapshot(run.run_dir) == before and not new.run_dir.exists()
    (path / shards[-1]).write_bytes(content)
    workers(world_size).run(train_here, longer, True)
    assert len(_shards_with_checksum(path.parent / "step_00000003")) > world_size


def test_weights_that_cannot_be_read(tmp_path: Path, workers: Callable[[int], DistributedPool]) -> None:
    (tmp_path / "__0_0.distcp").mkdir()
    with pytest.raises(UserError, match=r"is damaged: __0_0.distcp cannot be read \(Is a directory\); use another checkpoint$"):
        workers(1).run(_check_shards_here, tmp_path, {"crc32": {"__0_0.distcp": 7}})


def _check_shards_here(rank: int, world_size: int, path: Path, manifest: dict) -> None:
    check_shards(path, manifest)


def _shards_with_checksum(checkpoint: Path) -> list[str]:
    """The large files of a checkpoint, each of which has a checksum."""
    shards = sorted(file.name for file in checkpoint.glob("*.distcp"))
    assert shards == sorted(json.loads((checkpoint / MANIFEST).read_text())["crc32"])
    return shards


def test_a_checkpoint_without_hashes_is_accepted(run: RunConfig, workers: Callable[[int], DistributedPool]) -> None:
    """Earlier versions wrote neither hashes nor checksums."""
    file = find_latest(run.run_dir / "checkpoints") / MANIFEST
    content = json.loads(file.read_text())
    del content["sha256"], content["crc32"]
    file.write_text(json.dumps(content))
    del content["settings"]["nsa"]["gate_temperature"]  # nor this setting
    file.write_text(json.dumps(content))
    assert changed_settings(content, run) == []
    assert changed_settings(content, changed(run, "nsa.gate_temperature=2")) == ["nsa.gate_temperature: 1.0 -> 2.0"]
    assert prepare(run, resume=True).checkpoint is not None
    workers(1).run(train_here, tiny_config(run.runs_dir, "train.steps=3", "train.global_batch_size=1"), resume=True)


def test_the_older_checkpoint_that_is_complete_is_named(run: RunConfig) -> None:
    folder = run.run_dir / "checkpoints"
    for name in ("step_00000001", "step_00000000", "step_00000003"):
        shutil.copytree(find_latest(folder), folder / name)
    (find_latest(folder) / "common.pt").unlink()
    remedy = r"beside it has all its files \(--resume takes the one .*checkpoints/latest names\)$"
    refuse(run, f"step_00000002 is truncated: common.pt is missing .*; use another checkpoint; step_00000001 {remedy}")
    (folder / "step_00000001" / ".metadata").write_bytes(b"")
    refuse(run, f"step_00000002 is truncated: common.pt is missing .*; use another checkpoint; step_00000000 {remedy}")


def test_a_missing_file(run: RunConfig) -> None:
    (find_latest(run.run_dir / "checkpoints") / "common.pt").unlink()
    refuse(run, "is truncated: common.pt is missing where")


def test_a_truncated_manifest(run: RunConfig) -> None:
    file = find_latest(run.run_dir / "checkpoints") / MANIFEST
    file.write_bytes(file.read_bytes()[:40])
    refuse(run, "is damaged: .* is not valid JSON")


def test_a_foreign_checkpoint(run: RunConfig) -> None:
    (find_latest(run.run_dir / "checkpoints") / MANIFEST).unlink()
    refuse(run, f"is not a checkpoint of nsa-cp: it has no {MANIFEST}")


@pytest.mark.parametrize("content", [[], {"format": "other"}])
def test_a_foreign_manifest(run: RunConfig, content: object) -> None:
    (find_latest(run.run_dir / "checkpoints") / MANIFEST).write_text(json.dumps(content))
    refuse(run, "has another format")


def test_a_later_version(run: RunConfig) -> None:
    file = find_latest(run.run_dir / "checkpoints") / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    refuse(run, "has version 2, and this nsa-cp reads version 1")


def test_a_dangling_pointer(run: RunConfig) -> None:
    (run.run_dir / "checkpoints" / "latest").write_text("step_00000009\n")
    refuse(run, "names step_00000009, which is not there; write one of the existing checkpoints .step_00000002.")


def test_no_checkpoint(run: RunConfig) -> None:
    shutil.rmtree(run.run_dir / "checkpoints")
    refuse(run, "there is no checkpoint in .* to resume from")


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("model.num_layers=4", "model shape num_layers = 2, but the configuration has 4; resume with 2"),
        ("model.hidden_size=48", "hidden_size = 24, but the configuration has 48"),
        ("model.layer_pattern=[nsa, full]", r"layer_pattern = \['nsa', 'nsa'\], but the configuration has \['nsa', 'full'\]"),
        ("nsa.compressor=mean", "nsa.compressor = mlp, but the configuration has mean"),
        ("nsa.shared_kv=true", "nsa.shared_kv = False, but the configuration has True"),
        ("train.dtype=bf16", "train.dtype = fp32, but the configuration has bf16"),
        ("parallel.distributed_optimizer=true", "parallel.distributed_optimizer = False, but the configuration has True"),
        ("seed=4321", "seed = .*, but the configuration has 4321"),
        ("data.validation_fraction=0.3", "data.validation_fraction = .*, but the configuration has 0.3"),
    ],
)
def test_another_model_or_order_of_data_is_refused_with_both_numbers(run: RunConfig, override: str, pattern: str) -> None:
    refuse(changed(run, override), pattern)


def test_all_settings_that_differ_are_named_at_once(run: RunConfig) -> None:
    both = "model shape hidden_size = {}, model shape nsa.compressor = {}"
    pattern = f"written with {both}, but the configuration has {both}; resume with the former".format(24, "mlp", 48, "mean")
    refuse(changed(run, "model.hidden_size=48", "nsa.compressor=mean"), pattern)
    refuse(changed(run, "nsa.gate=branch", "seed=4321", "train.dtype=bf16"), "nsa.gate = head, train.dtype = fp32, seed = ")


def test_settings_that_the_checkpoint_does_not_have_are_not_named(run: RunConfig) -> None:
    plan = prepare(run, resume=True)
    path, manifest = plan.checkpoint
    shape = {key: value for key, value in manifest["model"].items() if not key.startswith("nsa.")}
    manifest = {**manifest, "model": {**shape, "layer_pattern": ["full", "full"]}}
    pattern = re.escape("model shape layer_pattern = ['full', 'full'], but the configuration has ['nsa', 'nsa']; resume with [")
    with pytest.raises(UserError, match=f"written with {pattern}"):
        check_compatible(manifest, plan.config, path)
    longer = changed(run, "model.num_layers=3", "model.layer_pattern=[full, nsa, nsa]")
    refuse(longer, "num_layers = 2, model shape layer_pattern = .* num_layers = 3, model shape layer_pattern = ")


def test_a_run_shorter_than_its_checkpoint(run: RunConfig) -> None:
    refuse(changed(run, "train.steps=1"), "is at step 2, beyond train.steps = 1; raise train.steps")


def test_an_existing_run_is_not_overwritten_by_accident(run: RunConfig) -> None:
    before = snapshot(run.run_dir)
    with pytest.raises(UserError, match="exists; go on with --resume, begin again with --overwrite, or choose another name="):
        prepare(run)
    with pytest.raises(UserError, match="exclude each other"):
        prepare(run, resume=True, overwrite=True)
    assert snapshot(run.run_dir) == before


def test_the_manifest_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path / "nothing")


@pytest.mark.parametrize("kind", [RuntimeError, CheckpointException])
def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path, kind: type[BaseException]) -> None:
    """As Megatron's writers tell it: in the message of another error, or in a collection of errors."""
    full = "Worker failure: [Errno 28] No space left on device"

    def error(text: str) -> BaseException:
        return kind(text) if kind is RuntimeError else kind(text, {0: (OSError(text), None)})

    with pytest.raises(UserError, match="no space left on the disk while saving .*step_00000004; .*: make room, and go on with"):
        with full_disk_named(tmp_path / "step_00000004"):
            raise error(full)
    with pytest.raises(kind, match="something else"), full_disk_named(tmp_path):
        raise error("something else")
