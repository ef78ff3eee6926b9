"""What the kernels of all stages share: tiles of query rows, head widths that are no power of two, and helpers of the launchers.

A query tile is ``TOKENS`` adjacent tokens times the ``HEADS`` query heads of one K/V group, flattened to at most ``ROWS`` rows
(row r is token r // HEADS, head r % HEADS). Rows past the end repeat the last token, so that loads need no mask; stores do.

A head of width D is held in two column parts, a power of two (``head``) and, where that saves work, a smaller one (``tail``):
192 is 128 + 64, 96 is 64 + 32. Widths that still do not fit are padded with zero columns.

Addresses are 64-bit everywhere: 256k tokens x 64 heads x 128 channels exceed 2^31 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INT_MAX = tl.constexpr(2147483647)

# How float32 tiles are multiplied (16-bit ones leave no choice): by three tensor-core products that together keep float32's
# accuracy to a few roundings. Plain float32 arithmetic, "ieee", takes several times as long to compile and to run.
FLOAT32_PRODUCTS = "tf32x3"


def split_width(width: int) -> tuple[int, int]:
    """Power-of-two column counts ``(head, tail)`` that cover ``width`` columns; tail is 0 or at least 16.

    A matrix product needs at least 16 columns. ``head + tail`` exceeds ``width`` only where no such pair is exact.
    """
    head = max(16, 1 << (width.bit_length() - 1))
    if head >= width:
        return head, 0
    tail = max(16, triton.next_power_of_2(width - head))
    return (head, tail) if tail < head else (2 * head, 0)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied only if its last dimension is not contiguous; kernels handle all other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def copies_in_bulk(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine (compute capability 9 and later) can fetch tiles of all these: bases and rows are 16-byte aligned.

    False if any tensor is empty, since it has no tiles to describe.
    """
    return all(
        x.is_cuda
        and x.numel() > 0
        and torch.cuda.get_device_capability(x.device)[0] >= 9
        and x.data_ptr() % 16 == 0
        and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:2])
        for x in tensors
    )


def bulk_tiles(x: torch.Tensor, rows: int, heads: int, split: tuple[int, int], bulk: bool) -> tuple[object, object]:
    """Descriptors of tiles ``rows x heads`` of ``x`` [R, heads, D], for both column parts; ``x`` itself if not ``bulk``.

    Columns past D read as 0. Without a tail the second descriptor is a placeholder that nothing reads.
    """
    if not bulk:
        return x, x
    head, tail = (TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, heads, part or split[0]]) for part in split)
    return head, tail


def key_arguments(k: torch.Tensor, v: torch.Tensor, keys: int, bulk: bool) -> tuple[object, ...]:
    """Arguments of kernels that walk key tiles, for k [M, G, Dk] and v [M, G, Dv]: both, and the descriptors of their tiles."""
    k_tiles = bulk_tiles(k, keys, 1, split_width(k.shape[2]), bulk)
    return k, v, *k_tiles, *bulk_tiles(v, keys, 1, split_width(v.shape[2]), bulk)


def widths(groups: int, heads: int, dk: int, dv: int) -> dict[str, object]:
    """Compile-time arguments that all attention kernels take: counts of groups and heads, and head widths by column part."""
    (dk_head, dk_tail), (dv_head, dv_tail) = split_width(dk), split_width(dv)
    return dict(
        GROUPS=groups, HEADS=heads, DK=dk, DK_HEAD=dk_head, DK_TAIL=dk_tail, DV=dv, DV_HEAD=dv_head, DV_TAIL=dv_tail,
        PRECISION=FLOAT32_PRODUCTS,
    )  # fmt: skip


def check_heads(num_heads: int, num_groups: int) -> int:
    """Number of query heads of one K/V group.

    Raises:
        ValueError: the heads do not divide over the groups.
    """
    if num_groups < 1 or num_heads % num_groups:
        raise ValueError(f"{num_heads} query heads do not divide over {num_groups} K/V groups")
    return num_heads // num_groups


@triton.jit
def this_query_tile(num_tokens, TOKENS: tl.constexpr):
    """Query tile and group of this program: group after group, so that one group's keys and values stay in the cache, and
    within a group late tiles, which see most, first."""
    tiles = tl.cdiv(num_tokens, TOKENS)
    return tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles


@triton.jit
def tile_rows(tile, group, num_tokens, HEADS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Token and head of every row of a query tile, and whether the row exists (others repeat the last token)."""
    row = tl.arange(0, ROWS)
    wanted = tile * TOKENS + row // HEADS
    token = tl.minimum(tl.minimum(wanted, tile * TOKENS + TOKENS - 1), num_tokens - 1)
    head = (group * HEADS + row % HEADS).to(tl.int64)
    return token, head, wanted == token


@triton.jit
def load_tile(base, offsets, keep, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Columns FIRST .. FIRST + COLUMNS of the rows at ``base + offsets``; 0 past WIDTH and, if MASKED, in rows not kept."""
    column = FIRST + tl.arange(0, COLUMNS)
    pointers = base + offsets[:, None] + column[None, :]
    if MASKED:
        if FIRST + COLUMNS > WIDTH:
            tile = tl.load(pointers, mask=keep[:, None] & (column < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=keep[:, None], other=0.0)
    else:
        if FIRST + COLUMNS > WIDTH:
            tile = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def load_wide(base, offsets, keep, HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Both column parts of rows; without a tail the second value is a stand-in that nothing reads."""
    head = load_tile(base, offsets, keep, 0, HEAD, WIDTH, MASKED)
    if TAIL > 0:
        tail = load_tile(base, offsets, keep, HEAD, TAIL, WIDTH, MASKED)
    else:
        tail = 0.0
    return head, tail


@triton.jit
def load_bulk(tiles, tail_tiles, row, head, ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Both column parts of the tile that starts at (row, head), its rows and heads flattened to ROWS, by the copy engine."""
    first = tl.reshape(tiles.load([row, head, 0]), [ROWS, HEAD])
    if TAIL > 0:
        tail = tl.reshape(tail_tiles.load([row, head, HEAD]), [ROWS, TAIL])
    else:
        tail = 0.0
    return first, tail


@triton.jit
def store_tile(base, offsets, keep, tile, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Write the kept rows of a tile at ``base + offsets``, in the element type of ``base``."""
    column = FIRST + tl.arange(0, COLUMNS)
    pointers = base + offsets[:, None] + column[None, :]
    mask = keep[:, None] & (column < WIDTH)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot_wide(a, a_tail, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b^T over both column parts, float32."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if TAIL > 0:
        product = tl.dot(a_tail, tl.trans(b_tail), product, input_precision=PRECISION)
    return product


@triton.jit
def zeros_wide(ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Float32 accumulators of both column parts; without a tail the second is a scalar that nothing changes."""
    head = tl.zeros([ROWS, HEAD], dtype=tl.float32)
    if TAIL > 0:
        tail = tl.zeros([ROWS, TAIL], dtype=tl.float32)
    else:
        tail = 0.0
    return head, tail


@triton.jit
def load_shift(shift_ptr, offsets, keep):
    """Row shifts for the backward, in base 2: +inf, which makes every probability 0, for rows that are not kept."""
    return tl.load(shift_ptr + offsets, mask=keep, other=float("inf")) * LOG2_E
