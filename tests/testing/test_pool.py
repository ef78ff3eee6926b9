"""The multi-process test base itself: results, clear failures, and nothing that outlives a failure."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from nsa_cp.testing import DistributedPool, RankError, run_distributed

pytestmark = pytest.mark.distributed


@dataclass
class Case:
    """An argument whose class lives in a test module."""

    factor: float


class StubbornError(ValueError):
    """An exception that pickle cannot rebuild."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"stubborn {first} {second}")


def weighted_sum(rank, world_size, case, *, offset=0.0):
    value = torch.full((3,), case.factor * (rank + 1), dtype=torch.float64)
    dist.all_reduce(value)
    return rank, value + offset, Case(rank)


def leave_state(rank, world_size):
    torch.manual_seed(rank + 17)
    torch.set_default_dtype(torch.float64)
    dist.new_group(list(range(world_size)))
    return len(dist.distributed_c10d._world.pg_map)


def observe_state(rank, world_size):
    groups = len(dist.distributed_c10d._world.pg_map)
    return groups, torch.get_default_dtype(), torch.rand(2), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def leave_without_group(rank, world_size):
    dist.destroy_process_group()


def join_as_torchrun_would(rank, world_size):
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method="env://")
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def one_rank_raises(rank, world_size):
    if rank == 1:
        raise ValueError("length 65600 is not a multiple of 1024")
    dist.barrier()


def one_rank_is_stubborn(rank, world_size):
    if rank == 0:
        raise StubbornError(1, 2)


def skip_too_late(rank, world_size):
    pytest.skip("too late")


def one_rank_dies(rank, world_size):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def one_rank_hangs(rank, world_size):
    if rank == 0:
        time.sleep(1000)


def process_id(rank, world_size):
    return os.getpid()


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # a killed orphan stays a zombie where nobody reaps
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def assert_ends(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if running(pid)]}"
        time.sleep(0.05)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_back_rank_by_rank(workers, world_size):
    results = workers(world_size).run(weighted_sum, Case(2.0), offset=0.5)
    expected = 2.0 * world_size * (world_size + 1) / 2 + 0.5
    assert [rank for rank, _, _ in results] == list(range(world_size))
    for rank, value, case in results:
        torch.testing.assert_close(value, torch.full((3,), expected, dtype=torch.float64), rtol=0, atol=0)
        assert case == Case(rank)


def test_the_pool_is_reused_and_every_call_starts_afresh(workers):
    pool = workers(2)
    before = pool.run(process_id)
    assert pool.run(leave_state) == [2, 2]
    observed = pool.run(observe_state)
    assert workers(2).run(process_id) == before
    for groups, dtype, numbers, threads, omp in observed:
        assert (groups, dtype, threads, omp) == (1, torch.float32, 1, "1")
        torch.testing.assert_close(numbers, torch.rand(2, generator=torch.Generator().manual_seed(0)), rtol=0, atol=0)


def test_a_call_may_destroy_the_default_group_or_join_another(workers):
    workers(2).run(leave_without_group)
    assert [value.tolist() for _, value, _ in workers(2).run(weighted_sum, Case(1.0))] == [[3.0] * 3] * 2
    assert workers(2).run(join_as_torchrun_would) == [(0, 1.0), (1, 1.0)]


def test_a_raising_rank_ends_the_call_with_its_own_error_and_traceback():
    pool = DistributedPool(3)
    pids = pool.run(process_id)
    start = time.monotonic()
    with pytest.raises(ValueError, match="65600 is not a multiple") as info:
        pool.run(one_rank_raises)
    assert time.monotonic() - start < 10
    cause = info.value.__cause__
    assert isinstance(cause, RankError)
    assert "one_rank_raises: rank 1 of 3 failed" in str(cause) and "in one_rank_raises\n" in str(cause)
    assert "killed without an answer: [0, 2]" in str(cause)
    assert not pool.alive
    assert_ends(pids)
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(process_id)


def test_an_exception_that_does_not_pickle_arrives_as_text():
    with pytest.raises(RankError, match="rank 0 of 2 failed(.|\n)*StubbornError: stubborn 1 2"):
        run_distributed(one_rank_is_stubborn, 2)


def test_a_skip_inside_a_rank_is_no_silent_success():
    with pytest.raises(RankError, match="Skipped: too late"):
        run_distributed(skip_too_late, 1)


def test_a_dying_rank_is_reported_with_its_status():
    with pytest.raises(RankError, match="rank 1 of 2 failed(.|\n)*exit status 7"):
        run_distributed(one_rank_dies, 2)


def test_a_hanging_rank_is_killed_at_the_timeout_and_shown():
    pool = DistributedPool(2)
    pids = pool.run(process_id)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer from ranks \[0\] of 2 after 1 s(.|\n)*in one_rank_hangs"):
        pool.run(one_rank_hangs, timeout=1)
    assert time.monotonic() - start < 10
    assert_ends(pids)


def test_dropping_a_pool_ends_its_processes():
    pool = DistributedPool(2)
    pids = pool.run(process_id)
    del pool
    assert_ends(pids)


def test_what_cannot_be_sent_is_refused():
    with DistributedPool(1) as pool, pytest.raises(ValueError, match="top level of a file"):
        pool.run(lambda rank, world_size: None)
    with pytest.raises(ValueError, match="world_size is 0"):
        DistributedPool(0)
