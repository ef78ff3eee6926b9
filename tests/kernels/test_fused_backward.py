"""What the host prepares for the backward of 5 products: its buffer's order, ranges of tiles, whose turn it is."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with Triton from 3.6 on, for Linux")

from nsa_cp.kernels.interval_attention.backward import ROWS_A_SUM  # noqa: E402
from nsa_cp.kernels.interval_attention.hopper_fused_backward import (  # noqa: E402
    chunk_length,
    dq_bytes,
    takes,
    tile_ranges,
    turns,
    unpack,
)


@pytest.mark.parametrize("tokens, groups, heads", [(11, 2, 16), (64, 3, 1), (2, 1, 64), (1, 2, 4)])
def test_unpack(tokens: int, groups: int, heads: int) -> None:
    tile_tokens = 64 // heads
    num_tiles = -(-tokens // tile_tokens)
    buffer = torch.randn(groups, num_tiles, 16, 128, 4)
    rows = unpack(buffer, tokens, heads)
    assert rows.shape == (tokens, groups * heads, 128)
    assert buffer.numel() * 4 == groups * dq_bytes(tokens, heads)
    group, tile, block, thread, i = torch.meshgrid(*map(torch.arange, buffer.shape), indexing="ij")
    # A matrix unit's result: a warp has 16 rows, 4 threads a row, 2 columns each, then the same 8 rows below.
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 * 8
    column = block * 8 + thread % 4 * 2 + i % 2
    token, head = tile * tile_tokens + row // heads, group * heads + row % heads
    there = token < tokens
    assert there.sum() == rows.numel()
    assert torch.equal(rows[token[there], head[there], column[there]], buffer[there])


def _ranges(kind: str, tokens: int, keys: int, generator: torch.Generator) -> torch.Tensor:
    """int32 [2, keys]: queries of each key, none for some."""
    begin = torch.arange(keys) * tokens // keys
    if kind == "causal":
        ends = torch.stack([begin, torch.full((keys,), tokens)])
    elif kind == "window":
        ends = torch.stack([begin, (begin + 90).clamp(max=tokens)])
    else:
        ends = torch.randint(0, tokens + 1, (2, keys), generator=generator).sort(0).values
    hidden = torch.rand(keys, generator=generator) < random.Random(keys).choice([0.0, 0.3, 0.99])
    ends[1, hidden] = 0
    return ends.to(torch.int32)


def _programs(first: torch.Tensor, last: torch.Tensor, num_tiles: int, groups: int, chunk: int) -> list[list[int]]:
    """Group, key tile, chunk, first and last query tile of the programs with something to do, in the order of their launch."""
    found, key_tiles = [], len(first)
    for number in range(key_tiles * groups * -(-num_tiles // chunk)):
        group, j, c = number % groups, key_tiles - 1 - number // groups % key_tiles, number // (groups * key_tiles)
        tile, stop = max(int(first[j]), c * chunk), min(int(last[j]), (c + 1) * chunk)
        if tile < stop:
            found.append([group, j, c, tile, stop])
    return found


def _run(programs: list[list[int]], counters: torch.Tensor, flags: torch.Tensor, slots: int, order: random.Random) -> list:
    """(group, query tile, key tile) in the order of the additions, by ``slots`` programs at a time; fails where all wait."""
    programs, running, found = list(programs), [], []
    while programs or running:
        while programs and len(running) < slots:
            running.append(programs.pop(0))
        order.shuffle(running)
        moved = False
        for program in list(running):
            group, j, chunk, tile, stop = program
            if tile < stop and counters[group, tile] == j:
                found.append((group, tile, j))
                counters[group, tile] = j - 1
                program[3] += 1
                moved = True
            elif tile == stop and (flags[group, j] == chunk).all():
                flags[group, j] += 1
                running.remove(program)
                moved = True
        assert moved, "all wait"
    return found


@pytest.mark.parametrize("heads", [4, 16, 64])
@pytest.mark.parametrize("keys", [1, 129, 700])
@pytest.mark.parametrize("kind", ["causal", "window", "no order"])
def test_everybody_has_a_turn(kind: str, keys: int, heads: int) -> None:
    """Every query tile meets every key tile that its rows see, once, later ones first; nobody waits for a program that has not
    begun."""
    tokens, groups, tile_tokens = 301, 2, 64 // heads
    num_tiles = -(-tokens // tile_tokens)
    begin, end = _ranges(kind, tokens, keys, torch.Generator().manual_seed(heads))
    first, last = tile_ranges(begin, end, tile_tokens)
    assert first.dtype == last.dtype == torch.int32 and len(first) == -(-keys // 128)
    assert (first.diff() >= 0).all() and (last.diff() >= 0).all()
    needed = {
        (group, tile, key // 128)
        for group in range(groups)
        for key in range(keys)
        for tile in range(int(begin[key]) // tile_tokens, -(-int(end[key]) // tile_tokens) if begin[key] < end[key] else 0)
    }
    for slots, chunk in ((1, 64), (3, 5), (20, 16)):
        counters, flags = turns(first, num_tiles, groups, chunk)
        programs = _programs(first, last, num_tiles, groups, chunk)
        found = _run(programs, counters, flags, slots, random.Random(slots))
        assert len(set(found)) == len(found) and set(found) >= needed
        for group, tile in {visit[:2] for visit in found}:
            visits = [j for *where, j in found if where == [group, tile]]
            assert visits == sorted(visits, reverse=True)


def test_the_simulation_sees_who_waits_in_vain() -> None:
    """Controls: a counter that begins too late, and one program at a time launched in the wrong order."""
    begin, end = _ranges("causal", 301, 700, torch.Generator().manual_seed(0))
    first, last = tile_ranges(begin, end, 4)
    programs = [_programs(first, last, 76, 1, 64) for _ in range(2)]
    counters, flags = turns(first, 76, 1, 64)
    counters[0, 40] -= 1
    with pytest.raises(AssertionError, match="all wait"):
        _run(programs[0], counters, flags, 20, random.Random(0))
    with pytest.raises(AssertionError, match="all wait"):
        _run(programs[1][::-1], *turns(first, 76, 1, 64), 1, random.Random(0))


def test_tiles_are_no_wider_than_their_keys_where_these_ascend() -> None:
    begin = torch.arange(256, dtype=torch.int32)
    first, last = tile_ranges(begin, begin + 7, 4)
    assert first.tolist() == [0, 32] and last.tolist() == [34, 66]


@pytest.mark.parametrize(
    "key_tiles, num_tiles, groups",
    [(1, 1, 1), (0, 0, 1), (32, 8192, 1), (32, 16384, 4), (32, 4096, 8), (64, 32768, 1), (4096, 131072, 1)],
)
def test_chunk_length(key_tiles: int, num_tiles: int, groups: int) -> None:
    """Within its bounds neither half of it nor twice it loses less time."""
    chunk, most = chunk_length(key_tiles, num_tiles, groups), ROWS_A_SUM // 64

    def lost(chunk: int) -> float:
        programs = key_tiles * groups * num_tiles / 2 / chunk
        return programs / 132 * (7 + 20 / groups) + chunk / 2 * 2.4

    assert 32 <= chunk <= most and chunk & (chunk - 1) == 0
    assert chunk == 32 or lost(chunk) <= 1.01 * lost(chunk // 2)
    assert chunk == most or lost(chunk) <= 1.01 * lost(2 * chunk)


@pytest.mark.parametrize(
    "heads, groups, width, dtype, expected",
    [
        (64, 4, 128, torch.bfloat16, True),
        (4, 4, 128, torch.float16, True),
        (12, 4, 128, torch.bfloat16, False),
        (128, 1, 128, torch.bfloat16, False),
        (64, 4, 64, torch.bfloat16, False),
        (64, 4, 128, torch.float32, False),
    ],
)
def test_takes(heads: int, groups: int, width: int, dtype: torch.dtype, expected: bool) -> None:
    q, k = torch.zeros(8, heads, width, dtype=dtype), torch.zeros(3, groups, width, dtype=dtype)
    assert takes(q, k, k, q) == expected
    assert not takes(q, k[:0], k[:0], q)
