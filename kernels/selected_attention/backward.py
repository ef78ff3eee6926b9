"""Selected attention, backward: dq on the forward's query tiles (or, with few heads a group, by ``by_block.py``); dk and dv for
each block over the queries that chose it.

No atomics. The list of a block's queries is cut into work items of bounded length, because a document's first block is chosen by
all its queries and would alone take as long as all others. Lists of one item are written at once; partial sums of longer ones
go to a workspace and are added in list order, so that the same inputs give the same bits. Gates: see interval attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import (
    LOG2_E,
    channels_last,
    check_heads,
    copies_in_bulk,
    key_arguments,
    load_bulk,
    load_shift,
    load_tile,
    load_wide,
    store_tile,
    widths,
    zeros_wide,
)
from ..hopper import on_hopper
from ..interval_attention.backward import (
    add_queries,
    add_score_gradients,
    load_queries,
    query_tile,
    score_gradients,
    store_dkv,
    store_dq,
)
from ..tuning import TileConfig, tile_config
from . import by_block
from .forward import block_steps, entry_keys, entry_row, load_entry, union_steps
from .unions import Selection, Visitors, build_unions, find_visitors

# Bytes of partial sums held at once: the groups are taken in as many passes as that needs.
_WORKSPACE_BYTES = 256 << 20


@triton.jit
def _dq_steps(
    first, last, steps, dq, dq_tail, q, q_tail, do, do_tail, shift, delta, bit, limit, group, num_keys, scale_log2,
    entries_ptr, k_ptr, v_ptr, k_stride_s, v_stride_s, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    MASKED: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add steps ``first .. last`` of the union to dq, which still lacks the factor scale."""
    CUT: tl.constexpr = MASKED or PARTS * KEYS > BLOCK
    entry = load_entry(entries_ptr, first, steps, PARTS)
    for step in tl.range(first, last):
        following = load_entry(entries_ptr, step + 1, steps, PARTS)
        row = entry_row(entry, step, KEYS, PARTS)
        picked = ((entry >> bit) & 1) != 0
        key, keep = entry_keys(row, step, num_keys, BLOCK, KEYS, PARTS, MASKED)
        if BULK:
            k, k_tail = load_bulk(k_tiles, k_tail_tiles, row, group, KEYS, DK_HEAD, DK_TAIL)
            v, v_tail = load_bulk(v_tiles, v_tail_tiles, row, group, KEYS, DV_HEAD, DV_TAIL)
        else:
            k, k_tail = load_wide(k_ptr, key.to(tl.int64) * k_stride_s, keep, DK_HEAD, DK_TAIL, DK, CUT)
            v, v_tail = load_wide(v_ptr, key.to(tl.int64) * v_stride_s, keep, DV_HEAD, DV_TAIL, DV, CUT)
        chosen_shift = tl.where(picked, shift, float("inf"))
        ds = score_gradients(
            q, q_tail, do, do_tail, k, k_tail, v, v_tail, chosen_shift, delta, scale_log2, DK_TAIL, DV_TAIL, PRECISION
        )
        if MASKED:
            ds = tl.where((key[None, :] <= limit[:, None]) & keep[None, :], ds, 0.0)
        elif CUT:
            ds = tl.where(keep[None, :], ds, 0.0)
        dq, dq_tail = add_score_gradients(dq, dq_tail, ds, k, k_tail, DK_TAIL, PRECISION)
        entry = following
    return dq, dq_tail


@triton.jit
def add_selected_dq(
    dq, dq_tail, q, q_tail, do, do_tail, tile, token, head, valid, group, num_keys, scale_log2,
    k_ptr, v_ptr, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles, k_stride_s, k_stride_g, v_stride_s, v_stride_g,
    shift_ptr, delta_ptr, entries_ptr, counts_ptr, position_ptr, key_start_ptr,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A query tile's dq (which still lacks the factor scale) with the blocks that its tokens chose added."""
    stats = token.to(tl.int64) * (GROUPS * HEADS) + head
    shift = load_shift(shift_ptr, stats, valid)
    delta = tl.load(delta_ptr + stats)
    limit = tl.load(key_start_ptr + token) + tl.load(position_ptr + token)
    entries_ptr, steps, full_steps = union_steps(entries_ptr, counts_ptr, tile, group, GROUPS, ENTRIES, PARTS)
    bit = token - tile * TOKENS
    k_ptr += group.to(tl.int64) * k_stride_g
    v_ptr += group.to(tl.int64) * v_stride_g
    dq, dq_tail = _dq_steps(
        0, full_steps, steps, dq, dq_tail, q, q_tail, do, do_tail, shift, delta, bit, limit, group, num_keys, scale_log2,
        entries_ptr, k_ptr, v_ptr, k_stride_s, v_stride_s, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles,
        DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, BLOCK, KEYS, PARTS, False, BULK, PRECISION,
    )  # fmt: skip
    return _dq_steps(
        full_steps, steps, steps, dq, dq_tail, q, q_tail, do, do_tail, shift, delta, bit, limit, group, num_keys, scale_log2,
        entries_ptr, k_ptr, v_ptr, k_stride_s, v_stride_s, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles,
        DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, BLOCK, KEYS, PARTS, True, False, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_keys"])
def selected_attention_backward_dq_kernel(
    q_ptr, do_ptr, dq_ptr, k_ptr, v_ptr, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles, shift_ptr, delta_ptr,
    entries_ptr, counts_ptr, position_ptr, key_start_ptr,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h, dq_stride_t, dq_stride_h,
    k_stride_s, k_stride_g, v_stride_s, v_stride_g, num_tokens, num_keys, scale, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one group."""
    tile, group, token, head, valid, q, q_tail, do, do_tail = query_tile(
        q_ptr, do_ptr, q_stride_t, q_stride_h, do_stride_t, do_stride_h, num_tokens,
        GROUPS, HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS,
    )  # fmt: skip
    dq, dq_tail = zeros_wide(ROWS, DK_HEAD, DK_TAIL)
    dq, dq_tail = add_selected_dq(
        dq, dq_tail, q, q_tail, do, do_tail, tile, token, head, valid, group, num_keys, scale_log2,
        k_ptr, v_ptr, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles, k_stride_s, k_stride_g, v_stride_s, v_stride_g,
        shift_ptr, delta_ptr, entries_ptr, counts_ptr, position_ptr, key_start_ptr,
        GROUPS, HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, ENTRIES, BLOCK, KEYS, PARTS, TOKENS, BULK, PRECISION,
    )  # fmt: skip
    store_dq(dq_ptr, dq, dq_tail, token, head, valid, dq_stride_t, dq_stride_h, scale, DK, DK_HEAD, DK_TAIL)


@triton.jit
def _dkv_range(
    first, last, end, dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, key, group, scale_log2,
    q_ptr, do_ptr, shift_ptr, delta_ptr, queries_ptr, position_ptr, key_start_ptr,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the list entries ``first .. last`` of a work item that ends at ``end``, TOKENS at a time."""
    row = tl.arange(0, ROWS)
    head = (group * HEADS + row % HEADS).to(tl.int64)
    index = first + row // HEADS
    # One tile ahead, so that the addresses of a tile's rows are known when their copies are to start.
    token = tl.load(queries_ptr + index, mask=(row < TOKENS * HEADS) & (index < end), other=0)
    for entry in tl.range(first, last, TOKENS):
        valid = (row < TOKENS * HEADS) & (entry + row // HEADS < end)
        index = entry + TOKENS + row // HEADS
        following = tl.load(queries_ptr + index, mask=(row < TOKENS * HEADS) & (index < end), other=0)
        if MASKED:
            limit = tl.load(key_start_ptr + token) + tl.load(position_ptr + token)
            visible = key[:, None] <= limit[None, :]
        else:
            visible = valid[None, :]
        q, q_tail, do, do_tail, shift, delta = load_queries(
            token, head, valid, q_ptr, do_ptr, shift_ptr, delta_ptr, q_stride_t, q_stride_h, do_stride_t, do_stride_h,
            GROUPS * HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL,
        )  # fmt: skip
        dk, dk_tail, dv, dv_tail = add_queries(
            dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q, q_tail, do, do_tail, shift, delta, visible, scale_log2,
            DK_TAIL, DV_TAIL, MASKED, PRECISION,
        )  # fmt: skip
        token = following
    return dk, dk_tail, dv, dv_tail


@triton.jit
def _block_rows(block, first, block_start_ptr, num_blocks, num_keys, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows ``first .. first + ROWS`` of a block, and which of them are its own.

    A document's last block may be cut short by the next document's first.
    """
    start = tl.load(block_start_ptr + block)
    following = tl.load(block_start_ptr + block + 1, mask=block + 1 < num_blocks, other=num_keys)
    within = first + tl.arange(0, ROWS)
    key = start + within
    return key, (within < BLOCK) & (key < tl.minimum(following, num_keys))


@triton.jit(do_not_specialize=["num_keys", "num_blocks", "chunk", "first_group", "last_group", "base_group"])
def selected_attention_backward_dkv_kernel(
    q_ptr, do_ptr, k_ptr, v_ptr, shift_ptr, delta_ptr, dk_ptr, dv_ptr, dk_parts_ptr, dv_parts_ptr,
    queries_ptr, offsets_ptr, item_offsets_ptr, slot_offsets_ptr, item_lists_ptr, block_start_ptr, position_ptr, key_start_ptr,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h, k_stride_s, k_stride_g, v_stride_s, v_stride_g,
    num_keys, num_blocks, chunk, first_group, last_group, base_group, scale, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: KEYS rows of one block against one work item of the queries that chose it.

    Lists are those of groups first_group .. last_group; the tensors' first group is group base_group of the lists.
    The host launches as many as there could be; those past the last item repeat an existing one without queries or stores.
    """
    last_list = last_group * num_blocks - 1
    item = tl.load(item_offsets_ptr + first_group * num_blocks) + tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    wanted = tl.load(item_lists_ptr + item)
    visit = tl.minimum(wanted, last_list)
    group = visit // num_blocks - base_group
    key, own = _block_rows(visit % num_blocks, part * KEYS, block_start_ptr, num_blocks, num_keys, BLOCK, KEYS)
    own = own & (wanted == visit)
    offset = key.to(tl.int64)
    k, k_tail = load_wide(k_ptr + group.to(tl.int64) * k_stride_g, offset * k_stride_s, own, DK_HEAD, DK_TAIL, DK, True)
    v, v_tail = load_wide(v_ptr + group.to(tl.int64) * v_stride_g, offset * v_stride_s, own, DV_HEAD, DV_TAIL, DV, True)

    number = item - tl.load(item_offsets_ptr + visit)
    list_first = tl.load(offsets_ptr + visit)
    first = list_first + number * chunk
    last = tl.minimum(first + chunk, tl.load(offsets_ptr + visit + 1))
    last = tl.where(wanted == visit, last, first)
    # The only queries before the block's end are its own, at most BLOCK; a list in ascending order has them first.
    masked = tl.maximum(tl.minimum(list_first + BLOCK, last) - first, 0)
    full_first = first + tl.cdiv(masked, TOKENS) * TOKENS
    dk, dk_tail = zeros_wide(KEYS, DK_HEAD, DK_TAIL)
    dv, dv_tail = zeros_wide(KEYS, DV_HEAD, DV_TAIL)
    dk, dk_tail, dv, dv_tail = _dkv_range(
        first, tl.minimum(full_first, last), last, dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, key, group, scale_log2,
        q_ptr, do_ptr, shift_ptr, delta_ptr, queries_ptr, position_ptr, key_start_ptr,
        q_stride_t, q_stride_h, do_stride_t, do_stride_h,
        GROUPS, HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS, True, PRECISION,
    )  # fmt: skip
    dk, dk_tail, dv, dv_tail = _dkv_range(
        full_first, last, last, dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, key, group, scale_log2,
        q_ptr, do_ptr, shift_ptr, delta_ptr, queries_ptr, position_ptr, key_start_ptr,
        q_stride_t, q_stride_h, do_stride_t, do_stride_h,
        GROUPS, HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS, False, PRECISION,
    )  # fmt: skip

    dk, dk_tail = dk * scale, dk_tail * scale
    if tl.load(item_offsets_ptr + visit + 1) - tl.load(item_offsets_ptr + visit) == 1:
        row = offset * GROUPS + group
        store_dkv(dk_ptr, dv_ptr, row, own, dk, dk_tail, dv, dv_tail, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL)
    else:
        slot = tl.load(slot_offsets_ptr + visit) - tl.load(slot_offsets_ptr + first_group * num_blocks) + number
        row = slot.to(tl.int64) * (PARTS * KEYS) + part * KEYS + tl.arange(0, KEYS)
        store_dkv(dk_parts_ptr, dv_parts_ptr, row, own, dk, dk_tail, dv, dv_tail, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL)


@triton.jit(do_not_specialize=["num_keys", "num_blocks", "first_group", "base_group"])
def selected_attention_backward_add_kernel(
    dk_ptr, dv_ptr, dk_parts_ptr, dv_parts_ptr, item_offsets_ptr, slot_offsets_ptr, block_start_ptr,
    num_keys, num_blocks, first_group, base_group,
    GROUPS: tl.constexpr, DK: tl.constexpr, DK_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, SLOT_ROWS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one block whose list was split; adds its partial sums in list order."""
    first_list = first_group * num_blocks
    visit = first_list + tl.program_id(0) // (SLOT_ROWS // ROWS)
    first = tl.program_id(0) % (SLOT_ROWS // ROWS) * ROWS
    items = tl.load(item_offsets_ptr + visit + 1) - tl.load(item_offsets_ptr + visit)
    if items > 1:
        group = visit // num_blocks - base_group
        key, own = _block_rows(visit % num_blocks, first, block_start_ptr, num_blocks, num_keys, BLOCK, ROWS)
        slot = tl.load(slot_offsets_ptr + visit) - tl.load(slot_offsets_ptr + first_list)
        dk = tl.zeros([ROWS, DK_PADDED], dtype=tl.float32)
        dv = tl.zeros([ROWS, DV_PADDED], dtype=tl.float32)
        for item in tl.range(0, items):
            row = (slot + item).to(tl.int64) * SLOT_ROWS + first + tl.arange(0, ROWS)
            dk += load_tile(dk_parts_ptr, row * DK, own, 0, DK_PADDED, DK, True)
            dv += load_tile(dv_parts_ptr, row * DV, own, 0, DV_PADDED, DV, True)
        row = key.to(tl.int64) * GROUPS + group
        store_tile(dk_ptr, row * DK, own, dk, 0, DK_PADDED, DK)
        store_tile(dv_ptr, row * DV, own, dv, 0, DV_PADDED, DV)


def selected_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    selection: Selection,
    scale: float,
    *,
    dq_config: TileConfig | None = None,
    dkv_config: TileConfig | None = None,
    chunk: int | None = None,
    workspace_bytes: int = _WORKSPACE_BYTES,
    bulk: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`..forward.selected_attention_forward`.

    Args:
        q, k, v, selection, scale: as in the forward.
        do: [T, N, Dv], upstream gradient without the gate.
        shift, delta: float32 [T, N], as in the backward of interval attention.
        dq_config, dkv_config: tile shapes instead of the table's.
        chunk: largest number of queries in a work item.
        workspace_bytes: budget of the partial sums of split lists; groups are taken in as many passes as that requires.
        bulk: whether to fetch keys and values by the copy engine; None: where it can.

    Returns:
        ``dq`` [T, N, Dk], ``dk`` [S, G, Dk], ``dv`` [S, G, Dv], float32. The same inputs give the same bits.

    Raises:
        ValueError: as the forward.
    """
    heads = check_heads(q.shape[1], v.shape[1])
    if scale <= 0:
        raise ValueError(f"scale = {scale} must be positive")
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    if len(q) == 0:
        return dq, dq.new_zeros(k.shape), dq.new_zeros(v.shape)
    q, k, v, do = channels_last(q), channels_last(k), channels_last(v), channels_last(do)
    few = heads <= by_block.MOST_HEADS_DQ and by_block.fits(selection.block_size, k, v)
    if dq_config is None and bulk is None and few:
        by_block.query_gradients(q, k, v, do, shift, delta, selection, scale, dq)
    else:
        _query_gradients(q, k, v, do, shift, delta, selection, scale, dq, dq_config, bulk)
    visitors = find_visitors(selection, chunk)
    dk, dv = selected_attention_backward_dkv(
        q, k, v, do, shift, delta, selection, visitors, scale, config=dkv_config, workspace_bytes=workspace_bytes
    )
    return dq, dk, dv


def _query_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    selection: Selection,
    scale: float,
    dq: torch.Tensor,
    config: TileConfig | None,
    bulk: bool | None,
) -> None:
    """Write dq of the selected branch alone, by unions, to ``dq``."""
    (tokens, num_heads, dk_width), (num_keys, groups, dv_width) = q.shape, v.shape
    heads = num_heads // groups
    config = config or tile_config("selected_dq", q.dtype, q.device, heads, max(dk_width, dv_width))
    unions = build_unions(selection, config.tokens(heads))
    block_size = selection.block_size
    keys, parts = block_steps(block_size, config.keys)
    bulk = keys * parts == block_size and (copies_in_bulk(k, v) if bulk is None else bulk)
    selected_attention_backward_dq_kernel[(unions.counts.shape[0] * groups,)](
        q, do, dq, *key_arguments(k, v, keys, bulk), shift.contiguous(), delta.contiguous(),
        unions.entries, unions.counts, selection.position, selection.key_start,
        *q.stride()[:2], *do.stride()[:2], *dq.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        tokens, num_keys, scale, scale * LOG2_E.value,
        ENTRIES=unions.entries.shape[-1], BLOCK=block_size, KEYS=keys, PARTS=parts, TOKENS=unions.tile_tokens,
        ROWS=config.rows, BULK=bulk, **widths(groups, heads, dk_width, dv_width),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def selected_attention_backward_dkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    selection: Selection,
    visitors: Visitors,
    scale: float,
    *,
    base_group: int = 0,
    config: TileConfig | None = None,
    workspace_bytes: int = _WORKSPACE_BYTES,
    hopper: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk [S, G, Dk] and dv [S, G, Dv] of :func:`selected_attention_backward`, float32.

    Args:
        selection: as in the forward; its ``blocks`` are not read.
        visitors: the queries that chose each block, for these G groups or for more.
        base_group: index, among the groups of ``visitors``, of the first group here.
        hopper: let ``hopper_backward.py`` do it where it can, unless ``config`` is given.
    """
    (tokens, num_heads, dk_width), (num_keys, groups, dv_width) = q.shape, v.shape
    heads = check_heads(num_heads, groups)
    # Zeros, because rows of documents without queries here are in no list.
    dk = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
    dv = torch.zeros(v.shape, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return dk, dv
    q, k, v, do = channels_last(q), channels_last(k), channels_last(v), channels_last(do)
    shift, delta, block_size = shift.contiguous(), delta.contiguous(), selection.block_size
    hopper = hopper and config is None and on_hopper(q.device)
    if hopper:
        from . import hopper_backward

        hopper = hopper_backward.takes(q, k, v, do, block_size)
    config = config or tile_config("selected_dkv", q.dtype, q.device, heads, max(dk_width, dv_width))
    keys, parts = (block_size, 1) if hopper else block_steps(block_size, config.keys)
    passes, dk_parts, dv_parts = _plan_passes(visitors, groups, keys * parts, dk_width, dv_width, workspace_bytes)
    for start, stop in passes:
        first, last = base_group + start, base_group + stop
        outputs = (dk, dv, dk_parts, dv_parts)
        if hopper:
            groups_taken = (first, last, base_group)
            hopper_backward.launch_items(q, k, v, do, shift, delta, outputs, selection, visitors, groups_taken, scale)
        else:
            selected_attention_backward_dkv_kernel[((last - first) * visitors.items_per_group * parts,)](
                q, do, k, v, shift, delta, *outputs,
                visitors.queries, visitors.offsets, visitors.item_offsets, visitors.slot_offsets, visitors.item_lists,
                selection.block_start, selection.position, selection.key_start,
                *q.stride()[:2], *do.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                num_keys, visitors.num_blocks, visitors.chunk, first, last, base_group, scale, scale * LOG2_E.value,
                BLOCK=block_size, KEYS=keys, PARTS=parts, TOKENS=config.tokens(heads), ROWS=config.rows,
                **widths(groups, heads, dk_width, dv_width), num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
        selected_attention_backward_add_kernel[((last - first) * visitors.num_blocks * (keys * parts // 16),)](
            dk, dv, dk_parts, dv_parts, visitors.item_offsets, visitors.slot_offsets, selection.block_start,
            num_keys, visitors.num_blocks, first, base_group,
            GROUPS=groups, DK=dk_width, DK_PADDED=triton.next_power_of_2(dk_width), DV=dv_width,
            DV_PADDED=triton.next_power_of_2(dv_width), BLOCK=block_size, SLOT_ROWS=keys * parts, ROWS=16,
        )  # fmt: skip
    return dk, dv


def _plan_passes(
    visitors: Visitors, groups: int, slot_rows: int, dk_width: int, dv_width: int, workspace_bytes: int
) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]:
    """Ranges of groups whose partial sums fit in the workspace together, at least one group each, and the workspace (dk, dv)."""
    slot_bytes = slot_rows * (dk_width + dv_width) * 4
    at_once = max(1, min(groups, workspace_bytes // max(1, visitors.slots_per_group * slot_bytes)))
    slots, device = at_once * visitors.slots_per_group, visitors.queries.device
    dk_parts = torch.empty(slots, slot_rows, dk_width, dtype=torch.float32, device=device)
    dv_parts = torch.empty(slots, slot_rows, dv_width, dtype=torch.float32, device=device)
    return [(first, min(first + at_once, groups)) for first in range(0, groups, at_once)], dk_parts, dv_parts
