"""Index structures of selected attention, built on the device with static shapes and without a host synchronisation.

Forward and dq walk, for each tile of adjacent tokens, the union of the blocks its tokens chose; a bit mask says which tokens did.
dk and dv, and with few heads a group also forward and dq (``by_block.py``), need the inverse: for each block the queries that
chose it (its visitors), cut into work items of bounded length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common import INT_MAX


class Selection(NamedTuple):
    """Which blocks each query chose, and where queries and blocks lie among the keys.

    Args:
        blocks: int32 [T, G, n], block indices within the query's document, each at most once, none past the query's own, padded
            with -1.
        position: int32 [T], position of each query in its document, ascending over the document's query rows: it sees tokens
            up to and including this one.
        key_start: int32 [T], key row at which the query's document starts.
        block_start: int32 [NB], key row at which each block of each document starts, ascending.
        block_base: int32 [T], number (in ``block_start``) of the first block of the query's document.
        block_size: l', tokens of a block.
    """

    blocks: torch.Tensor
    position: torch.Tensor
    key_start: torch.Tensor
    block_start: torch.Tensor
    block_base: torch.Tensor
    block_size: int

    def of(self, groups: slice, rows: slice) -> Selection:
        """The selection of some query rows in some groups."""
        return self._replace(
            blocks=self.blocks[rows, groups],
            position=self.position[rows],
            key_start=self.key_start[rows],
            block_base=self.block_base[rows],
        )

    @property
    def num_blocks(self) -> int:
        """NB, blocks of all documents."""
        return self.block_start.shape[0]


@dataclass(frozen=True)
class Unions:
    """Blocks chosen by the tokens of each tile.

    Args:
        entries: int64 [tiles, G, E], the key row at which a block of the union starts, ascending, in the upper half; in the
            lower half bit i is set where token i of the tile chose the block. The first ``counts`` entries count.
        counts: int32 [tiles, G, 2]: blocks in the union, and how many of them end before every query of the tile.
        tile_tokens: tokens of a tile.
    """

    entries: torch.Tensor
    counts: torch.Tensor
    tile_tokens: int


@triton.jit(do_not_specialize=["num_tokens"])
def build_unions_kernel(
    blocks_ptr, position_ptr, key_start_ptr, entries_ptr, counts_ptr,
    stride_t, stride_g, stride_n, num_tokens,
    GROUPS: tl.constexpr, TOKENS: tl.constexpr, PICKS: tl.constexpr, BLOCK: tl.constexpr,
    PADDED_TOKENS: tl.constexpr, PADDED_PICKS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: the union of one tile and group.

    Every pick is compared with every other: equal ones share their bits, and the pick of the lowest token stands for all.
    A sort then brings the survivors, packed with their bits in one word, to the front in ascending order.
    """
    ENTRIES: tl.constexpr = PADDED_TOKENS * PADDED_PICKS
    tile = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    entry = tl.arange(0, ENTRIES)
    local = entry // PADDED_PICKS
    pick = entry % PADDED_PICKS
    token = tile * TOKENS + local
    real = (local < TOKENS) & (token < num_tokens)
    row = token.to(tl.int64)
    base = blocks_ptr + group.to(tl.int64) * stride_g
    block = tl.load(base + row * stride_t + pick * stride_n, mask=real & (pick < PICKS), other=-1)
    first_key = tl.load(key_start_ptr + token, mask=real, other=0)
    start = tl.where(block >= 0, first_key + block * BLOCK, INT_MAX)

    bits = tl.zeros([ENTRIES], dtype=tl.int32)
    for other in range(TOKENS):
        other_token = tile * TOKENS + other
        exists = other_token < num_tokens
        other_key = tl.load(key_start_ptr + other_token, mask=exists, other=0)
        found = tl.zeros([ENTRIES], dtype=tl.int32)
        for shift in range(0, PADDED_PICKS, STEP):
            column = shift + tl.arange(0, STEP)
            other_block = tl.load(
                base + other_token.to(tl.int64) * stride_t + column * stride_n, mask=exists & (column < PICKS), other=-1
            )
            other_start = tl.where(other_block >= 0, other_key + other_block * BLOCK, -1)
            found = tl.maximum(found, tl.max((start[:, None] == other_start[None, :]).to(tl.int32), 1))
        bits = bits | (found << other)
    stands = (block >= 0) & ((bits & ((1 << local) - 1)) == 0)
    packed = (start.to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
    packed = tl.sort(tl.where(stands, packed, tl.full([ENTRIES], INT_MAX, tl.int64) << 32))

    out = (tile.to(tl.int64) * GROUPS + group) * ENTRIES
    tl.store(entries_ptr + out + entry, packed)
    position = tl.load(position_ptr + token, mask=real, other=0)
    first_query = tl.min(tl.where(real, first_key + position, INT_MAX), 0)
    counts = counts_ptr + (tile.to(tl.int64) * GROUPS + group) * 2
    tl.store(counts, tl.sum(stands.to(tl.int32), 0))
    tl.store(counts + 1, tl.sum((stands & (start + (BLOCK - 1) <= first_query)).to(tl.int32), 0))


def build_unions(selection: Selection, tile_tokens: int) -> Unions:
    """Sorted union of the blocks that the tokens of each tile chose, by the key row at which they start.

    Args:
        selection: what T queries chose.
        tile_tokens: tokens of a tile, at most 32.

    Returns:
        Unions of ``ceil(T / tile_tokens)`` tiles, in O(T * G * n) memory.

    Raises:
        ValueError: more tokens in a tile than the bit masks hold.
    """
    if tile_tokens > 32:
        raise ValueError(f"a tile of {tile_tokens} tokens does not fit its 32-bit masks; use at most 32")
    blocks = selection.blocks
    tokens, groups, picks = blocks.shape
    tiles = triton.cdiv(tokens, tile_tokens)
    if picks == 0:
        # There is nothing to walk, but kernels load one entry ahead.
        entries = torch.zeros(tiles, groups, 1, dtype=torch.int64, device=blocks.device)
        return Unions(entries, torch.zeros(tiles, groups, 2, dtype=torch.int32, device=blocks.device), tile_tokens)
    padded_tokens, padded_picks = triton.next_power_of_2(tile_tokens), triton.next_power_of_2(picks)
    entries = padded_tokens * padded_picks
    packed = torch.empty(tiles, groups, entries, dtype=torch.int64, device=blocks.device)
    counts = torch.empty(tiles, groups, 2, dtype=torch.int32, device=blocks.device)
    if tiles:
        build_unions_kernel[(tiles * groups,)](
            blocks, selection.position, selection.key_start, packed, counts, *blocks.stride(), tokens,
            GROUPS=groups, TOKENS=tile_tokens, PICKS=picks, BLOCK=selection.block_size,
            PADDED_TOKENS=padded_tokens, PADDED_PICKS=padded_picks, STEP=min(padded_picks, 16),
            num_warps=max(1, min(8, entries // 64)),
        )  # fmt: skip
    return Unions(packed, counts, tile_tokens)


@dataclass(frozen=True)
class Visitors:
    """For each (group, block) the queries that chose it, and the work items its list is cut into.

    Args:
        queries: int32 [T * G * n], query rows, ascending within a list; the list of (group, block) is number group * NB + block.
        offsets: int32 [G * NB + 1], where each list starts.
        item_offsets: int32 [G * NB + 1], number of the first work item of each list; every list has at least one.
        slot_offsets: int32 [G * NB + 1], number of the first partial sum of each list; only lists of several items have any.
        item_lists: int32 [items], the list of each work item; G * NB or more for items past the last.
        chunk: largest number of queries in a work item.
        num_blocks: NB.
        items_per_group, slots_per_group: upper bounds of the work items and of the partial sums of one group's lists, known
            without asking the device.
        places: int32 like ``queries``, each choice's flat index in ``blocks``, (token * G + group) * n + pick; only if asked for.
    """

    queries: torch.Tensor
    offsets: torch.Tensor
    item_offsets: torch.Tensor
    slot_offsets: torch.Tensor
    item_lists: torch.Tensor
    chunk: int
    num_blocks: int
    items_per_group: int
    slots_per_group: int
    places: torch.Tensor | None = None


@triton.jit(do_not_specialize=["num_blocks", "total"])
def list_numbers_kernel(
    blocks_ptr, block_base_ptr, out_ptr, stride_t, stride_g, stride_n, num_blocks, total,
    GROUPS: tl.constexpr, PICKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The list, group * NB + block, of every pick, flat; G * NB where there is none."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = place < total
    token = place // (GROUPS * PICKS)
    group = place // PICKS % GROUPS
    offset = token.to(tl.int64) * stride_t + group.to(tl.int64) * stride_g + place % PICKS * stride_n
    block = tl.load(blocks_ptr + offset, mask=mask, other=-1)
    base = tl.load(block_base_ptr + token, mask=mask, other=0)
    number = tl.where(block >= 0, group * num_blocks + base + block, GROUPS * num_blocks)
    tl.store(out_ptr + place, number, mask=mask)


@triton.jit
def _lower_bound(sorted_ptr, value, length, steps):
    """How many of the ``length`` ascending numbers are less than ``value``; ``steps`` is the bit length of ``length``."""
    low = tl.zeros_like(value)
    high = low + length
    for _ in tl.range(0, steps):
        middle = low + (high - low) // 2
        less = tl.load(sorted_ptr + middle, mask=low < high, other=INT_MAX) < value
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
    return low


@triton.jit(do_not_specialize=["lists", "total", "steps", "chunk"])
def count_items_kernel(ordered_ptr, offsets_ptr, counts_ptr, lists, total, steps, chunk, TILE: tl.constexpr):
    """Where each list starts in the sorted list numbers of all picks, and in the next place of either row of counts
    [2, lists + 1] its work items, and those if there are several; the first place of each is 0."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = place <= lists
    first = _lower_bound(ordered_ptr, place, total, steps)
    items = tl.maximum(tl.cdiv(_lower_bound(ordered_ptr, place + 1, total, steps) - first, chunk), 1)
    tl.store(offsets_ptr + place, first, mask=mask)
    for row in tl.static_range(2):
        counts = counts_ptr + row * (lists + 1)
        tl.store(counts + place + 1, items if row == 0 else tl.where(items > 1, items, 0), mask=place < lists)
        tl.store(counts + place, tl.zeros_like(items), mask=place == 0)


@triton.jit(do_not_specialize=["total", "num_items", "num_offsets", "steps", "picks_per_token"])
def list_items_kernel(
    order_ptr, item_offsets_ptr, queries_ptr, places_ptr, item_lists_ptr,
    total, num_items, num_offsets, steps, picks_per_token, PLACES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token of every sorted pick, with PLACES the pick's number too, and the list of every work item."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    pick = tl.load(order_ptr + index, mask=index < total, other=0).to(tl.int32)
    tl.store(queries_ptr + index, pick // picks_per_token, mask=index < total)
    if PLACES:
        tl.store(places_ptr + index, pick, mask=index < total)
    # Items are far fewer than picks.
    if tl.program_id(0) * TILE < num_items:
        number = _lower_bound(item_offsets_ptr, index + 1, num_offsets, steps) - 1
        tl.store(item_lists_ptr + index, number, mask=index < num_items)


def find_visitors(selection: Selection, chunk: int | None = None, *, places: bool = False) -> Visitors:
    """Invert a selection: a stable sort of the (group, block) of every pick.

    Args:
        selection: what T queries chose of NB blocks.
        chunk: largest number of queries in a work item; None for :func:`visitor_chunk`.
        places: also return the flat indices of the choices.

    Returns:
        Lists in O(T * G * n + G * NB) memory, all on the device.

    Raises:
        ValueError: 2^31 choices or more.
    """
    blocks, num_blocks = selection.blocks, selection.num_blocks
    tokens, groups, picks = blocks.shape
    if blocks.numel() >= 1 << 31:
        raise ValueError(
            f"{tokens} tokens x {groups} groups x {picks} blocks = {blocks.numel()} choices do not fit 32-bit numbers; "
            f"use context parallelism or fewer than {1 << 31}"
        )
    chunk = chunk or visitor_chunk(tokens, picks)
    lists = groups * num_blocks
    key = torch.empty(tokens * groups * picks, dtype=torch.int32, device=blocks.device)
    if key.numel():
        list_numbers_kernel[(triton.cdiv(key.numel(), 1024),)](
            blocks, selection.block_base, key, *blocks.stride(), num_blocks, key.numel(),
            GROUPS=groups, PICKS=picks, TILE=1024, num_warps=4,
        )  # fmt: skip
    ordered, order = key.sort(stable=True)
    int32 = {"dtype": torch.int32, "device": blocks.device}
    offsets = torch.empty(lists + 1, **int32)
    # Work items of each list; below, the same but 0 for lists of a single item. Shifted by one, so that running sums start at 0.
    counts = torch.empty(2, lists + 1, **int32)
    count_items_kernel[(triton.cdiv(lists + 1, 128),)](
        ordered, offsets, counts, lists, key.numel(), key.numel().bit_length(), chunk, TILE=128, num_warps=4
    )
    item_offsets, slot_offsets = running = torch.empty_like(counts)
    torch.cumsum(counts, 1, dtype=torch.int32, out=running)
    most_split = tokens * picks // chunk
    items_per_group = num_blocks + most_split
    item_lists = torch.empty(groups * items_per_group, **int32)
    queries = torch.empty(key.numel(), **int32)
    places_out = torch.empty(key.numel(), **int32) if places else None
    list_items_kernel[(triton.cdiv(max(key.numel(), item_lists.numel(), 1), 1024),)](
        order, item_offsets, queries, queries if places_out is None else places_out, item_lists,
        key.numel(), item_lists.numel(), lists + 1, (lists + 1).bit_length(), groups * picks,
        PLACES=places, TILE=1024, num_warps=4,
    )  # fmt: skip
    slots_per_group = most_split + min(num_blocks, most_split)
    sizes = (chunk, num_blocks, items_per_group, slots_per_group)
    return Visitors(queries, offsets, item_offsets, slot_offsets, item_lists, *sizes, places=places_out)


def visitor_chunk(tokens: int, picks: int) -> int:
    """Most queries in a work item: 512, in long sequences more, so that a group has at most about 2048 partial sums."""
    return max(512, triton.next_power_of_2(tokens * picks) // 1024)
