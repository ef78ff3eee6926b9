"""Activation recompute without choosing blocks again: what a checkpoint's first run chose, its recomputation reuses.

Choosing again would cost the scoring pass, and two blocks of nearly equal score may change places when anything before them
was rounded otherwise. Then the gradient would be that of another selection.
"""

from __future__ import annotations

import threading

import torch


class SelectionMemory:
    """The blocks chosen inside one checkpointed call, in the order of the layers in it. Make one for each call
    and run the call inside ``with memory:``, the first time and every time.

    Whoever runs the call again (the checkpoint, kept alive by the graph of its output) has to hold it, and then nothing can be
    mixed up, whatever the order of microbatches; when the graph goes, so do the blocks: int32 [T, G, n] a layer.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._complete = False
        self._next = 0

    def __enter__(self) -> SelectionMemory:
        """One run of the call: the first that ends well is remembered, every later one reuses its blocks."""
        if not self._complete:
            self._blocks.clear()
        self._next = 0
        _active().append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End of the run; one that failed is not remembered."""
        _active().remove(self)
        self._complete |= kind is None


def recall_selection() -> torch.Tensor | None:
    """For a layer about to choose: the blocks it chose in the first run of the checkpoint it runs in; None in a first run."""
    recalled = None
    for memory in _active():
        if memory._complete:
            assert memory._next < len(memory._blocks), "a recomputation runs more layers than the first run"
            # Of nested checkpoints all know the same blocks.
            recalled = memory._blocks[memory._next]
            memory._next += 1
    return recalled


def remember_selection(blocks: torch.Tensor) -> None:
    """Hand the blocks a layer attended to, [T, G, n], to the checkpoints whose first run this is."""
    for memory in _active():
        if not memory._complete:
            memory._blocks.append(blocks.detach())


def selection_contexts() -> tuple[SelectionMemory, SelectionMemory]:
    """``context_fn`` for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``: its recomputation reuses blocks."""
    memory = SelectionMemory()
    return memory, memory


_local = threading.local()


def _active() -> list[SelectionMemory]:
    """Memories of the checkpoints that this thread runs in, outermost first. (Autograd recomputes in a thread of its own.)"""
    if not hasattr(_local, "memories"):
        _local.memories = []
    return _local.memories
