"""Selected attention, forward, for Hopper: warp groups share the blocks they fetch and work on while they wait for products.

A program takes query tiles of two warp groups' 64 rows each, one after the other. One more warp fetches: each warp group's
queries, which move to registers, then K and V of the blocks that any token of the tile chose (see ``kernels/hopper.py`` for the
rings). A warp group none of whose tokens chose a block passes it on. For the n-th block, if it takes it:

    wait for K_n and V_h, h the block it took before
    issue S_n = Q K_n^T, then O += P_h V_h
    wait for S_n: K_n's slot is free
    softmax of S_n, while the other product runs
    wait for it: V_h's slot is free; scale O

While V_h waits for the next block that the warp group takes, its slot is not refilled. So when REACH blocks in a row were passed
on the product is taken alone; it must be less than the slots, or the next block to take could not be fetched.

A row's result does not depend on its neighbours: blocks that others chose add P = 0 and scale by 1, and both orders of products
give the same bits.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common import LOG2_E, split_width
from ..hopper import fetchable, multiprocessors, tiles
from ..interval_attention.hopper_forward import CONSUMERS, GROUP_ROWS, finish_rows, issue_scores, thread_sums, tile_and_group
from ..query_gradients.hopper import clear_hidden, thread_barrier
from ..rings import make_barriers
from .unions import build_unions

BLOCK = gl.constexpr(64)  # keys
_REGISTERS, _FETCHER_REGISTERS = 240, 24
# Bytes of shared memory for K and V of all slots; most slots; blocks that a product waits for the next one taken.
_RING_BYTES, _MOST_SLOTS = 200 << 10, 8
_REACH = 3


@gluon.jit
def union_of(entries_ptr, counts_ptr, tile, group, num_groups, ENTRIES: gl.constexpr):
    """A query tile's entries, their number, and how many of the blocks end before every query of the tile."""
    union = tile.to(gl.int64) * num_groups + group
    return entries_ptr + union * ENTRIES, gl.load(counts_ptr + union * 2), gl.load(counts_ptr + union * 2 + 1)


@gluon.jit
def fetch(
    q_tiles, q_tail_tiles, k_tiles, k_tail_tiles, v_tiles, tables, sizes, buffers, barriers,
    HEADS: gl.constexpr, ENTRIES: gl.constexpr, STAGES: gl.constexpr, DK_TAIL: gl.constexpr,
):  # fmt: skip
    """The fetching warp. The ring of keys holds queries too: of each work item, first every warp group's."""
    entries_ptr, counts_ptr, _position_ptr, _key_start_ptr = tables
    num_tokens, num_groups = sizes
    k_bufs, k_tail_bufs, v_bufs = buffers
    k_full, k_empty, v_full, v_empty = barriers
    TOKENS: gl.constexpr = GROUP_ROWS // HEADS
    DK_HEAD: gl.constexpr = k_tiles.block_type.shape[2]
    BYTES: gl.constexpr = BLOCK * (DK_HEAD + DK_TAIL) * k_tiles.dtype.primitive_bitwidth // 8
    n = 0
    m = 0
    for index in range(gl.program_id(0), gl.cdiv(num_tokens, CONSUMERS * TOKENS) * num_groups, gl.num_programs(0)):
        tile, group = tile_and_group(index, num_tokens, CONSUMERS * TOKENS)
        entries, steps, _full_steps = union_of(entries_ptr, counts_ptr, tile, group, num_groups, ENTRIES)
        for c in gl.static_range(CONSUMERS):
            slot = m % STAGES
            mbarrier.wait(k_empty.index(slot), ((m // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(slot), BYTES)
            token = (tile * CONSUMERS + c) * TOKENS
            q = k_bufs.index(slot).reshape(q_tiles.block_type.shape)
            tma.async_copy_global_to_shared(q_tiles, [token, group * HEADS, 0], k_full.index(slot), q)
            if DK_TAIL > 0:
                q_tail = k_tail_bufs.index(slot).reshape(q_tail_tiles.block_type.shape)
                tma.async_copy_global_to_shared(q_tail_tiles, [token, group * HEADS, DK_HEAD], k_full.index(slot), q_tail)
            m += 1
        entry = gl.load(entries)
        for step in range(steps):
            # One step ahead, so that the key is known when there is room.
            following = gl.load(entries + gl.minimum(step + 1, steps - 1))
            key = (entry >> 32).to(gl.int32)
            slot = m % STAGES
            mbarrier.wait(k_empty.index(slot), ((m // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(slot), BYTES)
            tma.async_copy_global_to_shared(k_tiles, [key, group, 0], k_full.index(slot), k_bufs.index(slot))
            if DK_TAIL > 0:
                tma.async_copy_global_to_shared(k_tail_tiles, [key, group, DK_HEAD], k_full.index(slot), k_tail_bufs.index(slot))
            slot = n % STAGES
            mbarrier.wait(v_empty.index(slot), ((n // STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(slot), v_tiles.block_type.nbytes)
            tma.async_copy_global_to_shared(v_tiles, [key, group, 0], v_full.index(slot), v_bufs.index(slot))
            m += 1
            n += 1
            entry = following


@gluon.jit
def pass_on(full, empty, n, STAGES: gl.constexpr):
    """Leave tile n to the others."""
    mbarrier.wait(full.index(n % STAGES), (n // STAGES) & 1)
    mbarrier.arrive(empty.index(n % STAGES), count=1)


@gluon.jit
def take_queries(
    C: gl.constexpr, m, buffers, barriers, S_LAYOUT: gl.constexpr, STAGES: gl.constexpr,
    DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr,
):  # fmt: skip
    """The warp group's queries, from the tiles m .. m + CONSUMERS of the ring of keys; without a tail the second is the first."""
    k_bufs, k_tail_bufs, _v_bufs = buffers
    k_full, k_empty, _v_full, _v_empty = barriers
    for c in gl.static_range(CONSUMERS):
        slot = (m + c) % STAGES
        mbarrier.wait(k_full.index(slot), ((m + c) // STAGES) & 1)
        if c == C:
            q = k_bufs.index(slot).reshape([GROUP_ROWS, DK_HEAD]).load(gl.DotOperandLayout(0, S_LAYOUT, 2))
            if DK_TAIL > 0:
                q_tail = k_tail_bufs.index(slot).reshape([GROUP_ROWS, DK_TAIL]).load(gl.DotOperandLayout(0, S_LAYOUT, 2))
            else:
                q_tail = q
        mbarrier.arrive(k_empty.index(slot), count=1)
    return q, q_tail


@gluon.jit
def add_values(h, p, acc, buffers, barriers, DV: gl.constexpr, STAGES: gl.constexpr):
    """acc + p V_h with nothing beside it."""
    _k_bufs, _k_tail_bufs, v_bufs = buffers
    _k_full, _k_empty, v_full, v_empty = barriers
    slot = h % STAGES
    mbarrier.wait(v_full.index(slot), (h // STAGES) & 1)
    acc = warpgroup_mma(p, v_bufs.index(slot).reshape([BLOCK, DV]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(slot), count=1)
    return acc


@gluon.jit
def take_block(
    n, m, h, key, border, picked, p, acc, top, total, q, q_tail, limit, stop, scale_log2, buffers, barriers,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, BEHIND: gl.constexpr,
):  # fmt: skip
    """Softmax of block n, tile m of the ring of keys, that starts at row ``key``; its product with V is left to the next.

    BEHIND: that of block h is still to be taken. ``border``: some query sees only a part of the block.
    """
    k_bufs, k_tail_bufs, v_bufs = buffers
    k_full, k_empty, v_full, v_empty = barriers
    slot = m % STAGES
    before = h % STAGES
    if BEHIND:
        mbarrier.wait(v_full.index(before), (h // STAGES) & 1)
    mbarrier.wait(k_full.index(slot), (m // STAGES) & 1)
    s = issue_scores(q, q_tail, k_bufs, k_tail_bufs, slot, S_LAYOUT, BLOCK, DK_HEAD, DK_TAIL)
    if BEHIND:
        acc = warpgroup_mma(p, v_bufs.index(before).reshape([BLOCK, DV]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
    else:
        s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    if border:
        column = key + gl.arange(0, BLOCK, gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(column[None, :] <= limit[:, None], s, float("-inf"))
    new_top = gl.maximum(top, gl.where(picked, gl.max(s, 1) * scale_log2, float("-inf")))
    # Rows that did not choose the block measure from +inf: exp2(-inf) = 0. So do rows that see nothing of it yet.
    reference = gl.where(picked & (new_top > float("-inf")), new_top, float("inf"))
    p_next = gl.exp2(s * scale_log2 - reference[:, None])
    shrink = gl.where(picked, gl.exp2(top - reference), 1.0)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + thread_sums(p_next, BLOCK)
    # The branch also keeps ptxas from moving the exponentials behind the wait.
    if border & (key + BLOCK > stop):
        # Rows that no query sees: 0 times whatever stands there could be NaN.
        mbarrier.wait(v_full.index(n % STAGES), (n // STAGES) & 1)
        clear_hidden(v_bufs.index(n % STAGES).reshape([BLOCK, DV]), key, 0, stop, DV)
        fence_async_shared()
        thread_barrier()
    if BEHIND:
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.convert_layout(p_next.to(p.dtype), P_LAYOUT), acc, new_top, total


@gluon.jit
def consume(
    C: gl.constexpr, out_ptr, lse_ptr, out_stride_t, out_stride_h, tables, sizes, scale_log2, buffers, barriers,
    HEADS: gl.constexpr, ENTRIES: gl.constexpr, STAGES: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr,
    DV: gl.constexpr, REACH: gl.constexpr,
):  # fmt: skip
    """Warp group ``C``: rows ``64 C .. 64 C + 64`` of each query tile (row r is token r // HEADS, head r % HEADS)."""
    entries_ptr, counts_ptr, position_ptr, key_start_ptr = tables
    num_tokens, num_groups = sizes
    k_bufs, _k_tail_bufs, _v_bufs = buffers
    k_full, k_empty, v_full, v_empty = barriers
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    TOKENS: gl.constexpr = GROUP_ROWS // HEADS
    TILE: gl.constexpr = CONSUMERS * TOKENS
    place: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    n = 0
    m = 0
    for index in range(gl.program_id(0), gl.cdiv(num_tokens, TILE) * num_groups, gl.num_programs(0)):
        tile, group = tile_and_group(index, num_tokens, TILE)
        entries, steps, full_steps = union_of(entries_ptr, counts_ptr, tile, group, num_groups, ENTRIES)
        anyone = gl.minimum(tile * TILE + gl.minimum(gl.arange(0, 128, place), TILE - 1), num_tokens - 1)
        stop = gl.max(gl.load(key_start_ptr + anyone) + gl.load(position_ptr + anyone), 0) + 1
        local = gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, S_LAYOUT)) // HEADS
        token = gl.minimum(tile * TILE + C * TOKENS + local, num_tokens - 1)
        limit = gl.load(key_start_ptr + token) + gl.load(position_ptr + token)
        q, q_tail = take_queries(C, m, buffers, barriers, S_LAYOUT, STAGES, DK_HEAD, DK_TAIL)
        m += CONSUMERS

        top = gl.full([GROUP_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        total = thread_sums(gl.zeros([GROUP_ROWS, BLOCK], gl.float32, S_LAYOUT), BLOCK)
        acc = gl.zeros([GROUP_ROWS, DV], gl.float32, O_LAYOUT)
        p = gl.zeros([GROUP_ROWS, BLOCK], k_bufs.dtype, P_LAYOUT)
        h = n
        behind = n < 0
        entry = gl.load(entries)
        for step in range(steps):
            following = gl.load(entries + gl.minimum(step + 1, steps - 1))
            key = (entry >> 32).to(gl.int32)
            bits = (entry.to(gl.int32) >> (C * TOKENS)) & ((1 << TOKENS) - 1)
            border = step >= full_steps
            if bits != 0:
                picked = ((bits >> local) & 1) != 0
                if behind:
                    p, acc, top, total = take_block(
                        n, m, h, key, border, picked, p, acc, top, total, q, q_tail, limit, stop, scale_log2, buffers, barriers,
                        S_LAYOUT, P_LAYOUT, DK_HEAD, DK_TAIL, DV, STAGES, True,
                    )  # fmt: skip
                else:
                    p, acc, top, total = take_block(
                        n, m, h, key, border, picked, p, acc, top, total, q, q_tail, limit, stop, scale_log2, buffers, barriers,
                        S_LAYOUT, P_LAYOUT, DK_HEAD, DK_TAIL, DV, STAGES, False,
                    )  # fmt: skip
                h = n
                behind = n >= 0
            else:
                pass_on(k_full, k_empty, m, STAGES)
                pass_on(v_full, v_empty, n, STAGES)
            if behind & (n - h == REACH):
                acc = add_values(h, p, acc, buffers, barriers, DV, STAGES)
                behind = n < 0
            n += 1
            m += 1
            entry = following
        if behind:
            acc = add_values(h, p, acc, buffers, barriers, DV, STAGES)
        total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, S_LAYOUT))
        finish_rows(
            acc, top, total, tile, group, num_tokens, num_groups * HEADS, out_ptr, lse_ptr, out_stride_t, out_stride_h,
            C, HEADS, TILE, DV,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tokens", "num_groups"])
def selected_attention_forward_hopper_kernel(
    q_tiles, q_tail_tiles, k_tiles, k_tail_tiles, v_tiles, out_ptr, lse_ptr, entries_ptr, counts_ptr, position_ptr, key_start_ptr,
    out_stride_t, out_stride_h, num_tokens, num_groups, scale_log2,
    HEADS: gl.constexpr, ENTRIES: gl.constexpr, STAGES: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr,
    DV: gl.constexpr, REACH: gl.constexpr, REGISTERS: gl.constexpr, FETCHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Work items program_id, program_id + num_programs, ...: one query tile of one group each."""
    dtype: gl.constexpr = k_tiles.dtype
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES] + k_tiles.block_type.shape, k_tiles.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES] + v_tiles.block_type.shape, v_tiles.layout)
    if DK_TAIL > 0:
        k_tail_bufs = gl.allocate_shared_memory(dtype, [STAGES] + k_tail_tiles.block_type.shape, k_tail_tiles.layout)
    else:
        k_tail_bufs = k_bufs
    k_full = make_barriers(STAGES, 1)
    k_empty = make_barriers(STAGES, CONSUMERS)
    v_full = make_barriers(STAGES, 1)
    v_empty = make_barriers(STAGES, CONSUMERS)
    # Compile-time constants stand apart: in a tuple that has a name they are forgotten to be such.
    tables = (entries_ptr, counts_ptr, position_ptr, key_start_ptr)
    sizes = (num_tokens, num_groups)
    buffers = (k_bufs, k_tail_bufs, v_bufs)
    barriers = (k_full, k_empty, v_full, v_empty)
    gl.warp_specialize([
        (consume, (
            gl.constexpr(0), out_ptr, lse_ptr, out_stride_t, out_stride_h, tables, sizes, scale_log2, buffers, barriers,
            HEADS, ENTRIES, STAGES, DK_HEAD, DK_TAIL, DV, REACH,
        )),
        (consume, (
            gl.constexpr(1), out_ptr, lse_ptr, out_stride_t, out_stride_h, tables, sizes, scale_log2, buffers, barriers,
            HEADS, ENTRIES, STAGES, DK_HEAD, DK_TAIL, DV, REACH,
        )),
        (fetch, (
            q_tiles, q_tail_tiles, k_tiles, k_tail_tiles, v_tiles, tables, sizes, buffers, barriers,
            HEADS, ENTRIES, STAGES, DK_TAIL,
        )),
    ], [4, 1], [REGISTERS, FETCHER_REGISTERS])  # fmt: skip


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_size: int) -> bool:
    """Whether :func:`selected_attention_forward` is for these: widths of 64 or 128 (also 192 of q and k), 4 to 64 heads a
    group, a power of two (more tokens a tile than 32 do not fit the union's masks), blocks of 64, all fetchable."""
    heads = q.shape[1] // k.shape[1]
    return (
        block_size == BLOCK.value
        and q.shape[2] in (64, 128, 192)
        and v.shape[2] in (64, 128)
        and heads >= 4
        and GROUP_ROWS.value % heads == 0
        and fetchable(q, k, v)
    )


def selected_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    position: torch.Tensor,
    key_start: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    slots: int | None = None,
    reach: int = _REACH,
) -> None:
    """As the Triton twin in ``forward.py``, for tensors of which :func:`takes` is true; writes out [T, N, Dv] and lse [T, N].

    Args:
        slots: of the rings, instead of as many as there is room for.
        reach: blocks that a product waits for the next one that its warp group takes; 0 for products that run alone.
    """
    (tokens, num_heads, dk), (_, groups, dv) = q.shape, v.shape
    heads = num_heads // groups
    tile_tokens = GROUP_ROWS.value // heads
    head, tail = split_width(dk)
    slots = slots or min(_MOST_SLOTS, _RING_BYTES // (BLOCK.value * (dk + dv) * q.itemsize))
    assert slots > reach, "a slot that is held must not keep out the block that frees it"
    unions = build_unions(blocks, position, key_start, BLOCK.value, CONSUMERS.value * tile_tokens)
    items = unions.counts.shape[0] * groups
    selected_attention_forward_hopper_kernel[(min(items, multiprocessors(q.device)),)](
        *(tiles(q, (tile_tokens, heads, part)) for part in (head, tail or head)),
        *(tiles(k, (BLOCK.value, 1, part)) for part in (head, tail or head)), tiles(v, (BLOCK.value, 1, dv)), out, lse,
        unions.entries, unions.counts, position, key_start, *out.stride()[:2], tokens, groups, scale * LOG2_E.value,
        HEADS=heads, ENTRIES=unions.entries.shape[-1], STAGES=slots, DK_HEAD=head, DK_TAIL=tail, DV=dv, REACH=reach,
        REGISTERS=_REGISTERS, FETCHER_REGISTERS=_FETCHER_REGISTERS, num_warps=4,
    )  # fmt: skip
