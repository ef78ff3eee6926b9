"""Compression, forward: phi of l adjacent tokens every d tokens (paper section 3.3.1, equation 7).

The blocks overlap, so they are never copied out: the product of a flattened block with its weights walks the l * D channels
in steps and reads each block's rows in place. The position encoding adds a constant to that product.

All products for compressed tokens are computed here and not by a library that picks its kernel by the number of rows. So a
compressed token has the same bits on every rank and in every split of the sequence, and blocks are chosen alike. (Where another
rank's chunk is shorter than l, ``nsa_cp.ops`` takes the torch path, which promises this only up to rounding.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..common import FLOAT32_PRODUCTS, channels_last

# Tile of the products: compressed tokens, summed channels, output channels.
TILE_BLOCKS, TILE_SUM, TILE_OUT = 64, 64, 64
# Tile of the one row that the position adds to them: summed channels, output channels; few, for many programs.
TILE_BIAS_SUM, TILE_BIAS_OUT = 512, 16


@triton.jit
def block_channels(x_ptr, start, keep, x_stride_m, first, TOTAL: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Channels ``first .. first + COUNT`` of flattened blocks, [blocks, COUNT]; channel c of a block is (row c // D, c % D)."""
    channel = first + tl.arange(0, COUNT)
    offset = (start[:, None] + (channel // WIDTH)[None, :]).to(tl.int64) * x_stride_m + (channel % WIDTH)[None, :]
    return tl.load(x_ptr + offset, mask=keep[:, None] & (channel < TOTAL)[None, :], other=0.0)


@triton.jit
def block_row_means(x_ptr, start, column, keep, x_stride_m, LENGTH: tl.constexpr):
    """Means of the LENGTH rows from ``start`` on, [blocks, columns], float32; 0 where not kept."""
    acc = tl.zeros(keep.shape, dtype=tl.float32)
    for row in tl.range(0, LENGTH):
        offset = (start.to(tl.int64) + row) * x_stride_m
        acc += tl.load(x_ptr + offset[:, None] + column[None, :], mask=keep, other=0.0).to(tl.float32)
    return acc / LENGTH


@triton.jit
def block_product_bias_kernel(
    position_ptr, weight_ptr, bias_ptr, TOTAL: tl.constexpr, OUT: tl.constexpr, TILE_SUM: tl.constexpr, TILE_OUT: tl.constexpr
):
    """bias [G, OUT] = position [G, TOTAL] @ weight [G, TOTAL, OUT], float32: what the position adds to every block's product."""
    tiles = tl.cdiv(OUT, TILE_OUT)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * TILE_OUT + tl.arange(0, TILE_OUT)
    acc = tl.zeros([TILE_SUM, TILE_OUT], dtype=tl.float32)
    for first in tl.range(0, TOTAL, TILE_SUM):
        channel = first + tl.arange(0, TILE_SUM)
        position = tl.load(position_ptr + group * TOTAL + channel, mask=channel < TOTAL, other=0.0).to(tl.float32)
        mask = (channel < TOTAL)[:, None] & (column < OUT)[None, :]
        weight = tl.load(weight_ptr + ((group * TOTAL + channel) * OUT)[:, None] + column[None, :], mask=mask, other=0.0)
        acc += position[:, None] * weight.to(tl.float32)
    tl.store(bias_ptr + group * OUT + column, tl.sum(acc, 0), mask=column < OUT)


@triton.jit(do_not_specialize=["num_blocks"])
def block_product_kernel(
    x_ptr, starts_ptr, weight_ptr, bias_ptr, rows_ptr, out_ptr, activated_ptr,
    x_stride_m, x_stride_g, rows_stride_m, rows_stride_g, num_blocks,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, OUT: tl.constexpr, LENGTH: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_SUM: tl.constexpr, TILE_OUT: tl.constexpr,
    SECOND: tl.constexpr, ACTIVATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [C, G, OUT] = flatten(block) @ weight [G, TOTAL, OUT] + bias [G, OUT]; activated: its silu, in weight's dtype.

    SECOND layer: row c of x stands for block c, and the mean of the LENGTH rows of ``rows`` from starts[c] on for the bias.
    """
    column_tile = tl.program_id(0) % tl.cdiv(OUT, TILE_OUT)
    group = tl.program_id(0) // tl.cdiv(OUT, TILE_OUT) % GROUPS
    block = tl.program_id(0) // (tl.cdiv(OUT, TILE_OUT) * GROUPS) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    column = column_tile * TILE_OUT + tl.arange(0, TILE_OUT)
    keep = block < num_blocks
    start = tl.load(starts_ptr + block, mask=keep, other=0)
    row = block if SECOND else start
    x_ptr += group.to(tl.int64) * x_stride_g
    weight_ptr += group.to(tl.int64) * (TOTAL * OUT)
    acc = tl.zeros([TILE_BLOCKS, TILE_OUT], dtype=tl.float32)
    for first in tl.range(0, TOTAL, TILE_SUM):
        x = block_channels(x_ptr, row, keep, x_stride_m, first, TOTAL, WIDTH, TILE_SUM)
        channel = first + tl.arange(0, TILE_SUM)
        mask = (channel < TOTAL)[:, None] & (column < OUT)[None, :]
        weight = tl.load(weight_ptr + channel[:, None] * OUT + column[None, :], mask=mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    offset = ((block.to(tl.int64) * GROUPS + group) * OUT)[:, None] + column[None, :]
    mask = keep[:, None] & (column < OUT)[None, :]
    if SECOND:
        acc += block_row_means(rows_ptr + group.to(tl.int64) * rows_stride_g, start, column, mask, rows_stride_m, LENGTH)
    else:
        acc += tl.load(bias_ptr + group * OUT + column, mask=column < OUT, other=0.0)[None, :]
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if ACTIVATED:
        tl.store(activated_ptr + offset, (acc * tl.sigmoid(acc)).to(weight_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_blocks"])
def block_mean_kernel(
    x_ptr, starts_ptr, out_ptr, x_stride_m, x_stride_g, num_blocks,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, LENGTH: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """out [C, G, D] = mean of each block's rows."""
    group = tl.program_id(0) % GROUPS
    block = tl.program_id(0) // GROUPS * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    column = tl.arange(0, PADDED)
    keep = (block < num_blocks)[:, None] & (column < WIDTH)[None, :]
    start = tl.load(starts_ptr + block, mask=block < num_blocks, other=0)
    mean = block_row_means(x_ptr + group.to(tl.int64) * x_stride_g, start, column, keep, x_stride_m, LENGTH)
    offset = ((block.to(tl.int64) * GROUPS + group) * WIDTH)[:, None] + column[None, :]
    tl.store(out_ptr + offset, mean.to(out_ptr.dtype.element_ty), mask=keep)


def check_compressor(weights: Sequence[torch.Tensor], block_size: int, groups: int, width: int) -> None:
    """Raises:
    ValueError: weights that are those of no compressor for blocks of this shape.
    """
    shapes = [tuple(w.shape) for w in weights]
    total = block_size * width
    linear = [(groups, block_size, width), (groups, total, width)]
    hidden = shapes[1][-1] if len(shapes) == 3 else 0
    if shapes not in ([], linear, [linear[0], (groups, total, hidden), (groups, hidden, width)]):
        raise ValueError(
            f"weights of shapes {shapes} do not fit blocks of {block_size} tokens, {groups} groups and {width} channels; "
            f"pass none (mean), position and weight {linear} (linear), or position, w1 [G, l*D, F] and w2 [G, F, D] (mlp)"
        )


def position_bias(position: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``flatten(position) @ weight``, float32 [G, F]; position [G, l, D], weight [G, l*D, F], each in its own dtype."""
    groups, total, width = weight.shape
    bias = torch.empty(groups, width, dtype=torch.float32, device=weight.device)
    block_product_bias_kernel[(groups * triton.cdiv(width, TILE_BIAS_OUT),)](
        position.contiguous(), weight.contiguous(), bias,
        TOTAL=total, OUT=width, TILE_SUM=TILE_BIAS_SUM, TILE_OUT=TILE_BIAS_OUT, num_warps=8,
    )  # fmt: skip
    return bias


def block_product(
    x: torch.Tensor,
    starts: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    position: torch.Tensor | None = None,
    activated: torch.Tensor | None = None,
    mean_of: tuple[torch.Tensor, int] | None = None,
) -> None:
    """Write ``flatten(x[starts[c] : starts[c] + l] + position) @ weight`` to ``out``, or with ``mean_of`` the second layer of
    ``mlp``: ``x[c] @ weight`` plus the mean of a block's rows.

    Args:
        x: [M, G, D]; with ``mean_of``, [C, G, D].
        starts: int32 [C], first row of each block.
        weight: [G, l*D, F]; with ``mean_of``, [G, D, F].
        out: [C, G, F], contiguous.
        position: [G, l, D]; None with ``mean_of``.
        activated: [C, G, F] in the dtype of x, to which silu of the result is written, or None.
        mean_of: (rows [M, G, F], l): the mean of ``rows[starts[c] : starts[c] + l]`` is added to row c.
    """
    blocks, groups, out_width = out.shape
    rows, length = (x, 1) if mean_of is None else mean_of
    # Pointers that the kernel does not use may be those of any tensor.
    bias = out if position is None else position_bias(position, weight)
    programs = triton.cdiv(blocks, TILE_BLOCKS) * groups * triton.cdiv(out_width, TILE_OUT)
    block_product_kernel[(programs,)](
        x, starts, weight.to(x.dtype).contiguous(), bias, rows, out, out if activated is None else activated,
        *x.stride()[:2], *rows.stride()[:2], blocks,
        GROUPS=groups, WIDTH=x.shape[-1], TOTAL=weight.shape[1], OUT=out_width, LENGTH=length,
        TILE_BLOCKS=TILE_BLOCKS, TILE_SUM=TILE_SUM, TILE_OUT=TILE_OUT,
        SECOND=mean_of is not None, ACTIVATED=activated is not None, PRECISION=FLOAT32_PRODUCTS, num_warps=4, num_stages=3,
    )  # fmt: skip


def block_mean(x: torch.Tensor, starts: torch.Tensor, block_size: int, out: torch.Tensor) -> None:
    """Write the means of the rows ``x[starts[c] : starts[c] + l]`` to ``out`` [C, G, D], contiguous."""
    blocks, groups, width = out.shape
    tile = 16
    block_mean_kernel[(triton.cdiv(blocks, tile) * groups,)](
        x, starts, out, *x.stride()[:2], blocks,
        GROUPS=groups, WIDTH=width, PADDED=triton.next_power_of_2(width), LENGTH=block_size, TILE_BLOCKS=tile, num_warps=4,
    )  # fmt: skip


def compress_forward(
    x: torch.Tensor, starts: torch.Tensor, weights: Sequence[torch.Tensor], block_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """phi of the blocks ``x[starts[c] : starts[c] + l]``, one phi for each K/V head.

    ``mean`` (no weights): the block mean. ``linear``: ``flatten(x + position) @ weight``. ``mlp``: block mean plus
    ``silu(flatten(x + position) @ w1) @ w2``. Flattening is token-major.

    Args:
        x: [M, G, D], float16, bfloat16 or float32; any strides.
        starts: int32 [C], first row of each block.
        weights: ``()``, ``(position [G, l, D], weight [G, l*D, D])`` or ``(position, w1 [G, l*D, F], w2 [G, F, D])``; products
            are taken in the dtype of x with float32 sums.
        block_size: l, tokens of a block.

    Returns:
        ``out`` [C, G, D] in the dtype of x, not rotated; and for ``mlp`` what its backward needs: the hidden layer before its
        activation, float32 [C, G, F] (None for the others).

    Raises:
        ValueError: weights that do not fit.
    """
    check_compressor(weights, block_size, *x.shape[1:])
    x, blocks = channels_last(x), starts.shape[0]
    out, hidden = torch.empty(blocks, *x.shape[1:], dtype=x.dtype, device=x.device), None
    if len(weights) == 3:
        hidden = torch.empty(blocks, x.shape[1], weights[1].shape[-1], dtype=torch.float32, device=x.device)
    if blocks == 0:
        return out, hidden
    if len(weights) == 0:
        block_mean(x, starts, block_size, out)
    elif hidden is None:
        block_product(x, starts, weights[1], out, position=weights[0])
    else:
        activated = torch.empty(hidden.shape, dtype=x.dtype, device=x.device)
        block_product(x, starts, weights[1], hidden, position=weights[0], activated=activated)
        block_product(activated, starts, weights[2], out, mean_of=(x, block_size))
    return out, hidden
