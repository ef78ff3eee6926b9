"""Halo exchange: fetches the rows just before each chunk from the ranks that hold them, and sends their gradients back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from nsa_cp.context_parallel.autograd import makes_kept_tensors
from nsa_cp.context_parallel.layout import SequenceLayout
from nsa_cp.context_parallel.runs import find_runs, join_runs, slices_from
from nsa_cp.context_parallel.transfer import PeerExchange


class HaloRows:
    """Which rows to send and to receive, and how own and received rows merge into one ascending buffer.

    Args:
        layout: which rank holds which rows; each rank derives the others' needs from it, so no sizes travel.
        depth: number of rows needed before each local row, within its document.

    Attributes:
        buffer_rows: global rows of the merged buffer, ascending int64 [M].
        arrival: global rows received, int64: grouped by the rank they come from, ascending within each group.
        receive_counts: number of rows received from each rank.
        num_own, num_received: rows of each kind in the buffer; they add up to M.
        runs: the buffer as runs of own (source 0) and received (source 1) rows; None if there are many (see ``runs.py``).
        order: instead of many runs, for each buffer row its index in (own rows, then received rows), int64 [M]; else None.
        send: for each rank the local rows it needs from here, int64.
    """

    @makes_kept_tensors
    def __init__(self, layout: SequenceLayout, depth: int) -> None:
        rank, self.cp_size, self.depth = layout.cp_rank, layout.cp_size, depth
        needed = layout.halo_rows(rank, depth)
        source = layout.row_owner[needed]
        self.receive_counts = tuple(np.bincount(source, minlength=layout.cp_size).tolist())
        self.arrival = needed[np.argsort(source, kind="stable")]
        merged = np.concatenate([layout.local_rows, self.arrival])
        order = np.argsort(merged, kind="stable")
        self.buffer_rows = np.sort(merged)
        self.num_own, self.num_received = len(layout.local_rows), len(self.arrival)
        self.runs = find_runs(order >= self.num_own, np.where(order >= self.num_own, order - self.num_own, order))
        self.order = torch.from_numpy(order) if self.runs is None else None
        self._slices = None if self.runs is None else [slices_from(self.runs, source) for source in (0, 1)]
        self.send: tuple[torch.Tensor, ...] = tuple(
            torch.from_numpy(_rows_sent(layout, depth, destination)) for destination in range(layout.cp_size)
        )
        self._within: dict[int, torch.Tensor] = {}

    @makes_kept_tensors
    def to(self, device: torch.device) -> HaloRows:
        """Move the index tensors to ``device`` in place."""
        self.order = None if self.order is None else self.order.to(device)
        self.send = tuple(index.to(device) for index in self.send)
        return self

    @property
    def is_local(self) -> bool:
        """Whether this rank neither sends nor receives anything."""
        return self.num_received == 0 and all(len(index) == 0 for index in self.send)

    @makes_kept_tensors
    def within(self, deeper: HaloRows) -> torch.Tensor:
        """Indices of this halo's received rows among those of a deeper halo of the same layout, int64."""
        if deeper.depth not in self._within:
            order = np.argsort(deeper.arrival, kind="stable")
            place = order[np.searchsorted(deeper.arrival[order], self.arrival)]
            self._within[deeper.depth] = torch.from_numpy(place).to(self.send[0].device)
        return self._within[deeper.depth]

    def merge(self, own: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        """The buffer [M, ...] from own rows and received rows (in the order of ``arrival``)."""
        if self.runs is None:
            return torch.cat([own, received]).index_select(0, self.order)
        return join_runs([own, received], self.runs)

    def separate(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of own and received rows of a buffer [M, ...]; the inverse of :meth:`merge`."""
        if self.runs is None:
            rows = torch.empty_like(buffer).index_copy_(0, self.order, buffer)
            return rows[: self.num_own], rows[self.num_own :]
        own, received = (torch.cat([buffer[:0], *(buffer[rows] for rows in slices)]) for slices in self._slices)
        return own, received


def _rows_sent(layout: SequenceLayout, depth: int, destination: int) -> np.ndarray:
    """Local indices of the rows that ``destination`` needs from this rank, ascending."""
    if destination == layout.cp_rank:
        return np.empty(0, dtype=np.int64)
    needed = layout.halo_rows(destination, depth)
    mine = needed[layout.row_owner[needed] == layout.cp_rank]
    return np.searchsorted(layout.local_rows, mine)


class HaloExchange:
    """One exchange for several tensors, whose halos may differ in depth: one message for each pair of ranks.

    Forward: :meth:`start`, then :meth:`wait`. Backward: :meth:`start_return`, then :meth:`wait_return`.

    Args:
        halos: the :class:`HaloRows` of each tensor, all of one layout.
        group: context-parallel group, or None for a single process.
        same_as: for each tensor the index of the first one that is the same tensor (its own index if there is none). Such
            tensors travel once, with the deepest of their halos, and so does the sum of their gradients. None: all differ.

    Attributes:
        carrier: for each tensor the index of the one that travels for it.
        carried: indices of the tensors that travel.
        received: after :meth:`wait`, the rows of other ranks, one tensor for each of ``carried``; empty if all rows are local.
            Keep them to rebuild the buffers later without a second exchange, see :meth:`merge`.
    """

    def __init__(self, halos: Sequence[HaloRows], group: dist.ProcessGroup | None, same_as: Sequence[int] | None = None) -> None:
        self.halos = tuple(halos)
        self.group = group
        first = tuple(range(len(self.halos))) if same_as is None else tuple(same_as)
        # Of equal tensors, the one with the deepest halo travels.
        self.carrier = tuple(
            max((j for j, other in enumerate(first) if other == source), key=lambda j: self.halos[j].depth) for source in first
        )
        self.carried = sorted(set(self.carrier))
        # Only ranks that rows go to or come from, so that the host's work does not grow with the group.
        travelling = [self.halos[i] for i in self.carried]
        self._destinations = [r for r in range(self.halos[0].cp_size) if any(len(halo.send[r]) for halo in travelling)]
        self._sources = [r for r in range(self.halos[0].cp_size) if any(halo.receive_counts[r] for halo in travelling)]
        self._exchange: PeerExchange | None = None
        self._own: tuple[torch.Tensor, ...] = ()
        self.received: tuple[torch.Tensor, ...] = ()

    @property
    def _is_local(self) -> bool:
        return all(halo.is_local for halo in self.halos)

    def start(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send what other ranks need of ``tensors`` (local rows, [T, ...] each) and post the receives."""
        self._own = tuple(tensors)
        if self._is_local:
            return
        pairs = [(tensors[i], self.halos[i]) for i in self.carried]
        outgoing = {peer: [x.index_select(0, halo.send[peer]) for x, halo in pairs] for peer in self._destinations}
        expected = {peer: [(halo.receive_counts[peer], *x.shape[1:]) for x, halo in pairs] for peer in self._sources}
        self._exchange = PeerExchange(outgoing, expected, tensors[0], self.group)

    def wait(self) -> list[torch.Tensor]:
        """The merged buffers [M, ...], rows ascending in global order."""
        own, self._own = self._own, ()
        if self._exchange is not None:
            messages = self._exchange.wait()
            self._exchange = None
            self.received = tuple(
                torch.cat([own[i][:0], *(messages[peer][place] for peer in self._sources)])
                for place, i in enumerate(self.carried)
            )
        return self.merge(own, self.received)

    def merge(self, tensors: Sequence[torch.Tensor], received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The buffers that :meth:`wait` returned, from local rows [T, ...] and the ``received`` kept of that exchange."""
        assert received or self._is_local
        if not received:
            # Without rows of other ranks the local rows are the buffer.
            return list(tensors)
        arrived = dict(zip(self.carried, received, strict=True))
        buffers = []
        for i, (x, halo, carrier) in enumerate(zip(tensors, self.halos, self.carrier, strict=True)):
            rows = arrived[carrier]
            buffers.append(halo.merge(x, rows if carrier == i else rows.index_select(0, halo.within(self.halos[carrier]))))
        return buffers

    def start_return(self, gradients: Sequence[torch.Tensor]) -> None:
        """Send the halo rows of buffer gradients ([M, ...] each) back to their owners."""
        if self._is_local:
            self._own = tuple(gradients)
            return
        parts = [halo.separate(gradient) for gradient, halo in zip(gradients, self.halos, strict=True)]
        self._own = tuple(own for own, _ in parts)
        for i, carrier in enumerate(self.carrier):
            if i != carrier:
                parts[carrier][1][self.halos[i].within(self.halos[carrier])] += parts[i][1]
        rows = [parts[i][1].split(self.halos[i].receive_counts) for i in self.carried]
        outgoing = {peer: [by_rank[peer] for by_rank in rows] for peer in self._sources}
        expected = {
            peer: [(len(self.halos[i].send[peer]), *gradients[i].shape[1:]) for i in self.carried] for peer in self._destinations
        }
        self._exchange = PeerExchange(outgoing, expected, gradients[0], self.group)

    def wait_return(self) -> list[torch.Tensor]:
        """Gradients of the local rows [T, ...], with what other ranks computed for them added in rank order.

        Of tensors that are the same (``same_as``), the one that travelled gets all of what came from other ranks; the gradient is
        the sum over these tensors.
        """
        own, self._own = self._own, ()
        if self._exchange is None:
            return list(own)
        messages = self._exchange.wait()
        self._exchange = None
        for peer in self._destinations:
            for i, rows in zip(self.carried, messages[peer], strict=True):
                if len(rows):
                    own[i][self.halos[i].send[peer]] += rows
        return list(own)
