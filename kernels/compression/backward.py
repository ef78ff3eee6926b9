"""Compression, backward: gradients of the rows and of the compressor's weights, without atomics.

A row lies in up to l/d blocks. Seen from the last block that starts at or before it, the others start d, 2d, ... rows earlier,
so each program gathers the contributions to its rows; the last blocks of a document also own the rows up to their end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..common import FLOAT32_PRODUCTS, channels_last
from .forward import TILE_BLOCKS, TILE_OUT, TILE_SUM, block_channels, check_compressor


@triton.jit(do_not_specialize=["num_blocks"])
def block_weight_gradient_kernel(
    x_ptr, starts_ptr, dh_ptr, out_ptr, x_stride_m, x_stride_g, num_blocks,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, OUT: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_SUM: tl.constexpr, TILE_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [G, TOTAL, OUT] = sum over blocks of flatten(block)^T dh, float32; dh [C, G, OUT]."""
    column_tile = tl.program_id(0) % tl.cdiv(OUT, TILE_OUT)
    channel_tile = tl.program_id(0) // tl.cdiv(OUT, TILE_OUT) % tl.cdiv(TOTAL, TILE_SUM)
    group = tl.program_id(0) // (tl.cdiv(OUT, TILE_OUT) * tl.cdiv(TOTAL, TILE_SUM))
    column = column_tile * TILE_OUT + tl.arange(0, TILE_OUT)
    x_ptr += group.to(tl.int64) * x_stride_g
    acc = tl.zeros([TILE_SUM, TILE_OUT], dtype=tl.float32)
    for first in tl.range(0, num_blocks, TILE_BLOCKS):
        block = first + tl.arange(0, TILE_BLOCKS)
        keep = block < num_blocks
        start = tl.load(starts_ptr + block, mask=keep, other=0)
        x = block_channels(x_ptr, start, keep, x_stride_m, channel_tile * TILE_SUM, TOTAL, WIDTH, TILE_SUM)
        offset = (block.to(tl.int64) * GROUPS + group) * OUT
        mask = keep[:, None] & (column < OUT)[None, :]
        dh = tl.load(dh_ptr + offset[:, None] + column[None, :], mask=mask, other=0.0)
        acc = tl.dot(tl.trans(x), dh, acc, input_precision=PRECISION)
    channel = channel_tile * TILE_SUM + tl.arange(0, TILE_SUM)
    offset = (group.to(tl.int64) * TOTAL + channel) * OUT
    mask = (channel < TOTAL)[:, None] & (column < OUT)[None, :]
    tl.store(out_ptr + offset[:, None] + column[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["num_blocks"])
def block_row_gradient_kernel(
    starts_ptr, dy_ptr, dh_ptr, weight_ptr, dx_ptr, num_blocks,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, HIDDEN: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_SUM: tl.constexpr, TILE_OUT: tl.constexpr,
    MEAN: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: for a tile of blocks, the rows at one offset from their start, float32.

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
    tl.store(dx_ptr + (target * WIDTH)[:, None] + column[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["total"])
def activation_gradient_kernel(hidden_ptr, upstream_ptr, activated_ptr, gradient_ptr, total, TILE: tl.constexpr):
    """activated = silu(hidden), gradient = upstream * silu'(hidden); all of ``total`` elements, the first three float32."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < total
    hidden = tl.load(hidden_ptr + place, mask=mask, other=0.0)
    slope = tl.sigmoid(hidden)
    gradient = tl.load(upstream_ptr + place, mask=mask, other=0.0) * slope * (1 + hidden * (1 - slope))
    tl.store(activated_ptr + place, hidden * slope, mask=mask)
    tl.store(gradient_ptr + place, gradient, mask=mask)


def _activation_gradient(hidden: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu of ``hidden`` [C, G, F] and the gradient before it, from that behind it; all float32 and contiguous."""
    activated, gradient = torch.empty_like(hidden), torch.empty_like(hidden)
    activation_gradient_kernel[(triton.cdiv(hidden.numel(), 1024),)](
        hidden, upstream, activated, gradient, hidden.numel(), TILE=1024, num_warps=4
    )
    return activated, gradient


def _weight_gradient(x: torch.Tensor, starts: torch.Tensor, dh: torch.Tensor, block_size: int) -> torch.Tensor:
    """Sum over blocks of flatten(block)^T dh: float32 [G, l*D, F]; dh [C, G, F] in the dtype of x."""
    groups, width = x.shape[1:]
    total, hidden = block_size * width, dh.shape[-1]
    out = torch.empty(groups, total, hidden, dtype=torch.float32, device=x.device)
    programs = groups * triton.cdiv(total, TILE_SUM) * triton.cdiv(hidden, TILE_OUT)
    block_weight_gradient_kernel[(programs,)](
        x, starts, dh, out, *x.stride()[:2], starts.shape[0],
        GROUPS=groups, WIDTH=width, TOTAL=total, OUT=hidden,
        TILE_BLOCKS=TILE_BLOCKS, TILE_SUM=TILE_SUM, TILE_OUT=TILE_OUT, PRECISION=FLOAT32_PRODUCTS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def _row_gradient(
    shape: torch.Size, starts: torch.Tensor, block_size: int, stride: int, *,
    mean: torch.Tensor | None = None, product: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Gradient of rows of ``shape`` [M, G, D], float32.

    Args:
        mean: dy [C, G, D], gradient of the block means.
        product: dh [C, G, F], gradient of the products of the flattened blocks, and their weight [G, l*D, F], of one dtype.
    """
    groups, width = shape[1:]
    dx = torch.zeros(shape, dtype=torch.float32, device=starts.device)
    # The kernel never reads the pointers of what is absent.
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
        starts: int32 [C], ascending; two blocks that share rows start a multiple of ``stride`` apart, with every block in
            between present.
        stride: d, divides l.
        hidden: second value of the forward.
        dy: [C, G, D], gradient of the compressed tokens; any floating dtype.

    Returns:
        ``dx`` float32 [M, G, D], 0 in rows of no block, and the weights' gradients, float32, in their order.

    Raises:
        ValueError: weights that do not fit, or a stride that does not divide the block size.
    """
    check_compressor(weights, block_size, *x.shape[1:])
    if block_size % stride:
        raise ValueError(f"stride = {stride} must divide block_size = {block_size}")
    if starts.shape[0] == 0:
        dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return dx, tuple(torch.zeros(w.shape, dtype=torch.float32, device=x.device) for w in weights)
    x, dy = channels_last(x), dy.contiguous()
    if len(weights) == 0:
        return _row_gradient(x.shape, starts, block_size, stride, mean=dy), ()
    position, weight = weights[:2]
    extra: tuple[torch.Tensor, ...] = ()
    dh, mean = dy.float(), None
    if len(weights) == 3:
        upstream, dh = dh.transpose(0, 1), torch.empty_like(hidden)
        torch.bmm(upstream, weights[2].float().transpose(1, 2), out=dh.transpose(0, 1))
        activated, dh = _activation_gradient(hidden, dh)
        extra, mean = (torch.bmm(activated.permute(1, 2, 0), upstream),), dy
    total = dh.sum(0)
    flat = position.reshape(position.shape[0], -1, 1).float()
    dposition = torch.bmm(weight.float(), total[..., None]).view(position.shape)
    dh = dh.to(x.dtype)
    dweight = _weight_gradient(x, starts, dh, block_size) + flat * total[:, None]
    product = (dh, weight.to(x.dtype).contiguous())
    dx = _row_gradient(x.shape, starts, block_size, stride, mean=mean, product=product)
    return dx, (dposition, dweight, *extra)
