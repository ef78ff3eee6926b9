"""Compression, forward: phi of l adjacent tokens every d tokens (paper section 3.3.1, equation 7).

The blocks overlap, so they are never laid out: the product of a flattened block with its weights walks the l * D channels
in steps and reads each block's rows where they are. The position encoding adds a constant to that product.

All products of compressed tokens are taken here, none by a library that picks its kernel by the number of rows: a compressed
token has the same bits on every rank and in every split of the sequence, and with it the choice of blocks. (Where a rank's chunk
is shorter than l, ``nsa_cp.ops`` takes the torch path, which promises this only up to rounding.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..common import FLOAT32_PRODUCTS, channels_last

# Tile of the products: compressed tokens, summed channels, output channels.
TILE_BLOCKS, TILE_SUM, TILE_OUT = 64, 64, 64


@triton.jit
def block_channels(x_ptr, start, keep, x_stride_m, first, TOTAL: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Channels ``first .. first + COUNT`` of flattened blocks, [blocks, COUNT]; channel c of a block is (row c // D, c % D)."""
    channel = first + tl.arange(0, COUNT)
    offset = (start[:, None] + (channel // WIDTH)[None, :]).to(tl.int64) * x_stride_m + (channel % WIDTH)[None, :]
    return tl.load(x_ptr + offset, mask=keep[:, None] & (channel < TOTAL)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_blocks"])
def block_product_kernel(
    x_ptr, starts_ptr, weight_ptr, bias_ptr, out_ptr, activated_ptr, x_stride_m, x_stride_g, num_blocks,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, OUT: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_SUM: tl.constexpr, TILE_OUT: tl.constexpr,
    SINGLE_ROWS: tl.constexpr, BIAS: tl.constexpr, ACTIVATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [C, G, OUT] = flatten(block) @ weight [G, TOTAL, OUT] + bias [G, OUT], float32; activated: its silu, in weight's dtype.

    SINGLE_ROWS: block c is row c alone.
    """
    column_tile = tl.program_id(0) % tl.cdiv(OUT, TILE_OUT)
    group = tl.program_id(0) // tl.cdiv(OUT, TILE_OUT) % GROUPS
    block = tl.program_id(0) // (tl.cdiv(OUT, TILE_OUT) * GROUPS) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    column = column_tile * TILE_OUT + tl.arange(0, TILE_OUT)
    keep = block < num_blocks
    if SINGLE_ROWS:
        start = block
    else:
        start = tl.load(starts_ptr + block, mask=keep, other=0)
    x_ptr += group.to(tl.int64) * x_stride_g
    weight_ptr += group.to(tl.int64) * (TOTAL * OUT)
    acc = tl.zeros([TILE_BLOCKS, TILE_OUT], dtype=tl.float32)
    for first in tl.range(0, TOTAL, TILE_SUM):
        x = block_channels(x_ptr, start, keep, x_stride_m, first, TOTAL, WIDTH, TILE_SUM)
        channel = first + tl.arange(0, TILE_SUM)
        mask = (channel < TOTAL)[:, None] & (column < OUT)[None, :]
        weight = tl.load(weight_ptr + channel[:, None] * OUT + column[None, :], mask=mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + group * OUT + column, mask=column < OUT, other=0.0)[None, :]
    offset = ((block.to(tl.int64) * GROUPS + group) * OUT)[:, None] + column[None, :]
    mask = keep[:, None] & (column < OUT)[None, :]
    tl.store(out_ptr + offset, acc, mask=mask)
    if ACTIVATED:
        tl.store(activated_ptr + offset, (acc * tl.sigmoid(acc)).to(weight_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_blocks"])
def block_mean_kernel(
    x_ptr, starts_ptr, added_ptr, out_ptr, x_stride_m, x_stride_g, num_blocks,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, LENGTH: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """out [C, G, D] = mean of each block's rows, plus ``added`` [C, G, D] where there is one."""
    group = tl.program_id(0) % GROUPS
    block = tl.program_id(0) // GROUPS * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    column = tl.arange(0, PADDED)
    keep = (block < num_blocks)[:, None] & (column < WIDTH)[None, :]
    start = tl.load(starts_ptr + block, mask=block < num_blocks, other=0).to(tl.int64)
    x_ptr += group.to(tl.int64) * x_stride_g
    acc = tl.zeros([TILE_BLOCKS, PADDED], dtype=tl.float32)
    for row in tl.range(0, LENGTH):
        acc += tl.load(x_ptr + ((start + row) * x_stride_m)[:, None] + column[None, :], mask=keep, other=0.0).to(tl.float32)
    acc = acc / LENGTH
    offset = ((block.to(tl.int64) * GROUPS + group) * WIDTH)[:, None] + column[None, :]
    if ADDED:
        acc += tl.load(added_ptr + offset, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=keep)


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


def block_product(
    x: torch.Tensor,
    starts: torch.Tensor | None,
    position: torch.Tensor | None,
    weight: torch.Tensor,
    activated: torch.Tensor | None = None,
) -> torch.Tensor:
    """``flatten(x[starts[c] : starts[c] + l] + position) @ weight``, float32.

    Args:
        x: [M, G, D]. starts: int32 [C], None where every row of x is a block. position: [G, l, D], None for zeros.
        weight: [G, l*D, F].
        activated: [C, G, F] in the dtype of x, to which silu of the product is written; None for nothing.

    Returns:
        [C, G, F].
    """
    groups, total, out_width = weight.shape
    blocks = x.shape[0] if starts is None else starts.shape[0]
    out = torch.empty(blocks, groups, out_width, dtype=torch.float32, device=x.device)
    bias = None if position is None else torch.bmm(position.reshape(groups, 1, total).float(), weight.float())
    # Pointers that are not read or written need only be of some tensor.
    programs = triton.cdiv(blocks, TILE_BLOCKS) * groups * triton.cdiv(out_width, TILE_OUT)
    block_product_kernel[(programs,)](
        x, x if starts is None else starts, weight.to(x.dtype).contiguous(), out if bias is None else bias,
        out, out if activated is None else activated, *x.stride()[:2], blocks,
        GROUPS=groups, WIDTH=x.shape[-1], TOTAL=total, OUT=out_width,
        TILE_BLOCKS=TILE_BLOCKS, TILE_SUM=TILE_SUM, TILE_OUT=TILE_OUT, SINGLE_ROWS=starts is None,
        BIAS=bias is not None, ACTIVATED=activated is not None, PRECISION=FLOAT32_PRODUCTS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def block_mean(x: torch.Tensor, starts: torch.Tensor, block_size: int, added: torch.Tensor | None) -> torch.Tensor:
    """Mean of the rows ``x[starts[c] : starts[c] + l]``, plus ``added``; [C, G, D] in the dtype of x."""
    blocks, (groups, width) = starts.shape[0], x.shape[1:]
    out = torch.empty(blocks, groups, width, dtype=x.dtype, device=x.device)
    tile = 16
    block_mean_kernel[(triton.cdiv(blocks, tile) * groups,)](
        x, starts, out if added is None else added, out, *x.stride()[:2], blocks,
        GROUPS=groups, WIDTH=width, PADDED=triton.next_power_of_2(width), LENGTH=block_size,
        TILE_BLOCKS=tile, ADDED=added is not None, num_warps=4,
    )  # fmt: skip
    return out


def compress_forward(
    x: torch.Tensor, starts: torch.Tensor, weights: Sequence[torch.Tensor], block_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """phi of the blocks ``x[starts[c] : starts[c] + l]``, one phi for each K/V head.

    ``mean`` (no weights): the block mean. ``linear``: ``flatten(x + position) @ weight``. ``mlp``: block mean plus
    ``silu(flatten(x + position) @ w1) @ w2``. Flattening is token-major.

    Args:
        x: [M, G, D], float16, bfloat16 or float32; any strides.
        starts: int32 [C], rows of x.
        weights: ``()``, ``(position [G, l, D], weight [G, l*D, D])`` or ``(position, w1 [G, l*D, F], w2 [G, F, D])``; products
            are taken in the dtype of x with float32 sums.
        block_size: l, tokens of a block.

    Returns:
        ``out`` [C, G, D] in the dtype of x, and what the backward of ``mlp`` needs: float32 [C, G, F], the hidden layer before
        its activation (None for the others). Rotary embedding is the caller's.

    Raises:
        ValueError: weights that do not fit.
    """
    check_compressor(weights, block_size, *x.shape[1:])
    x = channels_last(x)
    if starts.shape[0] == 0:
        hidden = x.new_empty(0, x.shape[1], weights[1].shape[-1], dtype=torch.float32) if len(weights) == 3 else None
        return x.new_empty(0, *x.shape[1:]), hidden
    if len(weights) == 0:
        return block_mean(x, starts, block_size, None), None
    if len(weights) == 2:
        return block_product(x, starts, *weights).to(x.dtype), None
    activated = torch.empty(starts.shape[0], x.shape[1], weights[1].shape[-1], dtype=x.dtype, device=x.device)
    product = block_product(x, starts, *weights[:2], activated)
    added = block_product(activated, None, None, weights[2])
    return block_mean(x, starts, block_size, added), product
