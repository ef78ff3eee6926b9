"""Lets Megatron-Core run on CPU processes with gloo. Where CUDA is available, nothing here has an effect (unless forced).

Megatron-Core 0.16 refers to CUDA in places that have nothing to do with a kernel. Inside :func:`cpu_compatibility`

- ``torch.cuda.current_device()`` is the CPU device and ``torch.cuda.synchronize()`` does nothing (buffers of tensor and
  pipeline parallelism, gradient buffers);
- the CUDA generator is the CPU generator, so that ``model_parallel_cuda_manual_seed``, Megatron's RNG tracker (dropout that
  differs between tensor-parallel ranks) and activation recompute work, with what they draw on a CPU restored on replay;
- ``device="cuda"`` in factory calls means the CPU, ``pin_memory`` is dropped, ``Tensor.cuda()`` is the identity (schedules,
  gradient clipping, optimizers, checkpoints);
- ``Tensor.type()`` says ``torch.cuda.FloatTensor`` for a CPU tensor, because the optimizers compare that string.

Configurations also need ``use_cpu_initialization=True``; :func:`check_cpu_config` refuses those that would fail.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from megatron.core.transformer import TransformerConfig
from torch.overrides import TorchFunctionMode

_enabled = contextlib.ExitStack()
_depth = 0


@contextlib.contextmanager
def cpu_compatibility(force: bool = False) -> Iterator[None]:
    """Let Megatron-Core build, train, save and load on the CPU inside this context; without effect if CUDA is available.

    Applies to the whole process, except that ``device="cuda"`` is rewritten in calls of this thread only. Contexts may nest.

    Args:
        force: use the CPU even if CUDA is available.
    """
    global _depth
    if (torch.cuda.is_available() and not force) or _depth:
        yield
        return
    tracker_log = logging.getLogger(megatron_random.__name__)
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in _REPLACEMENTS:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        tracker_log.addFilter(_is_not_generator_warning)
        stack.callback(tracker_log.removeFilter, _is_not_generator_warning)
        stack.enter_context(_CudaMeansCpu())
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def enable() -> None:
    """Enter :func:`cpu_compatibility` for the rest of the process. Calling it again does nothing."""
    if not _depth:
        _enabled.enter_context(cpu_compatibility())


def runs_on_cpu() -> bool:
    """Whether Megatron-Core computes on the CPU: there is no CUDA, or :func:`cpu_compatibility` was forced."""
    return _depth > 0 or not torch.cuda.is_available()


def check_cpu_config(config: TransformerConfig) -> None:
    """Refuse settings that fail, or silently go wrong, on the CPU; without effect where CUDA is used.

    Raises:
        ValueError: parameters to be allocated on CUDA, gradient accumulation fusion (a CUDA extension), or an interleaved
            pipeline with batched point-to-point calls, which pairs messages wrongly over gloo.
    """
    if not runs_on_cpu():
        return
    if not config.use_cpu_initialization:
        raise ValueError("use_cpu_initialization = False needs CUDA, and there is none; set it to True")
    if config.gradient_accumulation_fusion:
        raise ValueError("gradient_accumulation_fusion = True needs CUDA, and there is none; set it to False")
    if config.virtual_pipeline_model_parallel_size and config.batch_p2p_comm:
        raise ValueError(
            f"virtual_pipeline_model_parallel_size = {config.virtual_pipeline_model_parallel_size} with batch_p2p_comm = True "
            "gives wrong results over gloo; set overlap_p2p_comm=True and batch_p2p_comm=False"
        )


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of torch calls made while the mode is active."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _names_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _current_device() -> torch.device:
    return torch.device("cpu")


def _synchronize(device: object = None) -> None:
    return None


def _get_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


# (owner, attribute, stand-in) for every CUDA call that has to mean the CPU.
_REPLACEMENTS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (torch.cuda, "current_device", _current_device),
    (torch.cuda, "synchronize", _synchronize),
    (torch.cuda, "get_rng_state", _get_state),
    (torch.cuda, "set_rng_state", _set_state),
    (torch.cuda, "manual_seed", _manual_seed),
    (torch.cuda.random, "get_rng_state", _get_state),
    (torch.cuda.random, "set_rng_state", _set_state),
    (megatron_random, "_get_cuda_rng_state", _get_state),
    (megatron_random, "_set_cuda_rng_state", _set_state),
)


def _is_not_generator_warning(record: logging.LogRecord) -> bool:
    # Megatron's tracker warns if the CPU generator advances while it tracks the CUDA one. Here they are the same generator.
    return "CPU RNG state changed" not in record.getMessage()
