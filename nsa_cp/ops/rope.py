"""Rotary position embedding in the half-split form, with positions given row by row."""

from __future__ import annotations

import torch

from nsa_cp.config import RotaryConfig


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
