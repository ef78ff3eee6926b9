"""Interval attention, forward, for Hopper: the softmax of a key tile runs beside the product with V of the tile before.

A program takes query tiles, 64 rows for each of its two warp groups, one after the other. For key tile j (the program's n-th; see
``kernels/hopper.py`` for the rings) each warp group does:

    wait for K_j and V_{j-1}, fetched in this order
    issue S_j = Q K_j^T, then O += P_{j-1} V_{j-1}
    wait for S_j: K_j's slot is free
    softmax of S_j, while the other product runs
    wait for it: V_{j-1}'s slot is free; scale O

Key tiles are cut at multiples of their size, as in the Triton twin: a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common import INT_MAX, LN_2, LOG2_E, split_width
from ..hopper import fetchable, multiprocessors, shared_layout, tiles
from ..rings import make_barriers

# Query rows of a warp group, and warp groups of a program.
GROUP_ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
_REGISTERS, _FETCHER_REGISTERS = 240, 24
# Bytes of shared memory that K and V of all slots may take, beside the queries.
_RING_BYTES = 160 << 10


@gluon.jit
def tile_and_group(index, num_tokens, TOKENS: gl.constexpr):
    """Query tile and group of work item ``index``: group after group, within a group late tiles first."""
    count = gl.cdiv(num_tokens, TOKENS)
    return count - 1 - index % count, index // count


@gluon.jit
def key_tiles(
    tile, begin_ptr, end_ptr, num_tokens, TOKENS: gl.constexpr, PADDED_TOKENS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Key tiles ``first .. last`` (at least one) that the query tile walks, the tiles ``full_first .. full_last`` that all its
    rows see whole, and the key rows ``start .. stop`` that any of them sees."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    place = gl.minimum(gl.arange(0, PADDED_TOKENS, layout), TOKENS - 1)
    token = gl.minimum(tile * TOKENS + place, num_tokens - 1)
    begin = gl.load(begin_ptr + token)
    end = gl.load(end_ptr + token)
    some = begin < end
    stop = gl.max(gl.where(some, end, 0), 0)
    start = gl.minimum(gl.min(gl.where(some, begin, INT_MAX), 0), stop)
    first = start // KEYS
    # Where no row sees anything one tile is walked all the same, wholly masked.
    last = gl.maximum(gl.cdiv(stop, KEYS), first + 1)
    full_first = gl.minimum(gl.maximum(gl.cdiv(gl.max(begin, 0), KEYS), first + 1), last)
    full_last = gl.minimum(gl.maximum(gl.min(end, 0) // KEYS, full_first), last)
    return first, last, full_first, full_last, start, stop


@gluon.jit
def fetch(
    q_tiles, q_tail_tiles, k_tiles, k_tail_tiles, v_tiles, ranges, sizes, buffers, barriers,
    HEADS: gl.constexpr, TOKENS: gl.constexpr, PADDED_TOKENS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr, Q_BULK: gl.constexpr,
):  # fmt: skip
    """The fetching warp: queries of each work item, then its key and value tiles, in the order in which they are read."""
    begin_ptr, end_ptr = ranges
    num_tokens, num_groups = sizes
    q_bufs, q_tail_bufs, k_bufs, k_tail_bufs, v_bufs = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    BYTES: gl.constexpr = k_tiles.dtype.primitive_bitwidth // 8
    total = gl.cdiv(num_tokens, TOKENS) * num_groups
    n = 0
    turn = 0
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        tile, group = tile_and_group(index, num_tokens, TOKENS)
        first, last, _a, _b, _c, _d = key_tiles(tile, begin_ptr, end_ptr, num_tokens, TOKENS, PADDED_TOKENS, KEYS)
        if Q_BULK:
            for c in gl.static_range(CONSUMERS):
                row = c * GROUP_ROWS
                mbarrier.wait(q_empty.index(c), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(c), GROUP_ROWS * (DK_HEAD + DK_TAIL) * BYTES)
                place = [tile * TOKENS + row // HEADS, group * HEADS + row % HEADS, 0]
                tma.async_copy_global_to_shared(q_tiles, place, q_full.index(c), q_bufs.index(c))
                if DK_TAIL > 0:
                    tail = [tile * TOKENS + row // HEADS, group * HEADS + row % HEADS, DK_HEAD]
                    tma.async_copy_global_to_shared(q_tail_tiles, tail, q_full.index(c), q_tail_bufs.index(c))
        # K of a tile goes ahead of V of the tile before, as they are read: its slot is free earlier.
        for j in range(first, last + 1):
            if j < last:
                slot = n % STAGES
                mbarrier.wait(k_empty.index(slot), ((n // STAGES) & 1) ^ 1)
                mbarrier.expect(k_full.index(slot), KEYS * (DK_HEAD + DK_TAIL) * BYTES)
                tma.async_copy_global_to_shared(k_tiles, [j * KEYS, group, 0], k_full.index(slot), k_bufs.index(slot))
                if DK_TAIL > 0:
                    place = [j * KEYS, group, DK_HEAD]
                    tma.async_copy_global_to_shared(k_tail_tiles, place, k_full.index(slot), k_tail_bufs.index(slot))
            if j > first:
                slot = (n - 1) % STAGES
                mbarrier.wait(v_empty.index(slot), (((n - 1) // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(slot), KEYS * DV * BYTES)
                tma.async_copy_global_to_shared(v_tiles, [(j - 1) * KEYS, group, 0], v_full.index(slot), v_bufs.index(slot))
            n += 1
        n -= 1
        turn += 1


@gluon.jit
def issue_scores(
    q, q_tail, k_bufs, k_tail_bufs, slot, S_LAYOUT: gl.constexpr,
    KEYS: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr,
):  # fmt: skip
    """Q K^T of the slot, left in flight."""
    zero = gl.zeros([GROUP_ROWS, KEYS], gl.float32, S_LAYOUT)
    k = k_bufs.index(slot).reshape([KEYS, DK_HEAD]).permute([1, 0])
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    if DK_TAIL > 0:
        k_tail = k_tail_bufs.index(slot).reshape([KEYS, DK_TAIL]).permute([1, 0])
        s = warpgroup_mma(q_tail, k_tail, s, is_async=True)
    return s


@gluon.jit
def softmax_step(s, top, scale_log2, key, begin, end, MASKED: gl.constexpr):
    """One step of the online softmax: (p, shrink, top), p by the new maximum, shrink the old one's factor."""
    if MASKED:
        visible = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        s = gl.where(visible, s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * scale_log2)
    # A row that has seen nothing yet keeps the maximum -inf; measuring from 0 then gives exp2(-inf) = 0, not NaN.
    reference = gl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = gl.exp2(s * scale_log2 - reference[:, None])
    shrink = gl.exp2(top - reference)
    return p, shrink, new_top


@gluon.jit
def thread_sums(p, KEYS: gl.constexpr):
    """Row sums of p over the columns of each thread, [rows, 4]: columns 8 a + 2 t + r of a product lie in lane t of four."""
    return gl.sum(gl.sum(p.reshape([GROUP_ROWS, KEYS // 8, 4, 2]), 3), 1)


@gluon.jit
def clear_unseen(
    v_bufs, v_full, n, j, start, stop, KEYS: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, V_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Zero the rows of value tile j that no row of the query tile sees: 0 times whatever stands there could be NaN.

    Both warp groups do it to their common slot: kept rows are written back as they were, so the second does no harm.
    """
    if (j * KEYS < start) | ((j + 1) * KEYS > stop):
        mbarrier.wait(v_full.index(n % STAGES), (n // STAGES) & 1)
        for i in gl.static_range(KEYS // 32):
            buffer = v_bufs.index(n % STAGES).reshape([KEYS, DV]).slice(32 * i, 32)
            key = j * KEYS + 32 * i + gl.arange(0, 32, gl.SliceLayout(1, V_LAYOUT))
            keep = (key >= start) & (key < stop)
            buffer.store(gl.where(keep[:, None], buffer.load(V_LAYOUT), 0.0))
        fence_async_shared()


@gluon.jit
def attend(
    j_first, j_last, n, p, acc, top, total, q, q_tail, begin, end, start, stop, scale_log2, buffers, barriers,
    KEYS: gl.constexpr, STAGES: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Key tiles ``j_first .. j_last``; tile ``j_first`` is the program's n-th, and the p of the tile before is pending."""
    _q, _q_tail, k_bufs, k_tail_bufs, v_bufs = buffers
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty = barriers
    for j in range(j_first, j_last):
        slot = n % STAGES
        before = (n - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((n - 1) // STAGES) & 1)
        mbarrier.wait(k_full.index(slot), (n // STAGES) & 1)
        s = issue_scores(q, q_tail, k_bufs, k_tail_bufs, slot, S_LAYOUT, KEYS, DK_HEAD, DK_TAIL)
        acc = warpgroup_mma(p, v_bufs.index(before).reshape([KEYS, DV]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(slot), count=1)
        key = j * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
        p_next, shrink, top = softmax_step(s, top, scale_log2, key, begin, end, MASKED)
        factor = gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))
        total = total * factor[:, None] + thread_sums(p_next, KEYS)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(before), count=1)
        p = gl.convert_layout(p_next.to(p.dtype), P_LAYOUT)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
        if MASKED:
            clear_unseen(v_bufs, v_full, n, j, start, stop, KEYS, DV, STAGES, V_LAYOUT)
        n += 1
    return n, p, acc, top, total


@gluon.jit
def load_queries(
    q_ptr, q, q_tail, tile, group, num_tokens, q_stride_t, q_stride_h,
    C: gl.constexpr, HEADS: gl.constexpr, TOKENS: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr,
):  # fmt: skip
    """The warp group's query rows by ordinary loads, where the copy engine cannot fetch them."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = C * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    token = gl.minimum(gl.minimum(tile * TOKENS + row // HEADS, tile * TOKENS + TOKENS - 1), num_tokens - 1)
    offset = token.to(gl.int64) * q_stride_t + (group * HEADS + row % HEADS).to(gl.int64) * q_stride_h
    column = gl.arange(0, DK_HEAD, gl.SliceLayout(0, layout))
    q.store(gl.load(q_ptr + offset[:, None] + column[None, :]))
    if DK_TAIL > 0:
        tail = DK_HEAD + gl.arange(0, DK_TAIL, gl.SliceLayout(0, layout))
        q_tail.store(gl.load(q_ptr + offset[:, None] + tail[None, :]))
    fence_async_shared()


@gluon.jit
def finish_rows(
    acc, top, total, tile, group, num_tokens, num_heads, out_ptr, lse_ptr, out_stride_t, out_stride_h,
    C: gl.constexpr, HEADS: gl.constexpr, TOKENS: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """Divide by the softmax sums and write out and lse; a row that saw nothing has out 0 and lse -inf."""
    row = C * GROUP_ROWS + gl.arange(0, GROUP_ROWS, total.type.layout)
    token = tile * TOKENS + row // HEADS
    head = (group * HEADS + row % HEADS).to(gl.int64)
    valid = (row // HEADS < TOKENS) & (token < num_tokens)
    divisor = gl.where(total > 0, total, 1.0)
    lse = gl.where(total > 0, (top + gl.log2(divisor)) * LN_2, float("-inf"))
    gl.store(lse_ptr + token.to(gl.int64) * num_heads + head, lse, mask=valid)

    ratio = gl.convert_layout(1.0 / divisor, gl.SliceLayout(1, acc.type.layout))
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    out = gl.convert_layout((acc * ratio[:, None]).to(out_ptr.dtype.element_ty), layout)
    row = C * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    token = tile * TOKENS + row // HEADS
    head = (group * HEADS + row % HEADS).to(gl.int64)
    valid = (row // HEADS < TOKENS) & (token < num_tokens)
    offset = token.to(gl.int64) * out_stride_t + head * out_stride_h
    column = gl.arange(0, DV, gl.SliceLayout(0, layout))
    gl.store(out_ptr + offset[:, None] + column[None, :], out, mask=valid[:, None])


@gluon.jit
def consume(
    C: gl.constexpr, pointers, strides, ranges, sizes, scale_log2, buffers, barriers,
    HEADS: gl.constexpr, TOKENS: gl.constexpr, PADDED_TOKENS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr, Q_BULK: gl.constexpr,
):  # fmt: skip
    """Warp group ``C``: rows ``64 C .. 64 C + 64`` of each query tile (row r is token r // HEADS, head r % HEADS)."""
    q_ptr, out_ptr, lse_ptr = pointers
    q_stride_t, q_stride_h, out_stride_t, out_stride_h = strides
    begin_ptr, end_ptr = ranges
    num_tokens, num_groups = sizes
    q_bufs, q_tail_bufs, k_bufs, k_tail_bufs, v_bufs = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    V_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    q = q_bufs.index(C).reshape([GROUP_ROWS, DK_HEAD])
    q_tail = q_tail_bufs.index(C).reshape([GROUP_ROWS, DK_TAIL]) if DK_TAIL > 0 else q
    n = 0
    turn = 0
    for index in range(gl.program_id(0), gl.cdiv(num_tokens, TOKENS) * num_groups, gl.num_programs(0)):
        tile, group = tile_and_group(index, num_tokens, TOKENS)
        first, last, full_first, full_last, start, stop = key_tiles(
            tile, begin_ptr, end_ptr, num_tokens, TOKENS, PADDED_TOKENS, KEYS
        )
        row = C * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, S_LAYOUT))
        token = gl.minimum(gl.minimum(tile * TOKENS + row // HEADS, tile * TOKENS + TOKENS - 1), num_tokens - 1)
        begin = gl.load(begin_ptr + token)
        end = gl.load(end_ptr + token)
        if Q_BULK:
            mbarrier.wait(q_full.index(C), turn & 1)
        else:
            load_queries(q_ptr, q, q_tail, tile, group, num_tokens, q_stride_t, q_stride_h, C, HEADS, TOKENS, DK_HEAD, DK_TAIL)

        # The first tile, always masked; its product with V is left to the next tile.
        mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1)
        s = issue_scores(q, q_tail, k_bufs, k_tail_bufs, n % STAGES, S_LAYOUT, KEYS, DK_HEAD, DK_TAIL)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(n % STAGES), count=1)
        top = gl.full([GROUP_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        key = first * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
        p_first, _shrink, top = softmax_step(s, top, scale_log2, key, begin, end, True)
        total = thread_sums(p_first, KEYS)
        p = gl.convert_layout(p_first.to(q_bufs.dtype), P_LAYOUT)
        clear_unseen(v_bufs, v_full, n, first, start, stop, KEYS, DV, STAGES, V_LAYOUT)
        acc = gl.zeros([GROUP_ROWS, DV], gl.float32, O_LAYOUT)
        n += 1

        n, p, acc, top, total = attend(
            first + 1, full_first, n, p, acc, top, total, q, q_tail, begin, end, start, stop, scale_log2, buffers, barriers,
            KEYS, STAGES, DK_HEAD, DK_TAIL, DV, S_LAYOUT, P_LAYOUT, V_LAYOUT, True,
        )  # fmt: skip
        n, p, acc, top, total = attend(
            full_first, full_last, n, p, acc, top, total, q, q_tail, begin, end, start, stop, scale_log2, buffers, barriers,
            KEYS, STAGES, DK_HEAD, DK_TAIL, DV, S_LAYOUT, P_LAYOUT, V_LAYOUT, False,
        )  # fmt: skip
        n, p, acc, top, total = attend(
            full_last, last, n, p, acc, top, total, q, q_tail, begin, end, start, stop, scale_log2, buffers, barriers,
            KEYS, STAGES, DK_HEAD, DK_TAIL, DV, S_LAYOUT, P_LAYOUT, V_LAYOUT, True,
        )  # fmt: skip
        if Q_BULK:  # the last product with Q is done
            mbarrier.arrive(q_empty.index(C), count=1)
        turn += 1

        mbarrier.wait(v_full.index((n - 1) % STAGES), ((n - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_bufs.index((n - 1) % STAGES).reshape([KEYS, DV]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index((n - 1) % STAGES), count=1)
        total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, S_LAYOUT))
        finish_rows(
            acc, top, total, tile, group, num_tokens, num_groups * HEADS, out_ptr, lse_ptr, out_stride_t, out_stride_h,
            C, HEADS, TOKENS, DV,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tokens", "num_groups"])
def interval_attention_forward_hopper_kernel(
    q_ptr, q_tiles, q_tail_tiles, k_tiles, k_tail_tiles, v_tiles, out_ptr, lse_ptr, begin_ptr, end_ptr,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h, num_tokens, num_groups, scale_log2,
    HEADS: gl.constexpr, TOKENS: gl.constexpr, PADDED_TOKENS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr, Q_BULK: gl.constexpr, Q_TOKENS: gl.constexpr,
    Q_HEADS: gl.constexpr, Q_SHARED: gl.constexpr, Q_TAIL_SHARED: gl.constexpr,
    REGISTERS: gl.constexpr, FETCHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Work items program_id, program_id + num_programs, ...: one query tile of one group each."""
    dtype: gl.constexpr = k_tiles.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS, Q_TOKENS, Q_HEADS, DK_HEAD], Q_SHARED)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES] + k_tiles.block_type.shape, k_tiles.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES] + v_tiles.block_type.shape, v_tiles.layout)
    if DK_TAIL > 0:
        q_tail_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS, Q_TOKENS, Q_HEADS, DK_TAIL], Q_TAIL_SHARED)
        k_tail_bufs = gl.allocate_shared_memory(dtype, [STAGES] + k_tail_tiles.block_type.shape, k_tail_tiles.layout)
    else:
        q_tail_bufs = q_bufs
        k_tail_bufs = k_bufs
    q_full = make_barriers(CONSUMERS, 1)
    q_empty = make_barriers(CONSUMERS, 1)
    k_full = make_barriers(STAGES, 1)
    k_empty = make_barriers(STAGES, CONSUMERS)
    v_full = make_barriers(STAGES, 1)
    v_empty = make_barriers(STAGES, CONSUMERS)
    # Compile-time constants stand apart: in a tuple that has a name they are forgotten to be such.
    pointers = (q_ptr, out_ptr, lse_ptr)
    strides = (q_stride_t, q_stride_h, out_stride_t, out_stride_h)
    ranges = (begin_ptr, end_ptr)
    sizes = (num_tokens, num_groups)
    buffers = (q_bufs, q_tail_bufs, k_bufs, k_tail_bufs, v_bufs)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize([
        (consume, (
            gl.constexpr(0), pointers, strides, ranges, sizes, scale_log2, buffers, barriers,
            HEADS, TOKENS, PADDED_TOKENS, KEYS, STAGES, DK_HEAD, DK_TAIL, DV, Q_BULK,
        )),
        (consume, (
            gl.constexpr(1), pointers, strides, ranges, sizes, scale_log2, buffers, barriers,
            HEADS, TOKENS, PADDED_TOKENS, KEYS, STAGES, DK_HEAD, DK_TAIL, DV, Q_BULK,
        )),
        (fetch, (
            q_tiles, q_tail_tiles, k_tiles, k_tail_tiles, v_tiles, ranges, sizes, buffers, barriers,
            HEADS, TOKENS, PADDED_TOKENS, KEYS, STAGES, DK_HEAD, DK_TAIL, DV, Q_BULK,
        )),
    ], [4, 1], [REGISTERS, FETCHER_REGISTERS])  # fmt: skip


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether :func:`interval_attention_forward` can take these: widths of 64 or 128 (of q and k also 192), at most 128 heads a
    group, keys and values that the copy engine can fetch."""
    heads = q.shape[1] // k.shape[1]
    return suits(q.shape[2], v.shape[2]) and heads <= CONSUMERS.value * GROUP_ROWS.value and fetchable(k, v) and q.stride(-1) == 1


def suits(dk: int, dv: int) -> bool:
    """Whether the kernel supports these head widths."""
    return dk in (64, 128, 192) and dv in (64, 128)


def interval_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the Triton twin in ``forward.py``, for tensors for which :func:`takes` is true."""
    (tokens, num_heads, dk), (_, groups, dv) = q.shape, v.shape
    heads = num_heads // groups
    out = torch.empty(tokens, num_heads, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, num_heads, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    head, tail = split_width(dk)
    # Independent of Dv, so that the lse is, too (see ``interval_lse``).
    keys = 128
    stages = max(2, min(4, _RING_BYTES // (keys * (dk + dv) * q.itemsize)))
    tile_tokens = CONSUMERS.value * GROUP_ROWS.value // heads
    whole = heads & (heads - 1) == 0 and fetchable(q)
    q_block = (max(1, GROUP_ROWS.value // heads), min(GROUP_ROWS.value, heads)) if whole else (GROUP_ROWS.value, 1)
    q_parts = [(*q_block, width) for width in (head, tail or head)]
    items = triton.cdiv(tokens, tile_tokens) * groups
    interval_attention_forward_hopper_kernel[(min(items, multiprocessors(q.device)),)](
        q, *(tiles(q, part) if whole else q for part in q_parts), tiles(k, (keys, 1, head)), tiles(k, (keys, 1, tail or head)),
        tiles(v, (keys, 1, dv)), out, lse, begin, end, *q.stride()[:2], *out.stride()[:2], tokens, groups, scale * LOG2_E.value,
        HEADS=heads, TOKENS=tile_tokens, PADDED_TOKENS=triton.next_power_of_2(tile_tokens), KEYS=keys, STAGES=stages,
        DK_HEAD=head, DK_TAIL=tail, DV=dv, Q_BULK=whole, Q_TOKENS=q_block[0], Q_HEADS=q_block[1],
        Q_SHARED=shared_layout(q_parts[0], q.dtype), Q_TAIL_SHARED=shared_layout(q_parts[1], q.dtype),
        REGISTERS=_REGISTERS, FETCHER_REGISTERS=_FETCHER_REGISTERS, num_warps=4,
    )  # fmt: skip
    return out, lse
