"""Halo exchange: the rows just before each chunk, fetched from whoever holds them, and their gradients sent back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from nsa_cp.context_parallel.group import group_rank
from nsa_cp.context_parallel.layout import SequenceLayout
from nsa_cp.context_parallel.transfer import PeerExchange


class HaloRows:
    """Which rows to send, to receive, and how own and received rows merge into one ascending buffer.

    Args:
        layout: the cut; every rank derives every other rank's needs from it, so no sizes travel.
        depth: rows needed before each local row, within its document.

    Attributes:
        buffer_rows: ascending int64 global rows of the merged buffer [M].
    """

    def __init__(self, layout: SequenceLayout, depth: int) -> None:
        rank, self.cp_size = layout.cp_rank, layout.cp_size
        needed = layout.halo_rows(rank, depth)
        source = layout.row_owner[needed]
        self.receive_counts = tuple(np.bincount(source, minlength=layout.cp_size).tolist())
        # Received rows arrive grouped by source rank, ascending within each.
        arrival = needed[np.argsort(source, kind="stable")]
        merged = np.concatenate([layout.local_rows, arrival])
        self.order = torch.from_numpy(np.argsort(merged, kind="stable"))
        self.buffer_rows = np.sort(merged)
        self.num_own, self.num_received = len(layout.local_rows), len(arrival)
        self.send: tuple[torch.Tensor, ...] = tuple(
            torch.from_numpy(_rows_sent(layout, depth, destination)) for destination in range(layout.cp_size)
        )

    def to(self, device: torch.device) -> HaloRows:
        """Move the index tensors to ``device`` in place."""
        self.order = self.order.to(device)
        self.send = tuple(index.to(device) for index in self.send)
        return self

    @property
    def is_local(self) -> bool:
        """Nothing is sent or received by this rank."""
        return self.num_received == 0 and all(len(index) == 0 for index in self.send)


def _rows_sent(layout: SequenceLayout, depth: int, destination: int) -> np.ndarray:
    """Local indices of the rows that ``destination`` needs from this rank, ascending."""
    if destination == layout.cp_rank:
        return np.empty(0, dtype=np.int64)
    needed = layout.halo_rows(destination, depth)
    mine = needed[layout.row_owner[needed] == layout.cp_rank]
    return np.searchsorted(layout.local_rows, mine)


class HaloExchange:
    """One exchange for several tensors that may need halos of different depth; one message for each pair of ranks.

    Args:
        halos: for each tensor its :class:`HaloRows`.
        group: context-parallel group, or None for a single process.
    """

    def __init__(self, halos: Sequence[HaloRows], group: dist.ProcessGroup | None) -> None:
        self.halos = tuple(halos)
        self.group = group
        self.rank = group_rank(group)
        self._exchange: PeerExchange | None = None
        self._own: tuple[torch.Tensor, ...] = ()

    def start(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send what other ranks need of ``tensors`` ([T, ...] local rows each) and post the receives."""
        self._own = tuple(tensors)
        if all(halo.is_local for halo in self.halos):
            return
        peers = [peer for peer in range(self.halos[0].cp_size) if peer != self.rank]
        outgoing = {
            peer: [x.index_select(0, halo.send[peer]) for x, halo in zip(tensors, self.halos, strict=True)] for peer in peers
        }
        expected = {
            peer: [(halo.receive_counts[peer], *x.shape[1:]) for x, halo in zip(tensors, self.halos, strict=True)]
            for peer in peers
        }
        self._exchange = PeerExchange(outgoing, expected, tensors[0], self.group)

    def wait(self) -> list[torch.Tensor]:
        """The merged buffers [M, ...], rows ascending in global order."""
        own, self._own = self._own, ()
        if self._exchange is None:
            # Without remote rows the local rows already are the buffer.
            return list(own)
        received = self._exchange.wait()
        self._exchange = None
        return [
            torch.cat([x, *(rows[i] for _, rows in sorted(received.items()))]).index_select(0, halo.order)
            for i, (x, halo) in enumerate(zip(own, self.halos, strict=True))
        ]

    def start_return(self, gradients: Sequence[torch.Tensor]) -> None:
        """Send the halo rows of buffer gradients ([M, ...] each) back to their owners."""
        if all(halo.is_local for halo in self.halos):
            self._own = tuple(gradients)
            return
        own = []
        outgoing: dict[int, list[torch.Tensor]] = defaultdict(list)
        expected: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for gradient, halo in zip(gradients, self.halos, strict=True):
            arrival = torch.empty_like(gradient).index_copy_(0, halo.order, gradient)
            own.append(arrival[: halo.num_own])
            for peer, rows in enumerate(arrival[halo.num_own :].split(halo.receive_counts)):
                if peer != self.rank:
                    outgoing[peer].append(rows)
                    expected[peer].append((len(halo.send[peer]), *gradient.shape[1:]))
        self._own = tuple(own)
        self._exchange = PeerExchange(outgoing, expected, gradients[0], self.group)

    def wait_return(self) -> list[torch.Tensor]:
        """Gradients of the local rows [T, ...], what other ranks computed added in rank order."""
        own, self._own = self._own, ()
        if self._exchange is None:
            return list(own)
        received = self._exchange.wait()
        self._exchange = None
        for peer, tensors in sorted(received.items()):
            for gradient, halo, rows in zip(own, self.halos, tensors, strict=True):
                if len(rows):
                    gradient[halo.send[peer]] += rows
        return list(own)
