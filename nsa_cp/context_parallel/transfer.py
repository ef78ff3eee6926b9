"""Asynchronous collectives and point-to-point messages: every byte between context-parallel ranks is issued and counted here.

The one exception is the comparison of calls between hosts, in ``agreement.py``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from nsa_cp.context_parallel.traffic import record

# torch 2.13 renamed these two; the older names still work there but warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One flat tensor of ``tensors`` (of one dtype), one after the other."""
    return torch.cat([x.reshape(-1) for x in tensors])


def unpack(message: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Views of ``message`` with the given shapes; the inverse of :func:`pack`."""
    pieces = message.split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8: data that is only moved, not summed, can so travel on every backend, bfloat16 included."""
    return x.view(torch.uint8)


class Transfer:
    """Messages in flight.

    Args:
        received: buffers being filled.
        sent: buffers being read; kept alive until :meth:`wait`, because the transport reads them after the call returns.
        works: torch's handles to wait for.
    """

    def __init__(
        self, received: Sequence[torch.Tensor], sent: Sequence[torch.Tensor] = (), works: Sequence[dist.Work] = ()
    ) -> None:
        self._received, self._sent, self._works = list(received), sent, works

    def wait(self) -> list[torch.Tensor]:
        """The received buffers, filled (on CUDA: as seen by work queued on the current stream from now on).

        Raises:
            RuntimeError: a rank died or gave up, noticed at once or at the process group's timeout. (With NCCL torch's watchdog
                ends the process instead.)
        """
        with _lost_ranks_named():
            for work in self._works:
                work.wait()
        self._sent, self._works = (), ()
        return self._received


def lost_rank(error: RuntimeError) -> str:
    """A sentence on what a transport's error means and what to do about it."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"a rank died, raised an error of its own or did not take part within the process group's timeout; look for the "
        f"first error in the logs of the other ranks ({reason})"
    )


@contextlib.contextmanager
def _lost_ranks_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"a transfer between context-parallel ranks failed: {lost_rank(error)}") from error


def issue(
    pattern: str,
    sent: Sequence[torch.Tensor],
    received: Sequence[torch.Tensor],
    volume: tuple[int, int],
    launch: Callable[[], Sequence[dist.Work]],
) -> Transfer:
    """Start and count a transfer; all transfers pass through here.

    Args:
        pattern: ``all_gather``, ``reduce_scatter`` or ``exchange``.
        sent, received: the buffers, see :class:`Transfer`.
        volume: bytes that leave this rank, and bytes that reach it.
        launch: makes the torch.distributed calls that fill ``received`` from ``sent``, and returns their handles.
    """
    record(pattern, *volume)
    with _lost_ranks_named():
        return Transfer(received, sent, launch())


def all_gather(message: torch.Tensor, group: dist.ProcessGroup) -> Transfer:
    """Start an all-gather: every rank's flat ``message`` (of one size on all ranks), in rank order, in one flat buffer."""
    received = message.new_empty(group.size() * message.numel())
    volume = (group.size() - 1) * message.nbytes
    return issue(
        "all_gather",
        [message],
        [received],
        (volume, volume),
        lambda: [_all_gather(as_bytes(received), as_bytes(message), group=group, async_op=True)],
    )


def reduce_scatter(message: torch.Tensor, group: dist.ProcessGroup) -> Transfer:
    """Start a reduce-scatter: sum the flat ``message`` over ranks, cut it into as many equal parts, and take this rank's."""
    received = message.new_empty(message.numel() // group.size())
    volume = (group.size() - 1) * received.nbytes
    return issue(
        "reduce_scatter",
        [message],
        [received],
        (volume, volume),
        lambda: [_reduce_scatter(received, message, group=group, async_op=True)],
    )


class PeerExchange:
    """Send lists of tensors to other ranks and receive theirs, with one message per pair of ranks and direction.

    Construction posts all sends and receives; :meth:`wait` returns what arrived. Empty messages are not sent: both sides
    know the sizes. Ranks are numbered within the group.

    Args:
        outgoing: for each rank to send to, the tensors, all of one dtype.
        expected: for each rank to receive from, the shapes of its tensors.
        like: a tensor with the dtype and device of what is received.
        group: the process group.
    """

    def __init__(
        self,
        outgoing: Mapping[int, Sequence[torch.Tensor]],
        expected: Mapping[int, Sequence[tuple[int, ...]]],
        like: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        self.expected = expected
        incoming = {peer: like.new_empty(sum(map(math.prod, shapes))) for peer, shapes in expected.items()}
        messages = {peer: pack(tensors) for peer, tensors in outgoing.items()}

        def launch() -> Sequence[dist.Work]:
            operations = [
                dist.P2POp(transport, as_bytes(message), group=group, group_peer=peer)
                for transport, side in ((dist.isend, messages), (dist.irecv, incoming))
                for peer, message in side.items()
                if message.numel()
            ]
            return dist.batch_isend_irecv(operations) if operations else []

        volume = tuple(sum(message.nbytes for message in side.values()) for side in (messages, incoming))
        self._transfer = issue("exchange", list(messages.values()), list(incoming.values()), volume, launch)

    def wait(self) -> dict[int, list[torch.Tensor]]:
        """What each rank in ``expected`` sent, as views of its message."""
        received = self._transfer.wait()
        return {peer: unpack(buffer, shapes) for buffer, (peer, shapes) in zip(received, self.expected.items(), strict=True)}
