"""The n best blocks of every query and group, from their scores (paper equations 11 and 12).

Scores are not negative, so their bit patterns compare like integers (without the sign bit, which a NaN or a zero may have). The
threshold, the n-th largest pattern, is found by bisection on data that fits in registers: blocks fall into ``WIDTH`` classes by
index modulo ``WIDTH``, and only each class's largest score is kept. Long rows are read once for that, and once more to check
whether the threshold also holds for all blocks. It does unless two of the best are in one class; then bisection goes on from
there, on the row itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import INT_MAX

# By the largest number of blocks in a row: (classes, warps of a program), measured on an H200 (docs/kernels.md).
_SHAPES = {1024: (256, 1), 4096: (512, 1), 8192: (1024, 2)}
_LONGEST_SHAPE = 2048, 4
# Row lengths must be multiples of this: a load takes so many scores.
ROW_MULTIPLE = tl.constexpr(4)


@triton.jit
def _ranks(row_ptr, tile, first, stop, WIDTH: tl.constexpr):
    """Bit patterns of the scores of a tile's blocks within ``first .. stop``, -1 for the others."""
    block = tile * WIDTH + tl.arange(0, WIDTH)
    # Several at a time, so some past ``stop``, too: the row has room for them.
    score = tl.load(row_ptr + block, mask=block < tl.cdiv(stop, ROW_MULTIPLE) * ROW_MULTIPLE, other=0.0)
    return tl.where((block >= first) & (block < stop), score.to(tl.int32, bitcast=True) & INT_MAX, -1)


@triton.jit
def _count_above(row_ptr, tiles, first, stop, bound, WIDTH: tl.constexpr):
    """Blocks of the row with a pattern above ``bound``."""
    count = tl.zeros([WIDTH], dtype=tl.int32)
    for tile in range(tiles):
        count += (_ranks(row_ptr, tile, first, stop, WIDTH) > bound).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _halve(low, high, reached, middle, count, wanted):
    """The part of ``low .. high`` that holds the threshold, and how many patterns reach its lower end."""
    enough = count >= wanted
    return tl.where(enough, middle, low), tl.where(enough, high, middle - 1), tl.where(enough, count, reached)


@triton.jit(do_not_specialize=["first_token", "row_multiples"])
def top_blocks_kernel(
    scores_ptr, position_ptr, out_ptr, first_token, row_multiples,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PICKS: tl.constexpr, PADDED_PICKS: tl.constexpr,
    NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, SELECT_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the chosen blocks of one query and group, ascending. Among equals the lowest numbers win."""
    row = tl.program_id(0)
    token = first_token + row // GROUPS
    visible = tl.load(position_ptr + token) // SELECT_BLOCK + 1
    row_ptr = scores_ptr + row.to(tl.int64) * row_multiples * ROW_MULTIPLE
    out_ptr += (token.to(tl.int64) * GROUPS + row % GROUPS) * PICKS

    # Forced: the first blocks, and from ``stop`` on the last ones. Between them the others are free to be chosen.
    first = tl.minimum(visible, NUM_INIT)
    stop = tl.maximum(visible - NUM_LOCAL, first)
    wanted = tl.minimum(visible, PICKS) - (first + visible - stop)
    slot = tl.arange(0, PADDED_PICKS)
    local = stop + slot - (first + wanted)
    forced = tl.where(slot < first, slot, tl.where(local < visible, local, -1))
    tl.store(out_ptr + slot, forced, mask=((slot < first) | (slot >= first + wanted)) & (slot < PICKS))

    if wanted > 0:
        tiles = tl.cdiv(stop, WIDTH)
        best = _ranks(row_ptr, 0, first, stop, WIDTH)
        for tile in range(1, tiles):
            best = tl.maximum(best, _ranks(row_ptr, tile, first, stop, WIDTH))
        # At least ``wanted`` patterns reach ``low``, fewer than that ``high + 1``.
        low = tl.min(tl.where(best < 0, INT_MAX, best), 0)
        largest = tl.max(best, 0)
        high = largest
        reached = tl.sum((best >= low).to(tl.int32), 0)
        while (reached != wanted) & (low < high):
            middle = high - ((high - low) >> 1)
            low, high, reached = _halve(low, high, reached, middle, tl.sum((best >= middle).to(tl.int32), 0), wanted)
        if tiles > 1:
            # Two of the best may have hidden one another in a class.
            high = largest
            reached = _count_above(row_ptr, tiles, first, stop, low - 1, WIDTH)
            while (reached != wanted) & (low < high):
                middle = high - ((high - low) >> 1)
                count = _count_above(row_ptr, tiles, first, stop, middle - 1, WIDTH)
                low, high, reached = _halve(low, high, reached, middle, count, wanted)

        # Of those at the threshold itself, as many as there is room for.
        room = wanted
        if reached != wanted:
            room -= _count_above(row_ptr, tiles, first, stop, low, WIDTH)
        placed = first
        for tile in range(tiles):
            rank = _ranks(row_ptr, tile, first, stop, WIDTH)
            chosen = rank >= low
            if reached != wanted:
                level = rank == low
                chosen = chosen & ((rank > low) | (tl.cumsum(level.to(tl.int32), 0) <= room))
                room -= tl.sum(level.to(tl.int32), 0)
            place = placed + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(out_ptr + place, tile * WIDTH + tl.arange(0, WIDTH), mask=chosen)
            placed += tl.sum(chosen.to(tl.int32), 0)


def top_blocks(
    scores: torch.Tensor,
    position: torch.Tensor,
    chosen: torch.Tensor,
    first: int,
    last: int,
    select_block_size: int,
    num_init_blocks: int,
    num_local_blocks: int,
    *,
    width: int | None = None,
) -> None:
    """Write the chosen blocks of the queries ``first .. last`` to ``chosen``.

    Args:
        scores: float32 [last - first or more, G, R], not negative; R is a multiple of ``ROW_MULTIPLE``. Row 0 is query ``first``.
            Of a row only the ``position // l' + 1`` blocks that its query sees are read, and the forced ones' scores are ignored.
        position: int32 [T], position of each query in its document.
        chosen: int32 [T, G, n], written: block indices ascending, padded with -1.
        select_block_size: l', in tokens. num_init_blocks, num_local_blocks: forced blocks, together at most n.
        width: number of classes, a power of two of at least n, instead of the table's.
    """
    groups, row = scores.shape[1:]
    picks = chosen.shape[2]
    assert row % ROW_MULTIPLE.value == 0 and scores.is_contiguous() and chosen.is_contiguous(), (scores.shape, scores.stride())
    classes, warps = next((shape for most, shape in _SHAPES.items() if row <= most), _LONGEST_SHAPE)
    padded_picks = triton.next_power_of_2(picks)
    width = width or max(padded_picks, min(triton.next_power_of_2(row), classes))
    assert width >= picks, "the best of the classes must be as many as there are picks"
    top_blocks_kernel[((last - first) * groups,)](
        scores, position, chosen, first, row // ROW_MULTIPLE.value,
        GROUPS=groups, WIDTH=width, PICKS=picks, PADDED_PICKS=padded_picks, NUM_INIT=num_init_blocks, NUM_LOCAL=num_local_blocks,
        SELECT_BLOCK=select_block_size, num_warps=warps,
    )  # fmt: skip
