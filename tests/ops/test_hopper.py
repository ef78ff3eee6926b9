"""The Gluon kernels for Hopper beside their Triton twins: values, borders, hidden rows, strides, repeatability, who runs when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.kernels.block_selection import forward as selection
from nsa_cp.kernels.hopper import on_hopper
from nsa_cp.kernels.interval_attention.backward import (
    ROWS_A_SUM,
    interval_attention_backward,
    interval_attention_backward_dkv,
)
from nsa_cp.kernels.interval_attention.forward import interval_attention_forward, interval_lse
from nsa_cp.kernels.query_gradients.backward import Branch, query_gradients
from nsa_cp.kernels.selected_attention.backward import selected_attention_backward_dkv
from nsa_cp.kernels.selected_attention.unions import Selection, find_visitors
from nsa_cp.ops import branches_backward
from nsa_cp.ops.plan import NSAPlan, get_plan
from nsa_cp.ops.selected import selection_of
from nsa_cp.testing import assert_close
from nsa_cp.testing.cases import make_problem, solve

DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not on_hopper(DEVICE), reason="needs a Hopper GPU and a release of Triton tried on it"
    ),
]

PACKED = (0, 1, 8, 308, 437, 1000)
SCALE = 0.09
# Rows before and behind the keys that nobody may see; they hold NaN.
MARGIN = 5


@dataclass(frozen=True)
class Case:
    """Heads, groups, Dk, Dv, documents, element type."""

    heads: int
    groups: int
    dk: int
    dv: int
    documents: tuple[int, ...] = PACKED
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "64/4x128": Case(64, 4, 128, 128),
    "long": Case(64, 4, 128, 128, (0, 4097)),
    "float16": Case(16, 2, 64, 64, dtype=torch.float16),
    "4 heads": Case(8, 2, 128, 64),
    "5 heads": Case(10, 2, 64, 128),
    # Rows of a group that do not begin at 16 bytes of the one before.
    "1 head": Case(2, 2, 64, 64, (0, 130, 431, 433, 701)),
    "2 heads": Case(4, 2, 64, 64, (0, 1, 34, 421)),
    # Whose row statistics are read where they lie, past their end too.
    "1 group": Case(8, 1, 64, 128, (0, 1, 34, 421)),
    "64 heads": Case(64, 1, 128, 128, (0, 700)),
    "192/128": Case(32, 2, 192, 128),
    "192/64": Case(8, 2, 192, 64, dtype=torch.float16),
    "192, long": Case(64, 4, 192, 128, (0, 4097)),
}
# Of 5 products: widths of 128.
FUSED_CASES = {name: case for name, case in CASES.items() if case.dk == case.dv == 128} | {
    "float16": Case(32, 4, 128, 128, dtype=torch.float16),
    "4 heads": Case(4, 1, 128, 128, (0, 1, 34, 421)),
    "1 head": Case(2, 2, 128, 128, (0, 130, 431, 433, 701)),
    "longer": Case(64, 4, 128, 128, (0, 3000, 3011, 20011)),
}


def _plan(case: Case) -> NSAPlan:
    return get_plan(SequenceLayout.build(case.documents), NSAConfig(window_size=200), DEVICE)


def _normal(case: Case, rows: int, heads: int, width: int) -> Tensor:
    return torch.randn(rows, heads, width, device=DEVICE).to(case.dtype)


def _queries(case: Case) -> tuple[Tensor, Tensor]:
    """q and do; not contiguous, and do has a gap between its rows."""
    tokens = case.documents[-1]
    q = _normal(case, case.heads, tokens, case.dk).transpose(0, 1)
    return q, _normal(case, tokens, case.heads, 2 * case.dv)[..., : case.dv]


def _hidden_keys(case: Case, rows: int, behind: int = MARGIN) -> tuple[Tensor, Tensor]:
    """k and v of ``rows`` rows between rows of NaN."""
    k, v = (_normal(case, MARGIN + rows + behind, case.groups, width) for width in (case.dk, case.dv))
    for x in (k, v):
        x[:MARGIN], x[MARGIN + rows :] = float("nan"), float("nan")
    return k, v


def _intervals(plan: NSAPlan, name: str) -> tuple[int, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Number of keys, the keys of each query (moved by the margin), the queries of each key (none in the margins)."""
    intervals = plan.window_intervals if name == "window" else plan.compressed_intervals
    begin, end = (bound + MARGIN for bound in intervals.of_queries)
    of_keys = tuple(torch.nn.functional.pad(bound, (MARGIN, MARGIN)) for bound in intervals.of_keys)
    return intervals.num_keys, (begin, end), of_keys


def _statistics(case: Case, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Row shifts as a gate of about a half makes them, some rows closed, and any deltas."""
    lse = interval_attention_forward(q, k, v, *bounds, SCALE, hopper=False)[1]
    shift = (lse - torch.rand_like(lse).log()).masked_fill(lse == float("-inf"), float("inf"))
    shift[::7] = float("inf")
    return shift, torch.randn_like(lse)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    # Whatever is allocated and not written shows.
    with mock.patch.object(torch, "empty", _poisoned):
        yield


def _poisoned(*size: int | tuple[int, ...], **options: object) -> Tensor:
    x = torch.zeros(*size, **options)
    return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-77)


@pytest.mark.parametrize("name", ["window", "compressed"])
@pytest.mark.parametrize("case", CASES)
def test_forward(case: str, name: str) -> None:
    problem = CASES[case]
    rows, bounds, _ = _intervals(_plan(problem), name)
    q, _ = _queries(problem)
    k, v = _hidden_keys(problem, rows)
    out, lse = interval_attention_forward(q, k, v, *bounds, SCALE)
    expected, expected_lse = interval_attention_forward(q, k, v, *bounds, SCALE, hopper=False)
    assert_close(out, expected, max_relative_error=5e-3, name="out")
    assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5, name="lse")
    again = interval_attention_forward(q, k, v, *bounds, SCALE)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    # Other ranks see a row among other rows.
    late = interval_attention_forward(q[11:], k, v, *(bound[11:] for bound in bounds), SCALE)
    assert torch.equal(out[11:], late[0]) and torch.equal(lse[11:], late[1])
    assert torch.equal(lse, interval_lse(q, k, *bounds, SCALE, problem.dv))


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.heads // case.groups >= 4])
def test_block_scores(case: str) -> None:
    problem = CASES[case]
    plan = _plan(problem)
    rows, bounds, _ = _intervals(plan, "compressed")
    q, _ = _queries(problem)
    k, v = _hidden_keys(problem, rows)
    lse = interval_attention_forward(q, k, v, *bounds, SCALE, hopper=False)[1]
    ranges, tokens = (*bounds, plan.position), problem.documents[-1]
    found = []
    for scorer in (_hopper_scores, _triton_scores):
        scores = torch.zeros(tokens, problem.groups, plan.max_blocks, device=DEVICE)
        scorer(q, k, lse, ranges).write(scores[3:], 3, tokens)
        found.append(scores)
    seen = torch.arange(plan.max_blocks, device=DEVICE) <= (plan.position // 64)[:, None]
    scores, expected = (x.masked_fill(~seen[:, None], 0.0) for x in found)
    assert expected.abs().max() > 0.1
    assert_close(scores, expected, atol=1e-6, rtol=1e-5, name="scores")


def _hopper_scores(q: Tensor, k: Tensor, lse: Tensor, ranges: tuple[Tensor, ...]) -> object:
    from nsa_cp.kernels.block_selection.hopper import BlockScores, takes

    assert takes(q, k, 4)
    return BlockScores(q, k, lse, ranges, 32, 16, 64, SCALE)


def _triton_scores(q: Tensor, k: Tensor, lse: Tensor, ranges: tuple[Tensor, ...]) -> object:
    return selection._TritonScores(q, k, lse, ranges, 32, 16, 64, SCALE, config=None, bulk=None)


@pytest.mark.parametrize("name", ["window", "compressed"])
@pytest.mark.parametrize("case", CASES)
def test_key_gradients(case: str, name: str) -> None:
    problem = CASES[case]
    rows, bounds, of_keys = _intervals(_plan(problem), name)
    q, do = _queries(problem)
    k, v = _hidden_keys(problem, rows)
    statistics = _statistics(problem, q, k, v, bounds)
    arguments = (q, k, v, do, *statistics, *of_keys, SCALE)
    expected = interval_attention_backward_dkv(*arguments, hopper=False)
    for splits in (1, 3):
        gradients = interval_attention_backward_dkv(*arguments, splits=splits)
        assert_close(list(gradients), list(expected), max_relative_error=1e-4, name=f"{splits} splits")
        again = interval_attention_backward_dkv(*arguments, splits=splits)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    pieces = interval_attention_backward_dkv(*arguments, splits=1, rows_a_sum=128)
    assert_close(list(pieces), list(expected), max_relative_error=1e-4, name="sums of 128 rows")


@pytest.mark.parametrize("hopper", [True, False], ids=["gluon", "triton"])
def test_long_sums_do_not_shrink(hopper: bool) -> None:
    """Four million rows that all add to dv; matrix units alone, which round toward zero, lose a part of it."""
    tokens, heads, keys, width = 1 << 16, 64, 128, 64
    q, k, v = (torch.randn(n, h, width, device=DEVICE).bfloat16() for n, h in ((tokens, heads), (keys, 1), (keys, 1)))
    do = torch.randn(tokens, heads, width, device=DEVICE).abs().bfloat16()
    shift, delta = torch.ones(tokens, heads, device=DEVICE), torch.zeros(tokens, heads, device=DEVICE)
    bounds = [torch.full((keys,), x, dtype=torch.int32, device=DEVICE) for x in (0, tokens)]
    exact = torch.zeros(keys, width, dtype=torch.float64, device=DEVICE)
    for chunk in range(0, tokens, 4096):
        rows = slice(chunk, chunk + 4096)
        p = (q[rows].double() @ k[:, 0].double().T * SCALE - 1).exp()
        exact += torch.einsum("thm,thd->md", p, do[rows].double())

    def loss(rows_a_sum: int) -> float:
        arguments = (q, k, v, do, shift, delta, *bounds, SCALE)
        dv = interval_attention_backward_dkv(*arguments, splits=1, rows_a_sum=rows_a_sum, hopper=hopper)[1]
        return float((1 - dv[:, 0].double() / exact).mean())

    assert abs(loss(ROWS_A_SUM)) < 1e-3
    assert loss(tokens * heads) > 3e-3


def _fused_backward(*arguments: object, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    from nsa_cp.kernels.interval_attention.hopper_fused_backward import interval_attention_fused_backward, takes

    assert takes(*arguments[:4])
    return interval_attention_fused_backward(*arguments, **options)


def _as_rows(dq: Tensor, q: Tensor, k: Tensor) -> Tensor:
    from nsa_cp.kernels.interval_attention.hopper_fused_backward import unpack

    return unpack(dq, len(q), q.shape[1] // k.shape[1]) * SCALE


@pytest.mark.parametrize("name", ["window", "compressed"])
@pytest.mark.parametrize("case", FUSED_CASES)
def test_fused_backward(case: str, name: str) -> None:
    """dq, dk and dv in 5 products, in one chunk and in several."""
    problem = FUSED_CASES[case]
    rows, bounds, of_keys = _intervals(_plan(problem), name)
    q, do = _queries(problem)
    k, v = _hidden_keys(problem, rows)
    statistics = _statistics(problem, q, k, v, bounds)
    expected = interval_attention_backward(q, k, v, do, *statistics, *bounds, *of_keys, SCALE, bulk=False)
    arguments = (q, k, v, do, *statistics, *of_keys, SCALE)
    for chunk in (None, 13, 1 << 20):
        dq, dk, dv = _fused_backward(*arguments, chunk=chunk)
        assert_close([_as_rows(dq, q, k), dk, dv], list(expected), max_relative_error=1e-3, name=f"chunks of {chunk}")
        assert all(x[:MARGIN].eq(0).all() and x[-MARGIN:].eq(0).all() for x in (dk, dv))
        for _ in range(3):
            again = _fused_backward(*arguments, chunk=chunk)
            assert all(torch.equal(a, b) for a, b in zip((dq, dk, dv), again, strict=True))


def test_fused_backward_of_intervals_in_no_order() -> None:
    """Any queries of any key, some of none, against float64."""
    tokens, heads, keys, width = 701, 16, 400, 128
    q, do = (torch.randn(tokens, heads, width, device=DEVICE).bfloat16() for _ in range(2))
    k, v = (torch.randn(keys, 1, width, device=DEVICE).bfloat16() for _ in range(2))
    shift, delta = 6 + torch.rand(tokens, heads, device=DEVICE), torch.randn(tokens, heads, device=DEVICE)
    begin, end = torch.randint(0, tokens + 1, (2, keys), device=DEVICE).sort(0).values.to(torch.int32)
    end[3::17] = 0
    token = torch.arange(tokens, device=DEVICE)[:, None]
    visible = ((token >= begin) & (token < end))[:, None]
    wide_q, wide_do, wide_k, wide_v = q.double(), do.double(), k[:, 0].double(), v[:, 0].double()
    p = torch.where(visible, (wide_q @ wide_k.T * SCALE - shift[..., None]).exp(), 0.0)
    ds = p * (wide_do @ wide_v.T - delta[..., None])
    dk, dv = (torch.einsum("thm,thd->md", x, y)[:, None] for x, y in ((ds * SCALE, wide_q), (p, wide_do)))
    dq, *key_gradients = _fused_backward(q, k, v, do, shift, delta, begin, end, SCALE, chunk=16)
    found = [x.double() for x in (_as_rows(dq, q, k), *key_gradients)]
    # p and ds are rounded to 8 bits.
    assert_close(found, [ds @ wide_k * SCALE, dk, dv], max_relative_error=1e-2, name="gradients")


def _query_gradients_problem(case: Case, plan: NSAPlan, drifting: bool) -> tuple:
    """q, do, the three branches, their ranges and choices; and the queries of each compressed token."""
    q, do = _queries(case)
    branches, ranges = [], []
    for name in ("window", "compressed"):
        rows, bounds, of_keys = _intervals(plan, name)
        k, v = _hidden_keys(case, rows)
        branches.append(Branch(k, v, *_statistics(case, q, k, v, bounds)))
        ranges.append(bounds)
    # The selected branch's keys end with the last document's.
    k, v = _hidden_keys(case, case.documents[-1], behind=0)
    branches.append(Branch(k, v, torch.randn(q.shape[:2], device=DEVICE) + 3, torch.randn(q.shape[:2], device=DEVICE)))
    return q, do, branches, ranges, _choices(plan, case.groups, drifting), of_keys


@pytest.mark.parametrize("drifting", [False, True], ids=["random", "drifting"])
@pytest.mark.parametrize("case", CASES)
def test_query_gradients(case: str, drifting: bool) -> None:
    problem = CASES[case]
    q, do, parts, ranges, chosen, _ = _query_gradients_problem(problem, _plan(problem), drifting)
    expected = query_gradients(q, do, *parts, *ranges, chosen, SCALE, hopper=False)
    dq = query_gradients(q, do, *parts, *ranges, chosen, SCALE)
    assert_close(dq, expected, max_relative_error=1e-3, name="dq")
    assert torch.equal(dq, query_gradients(q, do, *parts, *ranges, chosen, SCALE))


@pytest.mark.parametrize("case", [name for name, case in FUSED_CASES.items() if case.heads // case.groups >= 4])
def test_query_gradients_from_the_compressed_ones(case: str) -> None:
    """The compressed branch's dq in, its keys not read; the same with selected keys that the copy engine cannot fetch."""
    problem = FUSED_CASES[case]
    q, do, (window, compressed, selected), ranges, chosen, of_keys = _query_gradients_problem(problem, _plan(problem), True)
    expected = query_gradients(q, do, window, compressed, selected, *ranges, chosen, SCALE, hopper=False)
    begun, *_ = _fused_backward(q, compressed.k, compressed.v, do, compressed.shift, compressed.delta, *of_keys, SCALE)
    unread = compressed._replace(k=torch.full_like(compressed.k, float("nan")))
    dq = query_gradients(q, do, window, unread, selected, *ranges, chosen, SCALE, begun=begun)
    assert_close(dq, expected, max_relative_error=1e-3, name="dq")
    assert torch.equal(dq, query_gradients(q, do, window, unread, selected, *ranges, chosen, SCALE, begun=begun))
    odd = torch.zeros(*selected.k.shape[:2], problem.dk + 1, dtype=problem.dtype, device=DEVICE)[..., 1:]
    selected = selected._replace(k=odd.copy_(selected.k))
    assert torch.equal(dq, query_gradients(q, do, window, unread, selected, *ranges, chosen, SCALE, begun=begun))


@pytest.mark.parametrize("buffer_bytes", [1 << 30, 1], ids=["all groups", "group by group"])
def test_the_fused_backward_in_the_whole(buffer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 products in place of 7 change no more than rounding, and two runs give the same bits."""
    settings = {"num_heads": 64, "num_groups": 4, "qk_dim": 128, "v_dim": 128, "rotary": RotaryConfig(), "dtype": torch.bfloat16}
    problem = make_problem(NSAConfig(backend="triton"), PACKED, **settings).to("cuda")
    with mock.patch("nsa_cp.ops.pipeline.fused_backward_groups", return_value=0):
        expected = solve(problem)
    monkeypatch.setattr(branches_backward, "_BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(branches_backward, "LEAST_PAIRS", 0)
    target = "nsa_cp.kernels.interval_attention.hopper_fused_backward.interval_attention_fused_backward"
    with mock.patch(target, side_effect=_fused_backward_itself()) as called:
        answers = solve(problem)
    assert called.call_count == (1 if buffer_bytes > 1 else 4)
    again = solve(problem)
    for key, value in expected.items():
        assert torch.equal(answers[key], again[key]), key
        if key != "blocks":
            assert_close(answers[key], value, max_relative_error=5e-3, name=key)


def _fused_backward_itself() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from nsa_cp.kernels.interval_attention.hopper_fused_backward import interval_attention_fused_backward

    return interval_attention_fused_backward


@pytest.mark.parametrize("drifting", [False, True], ids=["random", "drifting"])
@pytest.mark.parametrize("case", CASES)
def test_selected_key_gradients(case: str, drifting: bool) -> None:
    problem = CASES[case]
    plan = _plan(problem)
    q, do = _queries(problem)
    # The last block ends with the keys.
    k, v = _hidden_keys(problem, problem.documents[-1], behind=0)
    shift, delta = torch.randn(q.shape[:2], device=DEVICE) + 3, torch.randn(q.shape[:2], device=DEVICE)
    shift[::7] = float("inf")
    chosen = _choices(plan, problem.groups, drifting)
    # Whole lists, all groups at once; short items, group by group.
    for chunk, options in ((None, {}), (37, {"workspace_bytes": 1})):
        visitors = find_visitors(chosen, chunk)
        arguments = (q, k, v, do, shift, delta, chosen, visitors, SCALE)
        expected = selected_attention_backward_dkv(*arguments, **options, hopper=False)
        gradients = selected_attention_backward_dkv(*arguments, **options)
        assert_close(list(gradients), list(expected), max_relative_error=1e-3, name=f"items of {visitors.chunk}")
        assert all(x[:MARGIN].eq(0).all() for x in gradients)
        again = selected_attention_backward_dkv(*arguments, **options)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
        # The last group alone, with the lists of all.
        group, heads = problem.groups - 1, problem.heads // problem.groups
        mine = [x[:, group * heads :] for x in (q, do, shift, delta)]
        keys = (k[:, group:], v[:, group:])
        whose = (chosen, visitors, SCALE)
        alone = selected_attention_backward_dkv(mine[0], *keys, *mine[1:], *whose, base_group=group, **options)
        assert all(torch.equal(a, b[:, group:]) for a, b in zip(alone, gradients, strict=True))


def _choices(plan: NSAPlan, groups: int, drifting: bool) -> Selection:
    """Six random visible blocks, ascending; the same for neighbours where they drift; none for some tokens; in keys moved by the
    margin."""
    own = plan.position // 64
    score = torch.rand(len(own), groups, max(6, plan.max_blocks), device=DEVICE)
    if drifting:
        score = score[torch.arange(len(own), device=DEVICE) // 50 * 50]
    block = torch.arange(score.shape[-1], device=DEVICE)
    best, chosen = score.masked_fill(block > own[:, None, None], -1.0).topk(6, dim=-1)
    chosen = chosen.masked_fill(best < 0, 1 << 20).sort(-1).values
    chosen[::13] = 1 << 20
    selection = selection_of(chosen.masked_fill(chosen == 1 << 20, -1).to(torch.int32), plan)
    return selection._replace(key_start=selection.key_start + MARGIN, block_start=selection.block_start + MARGIN)


def _runs_on_hopper(target: str, launch: Callable[[], object]) -> bool:
    """Whether ``launch`` goes to the Hopper kernel ``target`` of ``nsa_cp.kernels``, which does not run."""
    with mock.patch(f"nsa_cp.kernels.{target}", return_value=(None, None)) as called:
        launch()
    return called.call_count == 1


def test_who_runs_when() -> None:
    """Widths that suit go to the Hopper kernels, others to Triton; a tile shape or ``hopper=False`` asks for Triton."""
    target = "interval_attention.hopper_forward.interval_attention_forward"
    for width, options, expected in (
        (128, {}, True),
        (96, {}, False),
        (128, {"hopper": False}, False),
        (128, {"bulk": False}, False),
    ):
        case = Case(8, 2, width, width)
        rows, bounds, _ = _intervals(_plan(case), "window")
        q, _ = _queries(case)
        k, v = _hidden_keys(case, rows)
        launch = partial(interval_attention_forward, q, k, v, *bounds, SCALE, **options)
        assert _runs_on_hopper(target, launch) == expected, (width, options)


@pytest.mark.parametrize(
    "case, key_gradients, query_gradients_too",
    [
        (Case(64, 1, 128, 128), True, True),
        (Case(32, 1, 192, 128), True, True),
        # Tiles of 32 rows.
        (Case(64, 1, 192, 128), False, True),
        # Tokens of 2 heads do not fit the union's masks.
        (Case(4, 2, 192, 64), True, False),
        (Case(8, 2, 192, 192), False, False),
        (Case(8, 2, 96, 64), False, False),
    ],
    ids=lambda value: f"{value.heads // value.groups} heads, {value.dk}/{value.dv}" if isinstance(value, Case) else None,
)
def test_who_runs_backward(case: Case, key_gradients: bool, query_gradients_too: bool) -> None:
    """As :func:`test_who_runs_when`, backward."""
    plan = _plan(case)
    rows, bounds, of_keys = _intervals(plan, "window")
    q, do = _queries(case)
    k, v = _hidden_keys(case, rows)
    statistics = (torch.zeros(q.shape[:2], device=DEVICE), torch.zeros(q.shape[:2], device=DEVICE))
    launch = partial(interval_attention_backward_dkv, q, k, v, do, *statistics, *of_keys, SCALE)
    assert _runs_on_hopper("interval_attention.hopper_backward.interval_attention_backward_dkv", launch) == key_gradients
    branches = [Branch(k, v, *statistics)] * 3
    launch = partial(query_gradients, q, do, *branches, bounds, bounds, _choices(plan, case.groups, False), SCALE)
    assert _runs_on_hopper("query_gradients.hopper.query_gradients", launch) == query_gradients_too
