"""Asynchronous point-to-point messages: several tensors to each peer, packed into one message."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

# torch 2.13 renamed these two; the older names still work there but warn.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one dtype, flattened one after the other."""
    return torch.cat([x.reshape(-1) for x in tensors])


def unpack(message: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Views of ``message`` with the given shapes; the inverse of :func:`pack`."""
    pieces = message.split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8: what is moved and not computed with travels so on every backend, bfloat16 included."""
    return x.view(torch.uint8)


class PeerExchange:
    """Send lists of tensors to peers and receive others, one message for a pair of ranks and direction.

    Construction posts all sends and receives; :meth:`wait` returns what arrived. Empty messages are not sent: both sides
    know the sizes. Rank numbers are those of the group.

    Args:
        outgoing: for each peer sent to, the tensors, all of one dtype.
        expected: for each peer received from, the shapes.
        like: gives dtype and device of what is received.
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
        self.incoming = {peer: like.new_empty(sum(map(math.prod, shapes))) for peer, shapes in expected.items()}
        # Kept until waited for: the transport reads them after this call returns.
        self.messages = {peer: pack(tensors) for peer, tensors in outgoing.items()}
        operations = [
            dist.P2POp(transport, as_bytes(message), group=group, group_peer=peer)
            for transport, messages in ((dist.isend, self.messages), (dist.irecv, self.incoming))
            for peer, message in messages.items()
            if message.numel()
        ]
        self.work = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> dict[int, list[torch.Tensor]]:
        """For each peer in ``expected`` what it sent, as views of the received message."""
        for work in self.work:
            work.wait()
        self.messages = {}
        return {peer: unpack(buffer, self.expected[peer]) for peer, buffer in self.incoming.items()}
