"""Activation checkpointing without choosing blocks twice: the recomputation reuses the blocks that the first run chose.

Choosing again would cost another scoring pass; and if anything before it were rounded differently, two blocks of nearly equal
score could change places, and the gradient would be that of another selection than the forward's.
"""

from __future__ import annotations

import threading

import torch


class SelectionMemory:
    """The blocks chosen inside one checkpointed call, in the order of the layers in it.

    Make one for each call, and enter it (``with memory:``) around the call's first run and around every recomputation. Let the
    checkpoint itself hold it: then blocks of different microbatches cannot be mixed up, and they are freed with the autograd
    graph. It holds int32 [T, G, n] for each layer.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._complete = False
        self._next = 0

    def __enter__(self) -> SelectionMemory:
        """Begin a run of the call: the first that succeeds is remembered, every later one reuses its blocks."""
        if not self._complete:
            self._blocks.clear()
        self._next = 0
        _active().append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the run; one that raised is not remembered."""
        _active().remove(self)
        self._complete |= kind is None


def recall_selection() -> torch.Tensor | None:
    """Called by a layer about to choose: its blocks of the checkpointed call's first run, or None if this is no recomputation."""
    recalled = None
    for memory in _active():
        if memory._complete:
            assert memory._next < len(memory._blocks), "a recomputation runs more layers than the first run"
            # Nested checkpoints all remember the same blocks, so any of them will do.
            recalled = memory._blocks[memory._next]
            memory._next += 1
    return recalled


def remember_selection(blocks: torch.Tensor) -> None:
    """Called by a layer that has attended to ``blocks`` [T, G, n]: every checkpoint whose first run this is keeps them."""
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
