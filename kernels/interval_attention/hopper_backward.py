"""Interval attention, dk and dv, for Hopper: products run while the exponentials are taken.

One program: 128 keys of one group, a share of the queries. Two warp groups own 64 keys each and never wait for each other; one
more warp fetches q, do and the row statistics into a ring of STAGES slots, see ``kernels/hopper.py``.

Order within a warp group, for tile j (all products asynchronous, finished in the order of issue):

    issue S_j = K Q_j^T, dV += P_{j-1} dO_{j-1}, dK += dS_{j-1} Q_{j-1}
    wait for S_j alone;  P_j = exp2 while the other two run
    wait for both: slot j - 1 is free
    issue dP_j = V dO_j^T, wait for it;  dS_j = P_j (dP_j - delta), beside the other warp group's products
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..common import INT_MAX, LOG2_E
from ..hopper import fetchable, tiles
from ..rings import make_barriers
from .backward import query_splits

# Keys of a warp group, query rows of a tile, slots of the ring.
_KEYS, _ROWS, _SLOTS = 64, 64, 4


@gluon.jit
def fetch(
    k_desc, v_desc, q_desc, do_desc, stats_desc, shared, first, last, key, group, tile_rows,
    TOKENS: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    """The fetching warp: K and V once, then tiles ``first .. last``."""
    k_smem, v_smem, q_ring, do_ring, stats_ring, kv_full, full, empty = shared
    if first < last:
        mbarrier.expect(kv_full, 2 * k_desc.block_type.nbytes + 2 * v_desc.block_type.nbytes)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(k_desc, [key + half * KEYS, group, 0], kv_full, k_smem.index(half))
            tma.async_copy_global_to_shared(v_desc, [key + half * KEYS, group, 0], kv_full, v_smem.index(half))
        for step in range(last - first):
            slot = step % STAGES
            bar = full.index(slot)
            token = (first + step) * TOKENS
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, q_desc.block_type.nbytes + do_desc.block_type.nbytes + 2 * stats_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [token, group * HEADS, 0], bar, q_ring.index(slot))
            tma.async_copy_global_to_shared(do_desc, [token, group * HEADS, 0], bar, do_ring.index(slot))
            row = group * tile_rows + token * HEADS
            tma.async_copy_global_to_shared(stats_desc, [row], bar, stats_ring.index(2 * slot))
            tma.async_copy_global_to_shared(stats_desc, [row + GROUPS * tile_rows], bar, stats_ring.index(2 * slot + 1))


@gluon.jit
def transposed(tile, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """A tile [TOKENS, HEADS, WIDTH] in shared memory as [WIDTH, ROWS]."""
    return tile.reshape([ROWS, WIDTH]).permute([1, 0])


@gluon.jit
def pass_on(step, last, full, empty, STAGES: gl.constexpr):
    """Steps ``step .. last``, which do not concern this warp group: its arrival must not count for the round before."""
    for skipped in range(step, last):
        mbarrier.wait(full.index(skipped % STAGES), (skipped // STAGES) & 1)
        mbarrier.arrive(empty.index(skipped % STAGES))


@gluon.jit
def consume(
    HALF: gl.constexpr, shared, rest,
    TOKENS: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """A warp group: 64 keys against all tiles."""
    k_smem, v_smem, q_ring, do_ring, stats_ring, kv_full, full, empty = shared
    q_begin_ptr, q_end_ptr, dk_ptr, dv_ptr, first, last, key, num_keys, group, split, scale, scale_log2 = rest
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    KEY: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    dtype: gl.constexpr = q_ring.dtype

    wanted = key + HALF * KEYS + gl.arange(0, KEYS, KEY)
    clamped = gl.minimum(wanted, num_keys - 1)
    q_begin = gl.load(q_begin_ptr + clamped)
    q_end = gl.load(q_end_ptr + clamped)
    # Tiles that all 64 keys see whole.
    full_first = gl.cdiv(gl.max(q_begin, 0), TOKENS)
    full_last = gl.min(q_end, 0) // TOKENS
    # Tiles that any of them sees; the others are passed on.
    some = q_begin < q_end
    seen_first = gl.minimum(gl.maximum(gl.min(gl.where(some, q_begin, INT_MAX), 0) // TOKENS, first), last)
    seen_last = gl.minimum(gl.maximum(gl.cdiv(gl.max(gl.where(some, q_end, 0), 0), TOKENS), seen_first), last)
    place = gl.arange(0, ROWS, ROW) // HEADS

    no_scores = gl.zeros([KEYS, ROWS], gl.float32, S_LAYOUT)
    dk = gl.zeros([KEYS, DK], gl.float32, DK_LAYOUT)
    dv = gl.zeros([KEYS, DV], gl.float32, DV_LAYOUT)
    # The tile before: none yet, its products add 0.
    p = gl.zeros([KEYS, ROWS], dtype, gl.DotOperandLayout(0, DV_LAYOUT, 2))
    ds = gl.zeros([KEYS, ROWS], dtype, gl.DotOperandLayout(0, DK_LAYOUT, 2))
    pass_on(0, seen_first - first, full, empty, STAGES)
    before = (seen_first - first) % STAGES
    if first < last:
        mbarrier.wait(kv_full, 0)
    for step in range(seen_first - first, seen_last - first):
        slot = step % STAGES
        tile = first + step
        token = tile * TOKENS + place
        whole = (tile >= full_first) & (tile < full_last)
        k = k_smem.index(HALF).reshape([KEYS, DK])
        v = v_smem.index(HALF).reshape([KEYS, DV])
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        s = warpgroup_mma(k, transposed(q_ring.index(slot), ROWS, DK), no_scores, use_acc=False, is_async=True)
        dv = warpgroup_mma(p, do_ring.index(before).reshape([ROWS, DV]), dv, is_async=True)
        dk = warpgroup_mma(ds, q_ring.index(before).reshape([ROWS, DK]), dk, is_async=True)
        s = warpgroup_mma_wait(2, deps=[s])
        shift = stats_ring.index(2 * slot).load(ROW) * LOG2_E
        wide = gl.exp2(s * scale_log2 - shift[None, :])
        # The branch also keeps ptxas from moving the exponentials behind the wait.
        if not whole:
            wide = gl.where((token[None, :] >= q_begin[:, None]) & (token[None, :] < q_end[:, None]), wide, 0.0)
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        dp = warpgroup_mma(v, transposed(do_ring.index(slot), ROWS, DV), no_scores, use_acc=False, is_async=True)
        mbarrier.arrive(empty.index(before), pred=tile > seen_first)
        dp = warpgroup_mma_wait(0, deps=[dp])
        delta = stats_ring.index(2 * slot + 1).load(ROW)
        dp = wide * (dp - delta[None, :])
        if not whole:
            # p is 0 there already; what hidden keys hold may not be finite.
            dp = gl.where((token[None, :] >= q_begin[:, None]) & (token[None, :] < q_end[:, None]), dp, 0.0)
        p = gl.convert_layout(wide.to(dtype), gl.DotOperandLayout(0, DV_LAYOUT, 2))
        ds = gl.convert_layout(dp.to(dtype), gl.DotOperandLayout(0, DK_LAYOUT, 2))
        before = slot
    if seen_first < seen_last:
        dv = warpgroup_mma(p, do_ring.index(before).reshape([ROWS, DV]), dv)
        dk = warpgroup_mma(ds, q_ring.index(before).reshape([ROWS, DK]), dk)
        mbarrier.arrive(empty.index(before))
    pass_on(seen_last - first, last - first, full, empty, STAGES)

    out = (split.to(gl.int64) * num_keys + key + HALF * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, DK_LAYOUT))) * GROUPS + group
    keep = (key + HALF * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, DK_LAYOUT))) < num_keys
    column = gl.arange(0, DK, gl.SliceLayout(0, DK_LAYOUT))
    gl.store(dk_ptr + (out * DK)[:, None] + column[None, :], dk * scale, mask=keep[:, None])
    out = (split.to(gl.int64) * num_keys + key + HALF * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, DV_LAYOUT))) * GROUPS + group
    keep = (key + HALF * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, DV_LAYOUT))) < num_keys
    column = gl.arange(0, DV, gl.SliceLayout(0, DV_LAYOUT))
    gl.store(dv_ptr + (out * DV)[:, None] + column[None, :], dv, mask=keep[:, None])


@gluon.jit(do_not_specialize=["num_tokens", "num_keys", "splits"])
def interval_attention_backward_dkv_hopper_kernel(
    q_desc, do_desc, k_desc, v_desc, stats_desc, q_begin_ptr, q_end_ptr, dk_ptr, dv_ptr,
    num_tokens, num_keys, splits, tile_rows, scale, scale_log2,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
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
    k_smem = gl.allocate_shared_memory(dtype, [2, KEYS, 1, DK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, KEYS, 1, DV], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, HEADS, DK], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, HEADS, DV], do_desc.layout)
    stats_ring = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], stats_desc.layout)
    kv_full = make_barriers(1, 1).index(0)
    full = make_barriers(STAGES, 1)
    empty = make_barriers(STAGES, 2)
    shared = (k_smem, v_smem, q_ring, do_ring, stats_ring, kv_full, full, empty)
    rest = (q_begin_ptr, q_end_ptr, dk_ptr, dv_ptr, first, last, key, num_keys, group, split, scale, scale_log2)
    gl.warp_specialize([
        (consume, (gl.constexpr(0), shared, rest, TOKENS, HEADS, ROWS, KEYS, STAGES, GROUPS, DK, DV)),
        (consume, (gl.constexpr(1), shared, rest, TOKENS, HEADS, ROWS, KEYS, STAGES, GROUPS, DK, DV)),
        (fetch, (
            k_desc, v_desc, q_desc, do_desc, stats_desc, shared, first, last, key, group, tile_rows,
            TOKENS, HEADS, ROWS, KEYS, STAGES, GROUPS,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> bool:
    """Whether :func:`interval_attention_backward_dkv` is for these: widths of 64 or 128, a power of two of at most 64 heads a
    group, tensors that the copy engine can fetch."""
    return (
        k.shape[2] in (64, 128)
        and v.shape[2] in (64, 128)
        and k.shape[1] > 0
        and _ROWS % (q.shape[1] // k.shape[1]) == 0
        and fetchable(q, k, v, do)
    )


def pack_statistics(shift: torch.Tensor, delta: torch.Tensor, groups: int) -> torch.Tensor:
    """float32 [2, G, R]: a group's rows, token after token, stand together, and every tile of them begins at a multiple of its
    size (the copy engine faults on lines that begin off 16 bytes). What fills the last tile is never used."""
    tokens, num_heads = shift.shape
    heads = num_heads // groups
    stats = torch.empty(2, groups, triton.cdiv(tokens * heads, _ROWS) * _ROWS, dtype=torch.float32, device=shift.device)
    for part, x in zip(stats[..., : tokens * heads].unflatten(2, (tokens, heads)), (shift, delta), strict=True):
        part.copy_(x.reshape(tokens, groups, heads).transpose(0, 1))
    return stats


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the Triton twin in ``backward.py``, for tensors of which :func:`takes` is true."""
    (tokens, num_heads, dk_width), (num_keys, groups, dv_width) = q.shape, v.shape
    heads = num_heads // groups
    stats = pack_statistics(shift, delta, groups)
    programs = triton.cdiv(num_keys, 2 * _KEYS) * groups
    splits = splits or query_splits(programs)
    dk = torch.empty(splits, *k.shape, dtype=torch.float32, device=q.device)
    dv = torch.empty(splits, *v.shape, dtype=torch.float32, device=q.device)
    interval_attention_backward_dkv_hopper_kernel[(programs * splits,)](
        tiles(q, (_ROWS // heads, heads, dk_width)), tiles(do, (_ROWS // heads, heads, dv_width)),
        tiles(k, (_KEYS, 1, dk_width)), tiles(v, (_KEYS, 1, dv_width)), tiles(stats.view(-1), (_ROWS,)),
        q_begin, q_end, dk, dv, tokens, num_keys, splits, stats.shape[2], scale, scale * LOG2_E.value,
        GROUPS=groups, HEADS=heads, DK=dk_width, DV=dv_width,
        TOKENS=_ROWS // heads, ROWS=_ROWS, KEYS=_KEYS, STAGES=_SLOTS, num_warps=4,
    )  # fmt: skip
    return (dk[0], dv[0]) if splits == 1 else (dk.sum(0), dv.sum(0))
