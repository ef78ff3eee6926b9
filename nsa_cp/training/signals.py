"""Turns the signals with which job managers and people stop a run into a request that the loop can honour between steps."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag while the context lasts; a second SIGINT interrupts at once.

    Attributes:
        name: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.name == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
