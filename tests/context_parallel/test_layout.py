"""SequenceLayout, halo, gather and ring move every row where it belongs: rows carry their global index."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_cp.context_parallel import (
    HaloExchange,
    HaloRows,
    RowGather,
    RowPartition,
    RowReduceScatter,
    RowRing,
    SequenceLayout,
    count_traffic,
    runs,
    start_agreement,
)

PACKS = [(0, 64), (0, 61), (0, 3), (0, 0, 1, 1, 18, 50, 53, 53, 90), (0, 7, 7, 40)]


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("per_document", [True, False])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    cp_size=st.integers(1, 8),
)
@settings(max_examples=40, deadline=None)
def test_every_row_is_held_once_and_round_trips(kind: str, per_document: bool, lengths: list[int], cp_size: int) -> None:
    borders = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    layouts = [
        SequenceLayout.build(borders, cp_size=cp_size, cp_rank=r, kind=kind, per_document=per_document) for r in range(cp_size)
    ]
    rows = torch.arange(borders[-1])
    shards = [layout.shard(rows) for layout in layouts]
    for rank, layout in enumerate(layouts):
        assert np.array_equal(layout.local_rows, shards[rank].numpy()) and np.all(np.diff(layout.local_rows) > 0)
        assert layout.num_local_tokens == len(shards[rank])
        starts = np.asarray(borders)[layout.local_documents]
        assert np.array_equal(layout.local_positions + starts, layout.local_rows)
        ends = np.asarray(borders)[layout.local_documents + 1]
        assert np.all((starts <= layout.local_rows) & (layout.local_rows < ends))
    assert torch.equal(layouts[0].unshard(shards), rows)


def test_zigzag_is_megatrons_cut() -> None:
    layout = SequenceLayout.build([0, 16, 32], cp_size=2, cp_rank=1)
    assert layout.local_rows.tolist() == [*range(4, 12), *range(20, 28)]
    assert layout.local_positions.tolist() == [*range(4, 12)] * 2


def test_equal_layouts_have_equal_hashes_everywhere() -> None:
    """Plans are found by them, and layouts travel to other processes."""
    layout = SequenceLayout.build([0, 16, 32], cp_size=2, cp_rank=1)
    code = "import sys, pickle; print(hash(pickle.load(sys.stdin.buffer)))"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(layout), capture_output=True, check=True)
    assert hash(SequenceLayout.build([0, 16, 32], cp_size=2, cp_rank=1)) == hash(layout) == int(done.stdout)
    assert hash(SequenceLayout.build([0, 16, 32], cp_size=2)) != hash(layout)


def test_halo_rows_by_brute_force() -> None:
    for borders in PACKS:
        for kind, per_document in itertools.product(("zigzag", "contiguous"), (True, False)):
            for depth in (0, 1, 5, 30):
                layout = SequenceLayout.build(borders, cp_size=3, kind=kind, per_document=per_document)
                for rank in range(3):
                    own = set(layout.rows_of(rank).tolist())
                    documents = [range(a, b) for a, b in zip(borders[:-1], borders[1:], strict=True)]
                    needed = {
                        row - back
                        for document in documents
                        for row in document
                        for back in range(depth + 1)
                        if row in own and row - back in document
                    }
                    assert layout.halo_rows(rank, depth).tolist() == sorted(needed - own)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": [0, 4, 2]}, "descends from 4 to 2"),
        ({"cu_seqlens": [1, 4]}, "start at 0"),
        ({"cu_seqlens": 8, "cp_size": 2, "cp_rank": 2}, "cp_rank = 2 lies outside cp_size = 2"),
        ({"cu_seqlens": 8, "kind": "spiral"}, "'spiral' is unknown"),
        ({"cu_seqlens": [0, 2.7, 8]}, "not whole numbers"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "not whole numbers"),
        ({"cu_seqlens": 8.0}, "not whole numbers"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceLayout.build(**arguments)


def test_chunks_that_miss_or_repeat_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="between 4 and 5"):
        SequenceLayout.from_chunks([0, 8], [[(0, 4)], [(5, 8)]])
    with pytest.raises(ValueError, match="cover 6 rows of 8"):
        SequenceLayout.from_chunks([0, 8], [[(0, 4)], [(4, 6)]])
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"cp_rank = {rank} lies outside cp_size = 2"):
            SequenceLayout.from_chunks([0, 8], [[(0, 4)], [(4, 8)]], cp_rank=rank)


@pytest.mark.parametrize("length", [8, np.int64(8), torch.tensor(8), (0, np.int32(8)), torch.tensor([0, 8])])
def test_borders_are_integers_of_any_kind(length: object) -> None:
    assert SequenceLayout.build(length) == SequenceLayout.build(8)


def _exchange_rows(rank: int, world_size: int, kind: str) -> None:
    """By concatenation of runs, and by indices."""
    for limit in (runs.MAX_RUNS, 0):
        with mock.patch.object(runs, "MAX_RUNS", limit):
            _check_exchanges(rank, world_size, kind)


def _check_exchanges(rank: int, world_size: int, kind: str) -> None:
    group = dist.group.WORLD
    for borders in PACKS:
        layout = SequenceLayout.build(borders, cp_size=world_size, cp_rank=rank, kind=kind, per_document=borders != PACKS[-1])
        own = torch.from_numpy(layout.local_rows).double()
        tensors = [own[:, None], torch.stack([own, -own], 1)]
        for depths, same_as in [((5, 1), None), ((0, 50), None), ((3, 9), (0, 0)), ((7, 2), (0, 0))]:
            halos = [HaloRows(layout, depth) for depth in depths]
            exchange = HaloExchange(halos, group, same_as)
            local = tensors if same_as is None else [tensors[1], tensors[1]]
            exchange.start(local)
            buffers = exchange.wait()
            with count_traffic() as nothing:
                again = HaloExchange(halos, group, same_as).merge(local, exchange.received)
            assert nothing.sent == 0 and all(torch.equal(x, y) for x, y in zip(again, buffers, strict=True))
            for buffer, halo in zip(buffers, halos, strict=True):
                assert buffer[:, 0].tolist() == halo.buffer_rows.tolist()
            # Every rank returns 1 for each row of its buffer: a row gets as many as there are buffers that hold it.
            exchange.start_return([torch.ones_like(buffer) for buffer in buffers])
            expected = []
            for depth in depths:
                holders = [np.union1d(layout.rows_of(r), layout.halo_rows(r, depth)) for r in range(world_size)]
                expected.append(torch.tensor([float(sum(row in h for h in holders)) for row in layout.local_rows]).double())
            gradients = [gradient[:, 0] for gradient in exchange.wait_return()]
            if same_as is not None:
                # Of a tensor that travelled once the sum over its places is right.
                gradients, expected = [sum(gradients)], [sum(expected)]
            assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))
        partition = RowPartition(layout.row_owner, world_size)
        whole, pair = RowGather(tensors, partition, group).wait()
        assert whole[:, 0].tolist() == list(range(borders[-1])) and torch.equal(pair[:, 1], -whole[:, 0])
        summed = RowReduceScatter([whole * (rank + 1), pair], partition, group).wait()
        factor = world_size * (world_size + 1) / 2
        assert torch.equal(summed[0], tensors[0] * factor) and torch.equal(summed[1], tensors[1] * world_size)
        seen = {source: shard[0][:, 0].tolist() for source, shard in RowRing(tensors, partition, group)}
        assert seen == {r: layout.rows_of(r).tolist() for r in range(world_size)}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_rows_travel_where_they_belong(workers, world_size: int, kind: str) -> None:
    workers(world_size).run(_exchange_rows, kind)


def _disagree(rank: int, world_size: int) -> str:
    try:
        start_agreement({}, SequenceLayout.build(9), ("same" if rank != 1 else "other",), dist.group.WORLD, torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return "agreed"


@pytest.mark.distributed
def test_a_rank_that_differs_is_named_on_every_rank(workers) -> None:
    for rank, message in enumerate(workers(3).run(_disagree)):
        assert "ranks [1] differ from rank 0" in message and f"Rank {rank} has" in message
