"""Sequences for recall: (key, value) pairs early in a sequence of filler tokens, and questions about them far beyond the window.

A question is a key alone. Its answer, the value, is the label there and is never written into the input, so that no question
gives away another. The vocabulary is filler, then keys, then values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsa_cp.study.task import Batch


@dataclass(frozen=True, kw_only=True)
class RecallShape:
    """The shape of a recall sequence.

    Args:
        length: tokens in the sequence.
        num_pairs: number of pairs; their keys differ.
        num_queries: number of questions, at different positions; with more questions than pairs keys are asked repeatedly.
        min_gap: least tokens between the last pair and the first question; should exceed all layers' windows together.
        pair_stride: tokens from the start of one pair to the next; those beyond the pair's two are filler.
        num_fillers, num_keys, num_values: tokens of each kind in the vocabulary.

    Raises:
        ValueError: more pairs than keys, a stride below 2, or a sequence too short for all this.
    """

    length: int
    num_pairs: int
    num_queries: int
    min_gap: int
    pair_stride: int = 2
    num_fillers: int = 64
    num_keys: int = 512
    num_values: int = 64

    def __post_init__(self) -> None:
        if self.num_pairs > self.num_keys:
            raise ValueError(f"num_pairs = {self.num_pairs} is more than num_keys = {self.num_keys}; keys must differ")
        if self.pair_stride < 2:
            raise ValueError(f"pair_stride = {self.pair_stride} must be at least 2, the tokens of a pair")
        if self.room < 0:
            raise ValueError(
                f"length = {self.length} is too short for {self.span} tokens of pairs, a gap of {self.min_gap} and "
                f"{self.num_queries} questions; use at least {self.length - self.room}"
            )

    @property
    def span(self) -> int:
        """Tokens from the first pair to the end of the last."""
        return self.num_pairs * self.pair_stride

    @property
    def room(self) -> int:
        """The last position at which the first pair may begin; negative if the sequence is too short."""
        return self.length - self.span - self.min_gap - self.num_queries

    @property
    def vocab_size(self) -> int:
        """Number of tokens of all kinds."""
        return self.num_fillers + self.num_keys + self.num_values


def draw_recall(
    shape: RecallShape,
    num_sequences: int,
    rng: np.random.Generator,
    *,
    depth: np.ndarray | None = None,
    at_end: bool = False,
) -> Batch:
    """A pack of random sequences; only the questions have a label.

    Args:
        depth: float [sequences] in 0..1, where the pairs begin: from the start (0) to as late as gap and questions allow (1);
            None: at most 32 tokens from the start.
        at_end: put all questions at the very end instead of anywhere after the gap.
    """
    b, s, pairs, queries = num_sequences, shape.length, shape.num_pairs, shape.num_queries
    tokens = rng.integers(0, shape.num_fillers, (b, s))
    keys = rng.random((b, shape.num_keys)).argsort(1)[:, :pairs] + shape.num_fillers
    values = rng.integers(0, shape.num_values, (b, pairs))
    # Without a given depth the start is random, so that pairs are at no fixed place within the attention's blocks.
    first = rng.integers(0, min(shape.room, 32) + 1, b) if depth is None else np.round(depth * shape.room).astype(np.int64)
    place = first[:, None] + np.arange(pairs) * shape.pair_stride
    np.put_along_axis(tokens, place, keys, 1)
    np.put_along_axis(tokens, place + 1, values + shape.num_fillers + shape.num_keys, 1)
    asked = rng.integers(0, pairs, (b, queries)) if queries > pairs else rng.random((b, pairs)).argsort(1)[:, :queries]
    start = np.full(b, s - queries) if at_end else first + shape.span + shape.min_gap
    rows = start[:, None] + _distinct(s - start, queries, rng)
    np.put_along_axis(tokens, rows, np.take_along_axis(keys, asked, 1), 1)
    rows_of_pack = rows + np.arange(b)[:, None] * s
    return Batch(tokens.ravel(), rows_of_pack.ravel(), np.take_along_axis(values, asked, 1).ravel())


def _distinct(rooms: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """For each of ``rooms``, ``count`` distinct integers in [0, room), ascending: sorted draws from less room, spread apart."""
    draws = np.sort((rng.random((len(rooms), count)) * (rooms - count + 1)[:, None]).astype(np.int64), 1)
    return draws + np.arange(count)
