"""dq of the three branches for Hopper: warp groups that share fetched keys and never wait for each other.

One program: 2 x 64 query rows (tokens times heads of one K/V group). Each warp group owns 64 rows and their dq; one more
warp fetches tiles of 64 keys and values into a ring (see ``kernels/hopper.py``): first the window's, then the compressed tokens',
then the blocks of the union of all the program's tokens. A warp group of whose rows none sees a tile releases it at once. The
very first tiles are the warp groups' q and do, which move to registers. If q and k have a tail (128 + 64 columns), registers have
no room for do beside both parts of q and dq: do then stays in shared memory of its own, from where every product reads it.

Per tile and warp group: issue S = Q K^T and dP = dO V^T; the exponentials run while dP does, and beside the other warp group's
products; dq += dS K.

If ``interval_attention/hopper_fused_backward.py`` has made the compressed branch's dq already, a warp group starts from its tile
of that buffer, [16, 128, 4] floats in the order of its own registers, and compressed tokens are not fetched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common import INT_MAX, LOG2_E, split_width
from ..hopper import fetchable, pair_tiles
from ..rings import again, fetch_tile, make_barriers, thread_barrier
from ..selected_attention.unions import Selection, build_unions

ROWS = gl.constexpr(64)  # of a warp group
KEYS = gl.constexpr(64)  # of a tile
WARP_GROUPS = gl.constexpr(2)
_SLOTS = 4


@gluon.jit
def fetch_keys(
    descs, key, group, count, ring, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tile number ``count`` of the sequence: keys ``key .. key + KEYS``."""
    kv_rings, full, empty = ring
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), KEYS * (DK_HEAD + DK_TAIL + DV) * 2)
    fetch_tile(descs, kv_rings, slot, key, group, full.index(slot), DK_HEAD, DK_TAIL)
    return count + 1


@gluon.jit
def fetch(
    q_descs, win_descs, cmp_descs, slc_descs, ring, do_smem, ranges, entries_ptr, token, group,
    TOKENS: gl.constexpr, HEADS: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, BEGUN: gl.constexpr,
):  # fmt: skip
    """The fetching warp."""
    win_start, win_stop, cmp_start, cmp_stop, slc_stop, steps, full_steps = ranges
    kv_rings, full, empty = ring
    k_ring, k_tail_ring, v_ring = kv_rings
    # The first tiles of the sequence are each warp group's q and do.
    for part in gl.static_range(WARP_GROUPS):
        mbarrier.expect(full.index(part), ROWS * (DK_HEAD + DK_TAIL + DV) * 2)
        place = token + part * TOKENS
        fetch_tile(q_descs, (k_ring, k_tail_ring, do_smem), part, place, group * HEADS, full.index(part), DK_HEAD, DK_TAIL)
    count = gl.to_tensor(WARP_GROUPS)
    for key in range(win_start // KEYS * KEYS, win_stop, KEYS):
        count = fetch_keys(win_descs, key, group, count, ring, DK_HEAD, DK_TAIL, DV, STAGES)
    if not BEGUN:
        for key in range(cmp_start // KEYS * KEYS, cmp_stop, KEYS):
            count = fetch_keys(cmp_descs, key, group, count, ring, DK_HEAD, DK_TAIL, DV, STAGES)
    entry = gl.load(entries_ptr)
    for step in range(steps):
        following = gl.load(entries_ptr + gl.minimum(step + 1, steps - 1))
        count = fetch_keys(slc_descs, (entry >> 32).to(gl.int32), group, count, ring, DK_HEAD, DK_TAIL, DV, STAGES)
        entry = following


@gluon.jit
def clear_hidden(tile, key, start, stop, WIDTH: gl.constexpr):
    """Zero the rows of a key or value tile outside ``start .. stop``: products add them up times 0, and they may not be finite.

    Every warp group that uses the tile does it; all write the same, and rows that any query sees keep their bytes.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    row = key + gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    keep = ((row >= start) & (row < stop))[:, None]
    tile.store(gl.where(keep, tile.load(LAYOUT), gl.zeros([KEYS, WIDTH], tile.dtype, LAYOUT)))


@gluon.jit
def add_tile(
    dq, dq_tail, rows, ring, slot, key, shift, delta, begin, end, whole, start, stop, scale_log2,
    S_LAYOUT: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """dq + dS K of one key tile; row r sees the keys ``begin[r] .. end[r]``, all of them if ``whole``."""
    q, q_tail, do, part = rows
    kv_rings, full, empty = ring
    k_ring, k_tail_ring, v_ring = kv_rings
    k = k_ring.index(slot).reshape([KEYS, DK_HEAD])
    k_tail = k_tail_ring.index(slot).reshape([KEYS, DK_TAIL]) if DK_TAIL > 0 else k
    v = v_ring.index(slot).reshape([KEYS, DV])
    if (key < start) | (key + KEYS > stop):
        clear_hidden(k, key, start, stop, DK_HEAD)
        if DK_TAIL > 0:
            clear_hidden(k_tail, key, start, stop, DK_TAIL)
        clear_hidden(v, key, start, stop, DV)
        fence_async_shared()
        thread_barrier()
    if DK_TAIL > 0:
        do = do.index(again(part)).reshape([ROWS, DV])
    nothing = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k.permute([1, 0]), nothing, use_acc=False, is_async=True)
    if DK_TAIL > 0:
        s = warpgroup_mma(q_tail, k_tail.permute([1, 0]), s, is_async=True)
    dp = warpgroup_mma(do, v.permute([1, 0]), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale_log2 - shift[:, None])
    column = key + gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
    # The branch also keeps ptxas from moving the exponentials behind the wait.
    if not whole:
        p = gl.where((column[None, :] >= begin[:, None]) & (column[None, :] < end[:, None]), p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    dq = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, dq.type.layout, 2)), k, dq, is_async=True)
    if DK_TAIL > 0:
        ds = gl.convert_layout(ds, gl.DotOperandLayout(0, dq_tail.type.layout, 2))
        dq_tail = warpgroup_mma(ds, k_tail, dq_tail, is_async=True)
        dq, dq_tail = warpgroup_mma_wait(0, deps=[dq, dq_tail])
    else:
        dq = warpgroup_mma_wait(0, deps=[dq])
    return dq, dq_tail


@gluon.jit
def add_interval(
    dq, dq_tail, count, rows, ring, shift, delta, begin, end, start, stop, scale_log2,
    S_LAYOUT: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq over the key tiles of ``start .. stop``, what any row of the program sees; row r sees ``begin[r] .. end[r]``."""
    kv_rings, full, empty = ring
    some = begin < end
    seen_first = gl.min(gl.where(some, begin, INT_MAX), 0)
    seen_last = gl.max(gl.where(some, end, 0), 0)
    whole_first = gl.max(begin, 0)
    whole_last = gl.min(end, 0)
    for key in range(start // KEYS * KEYS, stop, KEYS):
        slot = count % STAGES
        mbarrier.wait(full.index(slot), (count // STAGES) & 1)
        if (key < seen_last) & (key + KEYS > seen_first):
            dq, dq_tail = add_tile(
                dq, dq_tail, rows, ring, slot, key, shift, delta, begin, end,
                (key >= whole_first) & (key + KEYS <= whole_last), start, stop, scale_log2, S_LAYOUT, DK_HEAD, DK_TAIL, DV,
            )  # fmt: skip
        mbarrier.arrive(empty.index(slot))
        count += 1
    return dq, dq_tail, count


@gluon.jit
def statistics(branch, stats, valid):
    """Shift in base 2, +inf for rows that do not exist, and delta."""
    shift_ptr, delta_ptr = branch
    shift = gl.load(shift_ptr + stats, mask=valid, other=float("inf")) * LOG2_E
    return shift, gl.load(delta_ptr + stats, mask=valid, other=0.0)


@gluon.jit
def store(dq_ptr, x, column, first_token, group, num_tokens, stride_t, stride_h, HEADS: gl.constexpr):
    """``x`` to columns ``column ..`` of a warp group's rows of dq."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, x.type.layout))
    token = first_token + row // HEADS
    offset = token.to(gl.int64) * stride_t + (group * HEADS + row % HEADS).to(gl.int64) * stride_h
    columns = column + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    gl.store(dq_ptr + offset[:, None] + columns[None, :], x.to(dq_ptr.dtype.element_ty), mask=(token < num_tokens)[:, None])


@gluon.jit
def load_begun(begun_ptr, number, LAYOUT: gl.constexpr):
    """Tile ``number`` of the buffer, [ROWS, 128] in LAYOUT, whose registers lie there in order: quad b of thread i at
    (128 b + i) * 4."""
    FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    flat = gl.load(begun_ptr + number.to(gl.int64) * (ROWS * 128) + gl.arange(0, ROWS * 128, FLAT))
    # Block of 8 columns, warp, row of 8, pair of columns, upper or lower 8 rows, column of the pair.
    tile = flat.reshape([16, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5]).reshape([ROWS, 128])
    return gl.convert_layout(tile, LAYOUT, assert_trivial=True)


@gluon.jit
def consume(
    PART: gl.constexpr, ring, do_smem, ranges, win_stats, cmp_stats, slc_stats, row_pointers, entries_ptr,
    begun_ptr, dq_ptr, dq_stride_t, dq_stride_h, first_token, group, num_tokens, scale, scale_log2,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, TOKENS: gl.constexpr,
    DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, BEGUN: gl.constexpr,
):  # fmt: skip
    """A warp group: 64 query rows against all tiles."""
    # Without a tail dq_tail is a stand-in that nothing reads.
    TAIL: gl.constexpr = DK_TAIL if DK_TAIL > 0 else DK_HEAD
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    win_start, win_stop, cmp_start, cmp_stop, slc_stop, steps, full_steps = ranges
    win_begin_ptr, win_end_ptr, cmp_begin_ptr, cmp_end_ptr, position_ptr, key_start_ptr = row_pointers
    kv_rings, full, empty = ring
    k_ring, k_tail_ring, v_ring = kv_rings

    first_token += PART * TOKENS
    row = gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    wanted = first_token + row // HEADS
    token = gl.minimum(wanted, num_tokens - 1)
    stats = token.to(gl.int64) * (GROUPS * HEADS) + group * HEADS + row % HEADS
    valid = wanted < num_tokens

    for part in gl.static_range(WARP_GROUPS):
        mbarrier.wait(full.index(part), 0)
        if part == PART:
            q = k_ring.index(part).reshape([ROWS, DK_HEAD]).load(OPERAND)
            q_tail = k_tail_ring.index(part).reshape([ROWS, DK_TAIL]).load(OPERAND) if DK_TAIL > 0 else q
            do = do_smem if DK_TAIL > 0 else do_smem.index(part).reshape([ROWS, DV]).load(OPERAND)
        mbarrier.arrive(empty.index(part))
    rows = (q, q_tail, do, gl.to_tensor(PART))
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK_HEAD, 16])
    if BEGUN:
        # Without rows of its own a warp group takes the last tile, and stores nothing.
        number = group * gl.cdiv(num_tokens, TOKENS) + gl.minimum(first_token, num_tokens - 1) // TOKENS
        dq = load_begun(begun_ptr, number, DQ_LAYOUT)
    else:
        dq = gl.zeros([ROWS, DK_HEAD], gl.float32, DQ_LAYOUT)
    dq_tail = gl.zeros([ROWS, TAIL], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 16]))
    shift, delta = statistics(win_stats, stats, valid)
    dq, dq_tail, count = add_interval(
        dq, dq_tail, gl.to_tensor(WARP_GROUPS), rows, ring, shift, delta, gl.load(win_begin_ptr + token),
        gl.load(win_end_ptr + token), win_start, win_stop, scale_log2, S_LAYOUT, DK_HEAD, DK_TAIL, DV, STAGES,
    )  # fmt: skip
    if not BEGUN:
        shift, delta = statistics(cmp_stats, stats, valid)
        dq, dq_tail, count = add_interval(
            dq, dq_tail, count, rows, ring, shift, delta, gl.load(cmp_begin_ptr + token), gl.load(cmp_end_ptr + token),
            cmp_start, cmp_stop, scale_log2, S_LAYOUT, DK_HEAD, DK_TAIL, DV, STAGES,
        )  # fmt: skip

    shift, delta = statistics(slc_stats, stats, valid)
    limit = gl.load(key_start_ptr + token) + gl.load(position_ptr + token) + 1
    entry = gl.load(entries_ptr)
    for step in range(steps):
        following = gl.load(entries_ptr + gl.minimum(step + 1, steps - 1))
        slot = count % STAGES
        mbarrier.wait(full.index(slot), (count // STAGES) & 1)
        bits = (entry.to(gl.int32) >> (PART * TOKENS)) & ((1 << TOKENS) - 1)
        if bits != 0:
            picked = ((bits >> (row // HEADS)) & 1) != 0
            dq, dq_tail = add_tile(
                dq, dq_tail, rows, ring, slot, (entry >> 32).to(gl.int32),
                gl.where(picked, shift, float("inf")), delta, limit * 0, limit, step < full_steps, 0, slc_stop,
                scale_log2, S_LAYOUT, DK_HEAD, DK_TAIL, DV,
            )  # fmt: skip
        mbarrier.arrive(empty.index(slot))
        count += 1
        entry = following

    store(dq_ptr, dq * scale, 0, first_token, group, num_tokens, dq_stride_t, dq_stride_h, HEADS)
    if DK_TAIL > 0:
        store(dq_ptr, dq_tail * scale, DK_HEAD, first_token, group, num_tokens, dq_stride_t, dq_stride_h, HEADS)


@gluon.jit
def seen_range(begin_ptr, end_ptr, token):
    """The keys that any of these tokens sees."""
    begin = gl.load(begin_ptr + token)
    end = gl.load(end_ptr + token)
    some = begin < end
    stop = gl.max(gl.where(some, end, 0), 0)
    return gl.minimum(gl.min(gl.where(some, begin, INT_MAX), 0), stop), stop


@gluon.jit(do_not_specialize=["num_tokens"])
def query_gradients_hopper_kernel(
    q_desc, q_tail_desc, do_desc, win_k, win_k_tail, win_v, cmp_k, cmp_k_tail, cmp_v, slc_k, slc_k_tail, slc_v,
    begun_ptr, dq_ptr, dq_stride_t, dq_stride_h,
    win_shift_ptr, win_delta_ptr, cmp_shift_ptr, cmp_delta_ptr, slc_shift_ptr, slc_delta_ptr,
    win_begin_ptr, win_end_ptr, cmp_begin_ptr, cmp_end_ptr, entries_ptr, counts_ptr, position_ptr, key_start_ptr,
    num_tokens, scale, scale_log2,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
    TOKENS: gl.constexpr, ENTRIES: gl.constexpr, STAGES: gl.constexpr, BEGUN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Groups one after the other, so that one group's keys and values stay in the cache; late tiles, which see most, first."""
    num_tiles = gl.cdiv(num_tokens, WARP_GROUPS * TOKENS)
    tile = num_tiles - 1 - gl.program_id(0) % num_tiles
    group = gl.program_id(0) // num_tiles
    first_token = tile * (WARP_GROUPS * TOKENS)

    place: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    token = gl.minimum(first_token + gl.minimum(gl.arange(0, 128, place), WARP_GROUPS * TOKENS - 1), num_tokens - 1)
    win_start, win_stop = seen_range(win_begin_ptr, win_end_ptr, token)
    cmp_start, cmp_stop = seen_range(cmp_begin_ptr, cmp_end_ptr, token)
    slc_stop = gl.max(gl.load(key_start_ptr + token) + gl.load(position_ptr + token), 0) + 1
    union = tile.to(gl.int64) * GROUPS + group
    entries_ptr += union * ENTRIES
    steps = gl.load(counts_ptr + union * 2)
    full_steps = gl.load(counts_ptr + union * 2 + 1)
    ranges = (win_start, win_stop, cmp_start, cmp_stop, slc_stop, steps, full_steps)

    dtype: gl.constexpr = q_desc.dtype
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, KEYS, 1, DK_HEAD], win_k.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, KEYS, 1, DV], win_v.layout)
    if DK_TAIL > 0:
        k_tail_ring = gl.allocate_shared_memory(dtype, [STAGES, KEYS, 1, DK_TAIL], win_k_tail.layout)
        do_smem = gl.allocate_shared_memory(dtype, [WARP_GROUPS, TOKENS, HEADS, DV], do_desc.layout)
    else:
        k_tail_ring = k_ring
        do_smem = v_ring
    full = make_barriers(STAGES, 1)
    empty = make_barriers(STAGES, WARP_GROUPS)
    ring = ((k_ring, k_tail_ring, v_ring), full, empty)
    row_pointers = (win_begin_ptr, win_end_ptr, cmp_begin_ptr, cmp_end_ptr, position_ptr, key_start_ptr)
    win_stats = (win_shift_ptr, win_delta_ptr)
    cmp_stats = (cmp_shift_ptr, cmp_delta_ptr)
    slc_stats = (slc_shift_ptr, slc_delta_ptr)
    gl.warp_specialize(
        [
            (consume, (
                gl.constexpr(0), ring, do_smem, ranges, win_stats, cmp_stats, slc_stats, row_pointers,
                entries_ptr, begun_ptr, dq_ptr, dq_stride_t, dq_stride_h, first_token, group, num_tokens, scale, scale_log2,
                GROUPS, HEADS, TOKENS, DK_HEAD, DK_TAIL, DV, STAGES, BEGUN,
            )),
            (consume, (
                gl.constexpr(1), ring, do_smem, ranges, win_stats, cmp_stats, slc_stats, row_pointers,
                entries_ptr, begun_ptr, dq_ptr, dq_stride_t, dq_stride_h, first_token, group, num_tokens, scale, scale_log2,
                GROUPS, HEADS, TOKENS, DK_HEAD, DK_TAIL, DV, STAGES, BEGUN,
            )),
            (fetch, (
                (q_desc, q_tail_desc, do_desc), (win_k, win_k_tail, win_v), (cmp_k, cmp_k_tail, cmp_v),
                (slc_k, slc_k_tail, slc_v), ring, do_smem, ranges, entries_ptr, first_token, group,
                TOKENS, HEADS, DK_HEAD, DK_TAIL, DV, STAGES, BEGUN,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def takes(q: torch.Tensor, do: torch.Tensor, keys: Sequence[torch.Tensor], block_size: int) -> bool:
    """Whether :func:`query_gradients` can take these: widths of 64 or 128 (of q and k also 192), heads a group that are a power
    of two from 4 to 64 (the union's masks hold 32 tokens a tile), blocks of 64, all fetchable. ``keys``: k and v by branch."""
    heads = q.shape[1] // keys[0].shape[1]
    return (
        block_size == KEYS.value
        and q.shape[2] in (64, 128, 192)
        and do.shape[2] in (64, 128)
        and heads >= 4
        and ROWS.value % heads == 0
        and fetchable(q, do, *keys)
    )


def query_gradients(
    q: torch.Tensor,
    do: torch.Tensor,
    keys: list[torch.Tensor],
    statistics: list[torch.Tensor],
    ranges: tuple[torch.Tensor, ...],
    selection: Selection,
    scale: float,
    dq: torch.Tensor,
    begun: torch.Tensor | None = None,
) -> None:
    """As the Triton twin in ``backward.py``, for tensors for which :func:`takes` is true; writes to ``dq`` [T, N, Dk].

    Args:
        keys: k and v of the window, the compressed tokens and the selected branch.
        statistics: their shifts and deltas, contiguous, in the same order.
        ranges: begin and end of the rows that a query sees in the window, then of the compressed tokens that it sees.
        begun: float32 [G, tiles, 16, 128, 4], dq of the compressed branch as ``interval_attention_fused_backward`` returns it;
            that branch then adds nothing more.
    """
    (tokens, num_heads, dk), groups, dv = q.shape, keys[0].shape[1], do.shape[2]
    heads = num_heads // groups
    head, tail = split_width(dk)
    tile_tokens = ROWS.value // heads
    assert begun is None or (dk == 128 and begun.shape == (groups, triton.cdiv(tokens, tile_tokens), 16, 128, 4))
    unions = build_unions(selection, WARP_GROUPS.value * tile_tokens)
    query_gradients_hopper_kernel[(unions.counts.shape[0] * groups,)](
        *pair_tiles(q, do, tile_tokens, heads),
        *(part for branch in range(3) for part in pair_tiles(*keys[2 * branch : 2 * branch + 2], KEYS.value, 1)),
        begun, dq, *dq.stride()[:2], *statistics, *ranges,
        unions.entries, unions.counts, selection.position, selection.key_start, tokens, scale, scale * LOG2_E.value,
        GROUPS=groups, HEADS=heads, DK_HEAD=head, DK_TAIL=tail, DV=dv,
        TOKENS=tile_tokens, ENTRIES=unions.entries.shape[-1], STAGES=_SLOTS, BEGUN=begun is not None, num_warps=4,
    )  # fmt: skip
