"""Block scores for Hopper: the sum over heads of exp2(q K_cmp^T - lse), weighted by the overlap with blocks (paper eq. 8 to 10).

One warp fetches key tiles (64 compressed tokens) into a ring, see ``kernels/hopper.py``; each warp group holds 128 query rows
(tokens x heads) of its own and walks all tiles, so that the product of one runs beside the exponentials of the others. Scores are
kept transposed, [compressed tokens, rows]: most of the sum over heads then stays within a thread.

What a query may not see is dropped after the sum over heads (all heads of a token see the same), so that one loop does for
whole tiles and borders; other tokens' keys, or NaN, stay within their own row until then.
"""

from __future__ import annotations

import math

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

from ..common import INT_MAX, LOG2_E, split_width
from ..hopper import fetchable, multiprocessors, shared_layout, tiles
from ..rings import make_barriers

KEYS = gl.constexpr(64)  # compressed tokens of a tile: the rows of one product
ROWS = gl.constexpr(128)  # query rows of a warp group
_SLOTS = 4
# Warp groups of a program, by whether q has more than 128 channels, and registers of their threads.
_WARP_GROUPS, _WIDE_WARP_GROUPS = 3, 2
_REGISTERS = {3: 160, 2: 240}
_FETCHER_REGISTERS = 24


@gluon.jit
def overlap(offset, PIECES: gl.constexpr, PER_BLOCK: gl.constexpr):
    """Stride-d pieces that a compressed token shares with a block, at ``offset`` tokens after the block's first, as float32."""
    pieces = gl.minimum(PER_BLOCK - offset, PIECES) - gl.maximum(-offset, 0)
    return gl.maximum(pieces, 0).to(gl.float32)


@gluon.jit
def item_tokens(
    index, first_token, last_token, begin_ptr, position_ptr,
    TOKENS: gl.constexpr, PADDED_TOKENS: gl.constexpr, SELECT_BLOCK: gl.constexpr,
):  # fmt: skip
    """Group and first token of work item ``index``, and where its tokens' keys begin and which blocks they are in."""
    num_tiles = gl.cdiv(last_token - first_token, TOKENS)
    group = index // num_tiles
    tile_first = first_token + (num_tiles - 1 - index % num_tiles) * TOKENS
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    place = gl.minimum(gl.arange(0, PADDED_TOKENS, layout), TOKENS - 1)
    token = gl.minimum(tile_first + place, last_token - 1)
    return group, tile_first, gl.load(begin_ptr + token), gl.load(position_ptr + token) // SELECT_BLOCK


@gluon.jit
def key_tiles(begin, own_block, base, BLOCKS: gl.constexpr):
    """Tiles of the document whose keys begin at ``base``."""
    return gl.max(gl.where(begin == base, own_block, -1), 0) // BLOCKS + 1


@gluon.jit
def fetch(
    q_tiles, q_tail_tiles, k_tiles, k_tail_tiles, ranges, sizes, buffers, barriers,
    HEADS: gl.constexpr, TOKENS: gl.constexpr, GROUP_TOKENS: gl.constexpr, PADDED_TOKENS: gl.constexpr,
    BLOCKS: gl.constexpr, SELECT_BLOCK: gl.constexpr, STAGES: gl.constexpr,
    DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, CONSUMERS: gl.constexpr, Q_BULK: gl.constexpr,
):  # fmt: skip
    """The fetching warp: queries of each work item, then the key tiles of each of its documents."""
    begin_ptr, _end_ptr, position_ptr = ranges
    first_token, last_token, num_groups, _max_blocks = sizes
    q_bufs, q_tail_bufs, k_bufs, k_tail_bufs = buffers
    q_full, q_empty, k_full, k_empty = barriers
    BYTES: gl.constexpr = k_tiles.dtype.primitive_bitwidth // 8
    total = gl.cdiv(last_token - first_token, TOKENS) * num_groups
    n = 0
    turn = 0
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        group, tile_first, begin, own_block = item_tokens(
            index, first_token, last_token, begin_ptr, position_ptr, TOKENS, PADDED_TOKENS, SELECT_BLOCK
        )
        if Q_BULK:
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(c), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(c), ROWS * (DK_HEAD + DK_TAIL) * BYTES)
                place = [tile_first + c * GROUP_TOKENS, group * HEADS, 0]
                tma.async_copy_global_to_shared(q_tiles, place, q_full.index(c), q_bufs.index(c))
                if DK_TAIL > 0:
                    tail = [tile_first + c * GROUP_TOKENS, group * HEADS, DK_HEAD]
                    tma.async_copy_global_to_shared(q_tail_tiles, tail, q_full.index(c), q_tail_bufs.index(c))
        base = gl.min(begin, 0)
        while base < INT_MAX:
            for j in range(0, key_tiles(begin, own_block, base, BLOCKS)):
                slot = n % STAGES
                mbarrier.wait(k_empty.index(slot), ((n // STAGES) & 1) ^ 1)
                mbarrier.expect(k_full.index(slot), KEYS * (DK_HEAD + DK_TAIL) * BYTES)
                row = base + j * KEYS
                tma.async_copy_global_to_shared(k_tiles, [row, group, 0], k_full.index(slot), k_bufs.index(slot))
                if DK_TAIL > 0:
                    place = [row, group, DK_HEAD]
                    tma.async_copy_global_to_shared(k_tail_tiles, place, k_full.index(slot), k_tail_bufs.index(slot))
                n += 1
            base = gl.min(gl.where(begin > base, begin, INT_MAX), 0)
        turn += 1


@gluon.jit
def scores_of_tile(
    q, q_tail, k_bufs, k_tail_bufs, k_full, k_empty, n, S_LAYOUT: gl.constexpr,
    STAGES: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr,
):  # fmt: skip
    """K Q^T of the n-th key tile, whose slot is free afterwards."""
    slot = n % STAGES
    mbarrier.wait(k_full.index(slot), (n // STAGES) & 1)
    zero = gl.zeros([KEYS, ROWS], gl.float32, S_LAYOUT)
    k = k_bufs.index(slot).reshape([KEYS, DK_HEAD])
    s = warpgroup_mma(k, q.permute([1, 0]), zero, use_acc=False, is_async=True)
    if DK_TAIL > 0:
        k_tail = k_tail_bufs.index(slot).reshape([KEYS, DK_TAIL])
        s = warpgroup_mma(k_tail, q_tail.permute([1, 0]), s, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    return s


@gluon.jit
def fold(low, high, BIT: gl.constexpr):
    """Sum over the two lanes that differ in ``BIT``: the lane without it gets that of ``low``, the one with it of ``high``."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred up; .reg .b32 lane, send, keep, got; mov.u32 lane, %laneid; and.b32 lane, lane, "
        + BIT
        + "; setp.ne.b32 up, lane, 0; selp.b32 send, $1, $2, up; selp.b32 keep, $2, $1, up;"
        + " shfl.sync.bfly.b32 got, send, "
        + BIT
        + ", 0x1f, 0xffffffff; add.f32 $0, keep, got; }",
        "=r,r,r",
        [low, high],
        dtype=gl.float32,
        is_pure=False,  # lanes meet in it: it must not move into a branch
        pack=1,
    )


@gluon.jit
def sum_heads(p, TOKENS: gl.constexpr, PADDED_HEADS: gl.constexpr):
    """p [keys, tokens x heads] summed over heads, [keys, tokens]. Columns 8 a + 2 t + r of a product lie in lane t of four."""
    if PADDED_HEADS >= 8 and TOKENS >= 4:
        p = gl.sum(gl.sum(p.reshape([KEYS, TOKENS, PADDED_HEADS // 8, 4, 2]), 4), 2)
        # [keys, tokens / 4, token bits 1 and 0, lane bits 1 and 0]: each lane bit is summed while a token bit takes its place.
        p = p.reshape([KEYS, TOKENS // 4, 2, 2, 2, 2])
        low, high = gl.split(gl.permute(p, [0, 1, 2, 4, 5, 3]))
        p = fold(low, high, "1")
        low, high = gl.split(gl.permute(p, [0, 1, 3, 4, 2]))
        p = fold(low, high, "2").reshape([KEYS, TOKENS])
    else:
        p = gl.sum(p.reshape([KEYS, TOKENS, PADDED_HEADS]), 2)
    return p


@gluon.jit
def score_tile(
    s, j, base, lse, end, carry, own_block, out_keep, out_row, scores_ptr, scale_log2,
    Y_LAYOUT: gl.constexpr, B_LAYOUT: gl.constexpr, GROUP_TOKENS: gl.constexpr, PADDED_HEADS: gl.constexpr,
    BLOCKS: gl.constexpr, PIECES: gl.constexpr, PER_BLOCK: gl.constexpr,
):  # fmt: skip
    """Write the scores of one tile's blocks. ``carry`` [blocks, tokens]: in its first row, what the last block of the tile
    before reaches into this one."""
    p = gl.exp2(s * scale_log2 - lse[None, :])
    p = sum_heads(p, GROUP_TOKENS, PADDED_HEADS)
    p = gl.convert_layout(p, Y_LAYOUT)
    slot = gl.arange(0, KEYS, gl.SliceLayout(1, Y_LAYOUT))
    key = base + j * KEYS + slot
    p = gl.where(key[:, None] < end[None, :], p, 0.0)
    within = slot % PER_BLOCK
    inside = overlap(within, PIECES, PER_BLOCK)
    score = gl.sum((p * inside[:, None]).reshape([BLOCKS, PER_BLOCK, GROUP_TOKENS]), 1)
    score = gl.convert_layout(score, B_LAYOUT)
    place = gl.arange(0, BLOCKS, gl.SliceLayout(1, B_LAYOUT))
    if PIECES > 1:
        beyond = overlap(within - PER_BLOCK, PIECES, PER_BLOCK)
        reach = gl.sum((p * beyond[:, None]).reshape([BLOCKS, PER_BLOCK, GROUP_TOKENS]), 1)
        reach = gl.convert_layout(reach, B_LAYOUT)
        # Row i gets what block i - 1 reaches into it, and row 0 what the last block reaches into the next tile.
        previous = (place + (BLOCKS - 1)) % BLOCKS
        reach = gl.gather(reach, gl.broadcast(previous[:, None], reach)[0], 0)
        score += gl.where(place[:, None] == 0, carry, reach)
        carry = reach
    block = j * BLOCKS + place
    mask = out_keep[None, :] & (block[:, None] <= own_block[None, :])
    gl.store(scores_ptr + out_row[None, :] + block[:, None], score, mask=mask)
    return carry


@gluon.jit
def consume(
    C: gl.constexpr, pointers, strides, ranges, sizes, scale_log2, buffers, barriers,
    HEADS: gl.constexpr, PADDED_HEADS: gl.constexpr, TOKENS: gl.constexpr, GROUP_TOKENS: gl.constexpr,
    PADDED_TOKENS: gl.constexpr, BLOCKS: gl.constexpr, PIECES: gl.constexpr, PER_BLOCK: gl.constexpr,
    SELECT_BLOCK: gl.constexpr, STAGES: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr, Q_BULK: gl.constexpr,
):  # fmt: skip
    """Warp group ``C``: tokens ``C x GROUP_TOKENS`` .. of each work item, one group's heads."""
    q_ptr, lse_ptr, scores_ptr = pointers
    q_stride_t, q_stride_h = strides
    begin_ptr, end_ptr, position_ptr = ranges
    first_token, last_token, num_groups, max_blocks = sizes
    q_bufs, q_tail_bufs, k_bufs, k_tail_bufs = buffers
    q_full, q_empty, k_full, k_empty = barriers
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    LANES: gl.constexpr = BLOCKS if BLOCKS < 32 else 32
    Y_LAYOUT: gl.constexpr = gl.BlockedLayout([PER_BLOCK, 1], [LANES, 32 // LANES], [1, 4], [0, 1])
    B_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [LANES, 32 // LANES], [1, 4], [0, 1])
    q = q_bufs.index(C).reshape([ROWS, DK_HEAD])
    q_tail = q_tail_bufs.index(C).reshape([ROWS, DK_TAIL]) if DK_TAIL > 0 else q
    num_heads = num_groups * HEADS
    total = gl.cdiv(last_token - first_token, TOKENS) * num_groups
    n = 0
    turn = 0
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        group, tile_first, all_begin, all_own = item_tokens(
            index, first_token, last_token, begin_ptr, position_ptr, TOKENS, PADDED_TOKENS, SELECT_BLOCK
        )
        row = gl.arange(0, ROWS, gl.SliceLayout(0, S_LAYOUT))
        wanted = tile_first + C * GROUP_TOKENS + row // PADDED_HEADS
        head = row % PADDED_HEADS
        valid = (wanted < last_token) & (head < HEADS)
        place = wanted.to(gl.int64) * num_heads + group * HEADS + head
        # +inf makes every probability 0, for rows that see or are nothing.
        lse = gl.load(lse_ptr + place, mask=valid, other=float("inf")) * LOG2_E
        lse = gl.where(lse == float("-inf"), float("inf"), lse)

        y_token = gl.minimum(
            tile_first + C * GROUP_TOKENS + gl.arange(0, GROUP_TOKENS, gl.SliceLayout(0, Y_LAYOUT)), last_token - 1
        )
        y_begin = gl.load(begin_ptr + y_token)
        y_end = gl.load(end_ptr + y_token)
        out_wanted = tile_first + C * GROUP_TOKENS + gl.arange(0, GROUP_TOKENS, gl.SliceLayout(0, B_LAYOUT))
        out_token = gl.minimum(out_wanted, last_token - 1)
        begin = gl.load(begin_ptr + out_token)
        own_block = gl.load(position_ptr + out_token) // SELECT_BLOCK
        out_row = ((out_token - first_token).to(gl.int64) * num_groups + group) * max_blocks
        if Q_BULK:
            mbarrier.wait(q_full.index(C), turn & 1)
        else:
            load_queries(
                q_ptr, q, q_tail, tile_first, group, last_token, q_stride_t, q_stride_h,
                C, HEADS, PADDED_HEADS, GROUP_TOKENS, DK_HEAD, DK_TAIL,
            )  # fmt: skip

        base = gl.min(all_begin, 0)
        while base < INT_MAX:
            end = gl.where(y_begin == base, y_end, 0)
            keep = (begin == base) & (out_wanted < last_token)
            carry = gl.zeros([BLOCKS, GROUP_TOKENS], gl.float32, B_LAYOUT)
            for j in range(0, key_tiles(all_begin, all_own, base, BLOCKS)):
                s = scores_of_tile(q, q_tail, k_bufs, k_tail_bufs, k_full, k_empty, n, S_LAYOUT, STAGES, DK_HEAD, DK_TAIL)
                carry = score_tile(
                    s, j, base, lse, end, carry, own_block, keep, out_row, scores_ptr, scale_log2,
                    Y_LAYOUT, B_LAYOUT, GROUP_TOKENS, PADDED_HEADS, BLOCKS, PIECES, PER_BLOCK,
                )  # fmt: skip
                n += 1
            base = gl.min(gl.where(all_begin > base, all_begin, INT_MAX), 0)
        if Q_BULK:  # all products with Q are done
            mbarrier.arrive(q_empty.index(C), count=1)
        turn += 1


@gluon.jit
def load_queries(
    q_ptr, q, q_tail, tile_first, group, last_token, q_stride_t, q_stride_h,
    C: gl.constexpr, HEADS: gl.constexpr, PADDED_HEADS: gl.constexpr, GROUP_TOKENS: gl.constexpr,
    DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr,
):  # fmt: skip
    """The consumer's query rows by ordinary loads, where the copy engine cannot fetch them."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    token = gl.minimum(tile_first + C * GROUP_TOKENS + row // PADDED_HEADS, last_token - 1)
    head = group * HEADS + gl.minimum(row % PADDED_HEADS, HEADS - 1)
    offset = token.to(gl.int64) * q_stride_t + head.to(gl.int64) * q_stride_h
    column = gl.arange(0, DK_HEAD, gl.SliceLayout(0, layout))
    q.store(gl.load(q_ptr + offset[:, None] + column[None, :]))
    if DK_TAIL > 0:
        tail = DK_HEAD + gl.arange(0, DK_TAIL, gl.SliceLayout(0, layout))
        q_tail.store(gl.load(q_ptr + offset[:, None] + tail[None, :]))
    fence_async_shared()


@gluon.jit(do_not_specialize=["first_token", "last_token", "max_blocks", "num_groups"])
def block_scores_hopper_kernel(
    q_ptr, q_tiles, q_tail_tiles, k_tiles, k_tail_tiles, lse_ptr, begin_ptr, end_ptr, position_ptr, scores_ptr,
    q_stride_t, q_stride_h, first_token, last_token, max_blocks, num_groups, scale_log2,
    HEADS: gl.constexpr, PADDED_HEADS: gl.constexpr, TOKENS: gl.constexpr, GROUP_TOKENS: gl.constexpr,
    PADDED_TOKENS: gl.constexpr, BLOCKS: gl.constexpr, PIECES: gl.constexpr, PER_BLOCK: gl.constexpr,
    SELECT_BLOCK: gl.constexpr, STAGES: gl.constexpr, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr,
    CONSUMERS: gl.constexpr, Q_BULK: gl.constexpr, Q_TOKENS: gl.constexpr, Q_HEADS: gl.constexpr,
    Q_SHARED: gl.constexpr, Q_TAIL_SHARED: gl.constexpr, REGISTERS: gl.constexpr, FETCHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Work items program_id, program_id + num_programs, ...: TOKENS queries and one group each."""
    dtype: gl.constexpr = k_tiles.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS, Q_TOKENS, Q_HEADS, DK_HEAD], Q_SHARED)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES] + k_tiles.block_type.shape, k_tiles.layout)
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
    # Compile-time constants stand apart: in a tuple that has a name they are forgotten to be such.
    pointers = (q_ptr, lse_ptr, scores_ptr)
    strides = (q_stride_t, q_stride_h)
    ranges = (begin_ptr, end_ptr, position_ptr)
    sizes = (first_token, last_token, num_groups, max_blocks)
    buffers = (q_bufs, q_tail_bufs, k_bufs, k_tail_bufs)
    barriers = (q_full, q_empty, k_full, k_empty)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (
                gl.constexpr(0), pointers, strides, ranges, sizes, scale_log2, buffers, barriers,
                HEADS, PADDED_HEADS, TOKENS, GROUP_TOKENS, PADDED_TOKENS, BLOCKS, PIECES, PER_BLOCK, SELECT_BLOCK, STAGES,
                DK_HEAD, DK_TAIL, Q_BULK,
            )),
            (consume, (
                gl.constexpr(1), pointers, strides, ranges, sizes, scale_log2, buffers, barriers,
                HEADS, PADDED_HEADS, TOKENS, GROUP_TOKENS, PADDED_TOKENS, BLOCKS, PIECES, PER_BLOCK, SELECT_BLOCK, STAGES,
                DK_HEAD, DK_TAIL, Q_BULK,
            )),
            (fetch, (
                q_tiles, q_tail_tiles, k_tiles, k_tail_tiles, ranges, sizes, buffers, barriers,
                HEADS, TOKENS, GROUP_TOKENS, PADDED_TOKENS, BLOCKS, SELECT_BLOCK, STAGES, DK_HEAD, DK_TAIL, CONSUMERS, Q_BULK,
            )),
        ], [4, 1], [REGISTERS, FETCHER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (
                gl.constexpr(0), pointers, strides, ranges, sizes, scale_log2, buffers, barriers,
                HEADS, PADDED_HEADS, TOKENS, GROUP_TOKENS, PADDED_TOKENS, BLOCKS, PIECES, PER_BLOCK, SELECT_BLOCK, STAGES,
                DK_HEAD, DK_TAIL, Q_BULK,
            )),
            (consume, (
                gl.constexpr(1), pointers, strides, ranges, sizes, scale_log2, buffers, barriers,
                HEADS, PADDED_HEADS, TOKENS, GROUP_TOKENS, PADDED_TOKENS, BLOCKS, PIECES, PER_BLOCK, SELECT_BLOCK, STAGES,
                DK_HEAD, DK_TAIL, Q_BULK,
            )),
            (consume, (
                gl.constexpr(2), pointers, strides, ranges, sizes, scale_log2, buffers, barriers,
                HEADS, PADDED_HEADS, TOKENS, GROUP_TOKENS, PADDED_TOKENS, BLOCKS, PIECES, PER_BLOCK, SELECT_BLOCK, STAGES,
                DK_HEAD, DK_TAIL, Q_BULK,
            )),
            (fetch, (
                q_tiles, q_tail_tiles, k_tiles, k_tail_tiles, ranges, sizes, buffers, barriers,
                HEADS, TOKENS, GROUP_TOKENS, PADDED_TOKENS, BLOCKS, SELECT_BLOCK, STAGES, DK_HEAD, DK_TAIL, CONSUMERS, Q_BULK,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, FETCHER_REGISTERS])  # fmt: skip


def takes(q: torch.Tensor, k_cmp: torch.Tensor, blocks_of: int) -> bool:
    """Whether :class:`BlockScores` can take these: widths of 64, 128 or 192, 4 to 128 heads a group (with fewer there is little
    to sum, and registers do not hold the scores), keys that the copy engine can fetch, and blocks of ``blocks_of`` compressed
    tokens, a power of two of at most 64."""
    heads = q.shape[1] // k_cmp.shape[1]
    return (
        q.shape[2] in (64, 128, 192)
        and 4 <= heads <= ROWS.value
        and blocks_of <= KEYS.value
        and blocks_of & (blocks_of - 1) == 0
        and fetchable(k_cmp)
        and q.stride(-1) == 1
    )


class BlockScores:
    """Computes block scores, for any range of queries, of tensors for which :func:`takes` is true; arguments and ``steps`` as of
    ``_TritonScores`` in ``forward.py``."""

    def __init__(
        self,
        q: torch.Tensor,
        k_cmp: torch.Tensor,
        lse: torch.Tensor,
        ranges: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        compress_block_size: int,
        compress_stride: int,
        select_block_size: int,
        scale: float,
    ) -> None:
        """``ranges``: cmp_begin, cmp_end, position."""
        num_heads, width = q.shape[1:]
        self.groups, self.scale_log2 = k_cmp.shape[1], scale * LOG2_E.value
        heads = num_heads // self.groups
        padded_heads, per_block = triton.next_power_of_2(heads), select_block_size // compress_stride
        head, tail = split_width(width)
        warp_groups = _WARP_GROUPS if width <= 128 else _WIDE_WARP_GROUPS
        group_tokens = ROWS.value // padded_heads
        whole = heads == padded_heads and fetchable(q)
        q_block = (group_tokens, heads) if whole else (ROWS.value, 1)
        q_parts = [(*q_block, part) for part in (head, tail or head)]
        q_tiles = (tiles(q, part) if whole else q for part in q_parts)
        k_tiles = (tiles(k_cmp, (KEYS.value, 1, part)) for part in (head, tail or head))
        self.tensors = (q, *q_tiles, *k_tiles, lse, *ranges)
        self.q_strides, self.tokens, self.programs = q.stride()[:2], group_tokens * warp_groups, multiprocessors(q.device)
        # Multiples of the first number of tokens keep all programs equally busy.
        self.steps = (self.tokens * (self.programs // math.gcd(self.programs, self.groups)), self.tokens)
        self.settings = dict(
            HEADS=heads, PADDED_HEADS=padded_heads, TOKENS=self.tokens, GROUP_TOKENS=group_tokens,
            PADDED_TOKENS=triton.next_power_of_2(self.tokens), BLOCKS=KEYS.value // per_block,
            PIECES=compress_block_size // compress_stride, PER_BLOCK=per_block, SELECT_BLOCK=select_block_size, STAGES=_SLOTS,
            DK_HEAD=head, DK_TAIL=tail, CONSUMERS=warp_groups, Q_BULK=whole, Q_TOKENS=q_block[0], Q_HEADS=q_block[1],
            Q_SHARED=shared_layout(q_parts[0], q.dtype), Q_TAIL_SHARED=shared_layout(q_parts[1], q.dtype),
            REGISTERS=_REGISTERS[warp_groups], FETCHER_REGISTERS=_FETCHER_REGISTERS, num_warps=4,
        )  # fmt: skip

    def write(self, scores: torch.Tensor, first: int, last: int) -> None:
        """Write the scores of queries ``first .. last`` to ``scores`` [last - first or more, G, blocks or more]."""
        items = triton.cdiv(last - first, self.tokens) * self.groups
        block_scores_hopper_kernel[(min(items, self.programs),)](
            *self.tensors, scores, *self.q_strides, first, last, scores.shape[2], self.groups, self.scale_log2, **self.settings
        )
