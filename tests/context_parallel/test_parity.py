"""Context parallelism over real processes gives one process's answers: float64, values and every gradient, to 1e-10."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import HaloExchange, RowReduceScatter, SequenceLayout, transfer
from nsa_cp.ops import pipeline
from nsa_cp.ops.branches_backward import BranchesBackward
from nsa_cp.ops.plan import NSAPlan, get_plan, get_window_plan
from nsa_cp.reference import reference_native_sparse_attention
from nsa_cp.testing import assert_close
from nsa_cp.testing.cases import AttentionProblem, join_shards, make_problem, solve, solve_shard

pytestmark = pytest.mark.distributed

BASE = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=5, window_size=19, backend="torch"
)
PLAIN = (0, 172)  # equal chunks at two ranks, unequal at three and eight
PACKED = (0, 0, 1, 8, 70, 77, 160, 163)
# name: (settings, documents, cut each document or the pack, custom chunks)
CASES = {
    "plain": (BASE, PLAIN, True),
    "packed": (replace(BASE, shared_kv=True, compressor="linear", gate="branch"), PACKED, True),
    "packed_whole": (replace(BASE, compressed_rope="before", compressor="mean"), PACKED, False),
    "halo_longer_than_chunk": (replace(BASE, window_size=60, compress_block_size=16, select_block_size=16), (0, 90), True),
    "no_window": (replace(BASE, window_size=0), (0, 64), True),
}


def problem_of(name: str) -> AttentionProblem:
    config, documents, _ = CASES[name]
    return make_problem(config, documents, rotary=RotaryConfig(percent=0.75), seed=len(name))


def layout_of(name: str, kind: str, world_size: int, rank: int = 0) -> SequenceLayout:
    _, documents, per_document = CASES[name]
    return SequenceLayout.build(documents, cp_size=world_size, cp_rank=rank, kind=kind, per_document=per_document)


def _solve_on_rank(rank: int, world_size: int, names: list[str], kind: str, comm: str, fault: str | None = None) -> list:
    get_plan.cache_clear(), get_window_plan.cache_clear()
    with FAULTS[fault](rank):
        answers = []
        for name in names:
            problem = problem_of(name)
            problem = replace(problem, config=replace(problem.config, compressed_comm=comm, layout=kind))
            layout = layout_of(name, kind, world_size, rank)
            given = (
                layout_of(name, "contiguous" if kind == "zigzag" else "zigzag", world_size, rank) if fault == "chunks" else layout
            )
            shard = problem.shard(given)
            answers.append(solve(shard, layout=layout, group=dist.group.WORLD))
    get_plan.cache_clear(), get_window_plan.cache_clear()
    return answers


def _without_halo(rank: int) -> mock._patch:
    merge = HaloExchange.merge

    def emptied(self: HaloExchange, tensors: list[torch.Tensor], received: list[torch.Tensor]) -> list[torch.Tensor]:
        return merge(self, tensors, [torch.zeros_like(x) for x in received])

    return mock.patch.object(HaloExchange, "merge", emptied)


def _without_kept_halo(rank: int) -> mock._patch:
    """The forward is right; the backward finds zeros where the halo rows were kept."""
    wait = HaloExchange.wait

    def forgetful(self: HaloExchange) -> list[torch.Tensor]:
        buffers = wait(self)
        self.received = tuple(torch.zeros_like(x) for x in self.received)
        return buffers

    return mock.patch.object(HaloExchange, "wait", forgetful)


def _one_rank_drops_its_gradients(rank: int) -> mock._patch:
    start = RowReduceScatter.__init__

    def silent(self: RowReduceScatter, tensors: list, *args: object) -> None:
        start(self, [x * (rank != 1) for x in tensors], *args)

    return mock.patch.object(RowReduceScatter, "__init__", silent)


def _causality_off_by_one(rank: int) -> mock._patch:
    def shifted(self: NSAPlan) -> tuple[np.ndarray, np.ndarray]:
        base = self.compressed_base[self.layout.local_documents]
        seen = self.layout.local_positions + 1 - self.config.compress_block_size + 1
        count = self.compressed_counts[self.layout.local_documents]
        return base, base + np.minimum(count, np.maximum(0, seen // self.config.compress_stride + 1))

    return mock.patch.object(NSAPlan, "_compressed_range", property(shifted))


FAULTS = {
    None: lambda rank: mock.patch.dict({}),
    "chunks": lambda rank: mock.patch.dict({}),
    "halo": _without_halo,
    "kept halo": _without_kept_halo,
    "gradients": _one_rank_drops_its_gradients,
    "causality": _causality_off_by_one,
}


def _compare(shards: list[list], names: list[str], kind: str, world_size: int, expected: dict) -> None:
    for index, name in enumerate(names):
        joined = join_shards([answers[index] for answers in shards], layout_of(name, kind, world_size))
        for key, value in expected[name].items():
            tolerance = {} if key == "blocks" else {"rtol": 1e-10, "atol": 1e-10}
            assert_close(joined[key], value, **tolerance, name=f"{name} {kind} {key}")


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, torch.Tensor]]:
    """One process's answers, themselves equal to the oracle's."""
    answers = {}
    for name in CASES:
        problem = problem_of(name)
        answers[name] = solve(problem)
        oracle = solve(problem, reference_native_sparse_attention)
        assert torch.equal(answers[name]["blocks"], oracle["blocks"])
        assert_close(answers[name]["out"], oracle["out"], atol=1e-10, name=name)
    return answers


@pytest.mark.parametrize("comm", ["ring", "all_gather"])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_parity_with_one_process(workers, expected, world_size: int, kind: str, comm: str) -> None:
    names = list(CASES)
    _compare(workers(world_size).run(_solve_on_rank, names, kind, comm), names, kind, world_size, expected)


def _eight_groups() -> AttentionProblem:
    config = replace(BASE, layout="zigzag", compressed_comm="all_gather")
    return make_problem(config, PACKED, num_heads=8, num_groups=8, rotary=RotaryConfig(), seed=3)


def _solve_in_slices(rank: int, world_size: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Answers, and groups of each of the backward's slices, on ranks that differ in whether the fused backward is worth it."""
    problem = _eight_groups()
    layout = SequenceLayout.build(PACKED, cp_size=world_size, cp_rank=rank)

    def fused(*arguments: object, fewer: bool) -> int:
        return 1 if fewer else rank * arguments[-1]

    get_plan.cache_clear()
    with mock.patch.object(pipeline, "fused_backward_groups", fused):
        with mock.patch.object(pipeline, "BranchesBackward", wraps=pipeline.BranchesBackward) as made:
            answers = solve(problem.shard(layout), layout=layout, group=dist.group.WORLD)
    get_plan.cache_clear()
    return answers, [call.args[2].blocks.shape[1] for call in made.call_args_list]


def test_all_ranks_cut_the_groups_alike(workers) -> None:
    """Eight groups go four at a time, whatever each rank thinks of its own share."""
    shards = workers(2).run(_solve_in_slices)
    assert [slices for _, slices in shards] == [[4, 4], [4, 4]]
    joined = join_shards([answers for answers, _ in shards], SequenceLayout.build(PACKED, cp_size=2))
    for key, value in solve(_eight_groups()).items():
        assert_close(joined[key], value, **({} if key == "blocks" else {"rtol": 1e-10, "atol": 1e-10}), name=key)


def _order_of_the_backward(rank: int, world_size: int) -> list[str]:
    """Kernels and transfers of a backward in the order in which this rank issues them, one group a slice."""
    problem = _eight_groups()
    layout = SequenceLayout.build(PACKED, cp_size=world_size, cp_rank=rank, kind="contiguous")
    issued, issue = [], transfer.issue

    def noted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **options: object) -> object:
            issued.append(name)
            return call(*arguments, **options)

        return wrapped

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(pipeline, "_STEP_BYTES", 1))
        stack.enter_context(mock.patch.object(transfer, "issue", lambda pattern, *rest: noted(pattern, issue)(pattern, *rest)))
        for name in ("window", "compressed", "selected", "query_gradients"):
            kernel = getattr(BranchesBackward, name)
            stack.enter_context(mock.patch.object(BranchesBackward, name, noted(name, kernel)))
        solve(problem.shard(layout), layout=layout, group=dist.group.WORLD)
    return issued[issued.index("window") - 2 :]


def test_what_the_backward_issues_when(workers) -> None:
    """Gathers but the first behind the fused backward, and the halo's gradients before the last dq; alike on all ranks."""
    kernels = ["window", "compressed", "all_gather", "reduce_scatter", "selected", "reduce_scatter", "query_gradients"]
    last = [name for name in kernels if name != "all_gather"]
    last.insert(-1, "exchange")
    # Compressed tokens and the first group's rows; no halo.
    assert workers(3).run(_order_of_the_backward) == [["all_gather"] * 2 + 7 * kernels + last] * 3


@pytest.mark.parametrize("fault", ["chunks", "halo", "kept halo", "gradients", "causality"])
def test_negative_controls_fail(workers, expected, fault: str) -> None:
    shards = workers(2).run(_solve_on_rank, ["plain"], "zigzag", "ring", fault)
    with pytest.raises(AssertionError):
        _compare(shards, ["plain"], "zigzag", 2, expected)


def _differing_layout(rank: int, world_size: int) -> str:
    layout = SequenceLayout.build(64 if rank == 0 else 68, cp_size=world_size, cp_rank=rank)
    try:
        solve_shard(make_problem(BASE, (0, layout.num_tokens)), layout, dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "ran"


def test_ranks_with_different_lengths_are_told_so(workers) -> None:
    assert all("ranks [1] differ from rank 0" in message for message in workers(2).run(_differing_layout))
