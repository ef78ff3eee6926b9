"""All-gather of rows into global order, its mirror image the reduce-scatter, and a ring that delivers one shard at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from nsa_cp.context_parallel import transfer
from nsa_cp.context_parallel.autograd import makes_kept_tensors
from nsa_cp.context_parallel.group import group_rank, group_size
from nsa_cp.context_parallel.runs import find_runs, join_runs, slices_from
from nsa_cp.context_parallel.transfer import PeerExchange, Transfer, unpack


class RowPartition:
    """Which rank owns each of M rows. Every rank keeps its rows in ascending order; ranks may own different numbers of them.

    Args:
        owner: rank of each row, int [M].
        cp_size: number of ranks.

    Attributes:
        counts: number of rows of each rank.
        padded: the largest count; collectives move this many rows from every rank.
        rows: for each rank its rows, ascending int64.
        runs: all rows in global order as runs ``(rank, first row on it, number of rows)``; None if there are many (``runs.py``).
        slot: instead of many runs, the place of each row in the shards of all ranks laid end to end, int64 [M]; else None.
    """

    @makes_kept_tensors
    def __init__(self, owner: np.ndarray, cp_size: int) -> None:
        self.num_rows = len(owner)
        self.cp_size = cp_size
        self.rows = tuple(np.flatnonzero(owner == rank) for rank in range(cp_size))
        self.counts = tuple(len(rows) for rows in self.rows)
        self.padded = max(self.counts, default=0)
        # Row m is at slot[m] of the buffer that collectives fill: every rank's padded shard, in rank order.
        slot = np.empty(self.num_rows, dtype=np.int64)
        for rank, rows in enumerate(self.rows):
            slot[rows] = rank * self.padded + np.arange(len(rows))
        self.runs = find_runs(owner, slot - owner.astype(np.int64) * self.padded)
        # Kept only where there are no runs to copy by: it takes eight bytes a row.
        self.slot = torch.from_numpy(slot) if self.runs is None else None
        self._slices = None if self.runs is None else [slices_from(self.runs, rank) for rank in range(cp_size)]

    @makes_kept_tensors
    def to(self, device: torch.device) -> RowPartition:
        """Move the index tensor to ``device`` in place."""
        self.slot = None if self.slot is None else self.slot.to(device)
        return self

    def in_global_order(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor [M, ...] from the padded shards [padded, ...] of all ranks, in rank order."""
        if self.runs is None:
            return torch.cat(list(shards)).index_select(0, self.slot)
        return join_runs(shards, self.runs)

    def in_rank_order(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The flat message of a reduce-scatter: for every rank its rows of each tensor [M, ...], padded with zeros."""
        if self.runs is None:
            padded = [
                x.new_zeros(self.cp_size * self.padded, *x.shape[1:]).index_copy_(0, self.slot, x).view(self.cp_size, -1)
                for x in tensors
            ]
            return torch.cat(padded, dim=1).flatten()
        pieces = []
        for slices, held in zip(self._slices, self.counts, strict=True):
            for x in tensors:
                pieces += [x[rows].reshape(-1) for rows in slices]
                if held < self.padded:
                    pieces.append(x.new_zeros((self.padded - held) * x.shape[1:].numel()))
        return torch.cat(pieces) if pieces else tensors[0].new_empty(0)


class RowGather:
    """An all-gather in flight from construction on: local rows of several tensors in, whole tensors in global row order out.

    Args:
        tensors: [rows of this rank, ...] each, all of one dtype.
        partition: which rank holds which rows.
        group: context-parallel group, or None for a single process.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], partition: RowPartition, group: dist.ProcessGroup | None) -> None:
        self.partition = partition
        self.tensors: Sequence[torch.Tensor] = tensors
        self._transfer: Transfer | None = None
        if group_size(group) == 1:
            return
        self.tensors = ()
        self.shapes = [(partition.padded, *x.shape[1:]) for x in tensors]
        message = tensors[0].new_empty(sum(map(math.prod, self.shapes)))
        for place, x in zip(unpack(message, self.shapes), tensors, strict=True):
            place[: len(x)] = x
        self._transfer = transfer.all_gather(message, group)

    def wait(self) -> list[torch.Tensor]:
        """Whole tensors [M, ...] in global row order."""
        if self._transfer is None:
            return list(self.tensors)
        (buffer,) = self._transfer.wait()
        self._transfer = None
        by_rank = [unpack(shard, self.shapes) for shard in buffer.view(self.partition.cp_size, -1)]
        return [self.partition.in_global_order(shards) for shards in zip(*by_rank, strict=True)]


class RowReduceScatter:
    """A reduce-scatter in flight, mirror of :class:`RowGather`: whole gradients in, this rank's rows summed over ranks out.

    Args:
        tensors: [M, ...] each, in global row order, all of one dtype: float32 or float64, so that the sum keeps its precision.
        partition: which rank holds which rows.
        group: context-parallel group, or None for a single process.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], partition: RowPartition, group: dist.ProcessGroup | None) -> None:
        self.tensors: Sequence[torch.Tensor] = tensors
        self._transfer: Transfer | None = None
        if group_size(group) == 1:
            return
        self.tensors = ()  # the message holds a copy
        self.count = partition.counts[group_rank(group)]
        self.shapes = [(partition.padded, *x.shape[1:]) for x in tensors]
        self._transfer = transfer.reduce_scatter(partition.in_rank_order(tensors), group)

    def wait(self) -> list[torch.Tensor]:
        """Summed gradients of this rank's rows, [rows of this rank, ...] each. May be called again, for the same tensors."""
        if self._transfer is None:
            return list(self.tensors)
        (result,) = self._transfer.wait()
        self._transfer = None
        self.tensors = [x[: self.count] for x in unpack(result, self.shapes)]
        return list(self.tensors)


class RowRing:
    """The shards of all ranks one after the other: each is passed on to the next rank while the caller computes on it.

    Args:
        tensors: this rank's shard, [rows of this rank, ...] each, all of one dtype.
        partition: which rank holds which rows.
        group: context-parallel group, or None for a single process.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], partition: RowPartition, group: dist.ProcessGroup | None) -> None:
        self.tensors = list(tensors)
        self.partition = partition
        self.group = group
        self.rank, self.cp_size = group_rank(group), group_size(group)
        self._pending: PeerExchange | None = None
        if self.cp_size > 1:
            self._pending = self._pass_on(self.tensors, self.rank)

    def _pass_on(self, shard: Sequence[torch.Tensor], source: int) -> PeerExchange:
        """Send the shard of rank ``source`` to the next rank; post the receive of that of ``source - 1`` from the rank before."""
        following, before = (self.rank + 1) % self.cp_size, (self.rank - 1) % self.cp_size
        count = self.partition.counts[(source - 1) % self.cp_size]
        expected = [(count, *x.shape[1:]) for x in self.tensors]
        return PeerExchange({following: shard}, {before: expected}, self.tensors[0], self.group)

    def __iter__(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Yield ``(rank, its shard)``: this rank's own first, then those of the ranks before it, nearest first. Iterate once."""
        shard = self.tensors
        yield self.rank, shard
        for step in range(1, self.cp_size):
            source = (self.rank - step) % self.cp_size
            shard = self._pending.wait()[(self.rank - 1) % self.cp_size]
            self._pending = self._pass_on(shard, source) if step + 1 < self.cp_size else None
            yield source, shard
