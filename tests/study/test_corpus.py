"""The text: split by package, nothing in two parts, the same every time; and losses by position."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from nsa_cp.study import corpus as corpus_module
from nsa_cp.study.corpus import build_corpus, read_part
from nsa_cp.study.language import LanguageTask
from nsa_cp.study.task import Scores, Stage


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty packages of one byte each, repeated, so that a byte says where it comes from; texts are kept in ``tmp_path``."""
    monkeypatch.setattr(corpus_module.tempfile, "gettempdir", lambda: str(tmp_path / "kept"))
    read_part.cache_clear()
    folder = tmp_path / "site"
    for index in range(30):
        letter = chr(ord("A") + index)
        if index == 0:
            folder.mkdir()
            (folder / "single.py").write_text(letter * 3000)
            continue
        (folder / f"p{index}" / "sub").mkdir(parents=True)
        (folder / f"p{index}" / "a.py").write_text(letter * 2000)
        (folder / f"p{index}" / "sub" / "b.py").write_text(letter * 1000)
        (folder / f"p{index}" / "notes.txt").write_text("!" * 1000)
        (folder / f"p{index}" / "_vendor").mkdir()
        (folder / f"p{index}" / "_vendor" / "c.py").write_text("#" * 1000)
    return folder


def test_packages_are_in_one_part_each(site: Path) -> None:
    corpus = build_corpus(site, 80_000)
    parts = {part: set(read_part(corpus.digest, part).tobytes()) - {10} for part in corpus_module.PARTS}
    assert not parts["test"] & parts["valid"] and not parts["test"] & parts["train"] and not parts["valid"] & parts["train"]
    assert tuple(len(parts[part]) for part in corpus_module.PARTS) == corpus.num_packages and min(corpus.num_packages) >= 3
    assert not any(ord(mark) in part for part in parts.values() for mark in "!#")
    assert corpus.num_bytes == tuple(len(read_part(corpus.digest, part)) for part in corpus_module.PARTS)
    assert sum(corpus.num_bytes) <= 80_000


def test_the_same_sources_give_the_same_text_and_others_another(site: Path) -> None:
    corpus = build_corpus(site, 80_000)
    assert build_corpus(site, 80_000) == corpus
    (site / "single.py").write_text("z" * 3000)
    assert build_corpus(site, 80_000).digest != corpus.digest


def test_stages_train_on_their_own_lengths_and_all_are_judged_on_the_last(site: Path) -> None:
    schedule = (Stage(1, 5, 32), Stage(1, 3, 64))
    task = LanguageTask(corpus=build_corpus(site, 80_000), schedule=schedule, valid_batches=1, test_batches=1)
    for number, (count, length) in enumerate(((5, 32), (3, 64))):
        batch = task.draw(number, np.random.default_rng(0))
        tokens, answers = batch.tokens.reshape(count, length), batch.answers.reshape(count, length)
        assert (tokens[:, 1:] == answers[:, :-1]).all() and (tokens[1:, 0] != answers[:-1, -1]).any()
        (group,) = task.valid(number)
        assert group.layout == schedule[1].layout and len(group.batches[0].tokens) == 192


def test_targets_are_the_next_bytes_and_trailing_tokens_the_last_quarter(site: Path) -> None:
    task = LanguageTask(corpus=build_corpus(site, 80_000), schedule=(Stage(1, 2, 64),), valid_batches=1, test_batches=2)
    batch = task.draw(0, np.random.default_rng(0))
    tokens, answers = batch.tokens.reshape(2, 64), batch.answers.reshape(2, 64)
    assert (tokens[:, 1:] == answers[:, :-1]).all() and (batch.rows == np.arange(128)).all()
    (group,) = task.tests()
    assert len(group.batches) == 2
    position = np.tile(np.arange(64.0), 2)
    scores = {"test": [Scores(each, position + index, position > 0) for index, each in enumerate(group.batches)]}
    figures = task.figures(scores)
    assert figures["loss"] == 32.0 and figures["trailing_loss"] == 56.0
    assert figures["bits_per_byte"] == pytest.approx(32 / math.log(2))
    assert figures["bins"]["48-63"] == 56.0 and list(figures["bins"])[0] == "0-1" and figures["bins"]["0-1"] == 1.0


def test_two_processes_may_write_the_same_text_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "text" / "train", Path.replace

    def interrupted(written: Path, target: Path) -> Path:
        monkeypatch.undo()
        corpus_module._write_once(path, b"bytes")
        return replace(written, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    corpus_module._write_once(path, b"bytes")
    assert path.read_bytes() == b"bytes" and [entry.name for entry in path.parent.iterdir()] == ["train"]
