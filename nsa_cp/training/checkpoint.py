"""Saves and loads checkpoints: written whole or not at all, and readable on any parallel layout.

A checkpoint is a folder ``checkpoints/step_XXXXXXXX`` in Megatron-Core's distributed format with one more file, its manifest
(``manifest.py``). It is written under a temporary name, renamed when complete, and only then named in ``checkpoints/latest``. So
what ``latest`` names is always whole, and a crash while saving costs only the checkpoint being written.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import traceback
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
from torch.distributed.checkpoint.api import CheckpointException

from nsa_cp.training.config import RunConfig
from nsa_cp.training.errors import UserError
from nsa_cp.training.manifest import LATEST, MANIFEST, SHARDS, checkpoint_name, checkpoints_in, describe
from nsa_cp.training.shards import read_back

_TEMPORARY = ".incomplete-"
# The only format of DistributedOptimizer's state that can be read with another data-parallel size.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}


def save_checkpoint(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    *,
    config: RunConfig,
    step: int,
    consumed_samples: int,
    fingerprint: str,
) -> Path:
    """Write ``folder/step_XXXXXXXX`` and point ``folder/latest`` at it. Collective: every process calls it.

    Args:
        folder: the run's checkpoints folder, on storage that all processes share.
        chunks: this process's model chunks, not wrapped.
        optimizer: Megatron's optimizer, after at least one step.
        config: the run; ``train.keep_checkpoints`` says how many to keep.
        step: optimizer steps done.
        consumed_samples: training sequences used so far, which is the position in the data.
        fingerprint: of the data.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: there is no room on the disk, or what was written cannot be read back; ``latest`` names the checkpoint before.
    """
    final, temporary = folder / checkpoint_name(step), folder / (_TEMPORARY + checkpoint_name(step))
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(_TEMPORARY + "*"):
            shutil.rmtree(stale)
        temporary.mkdir()
    dist.barrier()
    with _signals_held_back(), full_disk_named(final):
        dist_checkpointing.save(_sharded_state(chunks, optimizer, with_rng=True), str(temporary))
        shards = read_back(temporary.glob(f"__{dist.get_rank()}_*{SHARDS}"))
        if dist.get_rank() == 0:
            done = {"step": step, "consumed_samples": consumed_samples, "fingerprint": fingerprint}
            manifest = describe(temporary, config, shards, **done, world_size=dist.get_world_size())
            _publish(temporary, final, manifest, keep=config.train.keep_checkpoints)
        dist.barrier()
    return final


@contextmanager
def full_disk_named(final: Path) -> Iterator[None]:
    """Say in one sentence that the disk is full; Megatron's writers tell it in the traceback of a process of theirs."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        text = "".join(traceback.format_exception(error))
        if not any(os.strerror(code) in text for code in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise UserError(
            f"no space left on the disk while saving {final}; checkpoints before it are whole: make room, and go on with --resume"
        ) from error


def _publish(temporary: Path, final: Path, manifest: dict[str, Any], *, keep: int) -> None:
    """Complete the folder, rename it, only then point ``latest`` at it, and remove all but the newest ``keep`` checkpoints."""
    folder = final.parent
    _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1))
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    _write_durably(folder / (LATEST + ".new"), final.name + "\n")
    os.replace(folder / (LATEST + ".new"), folder / LATEST)
    # Checkpoints of later steps were left by a run that has since resumed from an older one: neither counted nor removed.
    for old in [item for item in checkpoints_in(folder) if item.name <= final.name][:-keep]:
        shutil.rmtree(old)


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def load_checkpoint(path: Path, chunks: Sequence[torch.nn.Module], optimizer: Any | None, *, manifest: dict[str, Any]) -> None:
    """Read a checkpoint into a model and, unless it is None, its optimizer. Collective: every process calls it.

    The parallel layout may differ from the one that wrote it. Random-number states are restored together with the optimizer, and
    only on as many processes as wrote them.

    Args:
        path: the checkpoint's folder; ``check_shards`` has been asked about it.
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
    metadata = dict(_METADATA)  # a copy: Megatron adds process groups to it, which would be stale at the next call
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
    """Give AdamW zeroed state before its first step: DistributedOptimizer cannot describe an empty one for loading."""
    for adam in _torch_optimizers(optimizer):
        for group in adam.param_groups:
            for param in group["params"]:
                state = adam.state[param]
                state.setdefault("step", torch.tensor(0.0))
                for key in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(key, torch.zeros_like(param))


def _load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a Megatron optimizer whose inner optimizer may be PyTorch's AdamW.

    With it DistributedOptimizer fails on AdamW's step counters, which it saves once instead of per parameter; and it leaves all
    parameters with one shared counter, which AdamW would advance once for each of them. So the parameter state is loaded
    separately, without the counters, and then every parameter gets a counter of its own.
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

    A job manager signals the whole process group, so it would kill the processes that Megatron starts for writing, and the save
    would hang. They inherit the mask; this process gets its signal afterwards.
    """
    resource_tracker.ensure_running()  # started later, it would lift the mask again
    held = {signal.SIGTERM, signal.SIGINT}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
