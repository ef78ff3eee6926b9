"""Block selection: importance of each block from the compressed scores, then the n best (paper equations 8 to 12).

Queries are taken in chunks, so that a chunk's block scores, float32 [queries, G, blocks], stay within a fixed budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..common import (
    FLOAT32_PRODUCTS,
    INT_MAX,
    LOG2_E,
    bulk_tiles,
    channels_last,
    check_heads,
    copies_in_bulk,
    dot_wide,
    load_bulk,
    load_wide,
    split_width,
)
from ..hopper import on_hopper
from ..tuning import TileConfig, tile_config
from .top_blocks import ROW_MULTIPLE, top_blocks

# Bytes of scores held at once. At 64k tokens of 64 heads the outputs allocated later need twice as much, so the peak does not
# grow; with few heads, or on one of many ranks, it may.
SCORE_BYTES = 512 << 20


@triton.jit
def _overlap(offset, PIECES: tl.constexpr, PER_BLOCK: tl.constexpr):
    """Stride-d pieces that a compressed token shares with a block, at ``offset`` tokens after the block's first, as float32.

    The number of (m, k) with 0 <= m < PER_BLOCK, 0 <= k < PIECES and m - k = offset.
    """
    pieces = tl.minimum(PER_BLOCK - offset, PIECES) - tl.maximum(-offset, 0)
    return tl.maximum(pieces, 0).to(tl.float32)


@triton.jit
def _score_blocks(
    first, last, carry, q, q_tail, lse, cmp_end, base, key_stop, scale_log2, out_row, out_keep, own_block, group,
    k_ptr, k_tiles, k_tail_tiles, scores_ptr, k_stride_c,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, PADDED_HEADS: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
    PIECES: tl.constexpr, PER_BLOCK: tl.constexpr, MASKED: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the block tiles ``first .. last`` of one document, whose compressed tokens start at row ``base``.

    Scores are kept transposed, [compressed tokens, rows], so that the sum over heads stays mostly within a thread. A
    compressed token that starts in one block may reach into the next: ``carry`` [TOKENS] is that part of the last block.
    """
    KEYS: tl.constexpr = BLOCKS * PADDED
    slot = tl.arange(0, KEYS)
    within = slot % PADDED
    inside = _overlap(within, PIECES, PER_BLOCK) * (within < PER_BLOCK)
    beyond = _overlap(within - PER_BLOCK, PIECES, PER_BLOCK) * (within < PER_BLOCK)
    place = tl.arange(0, BLOCKS)
    for tile in tl.range(first, last):
        key = base + (tile * BLOCKS + slot // PADDED) * PER_BLOCK + within
        keep = key < key_stop
        if BULK:
            k, k_tail = load_bulk(k_tiles, k_tail_tiles, base + tile * KEYS, group, KEYS, DK_HEAD, DK_TAIL)
        else:
            cut: tl.constexpr = MASKED or PADDED > PER_BLOCK
            k, k_tail = load_wide(k_ptr, key.to(tl.int64) * k_stride_c, keep, DK_HEAD, DK_TAIL, DK, cut)
        p = tl.exp2(dot_wide(k, k_tail, q, q_tail, DK_TAIL, PRECISION) * scale_log2 - lse[None, :])
        if MASKED:
            p = tl.where(key[:, None] < cmp_end[None, :], p, 0.0)
        p = tl.sum(tl.reshape(p, [KEYS, TOKENS, PADDED_HEADS]), 2)
        score = tl.sum(tl.reshape(p * inside[:, None], [BLOCKS, PADDED, TOKENS]), 1)
        if PIECES > 1:
            reach = tl.sum(tl.reshape(p * beyond[:, None], [BLOCKS, PADDED, TOKENS]), 1)
            previous = tl.broadcast_to(tl.maximum(place - 1, 0)[:, None], [BLOCKS, TOKENS])
            score += tl.where(place[:, None] == 0, carry[None, :], tl.gather(reach, previous, 0))
            carry = tl.sum(tl.where(place[:, None] == BLOCKS - 1, reach, 0.0), 0)
        block = tile * BLOCKS + place
        mask = out_keep[None, :] & (block[:, None] <= own_block[None, :])
        tl.store(scores_ptr + out_row[None, :] + block[:, None], score, mask=mask)
    return carry


@triton.jit(do_not_specialize=["first_token", "last_token", "max_blocks"])
def block_scores_kernel(
    q_ptr, k_ptr, k_tiles, k_tail_tiles, lse_ptr, cmp_begin_ptr, cmp_end_ptr, position_ptr, scores_ptr,
    q_stride_t, q_stride_h, k_stride_c, k_stride_g, first_token, last_token, max_blocks, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
    PIECES: tl.constexpr, PER_BLOCK: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the scores of TOKENS queries and one group against every block they may choose.

    Queries of several documents in one tile are taken document by document. Late tiles, which see most, start first.
    """
    ROWS: tl.constexpr = TOKENS * PADDED_HEADS
    group = tl.program_id(0) % GROUPS
    tile = tl.num_programs(0) // GROUPS - 1 - tl.program_id(0) // GROUPS
    tile_first = first_token + tile * TOKENS
    row = tl.arange(0, ROWS)
    wanted = tile_first + row // PADDED_HEADS
    token = tl.minimum(wanted, last_token - 1)
    head = tl.minimum(row % PADDED_HEADS, HEADS - 1)
    valid = (wanted == token) & (row % PADDED_HEADS == head)
    head = (group * HEADS + head).to(tl.int64)
    place = token.to(tl.int64)
    q, q_tail = load_wide(q_ptr, place * q_stride_t + head * q_stride_h, valid, DK_HEAD, DK_TAIL, DK, False)
    # +inf makes every probability 0, for rows that see or are nothing.
    lse = tl.load(lse_ptr + place * (GROUPS * HEADS) + head, mask=valid, other=float("inf")) * LOG2_E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    row_begin = tl.load(cmp_begin_ptr + token)
    row_end = tl.load(cmp_end_ptr + token)

    out_wanted = tile_first + tl.arange(0, TOKENS)
    out_token = tl.minimum(out_wanted, last_token - 1)
    begin = tl.load(cmp_begin_ptr + out_token)
    end = tl.load(cmp_end_ptr + out_token)
    own_block = tl.load(position_ptr + out_token) // SELECT_BLOCK
    out_row = ((out_token - first_token).to(tl.int64) * GROUPS + group) * max_blocks
    k_ptr += group.to(tl.int64) * k_stride_g

    base = tl.min(begin, 0)
    while base < INT_MAX:
        here = begin == base
        tiles = tl.max(tl.where(here, own_block, -1), 0) // BLOCKS + 1
        seen_by_all = tl.min(tl.where(here, end, INT_MAX), 0) - base
        full_tiles = tl.minimum(seen_by_all // (BLOCKS * PER_BLOCK), tiles)
        key_stop = tl.max(tl.where(here, end, 0), 0)
        here_lse = tl.where(row_begin == base, lse, float("inf"))
        out_keep = here & (out_wanted == out_token)
        carry = tl.zeros([TOKENS], dtype=tl.float32)
        carry = _score_blocks(
            0, full_tiles, carry, q, q_tail, here_lse, row_end, base, key_stop, scale_log2, out_row, out_keep, own_block,
            group, k_ptr, k_tiles, k_tail_tiles, scores_ptr, k_stride_c, DK, DK_HEAD, DK_TAIL,
            TOKENS, PADDED_HEADS, BLOCKS, PADDED, PIECES, PER_BLOCK, False, BULK, PRECISION,
        )  # fmt: skip
        _score_blocks(
            full_tiles, tiles, carry, q, q_tail, here_lse, row_end, base, key_stop, scale_log2, out_row, out_keep, own_block,
            group, k_ptr, k_tiles, k_tail_tiles, scores_ptr, k_stride_c, DK, DK_HEAD, DK_TAIL,
            TOKENS, PADDED_HEADS, BLOCKS, PADDED, PIECES, PER_BLOCK, True, False, PRECISION,
        )  # fmt: skip
        base = tl.min(tl.where(begin > base, begin, INT_MAX), 0)


def select_blocks_forward(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    cmp_begin: torch.Tensor,
    cmp_end: torch.Tensor,
    position: torch.Tensor,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    scale: float,
    max_blocks: int,
    *,
    config: TileConfig | None = None,
    score_bytes: int = SCORE_BYTES,
    bulk: bool | None = None,
    hopper: bool = True,
) -> torch.Tensor:
    """The n blocks each query attends to, one choice for all heads of a group.

    Args:
        q: [T, N, Dk]; query head h belongs to group h // (N / G). float16, bfloat16 or float32; any strides.
        k_cmp: [C, G, Dk], compressed keys.
        lse: float32 [T, N], natural log-sum-exp of the compressed branch over all compressed tokens that the query sees.
        cmp_begin: int32 [T], row of ``k_cmp`` at which the query's document starts.
        cmp_end: int32 [T], one past the last row that the query sees.
        position: int32 [T], position of each query in its document.
        compress_block_size: l. compress_stride: d. select_block_size: l'. All in tokens.
        num_selected_blocks: n. num_init_blocks, num_local_blocks: forced blocks, counted in n.
        scale: factor of the scores, as in the compressed branch.
        max_blocks: upper bound of the blocks that any query sees, ``position // l' + 1``.
        config: tile shape instead of the table's.
        score_bytes: budget in bytes of the scores held at once.
        bulk: whether to fetch keys by the copy engine; None: where it can.
        hopper: let ``hopper.py`` compute the scores where it can, unless ``config`` or ``bulk`` is given.

    Returns:
        int32 [T, G, n], block indices within the query's document, ascending, padded with -1.

    Raises:
        ValueError: the heads do not divide over the groups, or d does not divide l and l'.
    """
    tokens, num_heads, _ = q.shape
    groups = k_cmp.shape[1]
    check_heads(num_heads, groups)
    if compress_block_size % compress_stride or select_block_size % compress_stride:
        raise ValueError(
            f"compress_stride = {compress_stride} must divide compress_block_size = {compress_block_size} and "
            f"select_block_size = {select_block_size}"
        )
    chosen = torch.empty(tokens, groups, num_selected_blocks, dtype=torch.int32, device=q.device)
    if tokens == 0:
        return chosen
    q, k_cmp, lse = channels_last(q), channels_last(k_cmp), lse.contiguous()
    scorer = _TritonScores
    if hopper and config is None and bulk is None and on_hopper(q.device):
        from . import hopper as kernels

        if kernels.takes(q, k_cmp, select_block_size // compress_stride):
            scorer = kernels.BlockScores
    shape = (compress_block_size, compress_stride, select_block_size)
    options = {"config": config, "bulk": bulk} if scorer is _TritonScores else {}
    block_scores = scorer(q, k_cmp, lse, (cmp_begin, cmp_end, position), *shape, scale, **options)
    row = triton.cdiv(max_blocks, ROW_MULTIPLE.value) * ROW_MULTIPLE.value
    chunk = chunk_tokens(tokens, score_bytes // (4 * groups * row), block_scores.steps)
    scores = torch.empty(min(chunk, tokens), groups, row, dtype=torch.float32, device=q.device)
    for first in range(0, tokens, chunk):
        last = min(first + chunk, tokens)
        block_scores.write(scores, first, last)
        top_blocks(scores, position, chosen, first, last, select_block_size, num_init_blocks, num_local_blocks)
    return chosen


def chunk_tokens(tokens: int, most: int, steps: Sequence[int]) -> int:
    """Number of queries in a chunk: a multiple of the first of ``steps`` that is not above ``most`` (else of the last one), at
    most ``most`` if possible, and such that the tokens divide evenly into chunks."""
    step = next((step for step in steps if step <= most), steps[-1])
    most = max(step, most // step * step)
    even = triton.cdiv(tokens, triton.cdiv(tokens, most))
    return triton.cdiv(even, step) * step


class _TritonScores:
    """Computes block scores, for any range of queries. Arguments as in :func:`select_blocks_forward`; ``ranges`` are cmp_begin,
    cmp_end and position. ``steps``: numbers of queries of which chunks should be multiples, the best first."""

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
        *,
        config: TileConfig | None,
        bulk: bool | None,
    ) -> None:
        (_, num_heads, width), self.groups = q.shape, k_cmp.shape[1]
        heads = num_heads // self.groups
        padded_heads = triton.next_power_of_2(heads)
        config = config or tile_config("selection_scores", q.dtype, q.device, padded_heads, width)
        per_block = select_block_size // compress_stride
        padded = triton.next_power_of_2(per_block)
        head, tail = split_width(width)
        blocks_at_once = max(1, config.keys // padded)
        # If a block has a power of two of compressed tokens, these are laid out in a tile as in memory.
        bulk = padded == per_block and (copies_in_bulk(k_cmp) if bulk is None else bulk)
        self.tokens, self.scale_log2 = config.tokens(padded_heads), scale * LOG2_E.value
        self.steps = (self.tokens,)
        self.tensors = (q, k_cmp, *bulk_tiles(k_cmp, blocks_at_once * padded, 1, (head, tail), bulk), lse, *ranges)
        self.strides = (*q.stride()[:2], *k_cmp.stride()[:2])
        self.settings = dict(
            GROUPS=self.groups, HEADS=heads, PADDED_HEADS=padded_heads, DK=width, DK_HEAD=head, DK_TAIL=tail,
            TOKENS=self.tokens, BLOCKS=blocks_at_once, PADDED=padded, PIECES=compress_block_size // compress_stride,
            PER_BLOCK=per_block, SELECT_BLOCK=select_block_size, BULK=bulk, PRECISION=FLOAT32_PRODUCTS,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    def write(self, scores: torch.Tensor, first: int, last: int) -> None:
        """Write the scores of queries ``first .. last`` to ``scores`` [last - first or more, G, blocks or more]."""
        block_scores_kernel[(triton.cdiv(last - first, self.tokens) * self.groups,)](
            *self.tensors, scores, *self.strides, first, last, scores.shape[2], self.scale_log2, **self.settings
        )
