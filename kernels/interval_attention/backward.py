"""Interval attention, backward: dq by tiles of queries that walk keys, dk and dv by tiles of keys that walk queries; no atomics.

With scores s = q k^T, gate g of a row and gradient do of the gated sum, the branch's upstream gradient would be g * do, which is
never formed: p = exp(scale s - shift) with shift = lse - log g is g times the softmax. So with delta = sum(do * o), not gated,
dv = p^T do, ds = p (do v^T - delta), dq = scale ds k, dk = scale ds^T q.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import (
    INT_MAX,
    LOG2_E,
    bulk_tiles,
    channels_last,
    check_heads,
    copies_in_bulk,
    dot_wide,
    key_arguments,
    load_bulk,
    load_shift,
    load_wide,
    split_width,
    store_tile,
    this_query_tile,
    tile_rows,
    widths,
    zeros_wide,
)
from ..hopper import on_hopper
from ..tuning import TileConfig, tile_config
from .forward import key_ranges

# Programs that keep a large GPU busy; with fewer key tiles than this the queries of each key tile are split over programs.
_WANTED_PROGRAMS = 1024
_MOST_SPLITS = 16
# Query rows that matrix units add up before the sum goes to memory. They round toward zero at every step: a sum of equal terms
# loses 6.4e-9 of itself a row (measured on an H100), 0.04% over this many, 5% over the 8 million rows of 16 heads at 512k tokens.
ROWS_A_SUM = 1 << 16


@triton.jit
def score_gradients(
    q, q_tail, do, do_tail, k, k_tail, v, v_tail, shift, delta, scale_log2,
    DK_TAIL: tl.constexpr, DV_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds [rows, keys] of a query tile and a key tile, float32; rows with shift +inf get 0."""
    p = tl.exp2(dot_wide(q, q_tail, k, k_tail, DK_TAIL, PRECISION) * scale_log2 - shift[:, None])
    dp = dot_wide(do, do_tail, v, v_tail, DV_TAIL, PRECISION)
    return p * (dp - delta[:, None])


@triton.jit
def add_score_gradients(dq, dq_tail, ds, k, k_tail, DK_TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """dq + ds k over both column parts."""
    ds = ds.to(k.dtype)
    dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    if DK_TAIL > 0:
        dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision=PRECISION)
    return dq, dq_tail


@triton.jit
def _dq_masked(
    first, last, dq, dq_tail, q, q_tail, do, do_tail, shift, delta, begin, end, start, stop, scale_log2,
    k_ptr, v_ptr, k_stride_m, v_stride_m,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key tiles ``first .. last``, of which some rows see a part."""
    for tile in tl.range(first, last, KEYS):
        key = tile + tl.arange(0, KEYS)
        offset = key.to(tl.int64)
        keep = (key >= start) & (key < stop)
        k, k_tail = load_wide(k_ptr, offset * k_stride_m, keep, DK_HEAD, DK_TAIL, DK, True)
        v, v_tail = load_wide(v_ptr, offset * v_stride_m, keep, DV_HEAD, DV_TAIL, DV, True)
        ds = score_gradients(q, q_tail, do, do_tail, k, k_tail, v, v_tail, shift, delta, scale_log2, DK_TAIL, DV_TAIL, PRECISION)
        visible = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        ds = tl.where(visible, ds, 0.0)
        dq, dq_tail = add_score_gradients(dq, dq_tail, ds, k, k_tail, DK_TAIL, PRECISION)
    return dq, dq_tail


@triton.jit
def _dq_full(
    first, last, dq, dq_tail, q, q_tail, do, do_tail, shift, delta, group, scale_log2,
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
        ds = score_gradients(q, q_tail, do, do_tail, k, k_tail, v, v_tail, shift, delta, scale_log2, DK_TAIL, DV_TAIL, PRECISION)
        dq, dq_tail = add_score_gradients(dq, dq_tail, ds, k, k_tail, DK_TAIL, PRECISION)
    return dq, dq_tail


@triton.jit
def add_interval_dq(
    dq, dq_tail, q, q_tail, do, do_tail, token, head, valid, group, scale_log2,
    k_ptr, v_ptr, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles, k_stride_m, k_stride_g, v_stride_m, v_stride_g,
    shift_ptr, delta_ptr, begin_ptr, end_ptr,
    NUM_HEADS: tl.constexpr, DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    KEYS: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A query tile's dq (which still lacks the factor scale) with all keys that its rows see added."""
    stats = token.to(tl.int64) * NUM_HEADS + head
    shift = load_shift(shift_ptr, stats, valid)
    delta = tl.load(delta_ptr + stats)
    begin = tl.load(begin_ptr + token)
    end = tl.load(end_ptr + token)
    first, full_first, full_last, start, stop = key_ranges(begin, end, KEYS)
    k_ptr += group.to(tl.int64) * k_stride_g
    v_ptr += group.to(tl.int64) * v_stride_g
    dq, dq_tail = _dq_masked(
        first, full_first, dq, dq_tail, q, q_tail, do, do_tail, shift, delta, begin, end, start, stop, scale_log2,
        k_ptr, v_ptr, k_stride_m, v_stride_m, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, PRECISION,
    )  # fmt: skip
    dq, dq_tail = _dq_full(
        full_first, full_last, dq, dq_tail, q, q_tail, do, do_tail, shift, delta, group, scale_log2,
        k_ptr, v_ptr, k_stride_m, v_stride_m, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles,
        DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, BULK, PRECISION,
    )  # fmt: skip
    return _dq_masked(
        full_last, stop, dq, dq_tail, q, q_tail, do, do_tail, shift, delta, begin, end, start, stop, scale_log2,
        k_ptr, v_ptr, k_stride_m, v_stride_m, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, PRECISION,
    )  # fmt: skip


@triton.jit
def query_tile(
    q_ptr, do_ptr, q_stride_t, q_stride_h, do_stride_t, do_stride_h, num_tokens,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """This program's query tile: tile, group, token, head, valid, q, do."""
    tile, group = this_query_tile(num_tokens, TOKENS)
    token, head, valid = tile_rows(tile, group, num_tokens, HEADS, TOKENS, ROWS)
    row = token.to(tl.int64)
    q, q_tail = load_wide(q_ptr, row * q_stride_t + head * q_stride_h, valid, DK_HEAD, DK_TAIL, DK, False)
    do, do_tail = load_wide(do_ptr, row * do_stride_t + head * do_stride_h, valid, DV_HEAD, DV_TAIL, DV, False)
    return tile, group, token, head, valid, q, q_tail, do, do_tail


@triton.jit
def store_dq(
    dq_ptr, dq, dq_tail, token, head, valid, dq_stride_t, dq_stride_h, scale,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
):  # fmt: skip
    """Write a query tile's dq with its factor scale."""
    offset = token.to(tl.int64) * dq_stride_t + head * dq_stride_h
    store_tile(dq_ptr, offset, valid, dq * scale, 0, DK_HEAD, DK)
    if DK_TAIL > 0:
        store_tile(dq_ptr, offset, valid, dq_tail * scale, DK_HEAD, DK_TAIL, DK)


@triton.jit(do_not_specialize=["num_tokens"])
def interval_attention_backward_dq_kernel(
    q_ptr, do_ptr, dq_ptr, k_ptr, v_ptr, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles, shift_ptr, delta_ptr, begin_ptr, end_ptr,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h, dq_stride_t, dq_stride_h,
    k_stride_m, k_stride_g, v_stride_m, v_stride_g, num_tokens, scale, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one group, over all keys its rows see."""
    _, group, token, head, valid, q, q_tail, do, do_tail = query_tile(
        q_ptr, do_ptr, q_stride_t, q_stride_h, do_stride_t, do_stride_h, num_tokens,
        GROUPS, HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS,
    )  # fmt: skip
    dq, dq_tail = zeros_wide(ROWS, DK_HEAD, DK_TAIL)
    dq, dq_tail = add_interval_dq(
        dq, dq_tail, q, q_tail, do, do_tail, token, head, valid, group, scale_log2,
        k_ptr, v_ptr, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles, k_stride_m, k_stride_g, v_stride_m, v_stride_g,
        shift_ptr, delta_ptr, begin_ptr, end_ptr,
        GROUPS * HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, BULK, PRECISION,
    )  # fmt: skip
    store_dq(dq_ptr, dq, dq_tail, token, head, valid, dq_stride_t, dq_stride_h, scale, DK, DK_HEAD, DK_TAIL)


@triton.jit
def add_queries(
    dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q, q_tail, do, do_tail, shift, delta, visible, scale_log2,
    DK_TAIL: tl.constexpr, DV_TAIL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of query rows to dk (which still lacks the factor scale) and dv of a key tile.

    Scores are kept transposed, [keys, rows], so that p and ds are first operands as they come out of the matrix unit.
    ``visible`` [keys, rows] counts only if MASKED.
    """
    p = tl.exp2(dot_wide(k, k_tail, q, q_tail, DK_TAIL, PRECISION) * scale_log2 - shift[None, :])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dp = dot_wide(v, v_tail, do, do_tail, DV_TAIL, PRECISION)
    # The product for dv runs while ds is formed.
    narrow = p.to(do.dtype)
    dv = tl.dot(narrow, do, dv, input_precision=PRECISION)
    if DV_TAIL > 0:
        dv_tail = tl.dot(narrow, do_tail, dv_tail, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    if MASKED:
        # p is 0 there already; what hidden keys hold may not be finite.
        ds = tl.where(visible, ds, 0.0)
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    if DK_TAIL > 0:
        dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)
    return dk, dk_tail, dv, dv_tail


@triton.jit
def load_queries(
    token, head, valid, q_ptr, do_ptr, shift_ptr, delta_ptr, q_stride_t, q_stride_h, do_stride_t, do_stride_h,
    NUM_HEADS: tl.constexpr, DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
):  # fmt: skip
    """Any query rows: q, do, shift, delta. ``token`` of rows that are not valid must still be an existing token."""
    row = token.to(tl.int64)
    stats = row * NUM_HEADS + head
    q, q_tail = load_wide(q_ptr, row * q_stride_t + head * q_stride_h, valid, DK_HEAD, DK_TAIL, DK, False)
    do, do_tail = load_wide(do_ptr, row * do_stride_t + head * do_stride_h, valid, DV_HEAD, DV_TAIL, DV, False)
    return q, q_tail, do, do_tail, load_shift(shift_ptr, stats, valid), tl.load(delta_ptr + stats)


@triton.jit
def _query_tiles(q_begin, q_end, split, splits, TOKENS: tl.constexpr):
    """First and last of this split's share of the query tiles that see any of the keys."""
    some = q_begin < q_end
    stop = tl.cdiv(tl.max(tl.where(some, q_end, 0), 0), TOKENS)
    start = tl.minimum(tl.min(tl.where(some, q_begin, INT_MAX), 0) // TOKENS, stop)
    share = tl.cdiv(stop - start, splits)
    return tl.minimum(start + share * split, stop), tl.minimum(start + share * (split + 1), stop)


@triton.jit
def store_dkv(
    dk_ptr, dv_ptr, row, keep, dk, dk_tail, dv, dv_tail,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
):  # fmt: skip
    """Write the kept rows of dk and dv."""
    store_tile(dk_ptr, row * DK, keep, dk, 0, DK_HEAD, DK)
    store_tile(dv_ptr, row * DV, keep, dv, 0, DV_HEAD, DV)
    if DK_TAIL > 0:
        store_tile(dk_ptr, row * DK, keep, dk_tail, DK_HEAD, DK_TAIL, DK)
    if DV_TAIL > 0:
        store_tile(dv_ptr, row * DV, keep, dv_tail, DV_HEAD, DV_TAIL, DV)


@triton.jit(do_not_specialize=["num_tokens", "num_keys", "splits"])
def interval_attention_backward_dkv_kernel(
    q_ptr, do_ptr, k_ptr, v_ptr, q_tiles, q_tail_tiles, do_tiles, do_tail_tiles, shift_ptr, delta_ptr,
    q_begin_ptr, q_end_ptr, dk_ptr, dv_ptr,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h, k_stride_m, k_stride_g, v_stride_m, v_stride_g,
    num_tokens, num_keys, splits, scale, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SEGMENT: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one key tile of one group and one share of its queries; dk, dv [splits, M, G, D] partial sums.

    Early key tiles, which causal attention shows to most queries, start first.
    """
    group = tl.program_id(0) % GROUPS
    split = tl.program_id(0) // GROUPS % splits
    tile = tl.program_id(0) // (GROUPS * splits)
    wanted = tile * KEYS + tl.arange(0, KEYS)
    # Keys past the end repeat the last one; only their stores are masked.
    key = tl.minimum(wanted, num_keys - 1)
    keep = wanted < num_keys
    offset = key.to(tl.int64)
    k, k_tail = load_wide(k_ptr + group.to(tl.int64) * k_stride_g, offset * k_stride_m, keep, DK_HEAD, DK_TAIL, DK, False)
    v, v_tail = load_wide(v_ptr + group.to(tl.int64) * v_stride_g, offset * v_stride_m, keep, DV_HEAD, DV_TAIL, DV, False)
    q_begin = tl.load(q_begin_ptr + key)
    q_end = tl.load(q_end_ptr + key)
    first, last = _query_tiles(q_begin, q_end, split, splits, TOKENS)
    out = (split.to(tl.int64) * num_keys + offset) * GROUPS + group
    # Sums are taken from the matrix units piece by piece, see ROWS_A_SUM; once even where there are no rows.
    for start in tl.range(first, tl.maximum(last, first + 1), SEGMENT):
        dk, dk_tail = zeros_wide(KEYS, DK_HEAD, DK_TAIL)
        dv, dv_tail = zeros_wide(KEYS, DV_HEAD, DV_TAIL)
        # One loop, whose every tile is masked: a second one without masks costs more in registers than the masks do.
        for tile in tl.range(start, tl.minimum(start + SEGMENT, last)):
            token, head, valid = tile_rows(tile, group, num_tokens, HEADS, TOKENS, ROWS)
            if BULK:
                q, q_tail = load_bulk(q_tiles, q_tail_tiles, tile * TOKENS, group * HEADS, ROWS, DK_HEAD, DK_TAIL)
                do, do_tail = load_bulk(do_tiles, do_tail_tiles, tile * TOKENS, group * HEADS, ROWS, DV_HEAD, DV_TAIL)
                stats = token.to(tl.int64) * (GROUPS * HEADS) + head
                shift = load_shift(shift_ptr, stats, valid)
                delta = tl.load(delta_ptr + stats)
            else:
                q, q_tail, do, do_tail, shift, delta = load_queries(
                    token, head, valid, q_ptr, do_ptr, shift_ptr, delta_ptr, q_stride_t, q_stride_h, do_stride_t, do_stride_h,
                    GROUPS * HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL,
                )  # fmt: skip
            visible = (token[None, :] >= q_begin[:, None]) & (token[None, :] < q_end[:, None])
            dk, dk_tail, dv, dv_tail = add_queries(
                dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q, q_tail, do, do_tail, shift, delta, visible, scale_log2,
                DK_TAIL, DV_TAIL, True, PRECISION,
            )  # fmt: skip
        # What other threads of the program wrote must be there.
        tl.debug_barrier()
        written = keep & (start > first)
        earlier, earlier_tail = load_wide(dk_ptr, out * DK, written, DK_HEAD, DK_TAIL, DK, True)
        dk, dk_tail = dk * scale + earlier, dk_tail * scale + earlier_tail
        earlier, earlier_tail = load_wide(dv_ptr, out * DV, written, DV_HEAD, DV_TAIL, DV, True)
        dv, dv_tail = dv + earlier, dv_tail + earlier_tail
        store_dkv(dk_ptr, dv_ptr, out, keep, dk, dk_tail, dv, dv_tail, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL)


def interval_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    q_begin: torch.Tensor,
    q_end: torch.Tensor,
    scale: float,
    *,
    dq_config: TileConfig | None = None,
    dkv_config: TileConfig | None = None,
    splits: int | None = None,
    bulk: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`..forward.interval_attention_forward`.

    Args:
        q, k, v, begin, end, scale: as in the forward.
        do: [T, N, Dv], upstream gradient without the gate.
        shift: float32 [T, N], the lse (over all keys of the row, even if these are only a ring's shard) minus the logarithm of
            the row's gate; +inf gives a row no gradient.
        delta: float32 [T, N], ``sum(do * out)`` with the output that belongs to that lse.
        q_begin, q_end: int32 [M], the query rows that see each key, half open: the inverse of ``begin`` and ``end``.
        dq_config, dkv_config: tile shapes instead of the table's.
        splits: number of parts that each key tile's queries are cut into, instead of as many as fill a GPU.
        bulk: whether to fetch tiles by the copy engine; None: where it can.

    Returns:
        ``dq`` [T, N, Dk], ``dk`` [M, G, Dk], ``dv`` [M, G, Dv], float32. The same inputs give the same bits.

    Raises:
        ValueError: as the forward.
    """
    (tokens, num_heads, dk_width), (num_keys, groups, dv_width) = q.shape, v.shape
    heads = check_heads(num_heads, groups)
    if scale <= 0:
        raise ValueError(f"scale = {scale} must be positive")
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    if tokens == 0 or num_keys == 0:
        return dq.zero_(), dq.new_zeros(k.shape), dq.new_zeros(v.shape)
    q, k, v, do = channels_last(q), channels_last(k), channels_last(v), channels_last(do)
    config = dq_config or tile_config("interval_dq", q.dtype, q.device, heads, max(dk_width, dv_width))
    bulk_keys = copies_in_bulk(k, v) if bulk is None else bulk
    tile_tokens = config.tokens(heads)
    interval_attention_backward_dq_kernel[(triton.cdiv(tokens, tile_tokens) * groups,)](
        q, do, dq, *key_arguments(k, v, config.keys, bulk_keys), shift.contiguous(), delta.contiguous(), begin, end,
        *q.stride()[:2], *do.stride()[:2], *dq.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        tokens, scale, scale * LOG2_E.value,
        TOKENS=tile_tokens, ROWS=config.rows, KEYS=config.keys, BULK=bulk_keys,
        **widths(groups, heads, dk_width, dv_width), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    dk, dv = interval_attention_backward_dkv(
        q, k, v, do, shift, delta, q_begin, q_end, scale, config=dkv_config, splits=splits, bulk=bulk
    )
    return dq, dk, dv


def interval_attention_backward_dkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    q_begin: torch.Tensor,
    q_end: torch.Tensor,
    scale: float,
    *,
    config: TileConfig | None = None,
    splits: int | None = None,
    bulk: bool | None = None,
    hopper: bool = True,
    rows_a_sum: int = ROWS_A_SUM,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk [M, G, Dk] and dv [M, G, Dv] of :func:`interval_attention_backward`, whose arguments these are.

    ``rows_a_sum``: see ROWS_A_SUM. ``hopper``: let ``hopper_backward.py`` do it where it can, unless ``config`` or ``bulk`` is
    given.
    """
    (tokens, num_heads, dk_width), (num_keys, groups, dv_width) = q.shape, v.shape
    heads = check_heads(num_heads, groups)
    if tokens == 0 or num_keys == 0:
        return shift.new_zeros(k.shape), shift.new_zeros(v.shape)
    if hopper and config is None and bulk is None and on_hopper(q.device):
        from . import hopper_backward

        if hopper_backward.takes(q, k, v, do):
            return hopper_backward.interval_attention_backward_dkv(
                q, k, v, do, shift, delta, q_begin, q_end, scale, splits=splits, rows_a_sum=rows_a_sum
            )
    q, k, v, do = channels_last(q), channels_last(k), channels_last(v), channels_last(do)
    config = config or tile_config("interval_dkv", q.dtype, q.device, heads, max(dk_width, dv_width))
    tile_tokens = config.tokens(heads)
    # A tile fetched by the copy engine has no room for rows beyond its tokens' heads.
    whole = tile_tokens * heads == config.rows
    bulk = whole and (copies_in_bulk(q, do) if bulk is None else bulk)
    dk_split, dv_split = split_width(dk_width), split_width(dv_width)
    programs = triton.cdiv(num_keys, config.keys) * groups
    splits = splits or query_splits(programs)
    dk = torch.empty(splits, *k.shape, dtype=torch.float32, device=q.device)
    dv = torch.empty(splits, *v.shape, dtype=torch.float32, device=q.device)
    interval_attention_backward_dkv_kernel[(programs * splits,)](
        q, do, k, v, *bulk_tiles(q, tile_tokens, heads, dk_split, bulk), *bulk_tiles(do, tile_tokens, heads, dv_split, bulk),
        shift.contiguous(), delta.contiguous(), q_begin, q_end, dk, dv,
        *q.stride()[:2], *do.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        tokens, num_keys, splits, scale, scale * LOG2_E.value,
        TOKENS=tile_tokens, ROWS=config.rows, KEYS=config.keys, SEGMENT=max(1, rows_a_sum // config.rows), BULK=bulk,
        **widths(groups, heads, dk_width, dv_width), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return (dk[0], dv[0]) if splits == 1 else (dk.sum(0), dv.sum(0))


def query_splits(programs: int) -> int:
    """Number of parts to cut each key tile's queries into, so that ``programs`` (key tiles times groups) fill a GPU."""
    return max(1, min(_MOST_SPLITS, _WANTED_PROGRAMS // programs))
