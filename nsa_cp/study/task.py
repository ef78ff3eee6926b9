"""What a study trains on: stages of training, and groups of test sequences, each of them packs of equally long sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from nsa_cp.context_parallel import SequenceLayout


class Batch(NamedTuple):
    """A pack of sequences, one after the other.

    tokens int64 [T]; rows int64 [R], ascending, where a prediction counts; answers int64 [R], what to predict there:
    numbers of outputs, the first of which stands for the first token that is ever predicted.
    """

    tokens: np.ndarray
    rows: np.ndarray
    answers: np.ndarray


@dataclass(frozen=True)
class Stage:
    """A part of training whose batches have one shape: ``steps`` packs of ``num_sequences`` x ``length`` tokens.

    It ends early at the validation accuracy ``enough``; None never.
    """

    steps: int
    num_sequences: int
    length: int
    enough: float | None = None

    @property
    def layout(self) -> SequenceLayout:
        """Of every pack of the stage."""
        return pack_layout(self.num_sequences, self.length)


class Scores(NamedTuple):
    """What a model made of one batch: for every row that counts its loss (nats) and whether the best guess was right."""

    batch: Batch
    losses: np.ndarray
    correct: np.ndarray


class Group(NamedTuple):
    """Test sequences that are reported together: their name, their layout, and packs of that layout."""

    name: str
    layout: SequenceLayout
    batches: Sequence[Batch]


class Task(Protocol):
    """A way to train and to test. Implementations are frozen dataclasses: their fields are part of a run's identity."""

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""

    @property
    def stages(self) -> Sequence[Stage]:
        """Training, in order."""

    def draw(self, stage: int, rng: np.random.Generator) -> Batch:
        """A training batch of stage number ``stage``."""

    def valid(self, stage: int) -> Iterator[Group]:
        """Sequences like those of a stage, never trained on, the same every time."""

    def tests(self) -> Iterator[Group]:
        """Sequences neither trained nor validated on, the same every time."""

    def figures(self, scores: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
        """Figures of merit from the scores of each group, as JSON values."""


@lru_cache(maxsize=64)
def pack_layout(num_sequences: int, length: int) -> SequenceLayout:
    """The layout of ``num_sequences`` sequences of ``length`` tokens, laid end to end."""
    return SequenceLayout.build([length * index for index in range(num_sequences + 1)])
