"""The language study's task: predict bytes of Python sources. Loss is reported by position: far reach shows in late bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsa_cp.study.corpus import Corpus, read_part
from nsa_cp.study.task import Batch, Group, Scores, Stage

# Edges of the position bins, in 32nds of a sequence; the last bin is the trailing tokens.
_EDGES = (0, 1, 2, 4, 8, 16, 24, 32)


@dataclass(frozen=True, kw_only=True)
class LanguageTask:
    """Predict every next byte.

    Args:
        corpus: the text, built on this machine.
        schedule: stages of training, shorter sequences first, drawn at random places of the training part.
        valid_batches, test_batches: packs of the last stage's size, at evenly spaced places of the other parts.
    """

    corpus: Corpus
    schedule: tuple[Stage, ...]
    valid_batches: int
    test_batches: int

    @property
    def vocab_size(self) -> int:
        """Number of byte values."""
        return 256

    @property
    def stages(self) -> Sequence[Stage]:
        """Training, in order."""
        return self.schedule

    def draw(self, stage: int, rng: np.random.Generator) -> Batch:
        """Sequences at random places."""
        text, shape = read_part(self.corpus.digest, "train"), self.schedule[stage]
        return _batch(text, rng.integers(0, len(text) - shape.length, shape.num_sequences), shape.length)

    def valid(self, stage: int) -> Iterator[Group]:
        """Sequences of packages not trained on; of the last stage's length in every stage, so that points of a curve compare."""
        yield self._spaced("valid", self.valid_batches)

    def tests(self) -> Iterator[Group]:
        """Sequences of packages neither trained nor validated on."""
        yield self._spaced("test", self.test_batches)

    def figures(self, scores: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
        """Nats a byte.

        ``loss`` over everything, ``trailing_loss`` over the last quarter of each sequence, ``bits_per_byte``, and ``bins``: the
        loss in each range of positions, named ``first-last``.
        """
        length = self.schedule[-1].length
        losses = np.concatenate([each.losses for group in scores.values() for each in group]).reshape(-1, length)
        edges = [edge * length // 32 for edge in _EDGES]
        spans = [(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True) if a < b]
        bins = {f"{a}-{b - 1}": float(losses[:, a:b].mean()) for a, b in spans}
        loss = float(losses.mean())
        trailing = float(losses[:, spans[-1][0] :].mean())
        return {"loss": loss, "trailing_loss": trailing, "bits_per_byte": loss / math.log(2), "bins": bins}

    def _spaced(self, part: str, batches: int) -> Group:
        text, last = read_part(self.corpus.digest, part), self.schedule[-1]
        starts = np.linspace(0, len(text) - last.length - 1, batches * last.num_sequences).astype(np.int64)
        return Group(part, last.layout, [_batch(text, row, last.length) for row in starts.reshape(batches, last.num_sequences)])


def _batch(text: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    windows = np.stack([text[start : start + length + 1] for start in starts]).astype(np.int64)
    return Batch(windows[:, :-1].ravel(), np.arange(len(starts) * length), windows[:, 1:].ravel())
