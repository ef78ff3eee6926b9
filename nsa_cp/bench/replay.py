"""Communication switched off: transfers answered at once with what a real run received, so that only their time is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
import torch.distributed as dist

from nsa_cp.context_parallel import transfer


class RecordedTransfers:
    """What the transfers of one run received, in the order they were issued.

    The recorded buffers themselves are handed out: nothing is copied, sent or filled, and the kernels see the data they saw
    in the real run. What remains is all of the local work: kernels, packing of messages and reordering of what arrived.
    """

    def __init__(self) -> None:
        self._received: list[list[torch.Tensor]] = []

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Run real transfers in the block and remember what they receive."""
        original = transfer.issue

        def issue(
            pattern: str,
            sent: Sequence[torch.Tensor],
            received: Sequence[torch.Tensor],
            volume: tuple[int, int],
            launch: Callable[[], Sequence[dist.Work]],
        ) -> transfer.Transfer:
            self._received.append(list(received))
            return original(pattern, sent, received, volume, launch)

        with mock.patch.object(transfer, "issue", issue):
            yield

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Answer the transfers of the block from memory; it must issue those of the recorded run, in that order.

        Raises:
            ValueError: other transfers than the recorded ones.
        """
        answers = iter(self._received)

        def issue(pattern: str, sent: object, received: Sequence[torch.Tensor], *_: object) -> transfer.Transfer:
            recorded = next(answers, None)
            if recorded is None or [x.shape for x in recorded] != [x.shape for x in received]:
                raise ValueError(f"the recorded run had no such {pattern} here; replay the very call that was recorded")
            return transfer.Transfer(recorded)

        with mock.patch.object(transfer, "issue", issue):
            yield
