"""Selected attention kernels against dense float64 attention under the same choice of blocks; their index structures."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nsa_cp.kernels.selected_attention import by_block
from nsa_cp.kernels.selected_attention.backward import selected_attention_backward, selected_attention_backward_dkv
from nsa_cp.kernels.selected_attention.forward import selected_attention_forward
from nsa_cp.kernels.selected_attention.unions import Selection, build_unions, find_visitors, visitor_chunk
from nsa_cp.kernels.tuning import TileConfig
from nsa_cp.testing import assert_close

SMALL = TileConfig(rows=32, keys=16, num_warps=4, num_stages=2, max_tokens=8)


class Problem(NamedTuple):
    """Shape of one case: queries of document lengths, of which every ``keep_every``-th row is local."""

    lengths: tuple[int, ...]
    groups: int
    heads: int
    dk: int
    dv: int
    block: int
    picks: int
    keep_every: int = 1


CASES = {
    "1head": Problem((53,), 2, 1, 32, 16, 16, 3),
    "2heads-packed": Problem((19, 1, 0, 27), 2, 2, 16, 32, 16, 2),
    "5heads-block24": Problem((50, 9), 1, 5, 24, 40, 24, 3),
    "16heads-block32": Problem((37,), 1, 16, 64, 64, 32, 2),
    "4heads-every-other-row": Problem((44, 23), 1, 4, 96, 48, 16, 4, keep_every=2),
    "8heads-wide": Problem((34, 9), 1, 8, 192, 128, 16, 2),
}
# Every case with masked loads; tiles fetched in bulk where the layouts differ most (one group of rows, and a width in two parts).
WAYS = [*((name, False) for name in CASES), ("16heads-block32", True), ("8heads-wide", True)]


def make_selection(problem: Problem, device: str, drift: bool = False) -> Selection:
    """Random choices among the visible blocks; a few queries choose nothing. With ``drift`` neighbours mostly agree."""
    lengths = torch.tensor(problem.lengths)
    starts = lengths.cumsum(0) - lengths
    counts = -(-lengths // problem.block)
    document = torch.arange(len(lengths)).repeat_interleave(lengths)[:: problem.keep_every]
    position = torch.cat([torch.arange(n) for n in problem.lengths])[:: problem.keep_every]
    block_start = torch.cat([s + problem.block * torch.arange(int(c)) for s, c in zip(starts, counts)])
    blocks = torch.full((len(position), problem.groups, problem.picks), -1)
    for t, own in enumerate((position // problem.block).tolist()):
        for g in range(problem.groups):
            if drift and own and t:
                blocks[t, g] = blocks[t - 1, g]
                continue
            chosen = torch.randperm(own + 1)[: problem.picks].sort().values
            blocks[t, g, : len(chosen)] = chosen if t % 13 != 5 else -1
    tables = (blocks, position, starts[document], block_start, (counts.cumsum(0) - counts)[document])
    return Selection(*(x.to(torch.int32).to(device) for x in tables), problem.block)


def make_inputs(problem: Problem, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """q, k, v, do and the gates [T, N]."""
    keys, heads = sum(problem.lengths), problem.groups * problem.heads
    tokens = -(-keys // problem.keep_every)
    shapes = [(tokens, heads, problem.dk), (keys, problem.groups, problem.dk), (keys, problem.groups, problem.dv)]
    shapes.append((tokens, heads, problem.dv))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes], torch.rand(tokens, heads, device=device)


def visible_keys(problem: Problem, selection: Selection) -> Tensor:
    """Bool [T, G, S]: key rows that each query sees, written down from the definition."""
    key = torch.arange(sum(problem.lengths), device=selection.blocks.device)
    token = key - selection.key_start[:, None]
    block = torch.where(token >= 0, token // problem.block, -2)
    chosen = (selection.blocks[..., None] == block[:, None, None]).any(2)
    return chosen & (token <= selection.position[:, None])[:, None]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    heads = q.shape[1] // k.shape[1]
    k, v, visible = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1), visible.repeat_interleave(heads, 1)
    scores = (torch.einsum("tnd,snd->tns", q, k) * scale).masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return torch.einsum("tns,snd->tnd", p, v), lse


def dense_gradients(tensors: list[Tensor], visible: Tensor, gate: Tensor, scale: float) -> list[Tensor]:
    q, k, v, do = (x.double() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = dense_attention(*leaves, visible, scale)
    return list(torch.autograd.grad((out * do * gate.double()[..., None]).sum(), leaves))


def row_shift(lse: Tensor, gate: Tensor | None) -> Tensor:
    """lse - log(gate), +inf for rows that see nothing."""
    shift = lse if gate is None else lse - gate.log()
    return shift.masked_fill(lse == float("-inf"), float("inf"))


def run_backward(
    tensors: list[Tensor], selection: Selection, gate: Tensor | None, problem: Problem, scale: float, **options: object
) -> tuple[Tensor, ...]:
    q, k, v, do = tensors
    out, lse = selected_attention_forward(q, k, v, selection, scale, config=SMALL)
    delta = (do.float() * out.float()).sum(-1)
    options = {"dq_config": SMALL, "dkv_config": SMALL, "chunk": 21, **options}
    return selected_attention_backward(q, k, v, do, row_shift(lse, gate), delta, selection, scale, **options)


@pytest.mark.parametrize("name, bulk", WAYS, ids=lambda x: x if isinstance(x, str) else "bulk" if x else "plain")
def test_forward(name: str, bulk: bool, dtype: torch.dtype, tolerance: float, device: str) -> None:
    problem = CASES[name]
    (q, k, v, _), _ = make_inputs(problem, dtype, device)
    selection = make_selection(problem, device)
    out, lse = selected_attention_forward(q, k, v, selection, 0.3, config=SMALL, bulk=bulk)
    expected, expected_lse = dense_attention(q.double(), k.double(), v.double(), visible_keys(problem, selection), 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, expected, max_relative_error=tolerance, name="out")
    assert_close(lse, expected_lse, atol=2e-5, rtol=1e-5, name="lse")
    blind = (selection.blocks < 0).all(-1).any(-1)
    assert blind.any() and (lse[blind] == float("-inf")).any()


@pytest.mark.parametrize("name, bulk", WAYS, ids=lambda x: x if isinstance(x, str) else "bulk" if x else "plain")
def test_gradients(name: str, bulk: bool, dtype: torch.dtype, tolerance: float, device: str) -> None:
    problem = CASES[name]
    tensors, gate = make_inputs(problem, dtype, device)
    selection = make_selection(problem, device)
    gradients = run_backward(tensors, selection, gate, problem, 0.3, bulk=bulk)
    expected = dense_gradients(tensors, visible_keys(problem, selection), gate, 0.3)
    for actual, reference, which in zip(gradients, expected, ("dq", "dk", "dv")):
        assert actual.dtype == torch.float32
        assert_close(actual, reference, max_relative_error=2 * tolerance, name=which)


def test_table_of_tile_shapes_and_neighbours_that_agree(dtype: torch.dtype, tolerance: float, device: str) -> None:
    problem = CASES["1head"]
    tensors, gate = make_inputs(problem, dtype, device)
    selection = make_selection(problem, device, drift=True)
    q, k, v, do = tensors
    out, lse = selected_attention_forward(q, k, v, selection, 0.3)
    delta = (do.float() * out.float()).sum(-1)
    gradients = selected_attention_backward(q, k, v, do, row_shift(lse, gate), delta, selection, 0.3)
    expected = dense_gradients(tensors, visible_keys(problem, selection), gate, 0.3)
    assert_close(list(gradients), expected, max_relative_error=2 * tolerance, name="gradient")


@pytest.mark.parametrize("chunk, workspace", [(4, 0), (4, 1 << 30), (1000, 0)], ids=["a-group-a-pass", "one-pass", "whole-lists"])
def test_any_cut_of_the_lists(chunk: int, workspace: int, device: str) -> None:
    problem = CASES["2heads-packed"]._replace(lengths=(33, 2))
    tensors, gate = make_inputs(problem, torch.float32, device)
    selection = make_selection(problem, device)
    gradients = run_backward(tensors, selection, gate, problem, 0.3, chunk=chunk, workspace_bytes=workspace)
    expected = dense_gradients(tensors, visible_keys(problem, selection), gate, 0.3)
    assert_close(list(gradients), expected, max_relative_error=1e-5, name="gradient")
    again = run_backward(tensors, selection, gate, problem, 0.3, chunk=chunk, workspace_bytes=workspace)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again))


def test_strided_inputs_and_one_group_of_several(device: str) -> None:
    problem = CASES["1head"]
    tensors, gate = make_inputs(problem, torch.float32, device)
    selection = make_selection(problem, device)
    one = [x[:, 1:] for x in tensors]
    selection = selection._replace(blocks=selection.blocks[:, 1:])
    gate = gate[:, 1:]
    assert not any(x.is_contiguous() for x in (*one, gate, selection.blocks))
    gradients = run_backward(one, selection, gate, problem, 0.3)
    expected = dense_gradients(one, visible_keys(problem, selection), gate, 0.3)
    assert_close(list(gradients), expected, max_relative_error=2e-5, name="gradient")
    ungated = run_backward(one, selection, None, problem, 0.3)
    expected = dense_gradients(one, visible_keys(problem, selection), torch.ones_like(gate), 0.3)
    assert_close(list(ungated), expected, max_relative_error=1e-5, name="ungated")


@pytest.mark.parametrize("tile_tokens", [7, 32])
def test_unions_hold_each_tile_s_choices(tile_tokens: int, device: str) -> None:
    problem = CASES["2heads-packed"]
    selection = make_selection(problem, device)
    unions = build_unions(selection, tile_tokens)
    tokens = selection.blocks.shape[0]
    assert unions.counts.shape[0] == -(-tokens // tile_tokens)
    for tile in range(unions.counts.shape[0]):
        rows = range(tile * tile_tokens, min(tokens, (tile + 1) * tile_tokens))
        for group in range(problem.groups):
            expected: dict[int, int] = {}
            for i, t in enumerate(rows):
                for block in selection.blocks[t, group].tolist():
                    if block >= 0:
                        start = int(selection.key_start[t]) + block * problem.block
                        expected[start] = expected.get(start, 0) | 1 << i
            count, full = unions.counts[tile, group].tolist()
            entries = unions.entries[tile, group, :count].tolist()
            assert [(entry >> 32, entry & 0xFFFFFFFF) for entry in entries] == sorted(expected.items())
            first_query = min(int(selection.key_start[t] + selection.position[t]) for t in rows)
            assert full == sum(start + problem.block - 1 <= first_query for start in expected)


def test_visitors_invert_the_choice(device: str) -> None:
    problem = CASES["2heads-packed"]
    selection = make_selection(problem, device)
    blocks, chunk = selection.num_blocks, 5
    visitors = find_visitors(selection, chunk, places=True)
    assert torch.equal(visitors.queries, visitors.places // (problem.groups * problem.picks))
    items = []
    for group in range(problem.groups):
        for block in range(blocks):
            number = group * blocks + block
            expected = [
                t
                for t in range(len(selection.position))
                if block - int(selection.block_base[t]) in selection.blocks[t, group].tolist()
            ]
            expected = [t for t in expected if block >= selection.block_base[t]]
            first, last = visitors.offsets[number : number + 2].tolist()
            assert visitors.queries[first:last].tolist() == expected
            picked = selection.blocks.flatten()[visitors.places[first:last].long()]
            assert (picked == block - selection.block_base[visitors.queries[first:last].long()]).all()
            items += [number] * max(1, -(-len(expected) // chunk))
    assert visitors.item_lists[: len(items)].tolist() == items
    assert (visitors.item_lists[len(items) :] >= problem.groups * blocks).all()
    assert int(visitors.slot_offsets[blocks]) <= visitors.slots_per_group
    assert len(items) <= problem.groups * visitors.items_per_group == len(visitors.item_lists)


@pytest.mark.parametrize("workspace", [0, 1 << 30])
def test_one_group_with_the_lists_of_all(workspace: int, device: str) -> None:
    """Lists sorted once for all groups give each group the bits that they give all groups together."""
    problem = CASES["1head"]
    (q, k, v, do), _ = make_inputs(problem, torch.float32, device)
    selection = make_selection(problem, device)
    shift, delta = torch.randn(2, *q.shape[:2], device=device)
    rest = (selection, find_visitors(selection, 21), 0.3)
    options = {"config": SMALL, "workspace_bytes": workspace}
    together = selected_attention_backward_dkv(q, k, v, do, shift, delta, *rest, **options)
    for group in range(problem.groups):
        heads, one = slice(group * problem.heads, (group + 1) * problem.heads), slice(group, group + 1)
        parts = (q[:, heads], k[:, one], v[:, one], do[:, heads], shift[:, heads], delta[:, heads])
        alone = selected_attention_backward_dkv(*parts, *rest, base_group=group, **options)
        assert all(torch.equal(a, b[:, one]) for a, b in zip(alone, together, strict=True))
    wrong = selected_attention_backward_dkv(*parts, *rest, base_group=0, **options)
    assert not torch.equal(wrong[0], together[0][:, one])


def run_by_block(
    tensors: list[Tensor], selection: Selection, gate: Tensor, problem: Problem, *, chunk: int = 21
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the selected branch's dq, added to a base of ones."""
    q, k, v, do = tensors
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], device=q.device)
    options = {"config": SMALL.fitted(problem.heads), "chunk": chunk}
    by_block.selected_attention_forward(q, k, v, selection, 0.3, out, lse, **options)
    statistics = row_shift(lse, gate), (do.float() * out.float()).sum(-1)
    base, dq = torch.ones(q.shape, device=q.device), torch.empty(q.shape, device=q.device)

    def base_of(groups: slice, rows: slice) -> Tensor:
        return base[rows, groups.start * problem.heads : groups.stop * problem.heads]

    by_block.query_gradients(q, k, v, do, *statistics, selection, 0.3, dq, base_of=base_of, **options)
    return out, lse, dq


@pytest.mark.parametrize("name", CASES)
def test_block_by_block(name: str, dtype: torch.dtype, tolerance: float, device: str) -> None:
    problem = CASES[name]
    tensors, gate = make_inputs(problem, dtype, device)
    selection = make_selection(problem, device)
    out, lse, dq = run_by_block(tensors, selection, gate, problem)
    q, k, v, _ = (x.double() for x in tensors)
    visible = visible_keys(problem, selection)
    expected, expected_lse = dense_attention(q, k, v, visible, 0.3)
    assert_close(out, expected, max_relative_error=tolerance, name="out")
    assert_close(lse, expected_lse, atol=2e-5, rtol=1e-5, name="lse")
    assert_close(dq - 1, dense_gradients(tensors, visible, gate, 0.3)[0], max_relative_error=2 * tolerance, name="dq")
    blind = lse == float("-inf")
    assert blind.any() and (dq[blind] == 1).all() and (out[blind] == 0).all()


def test_block_by_block_in_any_passes_and_items(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query's bits depend neither on the tokens and groups of a pass nor on how a block's queries are cut."""
    problem = CASES["2heads-packed"]
    tensors, gate = make_inputs(problem, torch.float32, device)
    selection = make_selection(problem, device)
    whole = run_by_block(tensors, selection, gate, problem)
    bytes_per_token = problem.picks * problem.heads * (problem.dv * 4 + 4)
    # 47 tokens of two groups: in one pass, one group after the other, and 16 tokens of one group at a time.
    for workspace, chunk, count in ((1 << 30, 1000, 1), (48 * bytes_per_token, 21, 2), (1, 3, 6)):
        monkeypatch.setattr(by_block, "WORKSPACE_BYTES", workspace)
        assert len(list(by_block.passes(len(tensors[0]), problem.groups, bytes_per_token))) == count
        again = run_by_block(tensors, selection, gate, problem, chunk=chunk)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


def test_block_by_block_for_one_group_of_several(device: str) -> None:
    """Slices of heads, in and out, as context parallelism gives them: the bits of all groups together."""
    problem = CASES["4heads-every-other-row"]._replace(groups=3)
    tensors, gate = make_inputs(problem, torch.float32, device)
    selection = make_selection(problem, device)
    out, _, _ = run_by_block(tensors, selection, gate, problem)
    (q, k, v, _), sliced = tensors, torch.full_like(out, float("nan"))
    for group in range(problem.groups):
        heads, one = slice(group * problem.heads, (group + 1) * problem.heads), slice(group, group + 1)
        lse = torch.empty(q.shape[0], problem.heads, device=device)
        own = selection._replace(blocks=selection.blocks[:, one])
        config = SMALL.fitted(problem.heads)
        by_block.selected_attention_forward(
            q[:, heads], k[:, one], v[:, one], own, 0.3, sliced[:, heads], lse, config=config, chunk=21
        )
    assert torch.equal(sliced, out)


def test_which_shapes_go_block_by_block(device: str) -> None:
    """Small groups, whose blocks stay on the multiprocessor; a tile shape or a way to fetch asks for the unions."""

    def fits(rows: int, dk: int, dv: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return by_block.fits(rows, *(torch.empty(1, 1, width, dtype=dtype) for width in (dk, dv)))

    assert fits(64, 128, 128) and fits(33, 64, 192) and fits(128, 64, 64) and fits(16, 64, 64, torch.float32)
    assert not fits(64, 200, 128) and not fits(256, 16, 16) and not fits(64, 64, 64, torch.float32)
    problem = CASES["2heads-packed"]
    (q, k, v, do), _ = make_inputs(problem, torch.float32, device)
    selection = make_selection(problem, device)
    statistics = torch.randn(2, *q.shape[:2], device=device)

    def forward(**options: object) -> None:
        selected_attention_forward(q, k, v, selection, 0.3, **options)

    def backward(**options: object) -> None:
        selected_attention_backward(q, k, v, do, *statistics, selection, 0.3, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_block, "attend_by_block_kernel", None)
        patch.setattr(by_block, "query_gradients_by_block_kernel", None)
        for goes in (forward, backward):
            goes(bulk=False)
            with pytest.raises(TypeError):
                goes()
        patch.setattr(by_block, "MOST_HEADS", 1)
        patch.setattr(by_block, "MOST_HEADS_DQ", 1)
        forward()
        backward()


def test_partial_sums_stay_bounded() -> None:
    """At any length the partial sums of a group are at most about 2048 blocks, and short sequences keep short work items."""
    assert visitor_chunk(4096, 16) == 512
    for tokens in (1 << 16, 1 << 20):
        assert 2 * tokens * 16 // visitor_chunk(tokens, 16) <= 2048


def test_bad_arguments_are_refused(device: str) -> None:
    problem = CASES["1head"]
    (q, k, v, _), _ = make_inputs(problem, torch.float32, device)
    selection = make_selection(problem, device)
    with pytest.raises(ValueError, match="32-bit masks"):
        build_unions(selection, 33)
    with pytest.raises(ValueError, match="must be positive"):
        selected_attention_forward(q, k, v, selection, -1.0)
    with pytest.raises(ValueError, match="do not divide"):
        selected_attention_forward(q[:, :1], k, v, selection, 1.0)
