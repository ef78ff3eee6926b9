"""Rotary position embedding in the half-split form, at a given position for each row."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa_cp.config import RotaryConfig
from nsa_cp.context_parallel.autograd import exact_backward, exact_forward
from nsa_cp.ops.dispatch import accumulator_dtype

Rotation = Callable[[torch.Tensor], torch.Tensor]


def rotation(rotary: RotaryConfig | None, position: torch.Tensor, like: torch.Tensor, backend: str) -> Rotation:
    """A differentiable function that rotates tensors [T, heads, D] at the integer positions ``position`` [T].

    The identity without ``rotary``, or if it rotates no channel. Results have the dtype of the input; the arithmetic is in the
    accumulator's dtype.

    Args:
        like: any tensor of the same D, dtype and device as those that will be rotated.
        backend: ``torch`` builds tables of cosines and sines here, once for all calls; ``triton`` forms angles in the kernel.
    """
    if rotary is None or rotary.dim(like.shape[-1]) == 0:
        return lambda x: x
    if backend == "triton":
        return lambda x: _KernelRotate.apply(x, position, rotary)
    tables = rotary_tables(position, rotary, like.shape[-1], accumulator_dtype(like))
    return lambda x: apply_rope(x, *tables)


def rotary_tables(
    positions: torch.Tensor, rotary: RotaryConfig, qk_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T, dim/2] of the angles ``position * base^(-2c/dim)`` for integer ``positions`` [T].

    Angles are formed in float64: at a position of a million float32 would be off by a hundredth of a turn.
    """
    dim = rotary.dim(qk_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.to(torch.float64)[:, None] * rotary.base**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs (c, c + dim/2) of ``x`` [T, heads, D]; channels past ``dim`` pass through.

    Args:
        cos, sin: [T, dim/2]; their dtype is that of the arithmetic, the result has the dtype of ``x``.
    """
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


class _KernelRotate(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx, x, position, rotary: RotaryConfig):  # noqa: ANN001, ANN205
        from nsa_cp.kernels.rotation.rotate import rotate

        ctx.save_for_backward(position)
        ctx.rotary = rotary
        return rotate(x, position, rotary.base, rotary.dim(x.shape[-1]))

    @staticmethod
    @exact_backward
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        from nsa_cp.kernels.rotation.rotate import rotate

        (position,) = ctx.saved_tensors
        return rotate(grad, position, ctx.rotary.base, ctx.rotary.dim(grad.shape[-1]), back=True), None, None
