"""All-gather of rows into global order, its mirror the float32 reduce-scatter, and the ring that does it piecewise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from nsa_cp.context_parallel.group import group_rank, group_size
from nsa_cp.context_parallel.transfer import PeerExchange, all_gather, as_bytes, pack, reduce_scatter, unpack


class RowPartition:
    """Rows 0..M dealt to ranks, ascending on each; sizes may differ.

    Args:
        owner: rank of each row, int [M].
        cp_size: number of ranks.

    Attributes:
        counts: rows of each rank.
        rows: for each rank its ascending int64 rows.
    """

    def __init__(self, owner: np.ndarray, cp_size: int) -> None:
        self.num_rows = len(owner)
        self.cp_size = cp_size
        self.rows = tuple(np.flatnonzero(owner == rank) for rank in range(cp_size))
        self.counts = tuple(len(rows) for rows in self.rows)
        self.padded = max(self.counts, default=0)
        # Row m stands at slot[m] of the rank-major padded buffer that collectives fill.
        slot = np.empty(self.num_rows, dtype=np.int64)
        for rank, rows in enumerate(self.rows):
            slot[rows] = rank * self.padded + np.arange(len(rows))
        self.slot = torch.from_numpy(slot)

    def to(self, device: torch.device) -> RowPartition:
        """Move the index tensor to ``device`` in place."""
        self.slot = self.slot.to(device)
        return self


class RowGather:
    """An all-gather in flight: local rows of several tensors in, whole tensors in global row order out.

    Args:
        tensors: [count of this rank, ...] each, one dtype.
        partition: who holds which rows.
        group: context-parallel group, or None for a single process.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], partition: RowPartition, group: dist.ProcessGroup | None) -> None:
        self.partition = partition
        self.tensors: Sequence[torch.Tensor] = tensors
        self.work: dist.Work | None = None
        if group_size(group) == 1:
            return
        self.tensors = ()
        self.shapes = [x.shape[1:] for x in tensors]
        self.message = pack([_pad_rows(x, partition.padded) for x in tensors])
        self.buffer = self.message.new_empty(partition.cp_size * self.message.numel())
        self.work = all_gather(as_bytes(self.buffer), as_bytes(self.message), group=group, async_op=True)

    def wait(self) -> list[torch.Tensor]:
        """Whole tensors [M, ...] in global row order."""
        if self.work is None:
            return list(self.tensors)
        self.work.wait()
        shards = self.buffer.view(self.partition.cp_size, -1)
        pieces, offset = [], 0
        for shape in self.shapes:
            width = self.partition.padded * shape.numel()
            piece = shards[:, offset : offset + width].reshape(-1, *shape)
            pieces.append(piece.index_select(0, self.partition.slot))
            offset += width
        del self.message, self.buffer
        return pieces


class RowReduceScatter:
    """A reduce-scatter in flight, mirror of :class:`RowGather`: whole gradients in, this rank's rows summed over ranks out.

    Args:
        tensors: [M, ...] each, in global row order, one dtype; float32 (or float64) so that the sum keeps its precision.
        partition: who holds which rows.
        group: context-parallel group, or None for a single process.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], partition: RowPartition, group: dist.ProcessGroup | None) -> None:
        self.partition = partition
        self.tensors: Sequence[torch.Tensor] = tensors
        self.work: dist.Work | None = None
        if group_size(group) == 1:
            return
        self.tensors = ()  # the message holds a copy
        cp_size, padded = partition.cp_size, partition.padded
        self.count = partition.counts[group_rank(group)]
        self.shapes = [(padded, *x.shape[1:]) for x in tensors]
        shards = [
            x.new_zeros(cp_size * padded, *x.shape[1:]).index_copy_(0, partition.slot, x).view(cp_size, -1) for x in tensors
        ]
        self.message = torch.cat(shards, dim=1).flatten()
        self.result = self.message.new_empty(self.message.numel() // cp_size)
        self.work = reduce_scatter(self.result, self.message, group=group, async_op=True)

    def wait(self) -> list[torch.Tensor]:
        """Summed gradients of this rank's rows, [count, ...] each."""
        if self.work is None:
            return list(self.tensors)
        self.work.wait()
        del self.message
        return [x[: self.count] for x in unpack(self.result, self.shapes)]


class RowRing:
    """Shards of all ranks, one after the other, each sent on while the caller computes on it.

    Args:
        tensors: this rank's shard, [count of this rank, ...] each, one dtype.
        partition: who holds which rows.
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
        """Send the shard of rank ``source`` to the next rank and post the receive of the one behind it."""
        following, before = (self.rank + 1) % self.cp_size, (self.rank - 1) % self.cp_size
        count = self.partition.counts[(source - 1) % self.cp_size]
        expected = [(count, *x.shape[1:]) for x in self.tensors]
        return PeerExchange({following: shard}, {before: expected}, self.tensors[0], self.group)

    def __iter__(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Yield ``(source rank, its shard)``, the own shard first, then those of the ranks before, nearest first."""
        shard = self.tensors
        yield self.rank, shard
        for step in range(1, self.cp_size):
            source = (self.rank - step) % self.cp_size
            shard = self._pending.wait()[(self.rank - 1) % self.cp_size]
            self._pending = self._pass_on(shard, source) if step + 1 < self.cp_size else None
            yield source, shard


def _pad_rows(x: torch.Tensor, count: int) -> torch.Tensor:
    if x.shape[0] == count:
        return x
    return torch.cat([x, x.new_zeros(count - x.shape[0], *x.shape[1:])])
