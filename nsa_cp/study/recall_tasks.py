"""Tasks of the two recall studies: MQAR, with pairs at the start of the sequence, and passkey, with them at any depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsa_cp.study.recall import RecallShape, draw_recall
from nsa_cp.study.task import Batch, Group, Scores, Stage, pack_layout

# First words of seeds that no training run uses: those of training are [seed, stage, step] with small seeds.
_VALID, _TEST = 1 << 40, 1 << 41


@dataclass(frozen=True, kw_only=True)
class RecallStage:
    """``steps`` batches of ``num_sequences`` sequences of one shape; ends early once validation accuracy is ``enough``."""

    shape: RecallShape
    num_sequences: int
    steps: int
    enough: float

    @property
    def stage(self) -> Stage:
        """This stage as the trainer sees it, without the contents of the sequences."""
        return Stage(self.steps, self.num_sequences, self.shape.length, self.enough)


@dataclass(frozen=True, kw_only=True)
class MqarTask:
    """Multi-query associative recall.

    Args:
        schedule: stages of training, shorter sequences first; the last one's shape is also the test's.
        test_batches: number of test batches, each of the last stage's size.
    """

    schedule: tuple[RecallStage, ...]
    test_batches: int

    @property
    def vocab_size(self) -> int:
        """The same in all stages."""
        return self.schedule[-1].shape.vocab_size

    @property
    def stages(self) -> Sequence[Stage]:
        """Training, in order."""
        return [each.stage for each in self.schedule]

    def draw(self, stage: int, rng: np.random.Generator) -> Batch:
        """A training batch."""
        return draw_recall(self.schedule[stage].shape, self.schedule[stage].num_sequences, rng)

    def valid(self, stage: int) -> Iterator[Group]:
        """One batch."""
        batch = self.draw(stage, np.random.default_rng([_VALID, stage]))
        yield Group("recall", self.stages[stage].layout, [batch])

    def tests(self) -> Iterator[Group]:
        """``test_batches`` batches."""
        last = len(self.schedule) - 1
        batches = [self.draw(last, np.random.default_rng([_TEST, index])) for index in range(self.test_batches)]
        yield Group("recall", self.stages[last].layout, batches)

    def figures(self, scores: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
        """``accuracy``, the fraction of questions answered right, and ``loss`` in nats."""
        return _accuracy_and_loss([each for group in scores.values() for each in group])


@dataclass(frozen=True, kw_only=True)
class PasskeyTask:
    """Passkey retrieval: one clump of pairs at a random depth in filler, asked for after it; tested by depth and length.

    In training, questions come anywhere after the gap; in the test, all are at the very end of the sequence.

    Args:
        schedule: stages of training; the longest sequences may have a few steps at the end.
        tests_at: for each tested length, the shape and the number of sequences in a pack.
        depths: where pairs begin in the test, from 0 (the start) to 1 (as late as the gap allows).
        test_batches: packs for each length and depth.
    """

    schedule: tuple[RecallStage, ...]
    tests_at: tuple[tuple[RecallShape, int], ...]
    depths: tuple[float, ...]
    test_batches: int

    @property
    def vocab_size(self) -> int:
        """The same in all stages."""
        return self.schedule[-1].shape.vocab_size

    @property
    def stages(self) -> Sequence[Stage]:
        """Training, in order."""
        return [each.stage for each in self.schedule]

    def draw(self, stage: int, rng: np.random.Generator) -> Batch:
        """A training batch: every sequence has a depth of its own."""
        each = self.schedule[stage]
        return draw_recall(each.shape, each.num_sequences, rng, depth=rng.random(each.num_sequences))

    def valid(self, stage: int) -> Iterator[Group]:
        """One batch."""
        batch = self.draw(stage, np.random.default_rng([_VALID, stage]))
        yield Group("recall", self.stages[stage].layout, [batch])

    def tests(self) -> Iterator[Group]:
        """One group for each length and depth, named ``length@depth``."""
        for number, (shape, count) in enumerate(self.tests_at):
            for place, depth in enumerate(self.depths):
                rngs = [np.random.default_rng([_TEST, number, place, index]) for index in range(self.test_batches)]
                batches = [draw_recall(shape, count, rng, depth=np.full(count, depth), at_end=True) for rng in rngs]
                yield Group(f"{shape.length}@{depth:g}", pack_layout(count, shape.length), batches)

    def figures(self, scores: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
        """``accuracy`` and ``loss`` over all groups; in the test also ``accuracy_LENGTH``, and ``grid``: accuracy by length and
        depth."""
        figures = _accuracy_and_loss([each for group in scores.values() for each in group])
        grid: dict[str, dict[str, float]] = {}
        for name, group in scores.items():
            if "@" in name:
                length, depth = name.split("@")
                grid.setdefault(length, {})[depth] = _accuracy_and_loss(group)["accuracy"]
        by_length = {f"accuracy_{length}": float(np.mean(list(row.values()))) for length, row in grid.items()}
        return {**figures, **by_length, **({"grid": grid} if grid else {})}


def _accuracy_and_loss(scores: Sequence[Scores]) -> dict[str, float]:
    correct = np.concatenate([each.correct for each in scores])
    losses = np.concatenate([each.losses for each in scores])
    return {"accuracy": float(correct.mean()), "loss": float(losses.mean())}
