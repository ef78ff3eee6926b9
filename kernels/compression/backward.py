"""Compression, backward: gradients of the rows and of the compressor's weights, without atomics.

A row lies in up to l/d blocks: the last one that starts at or before it, and others that start d, 2d, ... rows earlier. Each
program gathers all contributions to the rows it owns; the last blocks of a document also own the rows up to their end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..common import FLOAT32_PRODUCTS, channels_last
from .forward import TILE_BLOCKS, TILE_OUT, TILE_SUM, block_channels, check_compressor


@triton.jit
def product_of(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b; in float32 where their types differ."""
    if a.dtype != b.dtype:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def sum_of_parts(parts_ptr, num_parts, group, column, GROUPS: tl.constexpr, OUT: tl.constexpr, TILE: tl.constexpr):
    """Columns of the sum of ``parts`` [P, G, OUT], float32."""
    acc = tl.zeros([TILE, column.shape[0]], dtype=tl.float32)
    for first in tl.range(0, num_parts, TILE):
        part = first + tl.arange(0, TILE)
        offset = (part.to(tl.int64) * GROUPS + group) * OUT
        mask = (part < num_parts)[:, None] & (column < OUT)[None, :]
        acc += tl.load(parts_ptr + offset[:, None] + column[None, :], mask=mask, other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def position_gradient(
    weight_ptr, parts_ptr, num_parts, group, channel,
    GROUPS: tl.constexpr, TOTAL: tl.constexpr, OUT: tl.constexpr, TILE_OUT: tl.constexpr, TILE_PARTS: tl.constexpr,
):  # fmt: skip
    """Some channels of weight [G, TOTAL, OUT] @ (the sum of ``parts`` [P, G, OUT]), float32."""
    acc = tl.zeros([channel.shape[0]], dtype=tl.float32)
    for first in tl.range(0, OUT, TILE_OUT):
        column = first + tl.arange(0, TILE_OUT)
        total = sum_of_parts(parts_ptr, num_parts, group, column, GROUPS, OUT, TILE_PARTS)
        offset = (group.to(tl.int64) * TOTAL + channel) * OUT
        mask = (channel < TOTAL)[:, None] & (column < OUT)[None, :]
        weight = tl.load(weight_ptr + offset[:, None] + column[None, :], mask=mask, other=0.0)
        acc += tl.sum(weight.to(tl.float32) * total[None, :], 1)
    return acc


@triton.jit(do_not_specialize=["num_blocks", "num_parts"])
def block_weight_gradient_kernel(
    x_ptr, starts_ptr, dh_ptr, position_ptr, weight_ptr, parts_ptr, dweight_ptr, dposition_ptr,
    x_stride_m, x_stride_g, num_blocks, num_parts,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, OUT: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_SUM: tl.constexpr, TILE_OUT: tl.constexpr, TILE_PARTS: tl.constexpr,
    SECOND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of flatten(block + position) @ weight: dweight [G, TOTAL, OUT] and dposition [G, TOTAL].

    dh [C, G, OUT] is the gradient of the product, ``parts`` [P, G, OUT], float32, add up to its sum over the blocks.
    SECOND layer: block c is silu of row c of x, and there is no position.
    """
    column_tile = tl.program_id(0) % tl.cdiv(OUT, TILE_OUT)
    channel_tile = tl.program_id(0) // tl.cdiv(OUT, TILE_OUT) % tl.cdiv(TOTAL, TILE_SUM)
    group = tl.program_id(0) // (tl.cdiv(OUT, TILE_OUT) * tl.cdiv(TOTAL, TILE_SUM))
    column = column_tile * TILE_OUT + tl.arange(0, TILE_OUT)
    x_ptr += group.to(tl.int64) * x_stride_g
    acc = tl.zeros([TILE_SUM, TILE_OUT], dtype=tl.float32)
    for first in tl.range(0, num_blocks, TILE_BLOCKS):
        block = first + tl.arange(0, TILE_BLOCKS)
        keep = block < num_blocks
        row = block if SECOND else tl.load(starts_ptr + block, mask=keep, other=0)
        x = block_channels(x_ptr, row, keep, x_stride_m, channel_tile * TILE_SUM, TOTAL, WIDTH, TILE_SUM)
        if SECOND:
            x = x * tl.sigmoid(x)
        offset = (block.to(tl.int64) * GROUPS + group) * OUT
        mask = keep[:, None] & (column < OUT)[None, :]
        dh = tl.load(dh_ptr + offset[:, None] + column[None, :], mask=mask, other=0.0)
        acc = product_of(tl.trans(x), dh, acc, PRECISION)
    channel = channel_tile * TILE_SUM + tl.arange(0, TILE_SUM)
    place = group.to(tl.int64) * TOTAL + channel
    if not SECOND:
        position = tl.load(position_ptr + place, mask=channel < TOTAL, other=0.0).to(tl.float32)
        acc += position[:, None] * sum_of_parts(parts_ptr, num_parts, group, column, GROUPS, OUT, TILE_PARTS)[None, :]
    mask = (channel < TOTAL)[:, None] & (column < OUT)[None, :]
    tl.store(dweight_ptr + (place * OUT)[:, None] + column[None, :], acc.to(dweight_ptr.dtype.element_ty), mask=mask)
    if not SECOND:
        if column_tile == 0:  # one of the programs that share these channels
            sums = position_gradient(weight_ptr, parts_ptr, num_parts, group, channel, GROUPS, TOTAL, OUT, TILE_OUT, TILE_PARTS)
            tl.store(dposition_ptr + place, sums.to(dposition_ptr.dtype.element_ty), mask=channel < TOTAL)


@triton.jit(do_not_specialize=["num_blocks"])
def block_row_gradient_kernel(
    starts_ptr, dy_ptr, dh_ptr, weight_ptr, dx_ptr, num_blocks,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, HIDDEN: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_SUM: tl.constexpr, TILE_OUT: tl.constexpr,
    MEAN: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: for a tile of blocks, the rows at one offset from their start; float32 sums.

    Offset ``reach * STRIDE + phase``. With reach 0 every block owns its row; further ones belong only to blocks that no block
    follows STRIDE rows later. Block c - s, if it starts s * STRIDE rows earlier, holds the row as its token offset + s * STRIDE.
    """
    PIECES: tl.constexpr = LENGTH // STRIDE
    column_tile = tl.program_id(0) % tl.cdiv(WIDTH, TILE_OUT)
    rest = tl.program_id(0) // tl.cdiv(WIDTH, TILE_OUT)
    group = rest % GROUPS
    phase = rest // GROUPS % STRIDE
    reach = rest // (GROUPS * STRIDE) % PIECES
    block = rest // (GROUPS * STRIDE * PIECES) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    column = column_tile * TILE_OUT + tl.arange(0, TILE_OUT)
    exists = block < num_blocks
    start = tl.load(starts_ptr + block, mask=exists, other=0)
    following = tl.load(starts_ptr + block + 1, mask=block + 1 < num_blocks, other=-1)
    owns = exists & ((reach == 0) | (following != start + STRIDE))
    pieces = tl.where(tl.max(owns.to(tl.int32), 0) > 0, PIECES - reach, 0)

    acc = tl.zeros([TILE_BLOCKS, TILE_OUT], dtype=tl.float32)
    for earlier in range(0, pieces):
        other = block - earlier
        before = tl.load(starts_ptr + other, mask=owns & (other >= 0), other=-1)
        holds = owns & (other >= 0) & (before == start - earlier * STRIDE)
        row = other.to(tl.int64) * GROUPS + group
        if MEAN:
            mask = holds[:, None] & (column < WIDTH)[None, :]
            acc += tl.load(dy_ptr + (row * WIDTH)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32) / LENGTH
        if PRODUCT:
            token = (reach + earlier) * STRIDE + phase
            channel = (group.to(tl.int64) * LENGTH + token) * WIDTH + column
            for first in tl.range(0, HIDDEN, TILE_SUM):
                hidden = first + tl.arange(0, TILE_SUM)
                mask = holds[:, None] & (hidden < HIDDEN)[None, :]
                dh = tl.load(dh_ptr + (row * HIDDEN)[:, None] + hidden[None, :], mask=mask, other=0.0)
                mask = (column < WIDTH)[:, None] & (hidden < HIDDEN)[None, :]
                weight = tl.load(weight_ptr + (channel * HIDDEN)[:, None] + hidden[None, :], mask=mask, other=0.0)
                acc = tl.dot(dh, tl.trans(weight), acc, input_precision=PRECISION)
    target = (start + reach * STRIDE + phase).to(tl.int64) * GROUPS + group
    mask = owns[:, None] & (column < WIDTH)[None, :]
    tl.store(dx_ptr + (target * WIDTH)[:, None] + column[None, :], acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_blocks"])
def activation_gradient_kernel(
    dy_ptr, weight_ptr, hidden_ptr, dh_ptr, parts_ptr, num_blocks,
    GROUPS: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_SUM: tl.constexpr, TILE_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh [C, G, F] = (dy [C, G, D] @ weight [G, F, D]^T) silu'(hidden [C, G, F]); parts [P, G, F]: its sums over tiles of blocks.

    Hidden and parts are float32; what is summed is not yet rounded to dh's type.
    """
    column_tile = tl.program_id(0) % tl.cdiv(HIDDEN, TILE_OUT)
    group = tl.program_id(0) // tl.cdiv(HIDDEN, TILE_OUT) % GROUPS
    tile = tl.program_id(0) // (tl.cdiv(HIDDEN, TILE_OUT) * GROUPS)
    block = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    column = column_tile * TILE_OUT + tl.arange(0, TILE_OUT)
    row = block.to(tl.int64) * GROUPS + group
    keep = block < num_blocks
    acc = tl.zeros([TILE_BLOCKS, TILE_OUT], dtype=tl.float32)
    for first in tl.range(0, WIDTH, TILE_SUM):
        channel = first + tl.arange(0, TILE_SUM)
        mask = keep[:, None] & (channel < WIDTH)[None, :]
        dy = tl.load(dy_ptr + (row * WIDTH)[:, None] + channel[None, :], mask=mask, other=0.0)
        offset = (group.to(tl.int64) * HIDDEN + column) * WIDTH
        mask = (column < HIDDEN)[:, None] & (channel < WIDTH)[None, :]
        weight = tl.load(weight_ptr + offset[:, None] + channel[None, :], mask=mask, other=0.0)
        acc = product_of(dy, tl.trans(weight), acc, PRECISION)
    offset = (row * HIDDEN)[:, None] + column[None, :]
    mask = keep[:, None] & (column < HIDDEN)[None, :]
    hidden = tl.load(hidden_ptr + offset, mask=mask, other=0.0)
    slope = tl.sigmoid(hidden)
    acc *= slope * (1 + hidden * (1 - slope))
    tl.store(dh_ptr + offset, acc.to(dh_ptr.dtype.element_ty), mask=mask)
    tl.store(parts_ptr + (tile.to(tl.int64) * GROUPS + group) * HIDDEN + column, tl.sum(acc, 0), mask=column < HIDDEN)


def _activation_gradient(
    hidden: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of ``hidden`` [C, G, F] in ``silu(hidden) @ weight``, and float32 partial sums [P, G, F] of it over the blocks.

    Args:
        hidden: float32. weight: [G, F, D]. dy: [C, G, D], contiguous.
        dtype: of the gradient; it is summed before it is rounded to this.
    """
    blocks, groups, width = hidden.shape
    tiles = triton.cdiv(blocks, TILE_BLOCKS)
    dh = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    parts = torch.empty(tiles, groups, width, dtype=torch.float32, device=hidden.device)
    activation_gradient_kernel[(tiles * groups * triton.cdiv(width, TILE_OUT),)](
        dy, weight.contiguous(), hidden, dh, parts, blocks,
        GROUPS=groups, HIDDEN=width, WIDTH=dy.shape[-1],
        TILE_BLOCKS=TILE_BLOCKS, TILE_SUM=TILE_SUM, TILE_OUT=TILE_OUT, PRECISION=FLOAT32_PRODUCTS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return dh, parts


def _weight_gradient(
    x: torch.Tensor, starts: torch.Tensor, dh: torch.Tensor, weight: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of the weights of one matrix product, in their dtypes: in the first product (``first`` given) those of position
    [G, l, D] and weight [G, l*D, F], in the second that of weight alone.

    Args:
        x: [M, G, D], the input: in the first product its blocks of l rows from ``starts`` on, in the second ``silu`` of its rows.
        dh: [C, G, F], gradient of the product's result, contiguous.
        first: position, and float32 partial sums [P, G, F] of dh over the blocks; None for the second product.
    """
    groups, total, out_width = weight.shape
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    # What is absent is passed as a placeholder that the kernel never touches.
    position, parts = (dweight, dweight) if first is None else first
    dposition = torch.empty(position.shape, dtype=position.dtype, device=x.device) if first is not None else dweight
    # Smaller tiles for the second weight, which is so small that with whole ones most multiprocessors would have nothing to do.
    tile_sum, tile_out = (TILE_SUM, TILE_OUT) if first is not None else (TILE_SUM // 2, TILE_OUT // 2)
    programs = groups * triton.cdiv(total, tile_sum) * triton.cdiv(out_width, tile_out)
    block_weight_gradient_kernel[(programs,)](
        x, starts, dh, position.contiguous(), weight.contiguous(), parts, dweight, dposition,
        *x.stride()[:2], starts.shape[0], parts.shape[0],
        GROUPS=groups, WIDTH=x.shape[-1], TOTAL=total, OUT=out_width,
        TILE_BLOCKS=TILE_BLOCKS, TILE_SUM=tile_sum, TILE_OUT=tile_out, TILE_PARTS=16,
        SECOND=first is None, PRECISION=FLOAT32_PRODUCTS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return (dweight,) if first is None else (dposition, dweight)


def _row_gradient(
    x: torch.Tensor, starts: torch.Tensor, block_size: int, stride: int, *,
    mean: torch.Tensor | None = None, product: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Gradient of the rows of x [M, G, D], in its dtype.

    Args:
        mean: dy [C, G, D], gradient of the block means.
        product: dh [C, G, F], gradient of the flattened blocks' products, and their weight [G, l*D, F], both of one dtype.
    """
    groups, width = x.shape[1:]
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    # What is absent is passed as a placeholder that the kernel never reads.
    dh, weight = (mean, mean) if product is None else product
    dy = dh if mean is None else mean
    tiles = triton.cdiv(starts.shape[0], TILE_BLOCKS) * triton.cdiv(width, TILE_OUT)
    block_row_gradient_kernel[(tiles * groups * block_size,)](
        starts, dy, dh, weight, dx, starts.shape[0],
        GROUPS=groups, WIDTH=width, LENGTH=block_size, STRIDE=stride, HIDDEN=dh.shape[-1],
        TILE_BLOCKS=TILE_BLOCKS, TILE_SUM=TILE_SUM, TILE_OUT=TILE_OUT, MEAN=mean is not None, PRODUCT=product is not None,
        PRECISION=FLOAT32_PRODUCTS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return dx


def compress_backward(
    x: torch.Tensor,
    starts: torch.Tensor,
    weights: Sequence[torch.Tensor],
    block_size: int,
    stride: int,
    hidden: torch.Tensor | None,
    dy: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Gradients of :func:`..forward.compress_forward`.

    Args:
        x, weights, block_size: as in the forward.
        starts: int32 [C], ascending; of two blocks that share rows, starts differ by a multiple of ``stride``, and all blocks in
            between must be present.
        stride: d, divides l.
        hidden: the second value that the forward returned.
        dy: [C, G, D], gradient of the compressed tokens; any floating dtype.

    Returns:
        ``dx`` [M, G, D], 0 in rows of no block, and the weights' gradients, in their order. All are summed in float32 and rounded
        once, to the dtype of what they are the gradient of.

    Raises:
        ValueError: weights that do not fit, or a stride that does not divide the block size.
    """
    check_compressor(weights, block_size, *x.shape[1:])
    if block_size % stride:
        raise ValueError(f"stride = {stride} must divide block_size = {block_size}")
    if starts.shape[0] == 0:
        dx, *dweights = (torch.zeros(each.shape, dtype=each.dtype, device=x.device) for each in (x, *weights))
        return dx, tuple(dweights)
    x, dy = channels_last(x), dy.contiguous()
    if len(weights) == 0:
        return _row_gradient(x, starts, block_size, stride, mean=dy), ()
    position, weight = weights[:2]
    if len(weights) == 2:
        mean, second = None, ()
        dh, parts = dy.to(x.dtype), dy.sum(0, keepdim=True, dtype=torch.float32)
    else:
        mean, second = dy, _weight_gradient(hidden, starts, dy, weights[2])
        dh, parts = _activation_gradient(hidden, weights[2], dy, x.dtype)
    first = _weight_gradient(x, starts, dh, weight, (position, parts))
    dx = _row_gradient(x, starts, block_size, stride, mean=mean, product=(dh, weight.to(x.dtype).contiguous()))
    return dx, (*first, *second)
