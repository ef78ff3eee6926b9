"""Which implementation runs: Triton kernels on CUDA, plain torch anywhere."""

from __future__ import annotations

import importlib.util
import os

import torch

from nsa_cp.config import Backend

# Channels of the widest head for which the kernels have tile sizes.
WIDEST_HEAD = 256

# Most elements of an intermediate (scores, gathered keys) that the torch path makes at once: on a CPU 2 MiB in float32, to stay
# in its caches (docs/kernels.md), elsewhere 64 MiB, because every launch costs time.
CPU_CHUNK, DEVICE_CHUNK = 1 << 19, 1 << 24


def resolve_backend(backend: Backend, *tensors: torch.Tensor) -> str:
    """Which implementation to run, ``"torch"`` or ``"triton"``, for ``tensors`` of one dtype and device, channels last.

    Raises:
        ValueError: an unknown backend, or ``triton`` requested where it cannot run; the message says why.
    """
    if backend == "torch":
        return "torch"
    obstacle = triton_obstacle(*tensors)
    if backend == "auto":
        return "torch" if obstacle else "triton"
    if backend != "triton":
        raise ValueError(f"backend = {backend!r} is unknown; use 'auto', 'torch' or 'triton'")
    if obstacle:
        raise ValueError(f"backend = 'triton' cannot run here: {obstacle}; use backend = 'auto' or 'torch'")
    return "triton"


def triton_obstacle(*tensors: torch.Tensor) -> str | None:
    """Why Triton kernels cannot take ``tensors``, or None."""
    x, width = tensors[0], max(y.shape[-1] for y in tensors)
    if importlib.util.find_spec("nsa_cp.kernels.interval_attention") is None:
        return "this installation has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if x.dtype == torch.float64:
        return "the kernels compute in float32, not float64"
    if width > WIDEST_HEAD:
        return f"heads of {width} channels are wider than {WIDEST_HEAD}"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {x.device.type}, not on a CUDA device"
    if x.device.type != "cuda" and any(y.dtype == torch.bfloat16 for y in tensors):
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


def chunk_elements(x: torch.Tensor) -> int:
    """Most elements of an intermediate that the torch path makes at once on the device of ``x``."""
    return CPU_CHUNK if x.device.type == "cpu" else DEVICE_CHUNK


def accumulator_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32: the dtype of sums, lse and gradients before their final rounding."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
