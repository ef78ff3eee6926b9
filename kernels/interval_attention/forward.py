"""Interval attention (a query sees one range of keys), forward: query tiles with online softmax in base 2 (paper 3.3.1, 3.3.3).

A query tile walks the keys that any of its rows sees, in key tiles cut at multiples of their size, so that a row's result does
not depend on its neighbours in the tile. Key tiles that all rows see whole need no mask; those at the borders get one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import (
    INT_MAX,
    LN_2,
    LOG2_E,
    channels_last,
    check_heads,
    copies_in_bulk,
    dot_wide,
    key_arguments,
    load_bulk,
    load_wide,
    store_tile,
    this_query_tile,
    tile_rows,
    widths,
    zeros_wide,
)
from ..hopper import on_hopper
from ..tuning import SHORT_SPAN, TileConfig, tile_config


@triton.jit
def key_ranges(begin, end, KEYS: tl.constexpr):
    """Where a query tile's three loops over keys start and stop, and the key rows that any of its rows sees.

    Masked key tiles run over [first, full_first) and [full_last, stop), unmasked ones between. Rows of ``start .. stop``.
    """
    some = begin < end
    stop = tl.max(tl.where(some, end, 0), 0)
    start = tl.minimum(tl.min(tl.where(some, begin, INT_MAX), 0), stop)
    first = start // KEYS * KEYS
    last = tl.cdiv(stop, KEYS) * KEYS
    full_first = tl.minimum(tl.maximum(tl.cdiv(tl.max(begin, 0), KEYS) * KEYS, first), last)
    full_last = tl.minimum(tl.maximum(tl.min(end, 0) // KEYS * KEYS, full_first), last)
    return first, full_first, full_last, start, stop


@triton.jit
def softmax_step(scores, top, total, scale_log2, MASKED: tl.constexpr):
    """One step of the online softmax: (p, shrink, top, total), p by the new maximum, shrink the old one's factor."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    # A row that has seen nothing yet keeps the maximum -inf; measuring from 0 then gives exp2(-inf) = 0, not NaN.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.exp2(scores * scale_log2 - reference[:, None])
    shrink = tl.exp2(top - reference)
    return p, shrink, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def add_values(acc, acc_tail, shrink, p, v, v_tail, DV_TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """acc * shrink + p v over both column parts."""
    acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
    if DV_TAIL > 0:
        acc_tail = tl.dot(p, v_tail, acc_tail * shrink[:, None], input_precision=PRECISION)
    return acc, acc_tail


@triton.jit
def _attend_masked(
    first, last, acc, acc_tail, top, total, q, q_tail, begin, end, start, stop, scale_log2,
    k_ptr, v_ptr, k_stride_m, v_stride_m,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key tiles ``first .. last``, of which some rows see a part; ``top`` and ``total`` are the running maximum and sum."""
    for tile in tl.range(first, last, KEYS):
        key = tile + tl.arange(0, KEYS)
        offset = key.to(tl.int64)
        keep = (key >= start) & (key < stop)
        k, k_tail = load_wide(k_ptr, offset * k_stride_m, keep, DK_HEAD, DK_TAIL, DK, True)
        v, v_tail = load_wide(v_ptr, offset * v_stride_m, keep, DV_HEAD, DV_TAIL, DV, True)
        visible = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        scores = tl.where(visible, dot_wide(q, q_tail, k, k_tail, DK_TAIL, PRECISION), float("-inf"))
        p, shrink, top, total = softmax_step(scores, top, total, scale_log2, True)
        acc, acc_tail = add_values(acc, acc_tail, shrink, p.to(v.dtype), v, v_tail, DV_TAIL, PRECISION)
    return acc, acc_tail, top, total


@triton.jit
def _attend_full(
    first, last, acc, acc_tail, top, total, q, q_tail, group, scale_log2,
    k_ptr, v_ptr, k_stride_m, v_stride_m, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    KEYS: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key tiles ``first .. last``, which all rows see whole."""
    place = tl.arange(0, KEYS)
    for tile in tl.range(first, last, KEYS):
        if BULK:
            k, k_tail = load_bulk(k_tiles, k_tail_tiles, tile, group, KEYS, DK_HEAD, DK_TAIL)
            v, v_tail = load_bulk(v_tiles, v_tail_tiles, tile, group, KEYS, DV_HEAD, DV_TAIL)
        else:
            offset = (tile + place).to(tl.int64)
            k, k_tail = load_wide(k_ptr, offset * k_stride_m, place, DK_HEAD, DK_TAIL, DK, False)
            v, v_tail = load_wide(v_ptr, offset * v_stride_m, place, DV_HEAD, DV_TAIL, DV, False)
        scores = dot_wide(q, q_tail, k, k_tail, DK_TAIL, PRECISION)
        p, shrink, top, total = softmax_step(scores, top, total, scale_log2, False)
        acc, acc_tail = add_values(acc, acc_tail, shrink, p.to(v.dtype), v, v_tail, DV_TAIL, PRECISION)
    return acc, acc_tail, top, total


@triton.jit(do_not_specialize=["num_tokens"])
def interval_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles, out_ptr, lse_ptr, begin_ptr, end_ptr,
    q_stride_t, q_stride_h, k_stride_m, k_stride_g, v_stride_m, v_stride_g, out_stride_t, out_stride_h,
    num_tokens, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one group. Late tiles, which see most in causal attention, start first."""
    tile, group = this_query_tile(num_tokens, TOKENS)
    token, head, valid = tile_rows(tile, group, num_tokens, HEADS, TOKENS, ROWS)
    row = token.to(tl.int64)
    q, q_tail = load_wide(q_ptr, row * q_stride_t + head * q_stride_h, valid, DK_HEAD, DK_TAIL, DK, False)
    begin = tl.load(begin_ptr + token)
    end = tl.load(end_ptr + token)
    first, full_first, full_last, start, stop = key_ranges(begin, end, KEYS)

    acc, acc_tail = zeros_wide(ROWS, DV_HEAD, DV_TAIL)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    k_ptr += group.to(tl.int64) * k_stride_g
    v_ptr += group.to(tl.int64) * v_stride_g
    acc, acc_tail, top, total = _attend_masked(
        first, full_first, acc, acc_tail, top, total, q, q_tail, begin, end, start, stop, scale_log2,
        k_ptr, v_ptr, k_stride_m, v_stride_m, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, PRECISION,
    )  # fmt: skip
    acc, acc_tail, top, total = _attend_full(
        full_first, full_last, acc, acc_tail, top, total, q, q_tail, group, scale_log2,
        k_ptr, v_ptr, k_stride_m, v_stride_m, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles,
        DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, BULK, PRECISION,
    )  # fmt: skip
    acc, acc_tail, top, total = _attend_masked(
        full_last, stop, acc, acc_tail, top, total, q, q_tail, begin, end, start, stop, scale_log2,
        k_ptr, v_ptr, k_stride_m, v_stride_m, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, PRECISION,
    )  # fmt: skip

    finish_rows(
        acc, acc_tail, top, total, row, head, valid, out_ptr, lse_ptr, out_stride_t, out_stride_h,
        GROUPS * HEADS, DV, DV_HEAD, DV_TAIL,
    )  # fmt: skip


@triton.jit
def finish_rows(
    acc, acc_tail, top, total, row, head, valid, out_ptr, lse_ptr, out_stride_t, out_stride_h,
    NUM_HEADS: tl.constexpr, DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
):  # fmt: skip
    """Divide by the softmax sums and write out and lse; a row that saw nothing has out 0 and lse -inf."""
    divisor = tl.where(total > 0, total, 1.0)
    offset = row * out_stride_t + head * out_stride_h
    store_tile(out_ptr, offset, valid, acc / divisor[:, None], 0, DV_HEAD, DV)
    if DV_TAIL > 0:
        store_tile(out_ptr, offset, valid, acc_tail / divisor[:, None], DV_HEAD, DV_TAIL, DV)
    lse = tl.where(total > 0, (top + tl.log2(divisor)) * LN_2, float("-inf"))
    tl.store(lse_ptr + row * NUM_HEADS + head, lse, mask=valid)


def interval_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    scale: float,
    *,
    span: int = 1 << 30,
    config: TileConfig | None = None,
    bulk: bool | None = None,
    hopper: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v over each query's own range of key rows.

    Args:
        q: [T, N, Dk]; query head h reads K/V group h // (N / G). float16, bfloat16 or float32; any strides.
        k: [M, G, Dk]. v: [M, G, Dv].
        begin, end: int32 [T], query row t sees key rows ``begin[t] .. end[t]``, half open, none if ``begin[t] >= end[t]``.
            Any values within 0 .. M are allowed; it is fast if ranges of neighbouring rows overlap.
        scale: positive factor of the scores.
        span: upper bound of the keys that a query sees; short ranges take smaller tiles. Only a hint, but it must be equal on all
            ranks, because results depend on the tile shape in their last bits.
        config: tile shape instead of the table's.
        bulk: whether to fetch keys and values by the copy engine; None: where it can.
        hopper: let ``hopper_forward.py`` do it where it can and ranges are not short, unless ``config`` or ``bulk`` is given.

    Returns:
        ``out`` [T, N, Dv] in the dtype of q and ``lse`` float32 [T, N], natural logarithm; 0 and -inf where nothing is seen.

    Raises:
        ValueError: the heads do not divide over the groups, the scale is not positive, or heads are wider than supported.
    """
    tokens, num_heads, dk = q.shape
    groups, dv = k.shape[1], v.shape[2]
    heads = check_heads(num_heads, groups)
    if scale <= 0:
        raise ValueError(f"scale = {scale} must be positive")
    out = torch.empty(tokens, num_heads, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, num_heads, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    # Over short ranges the smaller tiles of the Triton kernel waste less: a window of 512 takes 3.7 ms in place of 4.3.
    if hopper and span > SHORT_SPAN and config is None and bulk is None and on_hopper(q.device):
        from . import hopper_forward

        if hopper_forward.takes(q, k, v):
            return hopper_forward.interval_attention_forward(q, k, v, begin, end, scale)
    config = config or tile_config(_stage(span), q.dtype, q.device, heads, max(dk, dv))
    q, k, v = channels_last(q), channels_last(k), channels_last(v)
    bulk = copies_in_bulk(k, v) if bulk is None else bulk
    tile_tokens = config.tokens(heads)
    interval_attention_forward_kernel[(triton.cdiv(tokens, tile_tokens) * groups,)](
        q, *key_arguments(k, v, config.keys, bulk), out, lse, begin, end,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], tokens, scale * LOG2_E.value,
        TOKENS=tile_tokens, ROWS=config.rows, KEYS=config.keys, BULK=bulk,
        **widths(groups, heads, dk, dv), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def interval_lse(
    q: torch.Tensor, k: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, scale: float, dv: int, *, span: int = 1 << 30
) -> torch.Tensor:
    """The lse [T, N] of :func:`interval_attention_forward` without the values, bit for bit as with values of ``dv`` channels.

    A few channels of the keys stand in for the values, as few as the kernel takes, so that the second product is cheap.
    """
    if span > SHORT_SPAN and on_hopper(q.device):
        from . import hopper_forward

        if hopper_forward.suits(q.shape[2], dv) and hopper_forward.takes(q, k, k[..., :64]):
            return interval_attention_forward(q, k, k[..., :64], begin, end, scale, span=span)[1]
    # The tile shape decides in what order a row is summed, so it must be the one for the real values.
    heads = check_heads(q.shape[1], k.shape[1])
    config = tile_config(_stage(span), q.dtype, q.device, heads, max(q.shape[2], dv))
    return interval_attention_forward(q, k, k[..., :16], begin, end, scale, config=config)[1]


def _stage(span: int) -> str:
    return "short_forward" if span <= SHORT_SPAN else "interval_forward"
