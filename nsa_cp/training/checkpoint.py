"""Checkpoints: written whole or not at all, checked before anything is read, readable on any parallel layout.

A checkpoint is a folder ``checkpoints/step_XXXXXXXX`` in Megatron-Core's distributed format with one file more, MANIFEST: what
the weights' shapes depend on, how far training was, and the size of every file. It is written under a temporary name, renamed
when complete, and only then named in ``checkpoints/latest``; so what ``latest`` names is whole, and a crash costs the newest one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nsa_cp.training.config import RunConfig, TrainSection
from nsa_cp.training.errors import UserError

MANIFEST = "nsa_cp_manifest.json"
LATEST = "latest"
_FORMAT, _VERSION = "nsa_cp checkpoint", 1
_TEMPORARY = ".incomplete-"
_STATES = {True: "closed", False: "open"}
# The only format in which DistributedOptimizer's state can be read on another data-parallel size.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:08d}"


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
    path = folder / pointer.read_text(encoding="utf-8").strip()
    if path.parent != folder or not path.is_dir():
        others = ", ".join(sorted(item.name for item in folder.glob("step_*"))) or "none"
        raise UserError(
            f"{pointer} names {path.name}, which is not there; write one of the existing checkpoints ({others}) into it"
        )
    return path


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there in full.

    Raises:
        UserError: not a checkpoint of this trainer, or some file of it is missing or has the wrong size.
    """
    file = path / MANIFEST
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist; give the folder of a checkpoint")
    if not file.is_file():
        raise UserError(f"{path} is not a checkpoint of nsa-cp: it has no {MANIFEST}; resume from one that nsa-cp train wrote")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"checkpoint {path} is damaged: {MANIFEST} is not valid JSON; resume from another checkpoint") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of nsa-cp: {MANIFEST} has another format; resume from one that nsa-cp train wrote"
        )
    if manifest.get("version") != _VERSION:
        raise UserError(
            f"checkpoint {path} has version {manifest.get('version')}, and this nsa-cp reads version {_VERSION}; "
            f"use the nsa-cp that wrote it"
        )
    for name, size in manifest["files"].items():
        part = path / name
        found = part.stat().st_size if part.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise UserError(
                f"checkpoint {path} is truncated: {name} {what} where {size} bytes were written; resume from another checkpoint"
            )
    return manifest


def check_compatible(manifest: dict[str, Any], config: RunConfig, path: Path, *, same_data: bool) -> None:
    """Refuse a checkpoint whose weights or optimizer state do not fit the run.

    Args:
        same_data: also refuse another order of the data, on which a resumed run would repeat text, skip it, or train on what
            was held out. Paths may change, since data moves.

    Raises:
        UserError: naming all settings that differ, with both values.
    """
    pairs = list(_shape_pairs(manifest["model"], config.model_shape()))
    pairs += [(key, manifest["optimizer"].get(key), value) for key, value in _optimizer_kind(config).items()]
    if same_data:
        names = ("kind", "sequence_length", "validation_fraction")
        pairs.append(("seed", manifest["seed"], config.seed))
        pairs += [(f"data.{name}", manifest["data"].get(name), getattr(config.data, name)) for name in names]
    _refuse_differences([pair for pair in pairs if pair[1] != pair[2]], path)
    if manifest["step"] > config.train.steps:
        raise UserError(
            f"checkpoint {path} is at step {manifest['step']}, beyond train.steps = {config.train.steps}; "
            f"raise train.steps to go on"
        )
    _check_selected_branch(manifest, config, path)


def _shape_pairs(saved: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What both model shapes have: a setting that only one has (of a compressor, of NSA) goes with one that differs."""
    for key, value in wanted.items():
        if key in saved and key != "layer_pattern":
            yield f"model shape {key}", saved[key], value
    pairs = zip(saved["layer_pattern"], wanted["layer_pattern"], strict=False)
    if any(a != b for a, b in pairs):
        yield "model shape layer_pattern", saved["layer_pattern"], wanted["layer_pattern"]


def _refuse_differences(differing: Sequence[tuple[str, Any, Any]], path: Path) -> None:
    if not differing:
        return
    written = ", ".join(f"{name} = {saved}" for name, saved, _ in differing)
    alone = len(differing) == 1
    given = differing[0][2] if alone else ", ".join(f"{name} = {wanted}" for name, _, wanted in differing)
    raise UserError(
        f"checkpoint {path} was written with {written}, but the configuration has {given}; "
        f"resume with {differing[0][1] if alone else 'the former'}, or give the run another name to start afresh"
    )


def _check_selected_branch(manifest: dict[str, Any], config: RunConfig, path: Path) -> None:
    """Weights do not tell whether the selected branch is closed: the settings must agree on it at the checkpoint's step."""
    step, saved, wanted = manifest["step"], manifest.get("selected_from_step", 0), config.train.selected_from_step
    was_closed, now = (train.selected_is_closed(step) for train in (TrainSection(selected_from_step=saved), config.train))
    if was_closed != now:
        raise UserError(
            f"checkpoint {path} of step {step} was written with train.selected_from_step = {saved}, its selected branch "
            f"{_STATES[was_closed]}, but with {wanted} it would be {_STATES[now]} there; use {saved}"
            + (f", or {step} to open it now" if was_closed else "")
        )


def _optimizer_kind(config: RunConfig) -> dict[str, Any]:
    return {"train.dtype": config.train.dtype, "parallel.distributed_optimizer": config.parallel.distributed_optimizer}


def save_checkpoint(
    folder: Path, chunks: Sequence[torch.nn.Module], optimizer: Any, *, config: RunConfig, step: int, consumed_samples: int
) -> Path:
    """Write ``folder/step_XXXXXXXX`` and point ``folder/latest`` at it. Collective: every process calls it.

    Args:
        folder: the run's checkpoints folder, on storage that all processes share.
        chunks: this process's model chunks, not wrapped.
        optimizer: Megatron's optimizer, after at least one step.
        config: the run.
        step: optimizer steps done.
        consumed_samples: training sequences used so far: the position in the data.

    Returns:
        The checkpoint's folder.
    """
    final, temporary = folder / checkpoint_name(step), folder / (_TEMPORARY + checkpoint_name(step))
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(_TEMPORARY + "*"):
            shutil.rmtree(stale)
        temporary.mkdir()
    dist.barrier()
    with _signals_held_back():
        dist_checkpointing.save(_sharded_state(chunks, optimizer, with_rng=True), str(temporary))
        if dist.get_rank() == 0:
            manifest = {
                "format": _FORMAT,
                "version": _VERSION,
                "step": step,
                "consumed_samples": consumed_samples,
                "model": config.model_shape(),
                "optimizer": _optimizer_kind(config),
                "parallel": {**config.parallel.model_dump(mode="json"), "world_size": dist.get_world_size()},
                "seed": config.seed,
                "selected_from_step": config.train.selected_from_step,
                "data": config.data.model_dump(mode="json"),
                "files": {
                    str(item.relative_to(temporary)): item.stat().st_size
                    for item in sorted(temporary.rglob("*"))
                    if item.is_file()
                },
            }
            _publish(temporary, final, manifest, keep=config.train.keep_checkpoints)
        dist.barrier()
    return final


def _publish(temporary: Path, final: Path, manifest: dict[str, Any], *, keep: int) -> None:
    """Complete the folder, rename it, and only then point ``latest`` at it and drop what is too old."""
    folder = final.parent
    _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1))
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    _write_durably(folder / (LATEST + ".new"), final.name + "\n")
    os.replace(folder / (LATEST + ".new"), folder / LATEST)
    # Later ones belong to a branch that was left by resuming from an older checkpoint; they do not count.
    for old in sorted(item for item in folder.glob("step_*") if item.name <= final.name)[:-keep]:
        shutil.rmtree(old)


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def load_checkpoint(path: Path, chunks: Sequence[torch.nn.Module], optimizer: Any | None, *, manifest: dict[str, Any]) -> None:
    """Read a checkpoint into a model and, unless it is None, its optimizer. Collective: every process calls it.

    The parallel layout may differ from the one that wrote it. Random-number states are restored on the same number of processes.

    Args:
        path: the checkpoint's folder.
        chunks: this process's model chunks, not wrapped.
        optimizer: Megatron's optimizer, or None for the weights alone.
        manifest: what ``read_manifest`` returned for ``path``.
    """
    same_world = manifest["parallel"]["world_size"] == dist.get_world_size()
    if optimizer is not None:
        _give_adam_its_state(optimizer)
    state = _sharded_state(chunks, optimizer, with_rng=same_world and optimizer is not None, is_loading=True)
    loaded = dist_checkpointing.load(state, str(path))
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"])
    if optimizer is None:
        return
    _load_optimizer(optimizer, loaded["optimizer"])
    if "rng" in loaded:
        _set_rng_state(loaded["rng"])


def _sharded_state(
    chunks: Sequence[torch.nn.Module], optimizer: Any | None, *, with_rng: bool, is_loading: bool = False
) -> dict[str, Any]:
    metadata = dict(_METADATA)  # Megatron adds process groups to it, which do not outlive them
    state: dict[str, Any] = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
    if optimizer is not None:
        # The chunks' keys carry global layer numbers, so one flat mapping is unambiguous.
        weights = {f"{name}.{key}": value for name, chunk in state.items() for key, value in chunk.items()}
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    if with_rng:
        state["rng"] = ShardedObject("rng_state", _rng_state(), (dist.get_world_size(),), (dist.get_rank(),))
    return state


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [part for part in inner if isinstance(part, torch.optim.AdamW)]


def _give_adam_its_state(optimizer: Any) -> None:
    """PyTorch's AdamW has no state before its first step, and DistributedOptimizer cannot describe an empty one for loading."""
    for adam in _torch_optimizers(optimizer):
        for group in adam.param_groups:
            for param in group["params"]:
                state = adam.state[param]
                state.setdefault("step", torch.tensor(0.0))
                for key in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(key, torch.zeros_like(param))


def _load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a Megatron optimizer whose inner optimizer may be PyTorch's AdamW.

    DistributedOptimizer then fails on AdamW's step counters, which it saves once and not for each parameter, and leaves all
    parameters with one shared counter, which AdamW would advance once for each of them. So its parameter state is loaded
    apart, without the counters, and every parameter gets a counter of its own.
    """
    adams = _torch_optimizers(optimizer)
    part = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    sharded = state.pop("param_state", None) if adams and isinstance(part, DistributedOptimizer) else None
    with torch.no_grad():
        optimizer.load_state_dict(state)
        steps = [(each, each.pop("step")) for adam in adams for each in adam.state.values() if "step" in each]
        if sharded is not None:
            part.load_parameter_state_from_fully_reshardable(sharded)
    for each, step in steps:
        each["step"] = step.clone()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Hold back SIGTERM and SIGINT while a checkpoint is written.

    A job manager signals the whole process group, so the processes that Megatron starts for writing would die of it, and the save
    would hang. The mask is inherited by them; this process gets its signal afterwards.
    """
    resource_tracker.ensure_running()  # its start would lift the mask again
    held = {signal.SIGTERM, signal.SIGINT}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
