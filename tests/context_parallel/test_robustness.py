"""Ranks that disagree, hang, die or are late: a clear error within the process group's timeout, or the same answers."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nsa_cp.attention import full_attention, sliding_window_attention
from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout, agreement, start_agreement, transfer
from nsa_cp.ops import native_sparse_attention
from nsa_cp.testing import DistributedPool
from nsa_cp.testing.cases import AttentionProblem, make_problem, solve
from nsa_cp.testing.pool import RankError

pytestmark = pytest.mark.distributed

WORLD, TIMEOUT = 2, 3.0
NCCL = pytest.param(
    "nccl",
    marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason=f"needs {WORLD} CUDA devices")],
)
BACKENDS = ["gloo", NCCL]
CONFIG = NSAConfig(
    compress_block_size=16, compress_stride=8, select_block_size=16, num_selected_blocks=4, window_size=32,
    compressor="linear",
)  # fmt: skip
DOCUMENTS = {"first": (0, 160), "second": (0, 3, 70, 131, 200)}


def _device(rank: int) -> torch.device:
    """The rank's GPU under NCCL, the CPU under gloo."""
    if dist.get_backend() != "nccl":
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _problem(rank: int, name: str, config: NSAConfig = CONFIG) -> tuple[AttentionProblem, SequenceLayout]:
    """This rank's shard of a pack, and its layout."""
    device = _device(rank)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float64
    whole = make_problem(config, DOCUMENTS[name], qk_dim=64, v_dim=64, rotary=RotaryConfig(), seed=len(name), dtype=dtype)
    layout = SequenceLayout.build(DOCUMENTS[name], cp_size=WORLD, cp_rank=rank)
    return whole.shard(layout).to(device), layout


def _solve(rank: int, name: str) -> dict[str, torch.Tensor]:
    problem, layout = _problem(rank, name)
    return {key: x.cpu() for key, x in solve(problem, layout=layout, group=dist.group.WORLD).items()}


def _synchronize() -> None:
    if dist.get_backend() == "nccl":
        torch.cuda.synchronize()


@pytest.fixture
def short_pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[DistributedPool]:
    """Processes whose collectives give up after TIMEOUT seconds; ranks have time to tell of their errors after the first."""
    monkeypatch.setattr("nsa_cp.testing.pool.GRACE_SECONDS", 3 * TIMEOUT)
    with DistributedPool(WORLD, backend=request.param, collective_timeout=TIMEOUT) as pool:
        yield pool


# --- disagreement -----------------------------------------------------------------------------------------------------------


def _met_and_repeated(rank: int, world_size: int, attention: str) -> str:
    """Both know the first pack; then rank 1 meets the second while rank 0 repeats the first."""
    _solve(rank, "first")
    problem, layout = _problem(rank, "first" if rank == 0 else "second")
    group = dist.group.WORLD
    try:
        if attention == "nsa":
            solve(problem, layout=layout, group=group)
        elif attention == "full":
            full_attention(problem.q, problem.k[0], problem.v[0], layout, cp_group=group)
        else:
            sliding_window_attention(problem.q, problem.k[0], problem.v[0], layout, window_size=8, cp_group=group)
    except ValueError as error:
        return str(error)
    return "ran"


@pytest.mark.parametrize("attention", ["nsa", "full", "window"])
def test_a_new_layout_beside_a_repeated_one_is_an_error_on_both_ranks(workers, attention: str) -> None:
    for rank, message in enumerate(workers(WORLD).run(_met_and_repeated, attention)):
        assert "ranks [1] differ from rank 0" in message and f"Rank {rank} has: documents" in message


def _different_calls(rank: int, world_size: int) -> list[str]:
    """Rank 1 calls with another window, another kind of attention, without rotation, with fewer heads and narrower values."""
    problem, layout = _problem(rank, "first")
    q, k, v, group, told = problem.q, problem.k[0], problem.v[0], dist.group.WORLD, []

    def window(size: int) -> None:
        sliding_window_attention(q, k, v, layout, window_size=size, cp_group=group)

    def nsa(**changes: Any) -> None:
        solve(replace(problem, **changes), layout=layout, group=group)

    narrow = make_problem(CONFIG, DOCUMENTS["first"], qk_dim=64, v_dim=32, dtype=q.dtype).shard(layout).to(q.device)

    for mine, other in (
        (lambda: window(8), lambda: window(16)),
        (lambda: window(8), lambda: full_attention(q, k, v, layout, cp_group=group)),
        (nsa, lambda: nsa(rotary=None)),
        (nsa, lambda: nsa(q=q[:, :2], gates=problem.gates[:, :2])),
        (nsa, lambda: nsa(v=narrow.v, v_weights=narrow.v_weights)),
    ):
        with pytest.raises(ValueError) as error:
            (mine if rank == 0 else other)()
        told.append(str(error.value))
    return told


def test_different_calls_on_one_layout_are_an_error_on_both_ranks(workers) -> None:
    for messages in workers(WORLD).run(_different_calls):
        assert all("ranks [1] differ from rank 0" in message for message in messages)


def _agree_without_a_cpu_backend(rank: int, world_size: int) -> bool:
    """Rank 0 belongs to one group more than rank 1, as the only member, and the context-parallel group is NCCL's by its name."""
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    layout, group = SequenceLayout.build(64, cp_size=world_size, cp_rank=rank), dist.new_group(list(range(world_size)))
    with (
        mock.patch.object(dist, "get_backend_config", lambda _: "cuda:nccl"),
        mock.patch.object(agreement, "connect", lambda _: None),
    ):
        for _ in range(2):
            start_agreement({}, layout, ("facts",), group, torch.device("cpu")).confirm()
        with pytest.raises(ValueError, match="differ from rank 0"):
            start_agreement({}, layout, (rank,), group, torch.device("cpu"))
    dist.destroy_process_group(group)
    return True


def test_hosts_meet_whatever_other_groups_a_rank_belongs_to(workers) -> None:
    assert all(workers(WORLD).run(_agree_without_a_cpu_backend))


def _held(rank: int, world_size: int, own_hosts: bool) -> bool:
    """Whether anything holds a group, after an attention in it, that was destroyed and that the caller has let go."""
    group = dist.new_group(range(world_size))
    config = "cuda:nccl" if own_hosts else dist.get_backend_config(group)
    with (
        mock.patch.object(dist, "get_backend_config", lambda _: config),
        mock.patch.object(agreement, "connect", lambda _: None),
    ):
        problem, layout = _problem(rank, "first")
        solve(problem, layout=layout, group=group)
    assert (group in agreement._gloo) == own_hosts
    dist.destroy_process_group(group)
    life = weakref.ref(group)
    del group
    gc.collect()
    return life() is not None or len(agreement._gloo) > 0


@pytest.mark.parametrize("own_hosts", [False, True], ids=["the-group", "gloo-of-its-own"])
def test_groups_that_are_let_go_are_gone(workers, own_hosts: bool) -> None:
    """A group that is still held when the interpreter ends may abort the process: its threads outlive it."""
    assert workers(WORLD).run(_held, own_hosts) == [False] * WORLD


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason=f"needs {WORLD} CUDA devices")
def test_a_new_layout_beside_a_repeated_one_over_nccl() -> None:
    """In a pool of its own: the kernels of the rank that repeats wait for what never comes."""
    with DistributedPool(WORLD, backend="nccl", collective_timeout=10 * TIMEOUT) as pool:
        for message in pool.run(_met_and_repeated, "nsa"):
            assert "ranks [1] differ from rank 0" in message


def _late_host(rank: int, world_size: int) -> tuple[float, float, str]:
    """Seconds that a repeated layout's agreement takes to start and to confirm when rank 1 comes a second late."""
    layout, confirmed = SequenceLayout.build(64, cp_size=world_size, cp_rank=rank), {}
    # Only a CPU's transfers block the host; what a GPU would do is told by the device given.
    arguments = (layout, ("facts",), dist.group.WORLD, torch.device("cuda"))
    start_agreement(confirmed, *arguments).confirm()
    dist.barrier()
    if rank == 1:
        time.sleep(1.0)
    begun = time.perf_counter()
    agreement = start_agreement(confirmed, *arguments)
    started = time.perf_counter()
    agreement.confirm()
    confirmed_at = time.perf_counter()
    try:
        start_agreement(confirmed, layout, ("facts" if rank else "other",), dist.group.WORLD, torch.device("cuda")).confirm()
    except ValueError as error:
        return started - begun, confirmed_at - started, str(error)
    return started - begun, confirmed_at - started, "agreed"


def test_a_repeated_layout_is_compared_without_waiting_and_confirmed_later(workers) -> None:
    (start, confirm, message), (_, _, other) = workers(WORLD).run(_late_host)
    assert start < 0.5 < confirm
    assert all("ranks [1] differ from rank 0" in text for text in (message, other))


# --- death, hanging, one rank's own error -----------------------------------------------------------------------------------


def _partner_fails(rank: int, world_size: int, how: str, file: str) -> None:
    """Rank 1 fails in its second call; rank 0 writes down what it is told, and after how many seconds."""
    problem, layout = _problem(rank, "first")
    _solve(rank, "first")
    if rank == 1:
        if how == "dies before":
            os._exit(3)
        if how == "dies within":
            with mock.patch.object(transfer, "issue", lambda *_: os._exit(3)):
                solve(problem, layout=layout, group=dist.group.WORLD)
        if how == "has another shape":
            with pytest.raises(ValueError, match="rows"):
                solve(replace(problem, q=problem.q[:-1]), layout=layout, group=dist.group.WORLD)
        time.sleep(1.5 * TIMEOUT)
        return
    begun = time.perf_counter()
    try:
        solve(problem, layout=layout, group=dist.group.WORLD)
        _synchronize()
    except RuntimeError as error:
        Path(file).write_text(f"{time.perf_counter() - begun:.1f} s: {error}", encoding="utf-8")


@pytest.mark.parametrize("how", ["dies before", "dies within", "hangs", "has another shape"])
@pytest.mark.parametrize("short_pool", BACKENDS, indirect=True)
def test_a_lost_rank_is_a_clear_error_within_the_timeout(
    request: pytest.FixtureRequest, short_pool: DistributedPool, how: str, tmp_path: Path
) -> None:
    file = tmp_path / "told.txt"
    try:
        short_pool.run(_partner_fails, how, str(file))
    except RankError as error:
        assert "dies" in how or "nccl" in request.node.name, error
    if "nccl" in request.node.name and how == "dies within":
        return  # torch's watchdog ends the process: RankError above, in time
    told = file.read_text(encoding="utf-8")
    assert "a rank died, raised an error of its own or did not take part within the process group's timeout" in told
    assert float(told.split(" s:")[0]) < 2 * TIMEOUT


# --- delays -----------------------------------------------------------------------------------------------------------------


@contextmanager
def _delays(rank: int) -> Iterator[None]:
    """Every transfer is issued and waited for after a random time: of the host over gloo, of the stream over NCCL."""
    generator = torch.Generator().manual_seed(17 + rank)
    issue, wait = transfer.issue, transfer.Transfer.wait

    def pause() -> None:
        fraction = float(torch.rand((), generator=generator)) ** 4
        if dist.get_backend() == "nccl":
            torch.cuda._sleep(int(fraction * 2e7))  # cycles: up to about 10 ms
        else:
            time.sleep(fraction * 0.03)

    def late_issue(*arguments: object) -> transfer.Transfer:
        pause()
        return issue(*arguments)

    def late_wait(self: transfer.Transfer) -> list[torch.Tensor]:
        pause()
        return wait(self)

    with mock.patch.object(transfer, "issue", late_issue), mock.patch.object(transfer.Transfer, "wait", late_wait):
        yield


def _in_flight(rank: int, world_size: int, comm: str, delayed: bool, together: bool) -> list[torch.Tensor]:
    """Three layers over each of two packs; ``together`` runs both forwards before both backwards. Outputs and gradients."""
    graphs, answers = [], []

    def backward() -> None:
        for out, leaves, grad in graphs:
            answers.extend([out, *torch.autograd.grad(out, leaves, grad)])
        graphs.clear()

    with _delays(rank) if delayed else mock.patch.dict({}):
        for name in DOCUMENTS:
            problem, layout = _problem(rank, name, replace(CONFIG, compressed_comm=comm))
            leaves = [x.requires_grad_() for x in (problem.q, *problem.k, *problem.v, problem.gates, *problem.k_weights)]
            out = problem.q
            for _ in range(3):
                out = native_sparse_attention(
                    out, problem.k, problem.v, problem.gates, problem.k_weights, problem.v_weights, problem.config,
                    rotary=problem.rotary, layout=layout, group=dist.group.WORLD,
                ).out  # fmt: skip
            graphs.append((out, leaves, problem.grad))
            if not together:
                backward()
        backward()
    return [x.detach().cpu() for x in answers]


def _compare_delays(pool: DistributedPool) -> None:
    for comm in ("all_gather", "ring"):
        expected = pool.run(_in_flight, comm, False, False)
        for delayed in (False, True):
            for answer, wanted in zip(pool.run(_in_flight, comm, delayed, True), expected, strict=True):
                assert len(answer) == len(wanted) == 2 * 11
                assert all(torch.equal(x, y) for x, y in zip(answer, wanted, strict=True)), f"{comm}, delayed {delayed}"


def test_delays_and_two_packs_in_flight_change_nothing(workers) -> None:
    _compare_delays(workers(WORLD))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason=f"needs {WORLD} CUDA devices")
@pytest.mark.parametrize("connections", ["1", "8"])
def test_delays_and_two_packs_in_flight_change_nothing_over_nccl(monkeypatch: pytest.MonkeyPatch, connections: str) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    with DistributedPool(WORLD, backend="nccl") as pool:
        _compare_delays(pool)
