"""Selected attention, dk and dv, for Hopper: products run while the exponentials are taken.

One program: a block of 64 keys against one work item of the queries that chose it. A tile of 64 rows is 64 / HEADS tokens of the
list, which are scattered in memory: each is fetched by copies of its own. Two warp groups take turns, tile by tile, each with its
own dk and dv, added through shared memory at the end. That needs one copy of the keys and one ring, halves the time of an item,
and keeps the sum in a fixed order. (Two items a program would need twice the keys and leave each item half the ring.)

Three warps fetch: one the queries and one the upstream gradients, by the copy engine, and one the row statistics through
registers, because these are too narrow for the engine. So are rows of 4 heads, half of the unit in which it swizzles: they are
copied lane by lane. Rows past the list's end have shift +inf; for them the engine reads zeros behind the tensor.

Rings as in ``kernels/hopper.py``, but with twice as many barriers as slots, so that a barrier always belongs to one warp group,
however many slots there are: tile i is in slot i % STAGES, and its barriers are number i % (2 STAGES).

Order within a warp group: as in ``interval_attention/hopper_backward.py``, the tile before being its own tile before.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..common import LOG2_E
from ..hopper import fetchable, tiles
from ..rings import make_barriers
from .unions import Selection, Visitors

BLOCK = gl.constexpr(64)  # keys
ROWS = gl.constexpr(64)  # query rows of a tile
# The unit in which the copy engine swizzles a tile, and so its smallest copy: this many rows of this many channels.
SWIZZLED, CHANNELS = gl.constexpr(8), gl.constexpr(64)
WARP_GROUPS = gl.constexpr(2)
# Shared memory for the ring, after keys, values and barriers.
_RING_BYTES = 194 << 10


@gluon.jit
def listed(queries_ptr, index, last, num_tokens, TOKENS: gl.constexpr):
    """The tokens ``index .. index + TOKENS`` of the lists, a tuple; ``num_tokens``, where nothing is, past ``last``."""
    tokens = ()
    for place in gl.static_range(TOKENS):
        tokens = tokens + (gl.load(queries_ptr + index + place, mask=index + place < last, other=num_tokens),)
    return tokens


@gluon.jit
def wait_for_room(empty, step, STAGES: gl.constexpr):
    """Until the tile that lay in the slot of tile ``step`` has been used."""
    before = step - STAGES
    mbarrier.wait(empty.index(before % (2 * STAGES)), (before // (2 * STAGES)) & 1, pred=before >= 0)


@gluon.jit
def fetch_rows(
    key_desc, source, key_smem, ring, kv_full, full, empty, queries_ptr, first, last, key, group, num_tokens,
    HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A fetching warp: the block's keys (or values), then the queries (or upstream gradients) of the list, tile by tile."""
    TOKENS: gl.constexpr = ROWS // HEADS
    if first < last:
        mbarrier.expect(kv_full, key_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(key_desc, [key, group, 0], kv_full, key_smem)
        if HEADS < SWIZZLED:
            for step in range(gl.cdiv(last - first, TOKENS)):
                # Shifts of +inf hide what stands for rows past the end.
                tokens = listed(queries_ptr, first + step * TOKENS, last, 0, TOKENS)
                wait_for_room(empty, step, STAGES)
                copy_tile(source, ring.index(step % STAGES), full.index(step % (2 * STAGES)), tokens, group * HEADS, HEADS)
        else:
            tokens = listed(queries_ptr, first, last, num_tokens, TOKENS)
            for step in range(gl.cdiv(last - first, TOKENS)):
                # One tile ahead, so that they are known when there is room.
                following = listed(queries_ptr, first + (step + 1) * TOKENS, last, num_tokens, TOKENS)
                wait_for_room(empty, step, STAGES)
                fetch_tile(source, ring, step % STAGES, full.index(step % (2 * STAGES)), tokens, group * HEADS, HEADS, STAGES)
                tokens = following


@gluon.jit
def fetch_tile(source, ring, slot, bar, tokens, head, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """A tile by the copy engine: for each token and CHANNELS channels the rows of its heads."""
    row_desc, _, _, _ = source
    WIDTH: gl.constexpr = ring.shape[2]
    TOKENS: gl.constexpr = ROWS // HEADS
    PARTS: gl.constexpr = WIDTH // CHANNELS
    pieces = ring._reinterpret(ring.dtype, [STAGES * PARTS * TOKENS, 1, HEADS, CHANNELS], row_desc.layout)
    mbarrier.expect(bar, ROWS * WIDTH * 2)
    for place in gl.static_range(TOKENS):
        for part in gl.static_range(PARTS):
            piece = pieces.index((slot * PARTS + part) * TOKENS + place)
            tma.async_copy_global_to_shared(row_desc, [tokens[place], head, part * CHANNELS], bar, piece)


@gluon.jit
def copy_tile(source, tile, bar, tokens, head, HEADS: gl.constexpr):
    """A tile lane by lane, 16 bytes each, two tokens of 4 heads at a time; each lane arrives when its bytes are there."""
    _, x_ptr, stride_t, stride_h = source
    WIDTH: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [1, 1], [1, 0])
    row = gl.arange(0, SWIZZLED, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    # Strides are given in units of 16 bytes, so that the compiler sees their alignment.
    x_ptr += head.to(gl.int64) * stride_h * 8
    place = ((row % HEADS) * stride_h * 8)[:, None] + column[None, :]
    for pair in gl.static_range(ROWS // SWIZZLED):
        token = gl.where(row < HEADS, tokens[2 * pair], tokens[2 * pair + 1])
        pointers = x_ptr + (token.to(gl.int64) * stride_t * 8)[:, None] + place
        async_copy.async_copy_global_to_shared(tile.slice(pair * SWIZZLED, SWIZZLED), pointers)
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def row_statistics(shift_ptr, delta_ptr, position_ptr, key_start_ptr, token, head, keep, NUM_HEADS: gl.constexpr):
    """Shift, delta and last visible key of rows."""
    offset = token.to(gl.int64) * NUM_HEADS + head
    shift = gl.load(shift_ptr + offset, mask=keep, other=float("inf"))
    delta = gl.load(delta_ptr + offset, mask=keep, other=0.0)
    return shift, delta, gl.load(key_start_ptr + token) + gl.load(position_ptr + token)


@gluon.jit
def fetch_statistics(
    rings, full, empty, shift_ptr, delta_ptr, position_ptr, key_start_ptr, queries_ptr, first, last, group,
    HEADS: gl.constexpr, NUM_HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The third fetching warp: loads run one tile ahead of the ring, the tokens' numbers two."""
    shift_ring, delta_ring, limit_ring = rings
    TOKENS: gl.constexpr = ROWS // HEADS
    LAYOUT: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [1], [0])
    row = gl.arange(0, ROWS, LAYOUT)
    head = group * HEADS + row % HEADS
    if first < last:
        index = first + row // HEADS
        token = gl.load(queries_ptr + index, mask=index < last, other=0)
        shift, delta, limit = row_statistics(
            shift_ptr, delta_ptr, position_ptr, key_start_ptr, token, head, index < last, NUM_HEADS
        )
        index += TOKENS
        token = gl.load(queries_ptr + index, mask=index < last, other=0)
        for step in range(gl.cdiv(last - first, TOKENS)):
            next_shift, next_delta, next_limit = row_statistics(
                shift_ptr, delta_ptr, position_ptr, key_start_ptr, token, head, index < last, NUM_HEADS
            )
            index += TOKENS
            token = gl.load(queries_ptr + index, mask=index < last, other=0)
            wait_for_room(empty, step, STAGES)
            slot = step % STAGES
            shift_ring.index(slot).store(shift * LOG2_E)
            delta_ring.index(slot).store(delta)
            limit_ring.index(slot).store(limit)
            mbarrier.arrive(full.index(step % (2 * STAGES)))
            shift, delta, limit = next_shift, next_delta, next_limit


@gluon.jit
def store_rows(out_ptr, x, row, stride, rows, LAYOUT: gl.constexpr, WIDTH: gl.constexpr):
    """Rows ``0 .. rows`` of ``x`` to rows ``row``, ``row + stride``, ... of ``out``."""
    place = gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    offset = (row.to(gl.int64) + place * stride) * WIDTH
    gl.store(out_ptr + offset[:, None] + column[None, :], x, mask=(place < rows)[:, None])


@gluon.jit
def add_up(
    HALF: gl.constexpr, dk, dv, q_ring, do_ring, finished, exchanged, out, scale,
    DK_LAYOUT: gl.constexpr, DV_LAYOUT: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """The first warp group adds and writes dk, the second dv; the ring, which nobody uses any more, holds what they exchange."""
    dk_out, dv_out, row, stride, rows = out
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    dk_smem = q_ring._reinterpret(gl.float32, [BLOCK, DK], LAYOUT)
    dv_smem = do_ring._reinterpret(gl.float32, [BLOCK, DV], LAYOUT)
    mbarrier.arrive(finished)
    mbarrier.wait(finished, 0)
    if HALF == 0:
        dv_smem.store(dv)
    else:
        dk_smem.store(dk)
    mbarrier.arrive(exchanged.index(HALF))
    mbarrier.wait(exchanged.index(1 - HALF), 0)
    if HALF == 0:
        store_rows(dk_out, (dk + dk_smem.load(DK_LAYOUT)) * scale, row, stride, rows, DK_LAYOUT, DK)
    else:
        store_rows(dv_out, dv_smem.load(DV_LAYOUT) + dv, row, stride, rows, DV_LAYOUT, DV)


@gluon.jit
def consume(
    HALF: gl.constexpr, shared, barriers, count, masked, key, out, scale, scale_log2,
    HEADS: gl.constexpr, STAGES: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """A warp group: every other tile of ``count``, of which the first ``masked`` may hold the block's own queries."""
    k_smem, v_smem, q_ring, do_ring, shift_ring, delta_ring, limit_ring = shared
    kv_full, full, empty, finished, exchanged = barriers
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = q_ring.dtype

    this_key = key + gl.arange(0, BLOCK, gl.SliceLayout(1, S_LAYOUT))
    no_scores = gl.zeros([BLOCK, ROWS], gl.float32, S_LAYOUT)
    dk = gl.zeros([BLOCK, DK], gl.float32, DK_LAYOUT)
    dv = gl.zeros([BLOCK, DV], gl.float32, DV_LAYOUT)
    # The tile before: none yet, its products add 0.
    p = gl.zeros([BLOCK, ROWS], dtype, gl.DotOperandLayout(0, DV_LAYOUT, 2))
    ds = gl.zeros([BLOCK, ROWS], dtype, gl.DotOperandLayout(0, DK_LAYOUT, 2))
    before = gl.to_tensor(HALF)
    if count > 0:
        mbarrier.wait(kv_full, 0)
    for step in range(HALF, count, WARP_GROUPS):
        slot = step % STAGES
        k = k_smem.reshape([BLOCK, DK])
        v = v_smem.reshape([BLOCK, DV])
        mbarrier.wait(full.index(step % (2 * STAGES)), (step // (2 * STAGES)) & 1)
        if HEADS < SWIZZLED:
            # Written by lanes, read by products.
            fence_async_shared()
        s = warpgroup_mma(k, q_ring.index(slot).permute([1, 0]), no_scores, use_acc=False, is_async=True)
        dv = warpgroup_mma(p, do_ring.index(before % STAGES), dv, is_async=True)
        dk = warpgroup_mma(ds, q_ring.index(before % STAGES), dk, is_async=True)
        s = warpgroup_mma_wait(2, deps=[s])
        shift = shift_ring.index(slot).load(ROW)
        wide = gl.exp2(s * scale_log2 - shift[None, :])
        # The branch also keeps ptxas from moving the exponentials behind the wait.
        if step < masked:
            limit = limit_ring.index(slot).load(ROW)
            wide = gl.where(this_key[:, None] <= limit[None, :], wide, 0.0)
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        dp = warpgroup_mma(v, do_ring.index(slot).permute([1, 0]), no_scores, use_acc=False, is_async=True)
        mbarrier.arrive(empty.index(before % (2 * STAGES)), pred=step > HALF)
        dp = warpgroup_mma_wait(0, deps=[dp])
        delta = delta_ring.index(slot).load(ROW)
        dp = wide * (dp - delta[None, :])
        p = gl.convert_layout(wide.to(dtype), gl.DotOperandLayout(0, DV_LAYOUT, 2))
        ds = gl.convert_layout(dp.to(dtype), gl.DotOperandLayout(0, DK_LAYOUT, 2))
        before = step
    if count > HALF:
        dv = warpgroup_mma(p, do_ring.index(before % STAGES), dv)
        dk = warpgroup_mma(ds, q_ring.index(before % STAGES), dk)
    if count > 0:
        add_up(HALF, dk, dv, q_ring, do_ring, finished, exchanged, out, scale, DK_LAYOUT, DV_LAYOUT, DK, DV)


@gluon.jit(do_not_specialize=["num_tokens", "num_keys", "num_blocks", "chunk", "first_group", "last_group", "base_group"])
def selected_attention_backward_dkv_hopper_kernel(
    q_desc, do_desc, q_ptr, do_ptr, q_stride_t, q_stride_h, do_stride_t, do_stride_h,
    k_desc, v_desc, shift_ptr, delta_ptr, dk_ptr, dv_ptr, dk_parts_ptr, dv_parts_ptr,
    queries_ptr, offsets_ptr, item_offsets_ptr, slot_offsets_ptr, item_lists_ptr, block_start_ptr, position_ptr, key_start_ptr,
    num_tokens, num_keys, num_blocks, chunk, first_group, last_group, base_group, scale, scale_log2,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As the Triton twin; programs without queries write nothing: their rows are zero already, or another's."""
    TOKENS: gl.constexpr = ROWS // HEADS
    last_list = last_group * num_blocks - 1
    item = gl.load(item_offsets_ptr + first_group * num_blocks) + gl.program_id(0)
    wanted = gl.load(item_lists_ptr + item)
    visit = gl.minimum(wanted, last_list)
    group = visit // num_blocks - base_group
    block = visit % num_blocks
    key = gl.load(block_start_ptr + block)
    # A document's last block may be cut short by the next document's first.
    stop = gl.minimum(gl.load(block_start_ptr + block + 1, mask=block + 1 < num_blocks, other=num_keys), num_keys)

    items_first = gl.load(item_offsets_ptr + visit)
    number = item - items_first
    list_first = gl.load(offsets_ptr + visit)
    first = list_first + number * chunk
    last = gl.minimum(first + chunk, gl.load(offsets_ptr + visit + 1))
    last = gl.where(wanted == visit, gl.maximum(first, last), first)
    count = gl.cdiv(last - first, TOKENS)
    # The only queries before the block's end are its own, at most BLOCK; a list in ascending order has them first.
    masked = gl.cdiv(gl.maximum(list_first + BLOCK - first, 0), TOKENS)
    if gl.load(item_offsets_ptr + visit + 1) - items_first == 1:
        dk_out, dv_out, row, stride = dk_ptr, dv_ptr, key.to(gl.int64) * GROUPS + group, gl.to_tensor(GROUPS)
    else:
        part = gl.load(slot_offsets_ptr + visit) - gl.load(slot_offsets_ptr + first_group * num_blocks) + number
        dk_out, dv_out, row, stride = dk_parts_ptr, dv_parts_ptr, part.to(gl.int64) * BLOCK, gl.to_tensor(1)
    out = (dk_out, dv_out, row, stride, stop - key)

    dtype: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_smem = gl.allocate_shared_memory(dtype, [BLOCK, 1, DK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [BLOCK, 1, DV], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DK], TILE)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DV], TILE)
    shift_ring = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], PLAIN)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], PLAIN)
    limit_ring = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], PLAIN)
    kv_full = make_barriers(1, 2).index(0)
    # Each fetching warp arrives once, or those that copy lane by lane 32 times.
    full = make_barriers(2 * STAGES, 3 if HEADS >= SWIZZLED else 65)
    empty = make_barriers(2 * STAGES, 1)
    finished = make_barriers(1, WARP_GROUPS).index(0)
    exchanged = make_barriers(WARP_GROUPS, 1)
    shared = (k_smem, v_smem, q_ring, do_ring, shift_ring, delta_ring, limit_ring)
    barriers = (kv_full, full, empty, finished, exchanged)
    rings = (shift_ring, delta_ring, limit_ring)
    q_source = (q_desc, q_ptr, q_stride_t, q_stride_h)
    do_source = (do_desc, do_ptr, do_stride_t, do_stride_h)
    gl.warp_specialize([
        (consume, (gl.constexpr(0), shared, barriers, count, masked, key, out, scale, scale_log2, HEADS, STAGES, DK, DV)),
        (consume, (gl.constexpr(1), shared, barriers, count, masked, key, out, scale, scale_log2, HEADS, STAGES, DK, DV)),
        (fetch_rows, (
            k_desc, q_source, k_smem, q_ring, kv_full, full, empty, queries_ptr, first, last, key, group, num_tokens,
            HEADS, STAGES,
        )),
        (fetch_rows, (
            v_desc, do_source, v_smem, do_ring, kv_full, full, empty, queries_ptr, first, last, key, group, num_tokens,
            HEADS, STAGES,
        )),
        (fetch_statistics, (
            rings, full, empty, shift_ptr, delta_ptr, position_ptr, key_start_ptr, queries_ptr, first, last, group,
            HEADS, GROUPS * HEADS, STAGES,
        )),
    ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, block_size: int) -> bool:
    """Whether :func:`launch_items` can take these: blocks of 64, widths of 64 or 128, heads a group that are a power of two from
    4 to 64, tensors that the copy engine can fetch."""
    heads = q.shape[1] // k.shape[1]
    return (
        block_size == BLOCK.value
        and k.shape[2] in (64, 128)
        and v.shape[2] in (64, 128)
        and heads >= 4
        and ROWS.value % heads == 0
        and fetchable(q, k, v, do)
    )


def _token_rows(x: torch.Tensor, heads: int) -> object:
    """Descriptor of CHANNELS channels of a token's rows of one group of x [T, N, D], laid out as in a swizzled tile.

    A placeholder if the group has fewer heads than the swizzle's unit has rows.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, max(heads, SWIZZLED.value), CHANNELS.value], layout)


def launch_items(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    outputs: tuple[torch.Tensor, ...],
    selection: Selection,
    visitors: Visitors,
    groups: tuple[int, int, int],
    scale: float,
) -> None:
    """Launch the kernel like its Triton twin in ``backward.py``, for tensors for which :func:`takes` is true.

    Args:
        outputs: dk, dv and the workspaces of their partial sums, to be written.
        groups: first and end of the groups of ``visitors`` to take, and which of these the tensors' first group is.
    """
    (tokens, num_heads, dk_width), (num_keys, num_groups, dv_width) = q.shape, v.shape
    heads, (first, last, _) = num_heads // num_groups, groups
    slot_bytes = ROWS.value * ((dk_width + dv_width) * 2 + 3 * 4)
    # Five slots against four on an H200, 64k tokens, widths of 128, random/drifting choices: 16 heads a group 8.95/8.75 against
    # 9.46/9.20 in one run, 8.58/9.01 against 8.68/9.19 in another; 4 heads 7.3 against 5.7 ms.
    stages = min(5 if heads >= 8 else 4, _RING_BYTES // slot_bytes)
    selected_attention_backward_dkv_hopper_kernel[((last - first) * visitors.items_per_group,)](
        _token_rows(q, heads), _token_rows(do, heads), q, do, *(stride // 8 for x in (q, do) for stride in x.stride()[:2]),
        tiles(k, (BLOCK.value, 1, dk_width)), tiles(v, (BLOCK.value, 1, dv_width)),
        shift, delta, *outputs,
        visitors.queries, visitors.offsets, visitors.item_offsets, visitors.slot_offsets, visitors.item_lists,
        selection.block_start, selection.position, selection.key_start,
        tokens, num_keys, visitors.num_blocks, visitors.chunk, *groups, scale, scale * LOG2_E.value,
        GROUPS=num_groups, HEADS=heads, DK=dk_width, DV=dv_width, STAGES=stages, num_warps=4,
    )  # fmt: skip
