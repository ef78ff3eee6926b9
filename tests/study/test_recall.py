"""The recall tasks: answers are right and nowhere else to be read, gaps outreach windows, kinds of tokens do not mix."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_cp.study.recall import RecallShape, draw_recall
from nsa_cp.study.studies import build_study
from nsa_cp.study.table import Study
from nsa_cp.study.task import Batch, Scores

SHAPE = RecallShape(
    length=200, num_pairs=12, num_queries=20, min_gap=70, pair_stride=3, num_fillers=8, num_keys=30, num_values=16
)


def read_pairs(tokens: np.ndarray, shape: RecallShape, first_question: int) -> dict[int, list[tuple[int, int]]]:
    """Key -> (position, value) of every pair before the questions, read from the tokens alone."""
    pairs: dict[int, list[tuple[int, int]]] = {}
    for position in range(first_question - 1):
        if shape.num_fillers <= tokens[position] < shape.num_fillers + shape.num_keys:
            value = tokens[position + 1] - shape.num_fillers - shape.num_keys
            pairs.setdefault(int(tokens[position]), []).append((position, int(value)))
    return pairs


def faults(batch: Batch, shape: RecallShape, sequences: int) -> list[str]:
    """What is wrong with a batch."""
    found = []
    tokens, rows, answers = batch.tokens.reshape(sequences, -1), batch.rows.reshape(sequences, -1), batch.answers
    for index, (row, answer) in enumerate(zip(rows, answers.reshape(sequences, -1), strict=True)):
        row = row - index * shape.length
        pairs = read_pairs(tokens[index], shape, int(row[0]))
        if len(pairs) != shape.num_pairs or any(len(places) != 1 for places in pairs.values()):
            found.append("pairs missing or keys repeated")
            continue
        for position, value in zip(row, answer, strict=True):
            ((place, known),) = pairs.get(int(tokens[index, position]), [(0, -1)])
            if known != value:
                found.append("wrong answer")
            if position - (place + 1) < shape.min_gap:
                found.append("question within the gap")
        if (tokens[index, row[0] :] >= shape.num_fillers + shape.num_keys).any():
            found.append("a value stands among the questions")
        if len(set(row.tolist())) != len(row):
            found.append("two questions at one place")
    return found


@pytest.mark.parametrize("depth", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("at_end", [False, True])
def test_answers_follow_from_the_pairs_alone(depth: float | None, at_end: bool) -> None:
    depths = None if depth is None else np.full(5, depth)
    batch = draw_recall(SHAPE, 5, np.random.default_rng(3), depth=depths, at_end=at_end)
    assert batch.tokens.shape == (5 * SHAPE.length,) and batch.rows.shape == batch.answers.shape == (5 * SHAPE.num_queries,)
    assert batch.tokens.min() >= 0 and batch.tokens.max() < SHAPE.vocab_size and 0 <= batch.answers.min()
    assert batch.answers.max() < SHAPE.num_values and len(set(batch.answers.tolist())) > 5
    assert faults(batch, SHAPE, 5) == []


def test_the_check_notices_faults() -> None:
    batch = draw_recall(SHAPE, 2, np.random.default_rng(3))
    assert "wrong answer" in faults(batch._replace(answers=(batch.answers + 1) % SHAPE.num_values), SHAPE, 2)
    early = batch.tokens.copy()
    early[batch.rows[0] - 5 : batch.rows[0] - 3] = SHAPE.num_fillers, SHAPE.vocab_size - 1
    assert faults(batch._replace(tokens=early), SHAPE, 2)


def test_depth_moves_the_pairs_from_start_to_end() -> None:
    batch = draw_recall(SHAPE, 3, np.random.default_rng(0), depth=np.array([0.0, 0.5, 1.0]), at_end=True)
    is_key = (batch.tokens >= SHAPE.num_fillers) & (batch.tokens < SHAPE.num_fillers + SHAPE.num_keys)
    first = is_key.reshape(3, -1).argmax(1)
    assert first.tolist() == [0, round(SHAPE.room / 2), SHAPE.room]
    assert (batch.rows.reshape(3, -1) % SHAPE.length == np.arange(SHAPE.length - SHAPE.num_queries, SHAPE.length)).all()


def test_the_same_seed_gives_the_same_batch_and_another_seed_another() -> None:
    first, again, other = (draw_recall(SHAPE, 2, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first.tokens != other.tokens).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pairs": 31}, "num_pairs = 31 is more than num_keys = 30"),
        ({"pair_stride": 1}, "pair_stride = 1 must be at least 2"),
        ({"length": 120}, "length = 120 is too short for 36 tokens of pairs.*use at least 126"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallShape(**{**vars(SHAPE), **changes})


@pytest.mark.parametrize("scale", ["full", "mini", "tiny"])
@pytest.mark.parametrize("name", ["mqar", "passkey"])
def test_tested_sequences_are_out_of_every_windows_reach_and_sparse(name: str, scale: str) -> None:
    study: Study = build_study(name, scale)
    nsa, layers = study.model.nsa, study.model.num_layers
    shapes = [study.task.schedule[-1].shape] if name == "mqar" else [shape for shape, _ in study.task.tests_at]
    # A question reaches a pair's value over all layers' windows; the token mix of the embedding adds one.
    assert all(shape.min_gap > layers * (nsa.window_size - 1) + 1 for shape in shapes)
    seen = nsa.num_selected_blocks * nsa.select_block_size + nsa.window_size
    if scale == "full":
        assert all(shape.length >= 8 * seen for shape in shapes)


def test_passkey_figures_by_length_and_depth() -> None:
    task = build_study("passkey", "tiny").task
    groups = {group.name: group for group in task.tests()}
    assert set(groups) == {"128@0", "128@1", "256@0", "256@1"}
    scores = {}
    for name, group in groups.items():
        batch = group.batches[0]
        assert group.layout.num_tokens == len(batch.tokens)
        right = np.full(len(batch.rows), name == "256@1")
        scores[name] = [Scores(batch, np.zeros(len(right)), right)]
    figures = task.figures(scores)
    assert figures["grid"] == {"128": {"0": 0.0, "1": 0.0}, "256": {"0": 0.0, "1": 1.0}}
    assert figures["accuracy_128"] == 0.0 and figures["accuracy_256"] == 0.5


def test_training_validation_and_test_sequences_differ() -> None:
    task = build_study("mqar", "tiny").task
    last = len(task.stages) - 1
    train = task.draw(last, np.random.default_rng([0, last, 0])).tokens
    valid, test = next(task.valid(last)).batches[0].tokens, next(task.tests()).batches[0].tokens
    assert (train != valid).any() and (valid != test).any() and (train != test).any()
    assert (next(task.valid(last)).batches[0].tokens == valid).all()
