"""Rotary position embedding of rows at given positions: one pass over the channels, without tables of cosines and sines.

The backward of a rotation is the rotation by the opposite angle, so one kernel serves both.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..common import channels_last

# Elements of x that a program handles at a time; the angles of its tokens are formed once for all heads.
_TILE_ELEMENTS = 4096
_FULL_TURN = tl.constexpr(2 * math.pi)


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_kernel(
    x_ptr, position_ptr, turns_ptr, out_ptr, x_stride_t, x_stride_h, num_tokens, sign,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, REST: tl.constexpr,
    PADDED_REST: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: all heads of TOKENS tokens. Channels (c, c + HALF) turn, the last REST pass through."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    pair = tl.arange(0, PADDED_HALF)
    # Turns in float64, of which only the fraction counts: at a position of a million float32 would be off by a hundredth.
    turns = tl.load(position_ptr + token, mask=exists, other=0).to(tl.float64)[:, None] * tl.load(
        turns_ptr + pair, mask=pair < HALF, other=0.0
    )
    angle = (turns - tl.floor(turns)).to(tl.float32) * _FULL_TURN
    cos, sin = tl.cos(angle), tl.sin(angle) * sign
    keep = exists[:, None] & (pair < HALF)[None, :]
    rest = tl.arange(0, PADDED_REST)
    keep_rest = exists[:, None] & (rest < REST)[None, :]
    # Pointers move on from head to head: a product of head and stride would be one of 32 bits.
    source, target = x_ptr + token[:, None] * x_stride_t, out_ptr + token[:, None] * HEADS * WIDTH
    for _ in range(HEADS):
        first = tl.load(source + pair[None, :], mask=keep, other=0.0).to(tl.float32)
        second = tl.load(source + HALF + pair[None, :], mask=keep, other=0.0).to(tl.float32)
        tl.store(target + pair[None, :], (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=keep)
        tl.store(target + HALF + pair[None, :], (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=keep)
        if REST > 0:
            value = tl.load(source + 2 * HALF + rest[None, :], mask=keep_rest, other=0.0)
            tl.store(target + 2 * HALF + rest[None, :], value, mask=keep_rest)
        source += x_stride_h
        target += WIDTH


@lru_cache(maxsize=None)  # some hundred bytes each, which a captured CUDA graph goes on reading
def turns_per_position(base: float, dim: int, device: torch.device) -> torch.Tensor:
    """Full turns that each channel pair makes from one position to the next, float64 [dim / 2]: ``base^(-2c / dim) / (2 pi)``."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return (base**-exponents / (2 * math.pi)).to(device)


def rotate(x: torch.Tensor, position: torch.Tensor, base: float, dim: int, *, back: bool = False) -> torch.Tensor:
    """Rotate channel pairs (c, c + dim/2) of ``x`` by ``position * base^(-2c/dim)`` radians, in float32.

    Args:
        x: [T, heads, D], any strides. position: integer [T].
        base: theta.
        dim: number of channels that rotate, even, from 2 to D; the others pass through.
        back: rotate by the opposite angle, as the backward does.

    Returns:
        [T, heads, D] in the dtype of x, contiguous.
    """
    tokens, heads, width = x.shape
    out = torch.empty(tokens, heads, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = channels_last(x)
    half, rest = dim // 2, width - dim
    padded, padded_rest = triton.next_power_of_2(half), triton.next_power_of_2(max(1, rest))
    at_once = max(1, _TILE_ELEMENTS // max(2 * padded, padded_rest))
    rotate_kernel[(triton.cdiv(tokens, at_once),)](
        x, position, turns_per_position(base, dim, x.device), out, *x.stride()[:2], tokens, -1.0 if back else 1.0,
        HEADS=heads, WIDTH=width, HALF=half, PADDED_HALF=padded, REST=rest, PADDED_REST=padded_rest, TOKENS=at_once, num_warps=4,
    )  # fmt: skip
    return out
