"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from nsa_cp.testing import DistributedPool


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], DistributedPool]]:
    """``workers(world_size)``: gloo processes shared by all tests of the session, started on first use.

    A test calls ``workers(4).run(function, *args)`` with a function ``(rank, world_size, *args)`` at the top level of its
    file and gets the list of the ranks' results. A failed call ends the processes; the next test gets fresh ones.
    """
    pools: dict[int, DistributedPool] = {}

    def pool(world_size: int) -> DistributedPool:
        if world_size not in pools or not pools[world_size].alive:
            pools[world_size] = DistributedPool(world_size)
        return pools[world_size]

    yield pool
    for each in pools.values():
        each.close()
