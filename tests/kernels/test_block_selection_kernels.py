"""Scoring and top-n kernels against the definition in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nsa_cp.kernels.block_selection.forward import chunk_tokens, select_blocks_forward
from nsa_cp.kernels.block_selection.top_blocks import top_blocks
from nsa_cp.kernels.tuning import TileConfig

SMALL = TileConfig(rows=16, keys=16, num_warps=4, num_stages=2)
SCALE = 0.3


class Problem(NamedTuple):
    """One case; l, d and l' in tokens, n and the forced blocks in blocks."""

    lengths: tuple[int, ...]
    groups: int
    heads: int
    width: int
    block: int
    stride: int
    select: int
    picks: int
    init: int
    local: int


CASES = {
    "2heads": Problem((71,), 2, 2, 16, 8, 4, 16, 3, 1, 1),
    "5heads-packed": Problem((50, 3, 0, 37), 1, 5, 24, 8, 4, 8, 4, 1, 2),
    "16heads-no-overlap": Problem((61,), 1, 16, 32, 8, 8, 16, 2, 0, 1),
    "1head-three-pieces": Problem((70,), 1, 1, 96, 12, 4, 12, 5, 2, 2),
    "4heads-all-forced": Problem((40,), 1, 4, 32, 4, 4, 4, 3, 1, 2),
}


def visible_blocks(position: Tensor, block: int, stride: int) -> Tensor:
    """Compressed tokens i with i * d + l - 1 <= position."""
    return torch.clamp((position - block + 1).div(stride, rounding_mode="floor") + 1, min=0)


def overlap_matrix(problem: Problem, compressed: int, blocks: int) -> Tensor:
    """How often compressed token i counts in block j, from the double sum of the definition."""
    ratio, pieces = problem.select // problem.stride, problem.block // problem.stride
    weights = torch.zeros(compressed, blocks, dtype=torch.float64)
    for j in range(blocks):
        for m in range(ratio):
            for k in range(pieces):
                if 0 <= ratio * j + m - k < compressed:
                    weights[ratio * j + m - k, j] += 1
    return weights


def best_blocks(scores: Tensor, own: int, problem: Problem) -> tuple[list[int], float]:
    """Forced blocks, then by score, ties to the lowest index; and the score gap that decides the last pick."""
    forced = [j for j in range(own + 1) if j < problem.init or j > own - problem.local]
    free = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-float(scores[j]), j))
    room = problem.picks - len(forced)
    gap = float(scores[free[room - 1]] - scores[free[room]]) if 0 < room < len(free) else float("inf")
    return sorted(forced + free[:room]), gap


def make_inputs(problem: Problem, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k_cmp, position [T] and first compressed row of each query's document [T]."""
    counts = [int(visible_blocks(torch.tensor(n - 1), problem.block, problem.stride)) for n in problem.lengths]
    q = torch.randn(sum(problem.lengths), problem.groups * problem.heads, problem.width, device=device).to(dtype)
    k = torch.randn(sum(counts), problem.groups, problem.width, device=device).to(dtype)
    position = torch.cat([torch.arange(n) for n in problem.lengths])
    begin = torch.cat([torch.full((n,), sum(counts[:i])) for i, n in enumerate(problem.lengths)])
    return q, k, position.to(torch.int32).to(device), begin.to(torch.int32).to(device)


def reference(q: Tensor, k: Tensor, position: Tensor, begin: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen blocks [T, G, n], deciding gaps [T, G], and lse [T, N], float64."""
    tokens, heads = q.shape[:2]
    q, k = q.double().cpu(), k.double().cpu()
    lse = torch.full((tokens, heads), float("-inf"), dtype=torch.float64)
    chosen = torch.full((tokens, problem.groups, problem.picks), -1, dtype=torch.int32)
    gaps = torch.full((tokens, problem.groups), float("inf"))
    for t in range(tokens):
        own, first = int(position[t]) // problem.select, int(begin[t])
        count = int(visible_blocks(position[t], problem.block, problem.stride))
        logits = torch.einsum("ghd,cgd->ghc", q[t].view(problem.groups, -1, q.shape[-1]), k[first : first + count]) * SCALE
        lse[t] = logits.logsumexp(-1).flatten()
        scores = logits.softmax(-1).sum(1) @ overlap_matrix(problem, count, own + 1)
        for g in range(problem.groups):
            best, gaps[t, g] = best_blocks(scores[g], own, problem)
            chosen[t, g, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return chosen, gaps, lse


def select(q: Tensor, k: Tensor, lse: Tensor, position: Tensor, begin: Tensor, problem: Problem, **options: object) -> Tensor:
    end = begin + visible_blocks(position, problem.block, problem.stride)
    sizes = (problem.block, problem.stride, problem.select, problem.picks, problem.init, problem.local)
    most = int(position.max()) // problem.select + 1
    lse = lse.float().to(q.device)
    return select_blocks_forward(q, k, lse, begin, end.to(torch.int32), position, *sizes, SCALE, most, **options)


@pytest.mark.parametrize("name", CASES)
def test_choice(name: str, dtype: torch.dtype, device: str) -> None:
    problem = CASES[name]
    q, k, position, begin = make_inputs(problem, dtype, device)
    expected, gaps, lse = reference(q, k, position, begin, problem)
    chosen = select(q, k, lse, position, begin, problem, config=SMALL, score_bytes=3000).cpu()
    assert chosen.dtype == torch.int32 and chosen.shape == expected.shape
    clear = gaps > 1e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(chosen[clear], expected[clear])
    for ours, theirs in zip(chosen[~clear], expected[~clear]):
        assert len(set(ours.tolist()) - set(theirs.tolist())) <= 1


def test_choice_among_the_blocks_of_several_tiles(device: str) -> None:
    """Compressed tokens that straddle two tiles count in both; many picks make the order of all scores matter."""
    problem = Problem((150,), 1, 2, 16, 8, 4, 8, 10, 1, 1)
    q, k, position, begin = make_inputs(problem, torch.float32, device)
    expected, gaps, lse = reference(q, k, position, begin, problem)
    last = slice(120, 150)
    chosen = select(q[last], k, lse[last], position[last], begin[last], problem, config=SMALL).cpu()
    clear = gaps[last] > 1e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(chosen[clear], expected[last][clear])


def test_table_of_tile_shapes_strides_and_same_bits_twice(dtype: torch.dtype, device: str) -> None:
    problem = CASES["2heads"]._replace(lengths=(41,), picks=2, init=0)
    q, k, position, begin = make_inputs(problem, dtype, device)
    expected, gaps, lse = reference(q, k, position, begin, problem)
    q = torch.stack([q, q], 1)[:, 1]
    k = torch.cat([k, torch.full_like(k, float("nan"))], 1)[:, : problem.groups]
    chosen = select(q, k, lse, position, begin, problem)
    assert torch.equal(chosen.cpu()[gaps > 1e-5], expected[gaps > 1e-5])
    assert torch.equal(chosen, select(q, k, lse, position, begin, problem))
    moved = select(q[7:], k, lse[7:], position[7:], begin[7:], problem, config=SMALL)
    assert torch.equal(select(q, k, lse, position, begin, problem, config=SMALL)[7:], moved)


def test_equal_scores_go_to_the_lowest_index(device: str) -> None:
    """Queries of zeros give every compressed token the same probability, so all whole blocks but the first tie."""
    problem = CASES["2heads"]._replace(lengths=(130,), picks=5)
    q, k, position, begin = make_inputs(problem, torch.float32, device)
    last = slice(124, 130)
    lse = visible_blocks(position[last], problem.block, problem.stride).log()[:, None].expand(-1, q.shape[1])
    chosen = select(q[last] * 0, k, lse, position[last], begin[last], problem, config=SMALL)
    assert chosen[5, 0].tolist() == chosen[5, 1].tolist() == [0, 1, 2, 3, 8]
    assert chosen[3, 1].tolist() == [0, 1, 2, 3, 7]


def check_top(scores: Tensor, init: int, local: int, picks: int, width: int | None) -> None:
    """The choice at every number of visible blocks, [blocks, groups, blocks], is the definition's."""
    blocks, groups = scores.shape[:2]
    position = torch.arange(blocks, dtype=torch.int32, device=scores.device) * 4 + 1
    chosen = torch.full((blocks, groups, picks), -7, dtype=torch.int32, device=scores.device)
    # What lies behind a row's visible blocks is not theirs.
    rows = torch.full((blocks, groups, -(-blocks // 4) * 4), float("nan"), device=scores.device)
    visible = torch.arange(blocks)[:, None] >= torch.arange(blocks)
    rows[..., :blocks] = torch.where(visible.to(scores.device)[:, None], scores, float("inf"))
    top_blocks(rows, position, chosen, 0, blocks, 4, init, local, width=width)
    problem = CASES["2heads"]._replace(picks=picks, init=init, local=local)
    for own in range(blocks):
        for group in range(groups):
            expected, _ = best_blocks(scores[own, group].cpu(), own, problem)
            assert chosen[own, group].tolist() == expected + [-1] * (picks - len(expected)), (own, group)


@pytest.mark.parametrize("init, local, picks", [(0, 1, 6), (1, 2, 6), (2, 3, 5), (0, 1, 1)])
def test_top_of_given_scores(init: int, local: int, picks: int, device: str) -> None:
    """Zeros, ties, denormals and equal rows, at every number of visible blocks."""
    blocks = 21
    scores = torch.rand(blocks, 2, blocks, device=device)
    scores[:, 0] = (scores[:, 0] * 4).floor() / 4
    scores[5:9, 1] *= 1e-41
    scores[9:12] = 0.0
    check_top(scores, init, local, picks, None)


@pytest.mark.parametrize("width", [8, 16])
def test_top_of_rows_longer_than_a_program_holds(width: int, device: str) -> None:
    """Rows of several tiles: independent scores, ties across tiles, and the best ones in one class, which hide one another."""
    blocks, picks = 33, 7
    scores = torch.rand(blocks, 3, blocks, device=device)
    scores[:, 1] = (scores[:, 1] * 6).floor() / 6
    scores[::2, 2, 3::width] += 2.0
    scores[1::2, 2, 3::width] = 2.0
    scores[28:31] = 0.0
    check_top(scores, 1, 2, picks, width)


def test_top_of_scores_that_are_no_numbers(device: str) -> None:
    """NaN (of a query that is one), of either sign, and minus zero still choose visible blocks, each once."""
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -0x400000, -0x80000000], dtype=torch.int32, device=device)
    scores = bits.view(torch.float32)[None, :, None].repeat(20, 1, 20)
    scores[10:, :, ::2] = 0.5
    position = torch.arange(20, dtype=torch.int32, device=device)
    chosen = torch.full((20, 4, 5), -7, dtype=torch.int32, device=device)
    top_blocks(scores, position, chosen, 0, 20, 1, 1, 2, width=8)
    for own in range(20):
        for found in chosen[own, :, : min(own + 1, 5)].tolist():
            assert found == sorted(set(found)) and 0 <= found[0] and found[-1] == own


@pytest.mark.parametrize(
    "tokens, most, steps, expected",
    [
        (65536, 32768, (792, 24), 22176),  # three times, not 32472 twice and a rest of 592
        (65536, 1 << 20, (792, 24), 65736),
        (100, 791, (792, 24), 120),
        (5000, 791, (792, 24), 720),  # too few for a step that keeps all programs equally busy
        (5000, 3, (792, 24), 24),
        (1, 50, (16,), 16),
    ],
)
def test_queries_of_a_chunk(tokens: int, most: int, steps: tuple[int, ...], expected: int) -> None:
    assert chunk_tokens(tokens, most, steps) == expected


def test_bad_arguments_are_refused(device: str) -> None:
    q, k = torch.zeros(4, 2, 16, device=device), torch.zeros(3, 1, 16, device=device)
    index = torch.zeros(4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="must divide"):
        select_blocks_forward(q, k, q[..., 0], index, index, index, 8, 3, 16, 4, 1, 2, 1.0, 1)
