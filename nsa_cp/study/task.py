"""What a study trains and tests on: the Task protocol, its stages of training and its groups of test sequences.

All batches are packs of sequences of equal length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from nsa_cp.context_parallel import SequenceLayout


class Batch(NamedTuple):
    """A pack of sequences, one after the other.

    tokens: int64 [T]. rows: int64 [R], ascending, the rows where a prediction counts. answers: int64 [R], what to predict there,
    as indices of the model's outputs (see ``ModelSettings.num_outputs``).
    """

    tokens: np.ndarray
    rows: np.ndarray
    answers: np.ndarray


@dataclass(frozen=True)
class Stage:
    """A part of training whose batches have one shape: ``steps`` packs of ``num_sequences`` x ``length`` tokens.

    It ends early once validation accuracy reaches ``enough``; with None it never does.
    """

    steps: int
    num_sequences: int
    length: int
    enough: float | None = None

    @property
    def layout(self) -> SequenceLayout:
        """The layout of every pack of the stage."""
        return pack_layout(self.num_sequences, self.length)


class Scores(NamedTuple):
    """A model's results on one batch: for every row that counts its loss (nats) and whether the likeliest output was right."""

    batch: Batch
    losses: np.ndarray
    correct: np.ndarray


class Group(NamedTuple):
    """Test sequences that are reported together: their name, their layout, and packs of that layout."""

    name: str
    layout: SequenceLayout
    batches: Sequence[Batch]


class Task(Protocol):
    """What to train and test on. Implementations are frozen dataclasses, because their fields are part of a run's identity."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""

    @property
    def stages(self) -> Sequence[Stage]:
        """Stages of training, in order."""

    def draw(self, stage: int, rng: np.random.Generator) -> Batch:
        """A training batch of stage number ``stage``."""

    def valid(self, stage: int) -> Iterator[Group]:
        """Validation sequences for a stage, never trained on, the same every time."""

    def tests(self) -> Iterator[Group]:
        """Test sequences, neither trained nor validated on, the same every time."""

    def figures(self, scores: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
        """Figures of merit (such as ``accuracy`` and ``loss``) from the scores of each group by name, as JSON values."""


@lru_cache(maxsize=64)
def pack_layout(num_sequences: int, length: int) -> SequenceLayout:
    """The layout of ``num_sequences`` sequences of ``length`` tokens, laid end to end."""
    return SequenceLayout.build([length * index for index in range(num_sequences + 1)])
