"""The manifest of a checkpoint, and the checks whether a run may resume from it, evaluate it, or begin with its weights.

The manifest is a JSON file in the checkpoint's folder: the settings that the weights' shapes depend on, how far training had
come, the size of every file, and a hash or a checksum. All functions here are local and only read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nsa_cp.training.config import ModelSection, NSASection, RunConfig, TrainSection, differences
from nsa_cp.training.errors import UserError
from nsa_cp.training.files import expanded

MANIFEST = "nsa_cp_manifest.json"
LATEST = "latest"
CHECKPOINTS = "checkpoints"
_FORMAT, _VERSION = "nsa_cp checkpoint", 1
_STATES = {True: "closed", False: "open"}
SHARDS = ".distcp"  # suffix of files with weights and optimizer state, too large for one process to read (``shards.py``)


class Shard(NamedTuple):
    """A shard's size in bytes and its CRC-32."""

    size: int
    crc32: int


class _Damaged(UserError):
    """A checkpoint is not as it was written. Its message lacks the remedy, which ``read_manifest`` adds."""


def describe(
    path: Path,
    config: RunConfig,
    shards: dict[str, Shard],
    *,
    step: int,
    consumed_samples: int,
    fingerprint: str,
    world_size: int,
) -> dict[str, Any]:
    """The manifest to write into ``path``, a checkpoint whose other files are complete.

    Args:
        path: the checkpoint's folder.
        config: the run.
        shards: by name.
        step: optimizer steps done.
        consumed_samples: training sequences used so far, which is the position in the data.
        fingerprint: of the data.
        world_size: number of processes that wrote it.
    """
    assert {item.name for item in path.glob("*" + SHARDS)} <= shards.keys()
    small = {str(item.relative_to(path)): item for item in sorted(path.rglob("*")) if item.is_file() and item.suffix != SHARDS}
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "step": step,
        "consumed_samples": consumed_samples,
        "train_samples": samples_in_all(config, step, consumed_samples),
        "model": config.model_shape(),
        "optimizer": _optimizer_kind(config),
        "parallel": {**config.parallel.model_dump(mode="json"), "world_size": world_size},
        "seed": config.seed,
        "selected_from_step": config.train.selected_from_step,
        "data": config.data.model_dump(mode="json"),
        "fingerprint": fingerprint,
        "settings": _settings(config),
        "files": {name: item.stat().st_size for name, item in small.items()} | {name: x.size for name, x in shards.items()},
        "sha256": {name: _sha256(item) for name, item in small.items()},
        "crc32": {name: shard.crc32 for name, shard in shards.items()},
    }


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def samples_in_all(config: RunConfig, step: int, consumed_samples: int) -> int:
    """Number of training sequences that a run now at ``step`` will have used at its end."""
    return consumed_samples + (config.train.steps - step) * config.train.global_batch_size


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder of them, by step. Copies and archives that a user keeps there are not among them."""
    return sorted(item for item in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", item.name) and item.is_dir())


def find_latest(folder: Path) -> Path:
    """The checkpoint that ``folder/latest`` names.

    Raises:
        UserError: there is none, or it is gone.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        raise UserError(
            f"there is no checkpoint in {folder} to resume from; begin with --overwrite, or without --resume "
            f"where there is no run yet"
        )
    path = folder / pointer.read_text(encoding="utf-8", errors="replace").strip()
    if path.parent != folder or not path.is_dir():
        others = ", ".join(item.name for item in checkpoints_in(folder)) or "none"
        raise UserError(
            f"{pointer} names {path.name}, which is not there; write one of the existing checkpoints ({others}) into it"
        )
    return path


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check that all its files are there. What shards hold, ``check_shards`` tells.

    Raises:
        UserError: not a checkpoint of this trainer; or one of its files is missing, has the wrong size or (small files only) has
            other content than was written. The message then names an older complete checkpoint beside it, if there is one.
    """
    try:
        return _read(path)
    except _Damaged as error:
        raise UserError(f"{error}; {_remedy(path)}") from error


def damaged(path: Path, fault: str) -> UserError:
    """The error that says what is wrong with the checkpoint ``path``, and what to do."""
    return UserError(f"checkpoint {path} is damaged: {fault}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    """The end of an error message about a checkpoint: names the newest older one in its folder that has all its files."""
    for older in [item for item in reversed(checkpoints_in(path.parent)) if item.name < path.name]:
        with contextlib.suppress(UserError):
            _read(older)
            pointer = path.parent / LATEST
            return f"use another checkpoint; {older.name} beside it has all its files (--resume takes the one {pointer} names)"
    return "use another checkpoint"


def _read(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist; give the folder of a checkpoint")
    if not file.is_file():
        raise UserError(f"{path} is not a checkpoint of nsa-cp: it has no {MANIFEST}; use one that nsa-cp train wrote")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _Damaged(f"checkpoint {path} is damaged: {MANIFEST} is not valid JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise UserError(f"{path} is not a checkpoint of nsa-cp: {MANIFEST} has another format; use one that nsa-cp train wrote")
    if manifest.get("version") != _VERSION:
        raise UserError(
            f"checkpoint {path} has version {manifest.get('version')}, and this nsa-cp reads version {_VERSION}; "
            f"use the nsa-cp that wrote it"
        )
    if not isinstance(manifest.get("files"), dict):
        raise _Damaged(f"checkpoint {path} is damaged: {MANIFEST} lists no files")
    for name, size in manifest["files"].items():
        part = path / name
        found = part.stat().st_size if part.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise _Damaged(f"checkpoint {path} is truncated: {name} {what} where {size} bytes were written")
        written = manifest.get("sha256", {}).get(name)  # none in checkpoints of earlier versions
        if written is not None and _sha256(part) != written:
            raise _Damaged(f"checkpoint {path} is damaged: {name} does not hold the bytes that were written")
    return manifest


def check_compatible(manifest: dict[str, Any], config: RunConfig, path: Path, *, to_resume: bool = True) -> None:
    """Refuse a checkpoint whose weights do not fit the run.

    Args:
        manifest: of the checkpoint in ``path``.
        to_resume: also refuse another optimizer, a step beyond the run's last, and other settings of the data, with which a
            resumed run would repeat or skip text or train on what was held out. Paths may change, because data may move.

    Raises:
        UserError: naming all settings that differ, with both values.
    """
    pairs = list(_shape_pairs(manifest["model"], config.model_shape()))
    if to_resume:
        pairs += [(key, manifest["optimizer"].get(key), value) for key, value in _optimizer_kind(config).items()]
        names = ("kind", "sequence_length", "validation_fraction")
        pairs.append(("seed", manifest["seed"], config.seed))
        pairs += [(f"data.{name}", manifest["data"].get(name), getattr(config.data, name)) for name in names]
    if to_resume:
        _refuse_differences(pairs, path, "resume with", "or give the run another name to start afresh")
    else:
        _refuse_differences(pairs, path, "evaluate with", "or another checkpoint")
    if to_resume and manifest["step"] > config.train.steps:
        raise UserError(
            f"checkpoint {path} is at step {manifest['step']}, beyond train.steps = {config.train.steps}; "
            f"raise train.steps to go on"
        )
    _check_selected_branch(manifest, config, path)


def changed_settings(manifest: dict[str, Any], config: RunConfig) -> list[str]:
    """Settings of the model and its attention in which a run differs from the one that wrote a checkpoint, each with both values.

    Empty for old checkpoints, which do not record them. A setting that did not exist then had what is its default now.
    """
    now = _settings(config)
    saved = manifest.get("settings") or now
    return list(differences({name: {**_DEFAULTS[name], **saved[name]} for name in now}, now))


def find_initial(init_from: str, run_dir: Path) -> Path:
    """The checkpoint that ``train.init_from`` names: a checkpoint's folder itself, or the newest checkpoint of a run's folder.

    Raises:
        UserError: it is neither, or it belongs to the run in ``run_dir`` itself, which may be about to be overwritten.
    """
    given = expanded(init_from)
    if run_dir.resolve() in (given.resolve(), *given.resolve().parents):
        raise UserError(
            f"train.init_from = {init_from} is the run {run_dir} itself; go on with --resume, or choose another name="
        )
    if not given.is_dir():
        raise UserError(f"train.init_from = {init_from} does not exist; give the folder of a run or of a checkpoint")
    if (given / MANIFEST).is_file():
        return given
    if (given / CHECKPOINTS / LATEST).is_file():
        return find_latest(given / CHECKPOINTS)
    raise UserError(
        f"train.init_from = {init_from} is neither a checkpoint ({MANIFEST}) nor a run with one ({CHECKPOINTS}/{LATEST}); "
        f"give the folder of one of the two"
    )


def check_initial(manifest: dict[str, Any], config: RunConfig, path: Path) -> None:
    """Refuse a checkpoint whose weights a new run cannot begin with.

    Step, data and optimizer do not matter, and layers of full or window attention may become another kind
    (``nsa_cp.megatron.copy_dense_weights``).

    Raises:
        UserError: naming all settings that differ, with both values.
    """
    kinds = manifest["model"]["layer_pattern"]
    pairs = list(_shape_pairs(manifest["model"], config.model_shape(), dense_may_change=True))
    pairs.append(("train.dtype", manifest["optimizer"].get("train.dtype"), config.train.dtype))
    _refuse_differences(pairs, path, "begin with", "or without train.init_from")
    was_closed, now = _was_closed(manifest), config.train.selected_is_closed(0)
    if was_closed != now and "nsa" in kinds:
        remedy = "1 or more, the steps after which it opens" if was_closed else "0"
        raise UserError(
            f"checkpoint {path} was written with its selected branch {_STATES[was_closed]}, but with train.selected_from_step = "
            f"{config.train.selected_from_step} the run begins with it {_STATES[now]}; set it to {remedy}"
        )


def _shape_pairs(
    saved: dict[str, Any], wanted: dict[str, Any], *, dense_may_change: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Yield ``(name, saved value, wanted value)`` for the settings that both model shapes have.

    A setting that only one of them has (of a compressor, of NSA) can be left out, because another one then differs, too.

    Args:
        dense_may_change: allow layers that were not ``nsa`` to become any kind.
    """
    for key, value in wanted.items():
        if key in saved and key != "layer_pattern":
            yield f"model shape {key}", saved[key], value
    pairs = zip(saved["layer_pattern"], wanted["layer_pattern"], strict=False)
    if any(a != b and not (dense_may_change and a != "nsa") for a, b in pairs):
        yield "model shape layer_pattern", saved["layer_pattern"], wanted["layer_pattern"]


def _refuse_differences(pairs: Iterable[tuple[str, Any, Any]], path: Path, go_on: str, otherwise: str) -> None:
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    if not differing:
        return
    written = ", ".join(f"{name} = {saved}" for name, saved, _ in differing)
    alone = len(differing) == 1
    given = differing[0][2] if alone else ", ".join(f"{name} = {wanted}" for name, _, wanted in differing)
    raise UserError(
        f"checkpoint {path} was written with {written}, but the configuration has {given}; "
        f"{go_on} {differing[0][1] if alone else 'the former'}, {otherwise}"
    )


def _check_selected_branch(manifest: dict[str, Any], config: RunConfig, path: Path) -> None:
    """Refuse settings that disagree with the checkpoint on whether the selected branch is closed, which weights do not show."""
    step, saved, wanted = manifest["step"], manifest.get("selected_from_step", 0), config.train.selected_from_step
    was_closed, now = _was_closed(manifest), config.train.selected_is_closed(step)
    if was_closed != now:
        raise UserError(
            f"checkpoint {path} of step {step} was written with train.selected_from_step = {saved}, its selected branch "
            f"{_STATES[was_closed]}, but with {wanted} it would be {_STATES[now]} there; use {saved}"
            + (f", or {step} to open it now" if was_closed else "")
        )


def _was_closed(manifest: dict[str, Any]) -> bool:
    return TrainSection(selected_from_step=manifest.get("selected_from_step", 0)).selected_is_closed(manifest["step"])


_DEFAULTS = {"model": ModelSection().model_dump(mode="json"), "nsa": NSASection().model_dump(mode="json")}


def _settings(config: RunConfig) -> dict[str, Any]:
    return {name: getattr(config, name).model_dump(mode="json") for name in ("model", "nsa")}


def _optimizer_kind(config: RunConfig) -> dict[str, Any]:
    return {"train.dtype": config.train.dtype, "parallel.distributed_optimizer": config.parallel.distributed_optimizer}
