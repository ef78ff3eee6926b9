"""Bytes of text as samples: nothing lost, nothing random, nothing shared between training and validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nsa_cp.training.config import DataSection
from nsa_cp.training.data import (
    DOCUMENT_SEPARATOR,
    ByteSource,
    ByteStream,
    collate,
    entropy_bits,
    load_text,
    read_utf8,
    train_batches,
    validation_batches,
)
from nsa_cp.training.errors import UserError


def array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


def counting_source(total: int, length: int, fraction: float = 0.2, seed: int = 1) -> ByteSource:
    """A text whose bytes tell their position (modulo 251, so that no period fits the sequence length)."""
    return ByteSource(
        [(np.arange(total) % 251).astype(np.uint8)], sequence_length=length, validation_fraction=fraction, seed=seed
    )


def test_stream_reads_across_documents() -> None:
    stream = ByteStream([array(b"abc"), array(b"d"), array(b"efgh")])
    whole = b"abc" + DOCUMENT_SEPARATOR + b"d" + DOCUMENT_SEPARATOR + b"efgh"
    assert len(stream) == len(whole)
    for start in range(len(whole)):
        for end in range(start, len(whole) + 1):
            assert bytes(stream.read(start, end - start).tolist()) == whole[start:end]
    assert stream.histogram(3)[ord("\n")] == 4 and stream.histogram(3)[ord("a")] == 0


def test_the_fingerprint_is_the_contents() -> None:
    def fingerprint(*documents: bytes) -> str:
        return ByteStream([array(document) for document in documents]).fingerprint()

    text = bytes(range(251)) * 1000
    assert fingerprint(text) == fingerprint(bytes(bytearray(text)))
    changed = [text[:-1] + b"x", b"x" + text[1:], text[:70000] + b"x" + text[70001:], text + b"x"]
    split = [(text[:70000], text[70000 + len(DOCUMENT_SEPARATOR) :]), (text[:7], text[7:])]
    assert len({fingerprint(text), *map(fingerprint, changed), *(fingerprint(*parts) for parts in split)}) == 7
    large = np.zeros((1 << 24) + 5, dtype=np.uint8)
    before = ByteStream([large]).fingerprint()
    large[1 << 23 :] = 1
    after = ByteStream([large]).fingerprint()
    assert before != after and after.startswith("16777221 bytes with hash ")


def test_samples_depend_on_seed_and_index_alone() -> None:
    source, again, other = counting_source(5000, 64), counting_source(5000, 64), counting_source(5000, 64, seed=2)
    order = [3, 200, 1, 3, 150, 0]  # over several epochs, backwards too
    for index in order:
        assert np.array_equal(source.train_sample(index).tokens, again.train_sample(index).tokens)
    assert any(not np.array_equal(source.train_sample(i).tokens, other.train_sample(i).tokens) for i in range(5))


def test_an_epoch_shows_every_sequence_once_and_labels_are_the_next_byte() -> None:
    source = counting_source(5000, 64)
    starts = set()
    for index in range(source.samples_per_epoch):
        sample = source.train_sample(index)
        assert np.array_equal(sample.labels[:-1], sample.tokens[1:])
        assert (sample.labels[-1] - sample.tokens[-1]) % 251 == 1
        assert sample.loss_mask.sum() == 64
        starts.add(sample.tokens.tobytes())
    assert len(starts) == source.samples_per_epoch
    first, second = source.train_sample(0), source.train_sample(source.samples_per_epoch)
    assert not np.array_equal(first.tokens, second.tokens)


def test_validation_is_held_out_fixed_and_does_not_overlap() -> None:
    text = np.concatenate([np.full(800, 1), np.full(200, 2)]).astype(np.uint8)
    sources = [ByteSource([text], sequence_length=32, validation_fraction=0.2, seed=seed) for seed in (1, 2)]
    assert sources[0].num_validation_samples == 6
    for source in sources:
        for index in range(3 * source.samples_per_epoch):
            sample = source.train_sample(index)
            assert set(sample.tokens) | set(sample.labels) == {1}
        for index in range(source.num_validation_samples):
            sample = source.validation_sample(index)
            assert set(sample.tokens) | set(sample.labels) == {2}
    for index in range(6):
        assert np.array_equal(sources[0].validation_sample(index).tokens, sources[1].validation_sample(index).tokens)


@pytest.mark.parametrize("total", [2 * 17, 2 * 17 + 1, 60])
def test_the_shortest_texts_work(total: int) -> None:
    source = counting_source(total, 16, fraction=0.01)
    assert source.num_validation_samples >= 1
    for index in range(4):
        assert len(source.train_sample(index).tokens) == 16


def test_too_little_text_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"33 bytes, too few.*16\b|33 bytes, too few.*= 17 bytes"):
        counting_source(33, 16)
    with pytest.raises(UserError, match="is empty; training needs at least 34 bytes"):
        ByteSource([], sequence_length=16, validation_fraction=0.1, seed=0)


def test_data_parallel_ranks_share_a_step_whatever_their_number() -> None:
    source = counting_source(9000, 32)

    def rows(dp_size: int, micro: int) -> list[bytes]:
        batches = [
            list(train_batches(source, 24, global_batch_size=12, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size))
            for rank in range(dp_size)
        ]
        return sorted(row.numpy().tobytes() for rank in batches for batch in rank for row in batch["tokens"])

    expected = sorted(source.train_sample(24 + i).tokens.tobytes() for i in range(12))
    assert len(set(expected)) == 12
    assert rows(1, 1) == rows(2, 3) == rows(4, 1) == rows(3, 2) == expected


@pytest.mark.parametrize(("dp_size", "micro", "multiple"), [(1, 1, 1), (2, 2, 1), (4, 1, 1), (1, 2, 3)])
def test_validation_counts_every_sequence_once_and_pads_with_masked_rows(dp_size: int, micro: int, multiple: int) -> None:
    source = counting_source(9000, 32)
    counted = []
    for rank in range(dp_size):
        rounds, start = validation_batches(
            source, num_sequences=5, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size, rounds_multiple=multiple
        )
        batches = list(start())
        assert len(batches) == rounds and rounds % multiple == 0
        for batch in batches:
            counted += [row.numpy().tobytes() for row, mask in zip(batch["tokens"], batch["loss_mask"]) if mask.sum() == 32]
            assert all(mask.sum() in (0, 32) for mask in batch["loss_mask"])
    assert sorted(counted) == sorted(source.validation_sample(i).tokens.tobytes() for i in range(5))


def test_collate_gives_whole_sequences() -> None:
    source = counting_source(9000, 32)
    batch = collate([source.train_sample(0), source.train_sample(1)])
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
        "tokens": ((2, 32), torch.int64),
        "labels": ((2, 32), torch.int64),
        "position_ids": ((2, 32), torch.int64),
        "loss_mask": ((2, 32), torch.float32),
    }
    assert batch["position_ids"][1].tolist() == list(range(32))


def test_entropy_of_known_distributions() -> None:
    assert entropy_bits(np.array([4, 4, 4, 4])) == 2.0
    assert entropy_bits(np.array([7, 0])) == 0.0
    assert entropy_bits(np.array([3, 1])) == pytest.approx(0.8112781244591328, rel=1e-12)


def test_the_text_of_the_standard_library() -> None:
    source = load_text(DataSection(sequence_length=2048), seed=1)
    whole, validation = source.unigram_bits_per_byte()
    assert 4.0 < validation < 5.0 and 4.4 < whole < 5.0
    assert "Python" in source.decode(source.stream.read(0, 20000).tolist())
    assert source.decode(source.encode("naïve ☃")) == "naïve ☃"


def test_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, empty, bad = tmp_path / "good.txt", tmp_path / "empty.txt", tmp_path / "bad.txt"
    good.write_text("grüße\n" * 200, encoding="utf-8")
    empty.write_bytes(b"")
    bad.write_bytes(b"x" * ((1 << 20) - 1) + "é".encode() + b"\xff")
    assert bytes(read_utf8(str(good))) == good.read_bytes()
    with pytest.raises(UserError, match="missing.txt does not exist; correct data.paths"):
        read_utf8(str(tmp_path / "missing.txt"))
    with pytest.raises(UserError, match="is not a file"):
        read_utf8(str(tmp_path))
    with pytest.raises(UserError, match=r"empty.txt is empty \(0 bytes\)"):
        read_utf8(str(empty))
    with pytest.raises(UserError, match=f"bad.txt is not UTF-8 text: byte {(1 << 20) + 1} is invalid"):
        read_utf8(str(bad))
    monkeypatch.setenv("HOME", str(tmp_path))
    section = DataSection(kind="text", paths=[str(good), "~/good.txt"], sequence_length=16)
    assert len(load_text(section, 1).stream) == 2 * len(good.read_bytes()) + len(DOCUMENT_SEPARATOR)
