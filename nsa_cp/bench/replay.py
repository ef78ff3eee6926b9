"""Runs context parallelism with communication switched off: transfers return at once what they received in an earlier run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
import torch.distributed as dist

from nsa_cp.context_parallel import transfer


class RecordedTransfers:
    """What the transfers of one run received, in the order in which they were issued.

    A replay hands out the recorded buffers themselves: nothing is copied, sent or filled, and the kernels see the data of the
    real run. All local work remains: kernels, packing of messages and reordering of what arrived.
    """

    def __init__(self) -> None:
        self._received: list[list[torch.Tensor]] = []

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Run the transfers of the ``with`` block for real and remember what they receive."""
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
        """Answer the transfers of the ``with`` block from memory; it must issue those of the recorded run, in the same order.

        Raises:
            ValueError: a transfer that was not recorded at this place.
        """
        answers = iter(self._received)

        def issue(pattern: str, sent: object, received: Sequence[torch.Tensor], *_: object) -> transfer.Transfer:
            recorded = next(answers, None)
            if recorded is None or [x.shape for x in recorded] != [x.shape for x in received]:
                raise ValueError(f"the recorded run had no such {pattern} here; replay the very call that was recorded")
            return transfer.Transfer(recorded)

        with mock.patch.object(transfer, "issue", issue):
            yield
