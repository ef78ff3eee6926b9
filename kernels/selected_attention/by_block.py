"""Selected attention block by block, for groups of few query heads: forward, and its part of dq.

In ``forward.py`` a tile of adjacent queries walks the union of their blocks. With few heads a group a tile holds many tokens,
which share few blocks, so that in every step most of its rows are masked. Here each block meets just the queries that chose it,
in tiles without idle rows, and writes a partial result ("part") for each of them; a second kernel adds up each query's parts in
the order of its blocks.

There is a part for every choice of a block, so tokens are taken in passes of bounded size. No atomics: the same inputs give the
same bits, and a query's result does not depend on the queries around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from ..common import (
    LN_2,
    LOG2_E,
    channels_last,
    check_heads,
    dot_wide,
    load_tile,
    load_wide,
    split_width,
    store_tile,
    widths,
    zeros_wide,
)
from ..interval_attention.backward import add_score_gradients, load_queries, score_gradients
from ..tuning import TileConfig, tile_config
from .unions import Selection, Visitors, find_visitors

# Query heads a group up to which this way is faster (docs/kernels.md), for the forward and for dq, whose parts are float32 and so
# twice as large.
MOST_HEADS, MOST_HEADS_DQ = 4, 2
# Bytes of parts held at once.
WORKSPACE_BYTES = 1 << 30
# Limits of a block's rows and of its keys' and values' bytes, which stay on the multiprocessor: on Hopper, elsewhere, and for
# float32, whose products take three times the room.
_MOST_ROWS = 128
_HOPPER_BYTES, _OTHER_BYTES, _FLOAT32_BYTES = 64 << 10, 32 << 10, 20 << 10
# Query rows of a program that adds up parts.
_MERGED_ROWS = 16


def fits(block_size: int, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether blocks of ``block_size`` rows of k [S, G, Dk] and v [S, G, Dv] stay on the multiprocessor."""
    rows = triton.next_power_of_2(max(16, block_size))
    width = sum(split_width(k.shape[2])) + sum(split_width(v.shape[2]))
    room = _OTHER_BYTES
    if k.itemsize > 2:
        room = _FLOAT32_BYTES
    elif k.is_cuda and torch.cuda.get_device_capability(k.device)[0] == 9:
        room = _HOPPER_BYTES
    return rows <= _MOST_ROWS and rows * width * k.itemsize <= room


@triton.jit
def _item(
    offsets_ptr, item_offsets_ptr, item_lists_ptr, block_start_ptr, num_blocks, num_keys, chunk,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """This program's work item: group, key rows of its block, which of them are the block's own, and first and last of the
    list's entries that it takes; of these, the tiles of TOKENS from ``whole`` on are of queries past the block's end."""
    last_list = GROUPS * num_blocks - 1
    item = tl.program_id(0)
    wanted = tl.load(item_lists_ptr + item)
    visit = tl.minimum(wanted, last_list)
    block = visit % num_blocks
    start = tl.load(block_start_ptr + block)
    following = tl.load(block_start_ptr + block + 1, mask=block + 1 < num_blocks, other=num_keys)
    within = tl.arange(0, KEYS)
    # A document's last block may be cut short by the next document's first.
    own = (within < BLOCK) & (start + within < tl.minimum(following, num_keys))
    list_first = tl.load(offsets_ptr + visit)
    first = list_first + (item - tl.load(item_offsets_ptr + visit)) * chunk
    last = tl.minimum(first + chunk, tl.load(offsets_ptr + visit + 1))
    # Items past the last one have no queries.
    last = tl.where(wanted == visit, last, first)
    # The only queries before the block's end are its own, at most BLOCK; a list in ascending order has them first.
    masked = tl.maximum(tl.minimum(list_first + BLOCK, last) - first, 0)
    return visit // num_blocks, start + within, own, first, first + tl.cdiv(masked, TOKENS) * TOKENS, last


@triton.jit
def _visiting_rows(
    entry, last, group, places_ptr, GROUPS: tl.constexpr, HEADS: tl.constexpr, PICKS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the list entries ``entry .. entry + TOKENS``: token, head, which rows exist, and the number of each row's part."""
    row = tl.arange(0, ROWS)
    valid = (row < TOKENS * HEADS) & (entry + row // HEADS < last)
    place = tl.load(places_ptr + entry + row // HEADS, mask=valid, other=0)
    part = place.to(tl.int64) * HEADS + row % HEADS
    return place // (GROUPS * PICKS), (group * HEADS + row % HEADS).to(tl.int64), valid, part


@triton.jit
def _attend(
    first, last, end, k, k_tail, v, v_tail, key, own, group, scale_log2,
    q_ptr, out_parts_ptr, lse_parts_ptr, places_ptr, position_ptr, key_start_ptr, q_stride_t, q_stride_h,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, PICKS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax attention of the list entries ``first .. last`` of an item that ends at ``end`` to one block."""
    for entry in tl.range(first, last, TOKENS):
        token, head, valid, part = _visiting_rows(entry, end, group, places_ptr, GROUPS, HEADS, PICKS, TOKENS, ROWS)
        row = token.to(tl.int64) * q_stride_t + head * q_stride_h
        q, q_tail = load_wide(q_ptr, row, valid, DK_HEAD, DK_TAIL, DK, False)
        scores = dot_wide(q, q_tail, k, k_tail, DK_TAIL, PRECISION) * scale_log2
        visible = own[None, :]
        if MASKED:
            limit = tl.load(key_start_ptr + token) + tl.load(position_ptr + token)
            visible = visible & (key[None, :] <= limit[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        top = tl.max(scores, 1)
        # A row that sees nothing of the block measures from +inf: exp2(-inf) = 0.
        seen = top > float("-inf")
        p = tl.exp2(scores - tl.where(seen, top, float("inf"))[:, None])
        total = tl.sum(p, 1)
        share = tl.where(seen, 1.0 / total, 0.0)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * share[:, None]
        store_tile(out_parts_ptr, part * DV, valid, out, 0, DV_HEAD, DV)
        if DV_TAIL > 0:
            tail = tl.dot(p.to(v.dtype), v_tail, input_precision=PRECISION) * share[:, None]
            store_tile(out_parts_ptr, part * DV, valid, tail, DV_HEAD, DV_TAIL, DV)
        tl.store(lse_parts_ptr + part, tl.where(seen, top + tl.log2(total), float("-inf")), mask=valid)


@triton.jit(do_not_specialize=["num_keys", "num_blocks", "chunk"])
def attend_by_block_kernel(
    q_ptr, k_ptr, v_ptr, out_parts_ptr, lse_parts_ptr, places_ptr, offsets_ptr, item_offsets_ptr, item_lists_ptr,
    block_start_ptr, position_ptr, key_start_ptr,
    q_stride_t, q_stride_h, k_stride_s, k_stride_g, v_stride_s, v_stride_g, num_keys, num_blocks, chunk, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, PICKS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one block and one work item of the queries that chose it; parts [T, G, n, H, Dv] and their lse, base 2."""
    group, key, own, first, whole, last = _item(
        offsets_ptr, item_offsets_ptr, item_lists_ptr, block_start_ptr, num_blocks, num_keys, chunk, GROUPS, BLOCK, KEYS, TOKENS
    )
    if first < last:
        row = key.to(tl.int64)
        k, k_tail = load_wide(k_ptr + group.to(tl.int64) * k_stride_g, row * k_stride_s, own, DK_HEAD, DK_TAIL, DK, True)
        v, v_tail = load_wide(v_ptr + group.to(tl.int64) * v_stride_g, row * v_stride_s, own, DV_HEAD, DV_TAIL, DV, True)
        _attend(
            first, tl.minimum(whole, last), last, k, k_tail, v, v_tail, key, own, group, scale_log2,
            q_ptr, out_parts_ptr, lse_parts_ptr, places_ptr, position_ptr, key_start_ptr, q_stride_t, q_stride_h,
            GROUPS, HEADS, PICKS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS, True, PRECISION,
        )  # fmt: skip
        _attend(
            whole, last, last, k, k_tail, v, v_tail, key, own, group, scale_log2,
            q_ptr, out_parts_ptr, lse_parts_ptr, places_ptr, position_ptr, key_start_ptr, q_stride_t, q_stride_h,
            GROUPS, HEADS, PICKS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS, False, PRECISION,
        )  # fmt: skip


@triton.jit
def _query_rows(num_rows, HEADS: tl.constexpr, PICKS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Rows (token, head) of this program: token, head, which exist, the place of the first pick, the head within its group."""
    wanted = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = wanted < num_rows
    row = tl.minimum(wanted, num_rows - 1)
    token = (row // (GROUPS * HEADS)).to(tl.int64)
    head = (row % (GROUPS * HEADS)).to(tl.int64)
    return token, head, valid, (token * GROUPS + head // HEADS) * PICKS, head % HEADS


@triton.jit(do_not_specialize=["num_rows"])
def merge_parts_kernel(
    out_parts_ptr, lse_parts_ptr, blocks_ptr, out_ptr, lse_ptr,
    out_stride_t, out_stride_h, lse_stride_t, stride_t, stride_g, stride_n, num_rows,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, PICKS: tl.constexpr, PADDED_PICKS: tl.constexpr,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS query rows, each the mean of its parts weighted by their share of the softmax."""
    token, head, valid, place, local = _query_rows(num_rows, HEADS, PICKS, GROUPS, ROWS)
    chosen_ptr = blocks_ptr + token * stride_t + (head // HEADS) * stride_g
    pick = tl.arange(0, PADDED_PICKS)[None, :]
    chosen = tl.load(chosen_ptr[:, None] + pick * stride_n, mask=pick < PICKS, other=-1) >= 0
    lse = tl.load(lse_parts_ptr + (place[:, None] + pick) * HEADS + local[:, None], mask=chosen, other=float("-inf"))
    top = tl.max(lse, 1)
    seen = top > float("-inf")
    total = tl.sum(tl.exp2(lse - tl.where(seen, top, float("inf"))[:, None]), 1)
    log_sum = tl.where(seen, top + tl.log2(total), float("inf"))
    acc = tl.zeros([ROWS, DV_PADDED], dtype=tl.float32)
    for j in tl.range(0, PICKS):
        part = (place + j) * HEADS + local
        picked = tl.load(chosen_ptr + j * stride_n) >= 0
        weight = tl.exp2(tl.load(lse_parts_ptr + part, mask=picked, other=float("-inf")) - log_sum)
        acc += weight[:, None] * load_tile(out_parts_ptr, part * DV, picked, 0, DV_PADDED, DV, True)
    store_tile(out_ptr, token * out_stride_t + head * out_stride_h, valid, acc, 0, DV_PADDED, DV)
    tl.store(lse_ptr + token * lse_stride_t + head, tl.where(seen, log_sum * LN_2, float("-inf")), mask=valid)


@triton.jit
def _differentiate(
    first, last, end, k, k_tail, v, v_tail, key, own, group, scale_log2,
    q_ptr, do_ptr, shift_ptr, delta_ptr, parts_ptr, places_ptr, position_ptr, key_start_ptr,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, PICKS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the list entries ``first .. last`` of an item that ends at ``end``: dq from one block, without the factor scale."""
    for entry in tl.range(first, last, TOKENS):
        token, head, valid, part = _visiting_rows(entry, end, group, places_ptr, GROUPS, HEADS, PICKS, TOKENS, ROWS)
        q, q_tail, do, do_tail, shift, delta = load_queries(
            token, head, valid, q_ptr, do_ptr, shift_ptr, delta_ptr, q_stride_t, q_stride_h, do_stride_t, do_stride_h,
            GROUPS * HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL,
        )  # fmt: skip
        ds = score_gradients(q, q_tail, do, do_tail, k, k_tail, v, v_tail, shift, delta, scale_log2, DK_TAIL, DV_TAIL, PRECISION)
        visible = own[None, :]
        if MASKED:
            limit = tl.load(key_start_ptr + token) + tl.load(position_ptr + token)
            visible = visible & (key[None, :] <= limit[:, None])
        ds = tl.where(visible, ds, 0.0)
        dq, dq_tail = zeros_wide(ROWS, DK_HEAD, DK_TAIL)
        dq, dq_tail = add_score_gradients(dq, dq_tail, ds, k, k_tail, DK_TAIL, PRECISION)
        store_tile(parts_ptr, part * DK, valid, dq, 0, DK_HEAD, DK)
        if DK_TAIL > 0:
            store_tile(parts_ptr, part * DK, valid, dq_tail, DK_HEAD, DK_TAIL, DK)


@triton.jit(do_not_specialize=["num_keys", "num_blocks", "chunk"])
def query_gradients_by_block_kernel(
    q_ptr, do_ptr, k_ptr, v_ptr, shift_ptr, delta_ptr, parts_ptr, places_ptr, offsets_ptr, item_offsets_ptr, item_lists_ptr,
    block_start_ptr, position_ptr, key_start_ptr,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h, k_stride_s, k_stride_g, v_stride_s, v_stride_g,
    num_keys, num_blocks, chunk, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, PICKS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one block and one work item of the queries that chose it; parts [T, G, n, H, Dk] of dq."""
    group, key, own, first, whole, last = _item(
        offsets_ptr, item_offsets_ptr, item_lists_ptr, block_start_ptr, num_blocks, num_keys, chunk, GROUPS, BLOCK, KEYS, TOKENS
    )
    if first < last:
        row = key.to(tl.int64)
        k, k_tail = load_wide(k_ptr + group.to(tl.int64) * k_stride_g, row * k_stride_s, own, DK_HEAD, DK_TAIL, DK, True)
        v, v_tail = load_wide(v_ptr + group.to(tl.int64) * v_stride_g, row * v_stride_s, own, DV_HEAD, DV_TAIL, DV, True)
        _differentiate(
            first, tl.minimum(whole, last), last, k, k_tail, v, v_tail, key, own, group, scale_log2,
            q_ptr, do_ptr, shift_ptr, delta_ptr, parts_ptr, places_ptr, position_ptr, key_start_ptr,
            q_stride_t, q_stride_h, do_stride_t, do_stride_h,
            GROUPS, HEADS, PICKS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS, True, PRECISION,
        )  # fmt: skip
        _differentiate(
            whole, last, last, k, k_tail, v, v_tail, key, own, group, scale_log2,
            q_ptr, do_ptr, shift_ptr, delta_ptr, parts_ptr, places_ptr, position_ptr, key_start_ptr,
            q_stride_t, q_stride_h, do_stride_t, do_stride_h,
            GROUPS, HEADS, PICKS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS, False, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def add_parts_kernel(
    parts_ptr, blocks_ptr, base_ptr, dq_ptr, base_stride_t, base_stride_h, dq_stride_t, dq_stride_h,
    stride_t, stride_g, stride_n, num_rows, scale,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, PICKS: tl.constexpr,
    DK: tl.constexpr, DK_PADDED: tl.constexpr, BASE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: dq of ROWS query rows: the parts of all blocks and, with BASE, what the other branches gave."""
    token, head, valid, place, local = _query_rows(num_rows, HEADS, PICKS, GROUPS, ROWS)
    chosen_ptr = blocks_ptr + token * stride_t + (head // HEADS) * stride_g
    acc = tl.zeros([ROWS, DK_PADDED], dtype=tl.float32)
    for j in tl.range(0, PICKS):
        picked = tl.load(chosen_ptr + j * stride_n) >= 0
        acc += load_tile(parts_ptr, ((place + j) * HEADS + local) * DK, picked, 0, DK_PADDED, DK, True)
    acc *= scale
    if BASE:
        acc += load_tile(base_ptr, token * base_stride_t + head * base_stride_h, valid, 0, DK_PADDED, DK, True)
    store_tile(dq_ptr, token * dq_stride_t + head * dq_stride_h, valid, acc, 0, DK_PADDED, DK)


def passes(tokens: int, groups: int, bytes_per_token: int) -> Iterator[tuple[slice, slice]]:
    """Slices of groups and of tokens whose parts, ``bytes_per_token`` for each token and group, fit in the workspace together.

    One group after the other, so that its keys and values are read about once and its lists are long; several groups together
    only if all their tokens fit.
    """
    # A multiple of 16 tokens, so that slices are aligned like the whole tensors.
    at_once = max(16, WORKSPACE_BYTES // bytes_per_token // 16 * 16)
    side_by_side = max(1, min(groups, at_once // max(1, tokens)))
    while groups % side_by_side:
        side_by_side -= 1
    for group in range(0, groups, side_by_side):
        for token in range(0, tokens, at_once):
            yield slice(group, group + side_by_side), slice(token, min(token + at_once, tokens))


def heads_of(groups: slice, heads: int) -> slice:
    """Query heads of a slice of groups that have ``heads`` each."""
    return slice(groups.start * heads, groups.stop * heads)


def selected_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    config: TileConfig | None = None,
    chunk: int | None = None,
) -> None:
    """As :func:`.forward.selected_attention_forward`, if :func:`fits`; writes to ``out`` and ``lse``.

    Args:
        config: tile shape instead of the table's.
        chunk: largest number of queries in a work item.
    """
    (tokens, num_heads, dk), (num_keys, num_groups, dv), picks = q.shape, v.shape, selection.blocks.shape[2]
    heads = check_heads(num_heads, num_groups)
    q, k, v = channels_last(q), channels_last(k), channels_last(v)
    config = config or tile_config("by_block_forward", q.dtype, q.device, heads, max(dk, dv))
    out_parts = lse_parts = q.new_empty(0)
    for some, rows in passes(tokens, num_groups, heads * picks * (dv * q.itemsize + 4)):
        groups, count = some.stop - some.start, rows.stop - rows.start
        mine = heads_of(some, heads)
        chosen, own_q, own_out, own_lse = selection.of(some, rows), q[rows, mine], out[rows, mine], lse[rows, mine]
        visitors = find_visitors(chosen, chunk, places=True)
        if lse_parts.numel() == 0:
            # The first pass is the largest; the others reuse its workspace.
            out_parts = torch.empty(count * picks * groups * heads, dv, dtype=q.dtype, device=q.device)
            lse_parts = torch.empty(count * picks * groups * heads, dtype=torch.float32, device=q.device)
        attend_by_block_kernel[(groups * visitors.items_per_group,)](
            own_q, k[:, some], v[:, some], out_parts, lse_parts, *_tables(visitors, chosen),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            num_keys, visitors.num_blocks, visitors.chunk, scale * LOG2_E.value,
            PICKS=picks, **_shape(selection.block_size, config, heads), **widths(groups, heads, dk, dv),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        merge_parts_kernel[(triton.cdiv(count * groups * heads, _MERGED_ROWS),)](
            out_parts, lse_parts, chosen.blocks, own_out, own_lse,
            *out.stride()[:2], lse.stride(0), *chosen.blocks.stride(), count * groups * heads,
            GROUPS=groups, HEADS=heads, PICKS=picks, PADDED_PICKS=triton.next_power_of_2(picks),
            DV=dv, DV_PADDED=triton.next_power_of_2(dv), ROWS=_MERGED_ROWS, num_warps=4,
        )  # fmt: skip


def query_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    selection: Selection,
    scale: float,
    dq: torch.Tensor,
    *,
    base_of: Callable[[slice, slice], torch.Tensor] | None = None,
    config: TileConfig | None = None,
    chunk: int | None = None,
) -> None:
    """Write dq of selected attention to ``dq`` [T, N, Dk], on top of what ``base_of`` returns, if given; only if :func:`fits`.

    Args:
        shift, delta: float32 [T, N], as in the backward of interval attention.
        base_of: called pass by pass with slices of groups and of tokens; returns what their dq starts from, float32 [tokens,
            heads, Dk].
        config, chunk: as in the forward.
    """
    (tokens, num_heads, dk), (num_keys, num_groups, dv), picks = q.shape, v.shape, selection.blocks.shape[2]
    heads = check_heads(num_heads, num_groups)
    q, k, v, do = channels_last(q), channels_last(k), channels_last(v), channels_last(do)
    config = config or tile_config("by_block_dq", q.dtype, q.device, heads, max(dk, dv))
    parts = q.new_empty(0)
    for some, rows in passes(tokens, num_groups, heads * picks * dk * 4):
        groups, count = some.stop - some.start, rows.stop - rows.start
        mine = heads_of(some, heads)
        base = dq[rows, mine] if base_of is None else base_of(some, rows)
        chosen, own_dq = selection.of(some, rows), dq[rows, mine]
        visitors = find_visitors(chosen, chunk, places=True)
        if parts.numel() == 0:
            parts = torch.empty(count * picks * groups * heads, dk, dtype=torch.float32, device=q.device)
        query_gradients_by_block_kernel[(groups * visitors.items_per_group,)](
            q[rows, mine], do[rows, mine], k[:, some], v[:, some],
            shift[rows, mine].contiguous(), delta[rows, mine].contiguous(), parts, *_tables(visitors, chosen),
            *q.stride()[:2], *do.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            num_keys, visitors.num_blocks, visitors.chunk, scale * LOG2_E.value,
            PICKS=picks, **_shape(selection.block_size, config, heads), **widths(groups, heads, dk, dv),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        add_parts_kernel[(triton.cdiv(count * groups * heads, _MERGED_ROWS),)](
            parts, chosen.blocks, base, own_dq,
            *base.stride()[:2], *dq.stride()[:2], *chosen.blocks.stride(), count * groups * heads, scale,
            GROUPS=groups, HEADS=heads, PICKS=picks, DK=dk, DK_PADDED=triton.next_power_of_2(dk), BASE=base_of is not None,
            ROWS=_MERGED_ROWS, num_warps=4,
        )  # fmt: skip
        # Freed now, so that it is not held beside the next pass's.
        del base


def _tables(visitors: Visitors, selection: Selection) -> tuple[torch.Tensor, ...]:
    assert visitors.places is not None
    lists = (visitors.places, visitors.offsets, visitors.item_offsets, visitors.item_lists)
    return *lists, selection.block_start, selection.position, selection.key_start


def _shape(block_size: int, config: TileConfig, heads: int) -> dict[str, int]:
    return {
        "BLOCK": block_size,
        "KEYS": max(16, triton.next_power_of_2(block_size)),
        "TOKENS": config.tokens(heads),
        "ROWS": config.rows,
    }
