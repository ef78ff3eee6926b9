"""Counts the bytes that context parallelism moves. Counted from shapes when transfers are issued, so nothing has to wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """What this rank sent and received during a :func:`count_traffic` block; ranks of a group may differ.

    An all-gather of P messages of m bytes counts as (P - 1) * m sent and as much received on every rank, a reduce-scatter
    likewise with m the bytes of one rank's part. Padding to equal messages counts, because it travels. A transfer repeated by
    recomputation counts again.

    Attributes:
        sent, received: bytes.
        transfers: number of transfers issued.
        by_pattern: (bytes sent, bytes received) for each of ``all_gather``, ``reduce_scatter`` and ``exchange`` (halo and ring).
    """

    sent: int = 0
    received: int = 0
    transfers: int = 0
    by_pattern: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, pattern: str, sent: int, received: int) -> None:
        """Count one transfer."""
        self.sent, self.received, self.transfers = self.sent + sent, self.received + received, self.transfers + 1
        before = self.by_pattern.get(pattern, (0, 0))
        self.by_pattern[pattern] = (before[0] + sent, before[1] + received)


# All counts in progress. Shared by all threads, because autograd runs the backward in a thread of its own.
_counting: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count all transfers that this process issues inside the block, whatever layer or group they belong to; blocks may nest.

    >>> with count_traffic() as forward:
    ...     out = attention(q, k, v, gate_logits, layout)
    >>> with count_traffic() as backward:
    ...     out.backward(grad)
    >>> forward.received, backward.received
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        # By identity: another count in progress may be equal.
        _counting[:] = [other for other in _counting if other is not traffic]


def record(pattern: str, sent: int, received: int) -> None:
    """Add one transfer to every count in progress."""
    for traffic in _counting:
        traffic.add(pattern, sent, received)
