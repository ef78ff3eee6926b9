"""Interval attention, backward: dq by query-stationary tiles, dk and dv by key-stationary ones; no atomics.

With p the probabilities, do the upstream gradient and g the row's gate, the branch's own upstream gradient is g * do, so
dv = (g p)^T do, ds = p (g do v^T - delta) with delta = g sum(do * o), dq = scale ds k, dk = scale ds^T q. g * do is never formed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import (
    FLOAT32_PRODUCTS,
    INT_MAX,
    LOG2_E,
    accumulator,
    channels_last,
    check_heads,
    dot_wide,
    gate_arguments,
    load_lse,
    load_wide,
    split_width,
    store_tile,
    tile_rows,
    zeros_wide,
)
from ..tuning import TileConfig, tile_config
from .forward import key_ranges

# Programs that keep a large GPU busy; with fewer key tiles than this the query range of each is split.
_WANTED_PROGRAMS = 1024
_MOST_SPLITS = 16


@triton.jit
def _dq_range(
    first, last, dq, dq_tail, q, q_tail, do, do_tail, lse, delta, gate, begin, end, start, stop, scale_log2,
    k_ptr, v_ptr, k_stride_m, v_stride_m,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the key tiles of ``first .. last`` to dq, which still lacks the factor scale."""
    for tile in tl.range(first, last, KEYS):
        key = tile + tl.arange(0, KEYS)
        offset = key.to(tl.int64)
        keep = (key >= start) & (key < stop)
        k, k_tail = load_wide(k_ptr, offset * k_stride_m, keep, DK_HEAD, DK_TAIL, DK, MASKED)
        v, v_tail = load_wide(v_ptr, offset * v_stride_m, keep, DV_HEAD, DV_TAIL, DV, MASKED)
        scores = dot_wide(q, q_tail, k, k_tail, DK_TAIL, PRECISION)
        p = tl.exp2(scores * scale_log2 - lse[:, None])
        if MASKED:
            visible = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
            p = tl.where(visible, p, 0.0)
        dp = dot_wide(do, do_tail, v, v_tail, DV_TAIL, PRECISION)
        if GATED:
            dp = dp * gate[:, None]
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if DK_TAIL > 0:
            dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision=PRECISION)
    return dq, dq_tail


@triton.jit(do_not_specialize=["num_tokens"])
def interval_attention_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr, begin_ptr, end_ptr, dq_ptr,
    q_stride_t, q_stride_h, k_stride_m, k_stride_g, v_stride_m, v_stride_g,
    do_stride_t, do_stride_h, gate_stride_t, gate_stride_h, dq_stride_t, dq_stride_h,
    num_tokens, scale, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    GATED: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one group, over all keys its rows see."""
    group = tl.program_id(0) % GROUPS
    tile = tl.cdiv(num_tokens, TOKENS) - 1 - tl.program_id(0) // GROUPS
    token, head, valid = tile_rows(tile, group, num_tokens, HEADS, TOKENS, ROWS)
    row = token.to(tl.int64)
    q, q_tail = load_wide(q_ptr, row * q_stride_t + head * q_stride_h, valid, DK_HEAD, DK_TAIL, DK, False)
    do, do_tail = load_wide(do_ptr, row * do_stride_t + head * do_stride_h, valid, DV_HEAD, DV_TAIL, DV, False)
    lse = load_lse(lse_ptr, row * (GROUPS * HEADS) + head, valid)
    delta = tl.load(delta_ptr + row * (GROUPS * HEADS) + head)
    if GATED:
        gate = tl.load(gate_ptr + row * gate_stride_t + head * gate_stride_h).to(tl.float32)
    else:
        gate = delta
    begin = tl.load(begin_ptr + token)
    end = tl.load(end_ptr + token)
    first, full_first, full_last, start, stop = key_ranges(begin, end, KEYS)

    dq, dq_tail = zeros_wide(ROWS, DK_HEAD, DK_TAIL)
    k_ptr += group.to(tl.int64) * k_stride_g
    v_ptr += group.to(tl.int64) * v_stride_g
    dq, dq_tail = _dq_range(
        first, full_first, dq, dq_tail, q, q_tail, do, do_tail, lse, delta, gate, begin, end, start, stop, scale_log2, k_ptr,
        v_ptr, k_stride_m, v_stride_m, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, True, GATED, PRECISION,
    )  # fmt: skip
    dq, dq_tail = _dq_range(
        full_first, full_last, dq, dq_tail, q, q_tail, do, do_tail, lse, delta, gate, begin, end, start, stop, scale_log2, k_ptr,
        v_ptr, k_stride_m, v_stride_m, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, False, GATED, PRECISION,
    )  # fmt: skip
    dq, dq_tail = _dq_range(
        full_last, stop, dq, dq_tail, q, q_tail, do, do_tail, lse, delta, gate, begin, end, start, stop, scale_log2, k_ptr,
        v_ptr, k_stride_m, v_stride_m, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, True, GATED, PRECISION,
    )  # fmt: skip

    offset = row * dq_stride_t + head * dq_stride_h
    store_tile(dq_ptr, offset, valid, dq * scale, 0, DK_HEAD, DK, ACCUMULATE)
    if DK_TAIL > 0:
        store_tile(dq_ptr, offset, valid, dq_tail * scale, DK_HEAD, DK_TAIL, DK, ACCUMULATE)


@triton.jit
def add_queries(
    dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, token, head, valid, visible, scale_log2,
    q_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h, gate_stride_t, gate_stride_h,
    NUM_HEADS: tl.constexpr, DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    MASKED: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of query rows to dk (which still lacks the factor scale) and dv of a key tile.

    Scores are kept transposed, [keys, rows], so that p and ds are first operands as they come out of the matrix unit.
    ``token`` of rows that do not exist must still be an existing token; ``visible`` [keys, rows] counts only if MASKED.
    """
    row = token.to(tl.int64)
    stats = row * NUM_HEADS + head
    q, q_tail = load_wide(q_ptr, row * q_stride_t + head * q_stride_h, valid, DK_HEAD, DK_TAIL, DK, False)
    do, do_tail = load_wide(do_ptr, row * do_stride_t + head * do_stride_h, valid, DV_HEAD, DV_TAIL, DV, False)
    lse = load_lse(lse_ptr, stats, valid)
    delta = tl.load(delta_ptr + stats)
    p = tl.exp2(dot_wide(k, k_tail, q, q_tail, DK_TAIL, PRECISION) * scale_log2 - lse[None, :])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dp = dot_wide(v, v_tail, do, do_tail, DV_TAIL, PRECISION)
    if GATED:
        gate = tl.load(gate_ptr + row * gate_stride_t + head * gate_stride_h).to(tl.float32)
        dp = dp * gate[None, :]
        p_gated = (p * gate[None, :]).to(do.dtype)
    else:
        p_gated = p.to(do.dtype)
    ds = p * (dp - delta[None, :])
    if MASKED:
        ds = tl.where(visible, ds, 0.0)
    ds = ds.to(q.dtype)
    dv = tl.dot(p_gated, do, dv, input_precision=PRECISION)
    if DV_TAIL > 0:
        dv_tail = tl.dot(p_gated, do_tail, dv_tail, input_precision=PRECISION)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    if DK_TAIL > 0:
        dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)
    return dk, dk_tail, dv, dv_tail


@triton.jit
def _dkv_range(
    first, last, dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_begin, q_end, group, num_tokens, scale_log2,
    q_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h, gate_stride_t, gate_stride_h,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the query tiles ``first .. last`` to dk and dv."""
    for tile in tl.range(first, last):
        token, head, valid = tile_rows(tile, group, num_tokens, HEADS, TOKENS, ROWS)
        visible = (token[None, :] >= q_begin[:, None]) & (token[None, :] < q_end[:, None])
        dk, dk_tail, dv, dv_tail = add_queries(
            dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, token, head, valid, visible, scale_log2,
            q_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr,
            q_stride_t, q_stride_h, do_stride_t, do_stride_h, gate_stride_t, gate_stride_h,
            GROUPS * HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, MASKED, GATED, PRECISION,
        )  # fmt: skip
    return dk, dk_tail, dv, dv_tail


@triton.jit
def _query_tiles(q_begin, q_end, split, SPLITS: tl.constexpr, TOKENS: tl.constexpr):
    """This split's share of the query tiles that see any of the keys, and which of them see all keys with all tokens."""
    some = q_begin < q_end
    stop = tl.max(tl.where(some, q_end, 0), 0)
    start = tl.minimum(tl.min(tl.where(some, q_begin, INT_MAX), 0), stop)
    first = start // TOKENS
    share = tl.cdiv(tl.cdiv(stop, TOKENS) - first, SPLITS)
    last = tl.minimum(first + share * (split + 1), tl.cdiv(stop, TOKENS))
    first = tl.minimum(first + share * split, last)
    full_first = tl.minimum(tl.maximum(tl.cdiv(tl.max(q_begin, 0), TOKENS), first), last)
    full_last = tl.minimum(tl.maximum(tl.min(q_end, 0) // TOKENS, full_first), last)
    return first, full_first, full_last, last


@triton.jit(do_not_specialize=["num_tokens", "num_keys"])
def interval_attention_backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr, q_begin_ptr, q_end_ptr, dk_ptr, dv_ptr,
    q_stride_t, q_stride_h, k_stride_m, k_stride_g, v_stride_m, v_stride_g,
    do_stride_t, do_stride_h, gate_stride_t, gate_stride_h,
    num_tokens, num_keys, scale, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one key tile of one group and one share of its queries; dk, dv [SPLITS, M, G, D] partial sums.

    Early key tiles, which causal attention shows to most queries, start first.
    """
    group = tl.program_id(0) % GROUPS
    split = tl.program_id(0) // GROUPS % SPLITS
    tile = tl.program_id(0) // (GROUPS * SPLITS)
    wanted = tile * KEYS + tl.arange(0, KEYS)
    # Keys past the end repeat the last one; only their stores are masked.
    key = tl.minimum(wanted, num_keys - 1)
    keep = wanted < num_keys
    offset = key.to(tl.int64)
    k, k_tail = load_wide(k_ptr + group.to(tl.int64) * k_stride_g, offset * k_stride_m, keep, DK_HEAD, DK_TAIL, DK, False)
    v, v_tail = load_wide(v_ptr + group.to(tl.int64) * v_stride_g, offset * v_stride_m, keep, DV_HEAD, DV_TAIL, DV, False)
    q_begin = tl.load(q_begin_ptr + key)
    q_end = tl.load(q_end_ptr + key)
    first, full_first, full_last, last = _query_tiles(q_begin, q_end, split, SPLITS, TOKENS)

    dk, dk_tail = zeros_wide(KEYS, DK_HEAD, DK_TAIL)
    dv, dv_tail = zeros_wide(KEYS, DV_HEAD, DV_TAIL)
    dk, dk_tail, dv, dv_tail = _dkv_range(
        first, full_first, dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_begin, q_end, group, num_tokens, scale_log2,
        q_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr,
        q_stride_t, q_stride_h, do_stride_t, do_stride_h, gate_stride_t, gate_stride_h,
        GROUPS, HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS, True, GATED, PRECISION,
    )  # fmt: skip
    dk, dk_tail, dv, dv_tail = _dkv_range(
        full_first, full_last, dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_begin, q_end, group, num_tokens, scale_log2,
        q_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr,
        q_stride_t, q_stride_h, do_stride_t, do_stride_h, gate_stride_t, gate_stride_h,
        GROUPS, HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS, False, GATED, PRECISION,
    )  # fmt: skip
    dk, dk_tail, dv, dv_tail = _dkv_range(
        full_last, last, dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_begin, q_end, group, num_tokens, scale_log2,
        q_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr,
        q_stride_t, q_stride_h, do_stride_t, do_stride_h, gate_stride_t, gate_stride_h,
        GROUPS, HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS, True, GATED, PRECISION,
    )  # fmt: skip

    out = (split.to(tl.int64) * num_keys + offset) * GROUPS + group
    store_tile(dk_ptr, out * DK, keep, dk * scale, 0, DK_HEAD, DK, False)
    store_tile(dv_ptr, out * DV, keep, dv, 0, DV_HEAD, DV, False)
    if DK_TAIL > 0:
        store_tile(dk_ptr, out * DK, keep, dk_tail * scale, DK_HEAD, DK_TAIL, DK, False)
    if DV_TAIL > 0:
        store_tile(dv_ptr, out * DV, keep, dv_tail, DV_HEAD, DV_TAIL, DV, False)


def interval_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    gate: torch.Tensor | None,
    begin: torch.Tensor,
    end: torch.Tensor,
    q_begin: torch.Tensor,
    q_end: torch.Tensor,
    scale: float,
    *,
    dq: torch.Tensor | None = None,
    dq_config: TileConfig | None = None,
    dkv_config: TileConfig | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`..forward.interval_attention_forward`.

    Args:
        q, k, v, begin, end, scale: as in the forward.
        do: [T, N, Dv], upstream gradient without the gate.
        lse: float32 [T, N]: the forward's, or one over more keys than these (a ring's shards). Rows with -inf get no gradient.
        delta: float32 [T, N], ``gate * sum(do * out)`` with the output that belongs to ``lse``.
        gate: [T, N] of any floating dtype and strides, or None for 1.
        q_begin, q_end: int32 [M], the query rows that see each key, half open: the inverse of ``begin`` and ``end``.
        dq: float32 [T, N, Dk] to add to, or None for a new one.
        dq_config, dkv_config: tile shapes instead of the table's.
        splits: shares each key tile's queries are cut into, instead of the number that fills a GPU.

    Returns:
        ``dq`` [T, N, Dk], ``dk`` [M, G, Dk], ``dv`` [M, G, Dv], float32. The same inputs give the same bits.

    Raises:
        ValueError: as the forward, or ``dq`` of another shape or dtype.
    """
    (tokens, num_heads, dk_width), (num_keys, groups, dv_width) = q.shape, v.shape
    heads = check_heads(num_heads, groups)
    if scale <= 0:
        raise ValueError(f"scale = {scale} must be positive")
    dq, accumulate = accumulator(dq, q.shape, q.device)
    if tokens == 0 or num_keys == 0:
        dq = dq if accumulate else dq.zero_()
        return dq, dq.new_zeros(k.shape), dq.new_zeros(v.shape)
    q, k, v, do = channels_last(q), channels_last(k), channels_last(v), channels_last(do)
    lse, delta = lse.contiguous(), delta.contiguous()
    gate, *gate_strides, gated = gate_arguments(gate, delta)
    (dk_head, dk_tail), (dv_head, dv_tail) = split_width(dk_width), split_width(dv_width)
    shared = dict(
        GROUPS=groups, HEADS=heads, DK=dk_width, DK_HEAD=dk_head, DK_TAIL=dk_tail, DV=dv_width, DV_HEAD=dv_head, DV_TAIL=dv_tail,
        GATED=gated, PRECISION=FLOAT32_PRODUCTS,
    )  # fmt: skip
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *do.stride()[:2], *gate_strides)

    width = max(dk_width, dv_width)
    config = dq_config or tile_config("interval_dq", q.dtype, q.device, heads, width)
    tile_tokens = config.tokens(heads)
    interval_attention_backward_dq_kernel[(triton.cdiv(tokens, tile_tokens) * groups,)](
        q, k, v, do, lse, delta, gate, begin, end, dq, *strides, *dq.stride()[:2], tokens, scale, scale * LOG2_E.value,
        TOKENS=tile_tokens, ROWS=config.rows, KEYS=config.keys, ACCUMULATE=accumulate, **shared,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    config = dkv_config or tile_config("interval_dkv", q.dtype, q.device, heads, width)
    programs = triton.cdiv(num_keys, config.keys) * groups
    splits = splits or max(1, min(_MOST_SPLITS, _WANTED_PROGRAMS // programs))
    dk = torch.empty(splits, *k.shape, dtype=torch.float32, device=q.device)
    dv = torch.empty(splits, *v.shape, dtype=torch.float32, device=q.device)
    interval_attention_backward_dkv_kernel[(programs * splits,)](
        q, k, v, do, lse, delta, gate, q_begin, q_end, dk, dv, *strides, tokens, num_keys, scale, scale * LOG2_E.value,
        TOKENS=config.tokens(heads), ROWS=config.rows, KEYS=config.keys, SPLITS=splits, **shared,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return (dq, dk[0], dv[0]) if splits == 1 else (dq, dk.sum(0), dv.sum(0))
