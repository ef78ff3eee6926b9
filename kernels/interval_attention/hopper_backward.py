"""Interval attention, dk and dv, for Hopper: products run while the exponentials are taken.

One program: 128 keys of one group and a part of the queries. Two warp groups own 64 keys each and never wait for each other; one
more warp fetches q, do and the row statistics into a ring of STAGES slots, see ``kernels/hopper.py``.

Order within a warp group, for tile j (all products asynchronous, finished in the order of issue):

    issue S_j = K Q_j^T, dV += P_{j-1} dO_{j-1}, dK += dS_{j-1} Q_{j-1}
    wait for S_j alone;  P_j = exp2 while the other two run
    wait for both: slot j - 1 is free
    issue dP_j = V dO_j^T, wait for it;  dS_j = P_j (dP_j - delta), beside the other warp group's products

Where q and k have a tail (128 + 64 columns), each product with the head is followed by one with the tail; beside dk [64, 192] and
dv the registers have room for S and dP of 32 rows only.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..common import INT_MAX, LOG2_E, split_width
from ..hopper import fetchable, pair_tiles, tiles
from ..rings import again, fetch_tile, make_barriers
from .backward import ROWS_A_SUM, query_splits

# Keys of a warp group.
_KEYS = 64
# Query rows of a tile and slots of the ring, without a tail and with one.
_TILE, _TAIL_TILE = (64, 4), (32, 6)


@gluon.jit
def fetch(
    q_descs, k_descs, shift_desc, delta_desc, shared, first, last, key, group, group_rows,
    TOKENS: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """The fetching warp: K and V once, then tiles ``first .. last``."""
    keys, rings, stats_ring, bounds, kv_full, full, empty = shared
    ROW_BYTES: gl.constexpr = (DK_HEAD + DK_TAIL + DV) * 2
    if first < last:
        mbarrier.expect(kv_full, 2 * KEYS * ROW_BYTES)
        for half in gl.static_range(2):
            fetch_tile(k_descs, keys, half, key + half * KEYS, group, kv_full, DK_HEAD, DK_TAIL)
        for step in range(last - first):
            slot = step % STAGES
            bar = full.index(slot)
            token = (first + step) * TOKENS
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, ROWS * ROW_BYTES + 2 * shift_desc.block_type.nbytes)
            fetch_tile(q_descs, rings, slot, token, group * HEADS, bar, DK_HEAD, DK_TAIL)
            row = group * group_rows + token * HEADS
            tma.async_copy_global_to_shared(shift_desc, [row], bar, stats_ring.index(2 * slot))
            tma.async_copy_global_to_shared(delta_desc, [row], bar, stats_ring.index(2 * slot + 1))


@gluon.jit
def pass_on(step, last, full, empty, STAGES: gl.constexpr):
    """Steps ``step .. last``, which do not concern this warp group: its arrival must not count for the round before."""
    for skipped in range(step, last):
        mbarrier.wait(full.index(skipped % STAGES), (skipped // STAGES) & 1)
        mbarrier.arrive(empty.index(skipped % STAGES))


@gluon.jit
def transposed(tile, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """A tile [TOKENS, HEADS, WIDTH] in shared memory as [WIDTH, ROWS]."""
    return tile.reshape([ROWS, WIDTH]).permute([1, 0])


@gluon.jit
def issue_scores(
    keys, rings, half, slot, zero, ROWS: gl.constexpr, KEYS: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr,
):  # fmt: skip
    """K Q^T of the slot, left in flight."""
    k, k_tail, v = keys
    q_ring, q_tail_ring, do_ring = rings
    k = k.index(half).reshape([KEYS, DK_HEAD])
    s = warpgroup_mma(k, transposed(q_ring.index(slot), ROWS, DK_HEAD), zero, use_acc=False, is_async=True)
    if DK_TAIL > 0:
        k_tail = k_tail.index(half).reshape([KEYS, DK_TAIL])
        s = warpgroup_mma(k_tail, transposed(q_tail_ring.index(slot), ROWS, DK_TAIL), s, is_async=True)
    return s


@gluon.jit
def issue_gradients(
    p, ds, rings, slot, dv, dk, dk_tail,
    ROWS: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """dV + P dO and dK + dS Q of the slot, left in flight."""
    q_ring, q_tail_ring, do_ring = rings
    dv = warpgroup_mma(p, do_ring.index(slot).reshape([ROWS, DV]), dv, is_async=True)
    dk = warpgroup_mma(ds, q_ring.index(slot).reshape([ROWS, DK_HEAD]), dk, is_async=True)
    if DK_TAIL > 0:
        # As a first operand ds has the same registers whatever the width of the result.
        ds = gl.convert_layout(ds, gl.DotOperandLayout(0, dk_tail.type.layout, 2), assert_trivial=True)
        dk_tail = warpgroup_mma(ds, q_tail_ring.index(slot).reshape([ROWS, DK_TAIL]), dk_tail, is_async=True)
    return dv, dk, dk_tail


@gluon.jit
def finish_gradients(dv, dk, dk_tail, DK_TAIL: gl.constexpr):
    """Wait for all products."""
    if DK_TAIL > 0:
        dv, dk, dk_tail = warpgroup_mma_wait(0, deps=[dv, dk, dk_tail])
    else:
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
    return dv, dk, dk_tail


@gluon.jit
def hide(wide, token, bounds, half):
    """``wide`` with 0 where a query is not between a key's bounds."""
    q_begin = bounds.index(2 * half).load(gl.SliceLayout(1, wide.type.layout))
    q_end = bounds.index(2 * half + 1).load(gl.SliceLayout(1, wide.type.layout))
    return gl.where((token[None, :] >= q_begin[:, None]) & (token[None, :] < q_end[:, None]), wide, 0.0)


@gluon.jit
def consume(
    HALF: gl.constexpr, shared, rest,
    TOKENS: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    SEGMENT: gl.constexpr, GROUPS: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """A warp group: 64 keys against all tiles."""
    keys, rings, stats_ring, bounds, kv_full, full, empty = shared
    q_begin_ptr, q_end_ptr, dk_ptr, dv_ptr, first, last, key, num_keys, group, split, scale, scale_log2 = rest
    # Without a tail dk_tail is a stand-in that nothing reads.
    TAIL: gl.constexpr = DK_TAIL if DK_TAIL > 0 else DK_HEAD
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK_HEAD, 16])
    TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    KEY: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    _, _, v_smem = keys
    q_ring, _, do_ring = rings
    dtype: gl.constexpr = q_ring.dtype

    wanted = key + HALF * KEYS + gl.arange(0, KEYS, KEY)
    clamped = gl.minimum(wanted, num_keys - 1)
    q_begin = gl.load(q_begin_ptr + clamped)
    q_end = gl.load(q_end_ptr + clamped)
    # The loop has no registers for them.
    bounds.index(2 * HALF).store(q_begin)
    bounds.index(2 * HALF + 1).store(q_end)
    # Tiles that all 64 keys see whole.
    full_first = gl.cdiv(gl.max(q_begin, 0), TOKENS)
    full_last = gl.min(q_end, 0) // TOKENS
    # Tiles that any of them sees; the others are passed on.
    some = q_begin < q_end
    seen_first = gl.minimum(gl.maximum(gl.min(gl.where(some, q_begin, INT_MAX), 0) // TOKENS, first), last)
    seen_last = gl.minimum(gl.maximum(gl.cdiv(gl.max(gl.where(some, q_end, 0), 0), TOKENS), seen_first), last)
    place = gl.arange(0, ROWS, ROW) // HEADS

    no_scores = gl.zeros([KEYS, ROWS], gl.float32, S_LAYOUT)
    pass_on(0, seen_first - first, full, empty, STAGES)
    if first < last:
        mbarrier.wait(kv_full, 0)
    # Sums are taken from the matrix units piece by piece, see ROWS_A_SUM; once even where there are no rows.
    for start in range(seen_first - first, gl.maximum(seen_last, seen_first + 1) - first, SEGMENT):
        stop = gl.minimum(start + SEGMENT, seen_last - first)
        dk = gl.zeros([KEYS, DK_HEAD], gl.float32, DK_LAYOUT)
        dk_tail = gl.zeros([KEYS, TAIL], gl.float32, TAIL_LAYOUT)
        dv = gl.zeros([KEYS, DV], gl.float32, DV_LAYOUT)
        # The tile before: none yet, its products add 0.
        p = gl.zeros([KEYS, ROWS], dtype, gl.DotOperandLayout(0, DV_LAYOUT, 2))
        ds = gl.zeros([KEYS, ROWS], dtype, gl.DotOperandLayout(0, DK_LAYOUT, 2))
        before = start % STAGES
        for step in range(start, stop):
            slot = step % STAGES
            tile = first + step
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            s = issue_scores(keys, rings, HALF, slot, no_scores, ROWS, KEYS, DK_HEAD, DK_TAIL)
            dv, dk, dk_tail = issue_gradients(p, ds, rings, before, dv, dk, dk_tail, ROWS, DK_HEAD, DK_TAIL, DV)
            s = warpgroup_mma_wait(3 if DK_TAIL > 0 else 2, deps=[s])
            shift = stats_ring.index(2 * slot).load(ROW) * LOG2_E
            wide = gl.exp2(s * scale_log2 - shift[None, :])
            # The branch also keeps ptxas from moving the exponentials behind the wait.
            if (tile < full_first) | (tile >= full_last):
                wide = hide(wide, tile * TOKENS + place, bounds, HALF)
            dv, dk, dk_tail = finish_gradients(dv, dk, dk_tail, DK_TAIL)
            v = v_smem.index(HALF).reshape([KEYS, DV])
            dp = warpgroup_mma(v, transposed(do_ring.index(slot), ROWS, DV), no_scores, use_acc=False, is_async=True)
            mbarrier.arrive(empty.index(before), pred=step > start)
            dp = warpgroup_mma_wait(0, deps=[dp])
            delta = stats_ring.index(2 * slot + 1).load(ROW)
            dp = wide * (dp - delta[None, :])
            p = gl.convert_layout(wide.to(dtype), gl.DotOperandLayout(0, DV_LAYOUT, 2))
            ds = gl.convert_layout(dp.to(dtype), gl.DotOperandLayout(0, DK_LAYOUT, 2))
            before = slot
        if start < stop:
            dv, dk, dk_tail = issue_gradients(p, ds, rings, before, dv, dk, dk_tail, ROWS, DK_HEAD, DK_TAIL, DV)
            dv, dk, dk_tail = finish_gradients(dv, dk, dk_tail, DK_TAIL)
            mbarrier.arrive(empty.index(before))
        target = (bounds, split, again(key + HALF * KEYS), num_keys, group, start > seen_first - first)
        add(dk_ptr, dk * scale, 0, HALF, target, GROUPS, DK_HEAD + DK_TAIL)
        if DK_TAIL > 0:
            add(dk_ptr, dk_tail * scale, DK_HEAD, HALF, target, GROUPS, DK_HEAD + DK_TAIL)
        add(dv_ptr, dv, 0, HALF, target, GROUPS, DV)
    pass_on(seen_last - first, last - first, full, empty, STAGES)


@gluon.jit
def add(out_ptr, x, column, half, target, GROUPS: gl.constexpr, WIDTH: gl.constexpr):
    """``x`` to columns ``column ..`` of a warp group's keys in out [splits, M, G, WIDTH], or added to them if ``more``."""
    bounds, split, key, num_keys, group, more = target
    KEY: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    row = key + gl.arange(0, x.shape[0], KEY)
    out = (split.to(gl.int64) * num_keys + row) * GROUPS + group
    columns = column + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    # What keys hold that nobody sees may not be finite.
    some = bounds.index(2 * half).load(KEY) < bounds.index(2 * half + 1).load(KEY)
    x = gl.where(some[:, None], x, 0.0)
    pointers = out_ptr + (out * WIDTH)[:, None] + columns[None, :]
    keep = (row < num_keys)[:, None]
    # The same thread wrote them.
    gl.store(pointers, x + gl.load(pointers, mask=keep & more, other=0.0), mask=keep)


@gluon.jit(do_not_specialize=["num_tokens", "num_keys", "splits"])
def interval_attention_backward_dkv_hopper_kernel(
    q_desc, q_tail_desc, do_desc, k_desc, k_tail_desc, v_desc, shift_desc, delta_desc,
    q_begin_ptr, q_end_ptr, dk_ptr, dv_ptr, num_tokens, num_keys, splits, group_rows, scale, scale_log2,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, SEGMENT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """dk, dv [splits, M, G, D] partial sums; early key tiles, which causal attention shows to most queries, start first."""
    group = gl.program_id(0) % GROUPS
    split = gl.program_id(0) // GROUPS % splits
    key = gl.program_id(0) // (GROUPS * splits) * (2 * KEYS)

    # This split's share of the query tiles that see any of the keys.
    place: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    clamped = gl.minimum(key + gl.arange(0, 2 * KEYS, place), num_keys - 1)
    q_begin = gl.load(q_begin_ptr + clamped)
    q_end = gl.load(q_end_ptr + clamped)
    some = q_begin < q_end
    stop = gl.cdiv(gl.max(gl.where(some, q_end, 0), 0), TOKENS)
    start = gl.minimum(gl.min(gl.where(some, q_begin, INT_MAX), 0) // TOKENS, stop)
    share = gl.cdiv(stop - start, splits)
    first = gl.minimum(start + share * split, stop)
    last = gl.minimum(start + share * (split + 1), stop)

    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [2, KEYS, 1, DK_HEAD], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, KEYS, 1, DV], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, HEADS, DK_HEAD], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, HEADS, DV], do_desc.layout)
    if DK_TAIL > 0:
        k_tail_smem = gl.allocate_shared_memory(dtype, [2, KEYS, 1, DK_TAIL], k_tail_desc.layout)
        q_tail_ring = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, HEADS, DK_TAIL], q_tail_desc.layout)
    else:
        k_tail_smem = k_smem
        q_tail_ring = q_ring
    stats_ring = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], shift_desc.layout)
    bounds = gl.allocate_shared_memory(gl.int32, [4, KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = make_barriers(1, 1).index(0)
    full = make_barriers(STAGES, 1)
    empty = make_barriers(STAGES, 2)
    shared = ((k_smem, k_tail_smem, v_smem), (q_ring, q_tail_ring, do_ring), stats_ring, bounds, kv_full, full, empty)
    rest = (q_begin_ptr, q_end_ptr, dk_ptr, dv_ptr, first, last, key, num_keys, group, split, scale, scale_log2)
    gl.warp_specialize([
        (consume, (gl.constexpr(0), shared, rest, TOKENS, HEADS, ROWS, KEYS, STAGES, SEGMENT, GROUPS, DK_HEAD, DK_TAIL, DV)),
        (consume, (gl.constexpr(1), shared, rest, TOKENS, HEADS, ROWS, KEYS, STAGES, SEGMENT, GROUPS, DK_HEAD, DK_TAIL, DV)),
        (fetch, (
            (q_desc, q_tail_desc, do_desc), (k_desc, k_tail_desc, v_desc), shift_desc, delta_desc,
            shared, first, last, key, group, group_rows, TOKENS, HEADS, ROWS, KEYS, STAGES, DK_HEAD, DK_TAIL, DV,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


def _tile(dk_width: int) -> tuple[int, int]:
    return _TAIL_TILE if split_width(dk_width)[1] else _TILE


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> bool:
    """Whether :func:`interval_attention_backward_dkv` can take these: widths of 64 or 128 (of q and k also 192), heads a group
    that are a power of two of at most 64 (32 where the width is 192), tensors that the copy engine can fetch."""
    return (
        k.shape[2] in (64, 128, 192)
        and v.shape[2] in (64, 128)
        and k.shape[1] > 0
        and _tile(k.shape[2])[0] % (q.shape[1] // k.shape[1]) == 0
        and fetchable(q, k, v, do)
    )


def group_by_group(x: torch.Tensor, groups: int, group_rows: int) -> torch.Tensor:
    """Row statistics [T, N] as a flat tensor in which each group's rows, token after token, take ``group_rows`` elements.

    That is a multiple of whole tiles, because the copy engine faults on starts that are not 16-byte aligned. The last tile is
    filled with 0: p is masked there, but ds = 0 x (dp - delta) needs a finite delta. A single aligned group is returned without a
    copy and of length T * N, since the copy engine reads zeros past its end.
    """
    if groups == 1 and x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x.view(-1)
    rows = x.numel() // groups
    flat = torch.empty(groups, group_rows, dtype=torch.float32, device=x.device)
    flat[:, rows:] = 0.0
    flat[:, :rows].unflatten(1, (len(x), -1)).copy_(x.unflatten(1, (groups, -1)).transpose(0, 1))
    return flat.view(-1)


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
    splits: int | None = None,
    rows_a_sum: int = ROWS_A_SUM,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the Triton twin in ``backward.py``, for tensors for which :func:`takes` is true."""
    (tokens, num_heads, dk_width), (num_keys, groups, dv_width) = q.shape, v.shape
    heads = num_heads // groups
    head, tail = split_width(dk_width)
    rows, slots = _tile(dk_width)
    group_rows = triton.cdiv(tokens * heads, rows) * rows
    programs = triton.cdiv(num_keys, 2 * _KEYS) * groups
    splits = splits or query_splits(programs)
    dk = torch.empty(splits, *k.shape, dtype=torch.float32, device=q.device)
    dv = torch.empty(splits, *v.shape, dtype=torch.float32, device=q.device)
    interval_attention_backward_dkv_hopper_kernel[(programs * splits,)](
        *pair_tiles(q, do, rows // heads, heads), *pair_tiles(k, v, _KEYS, 1),
        *(tiles(group_by_group(x, groups, group_rows), (rows,)) for x in (shift, delta)),
        q_begin, q_end, dk, dv, tokens, num_keys, splits, group_rows, scale, scale * LOG2_E.value,
        GROUPS=groups, HEADS=heads, DK_HEAD=head, DK_TAIL=tail, DV=dv_width,
        TOKENS=rows // heads, ROWS=rows, KEYS=_KEYS, STAGES=slots, SEGMENT=max(1, rows_a_sum // rows), num_warps=4,
    )  # fmt: skip
    return (dk[0], dv[0]) if splits == 1 else (dk.sum(0), dv.sum(0))
