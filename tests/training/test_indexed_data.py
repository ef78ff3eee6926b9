"""Megatron's indexed datasets: what is written is what is trained on, and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from training_harness import figures_here, metrics, printed_here, rewind, tiny_config, train_here

from nsa_cp.testing import DistributedPool
from nsa_cp.training.config import DataSection
from nsa_cp.training.config_load import load_config
from nsa_cp.training.errors import UserError
from nsa_cp.training.indexed import IndexedSource

END = 99
LENGTHS = [50, 7, 120, 1, 64, 33, 90, 41]


def write_index(prefix: Path, lengths: list[int] = LENGTHS, highest: int = 98, seed: int = 3) -> list[np.ndarray]:
    """Documents of random tokens that end in END, as Megatron's preprocessing writes them; returns them."""
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(0, highest + 1, length - 1), END) for length in lengths]
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return documents


def section(prefix: Path | str, **changes: object) -> DataSection:
    values = dict(
        kind="indexed", paths=[str(prefix)], sequence_length=16, vocab_size=100, end_of_document=END, validation_fraction=0.3
    )
    return DataSection(**{**values, **changes})


def read_training(
    rank: int, world_size: int, data: DataSection, cache: Path, count: int, seed: int = 5
) -> list[tuple[bytes, bytes, bytes]]:
    source = IndexedSource(data, seed)
    source.open_training(count, cache)
    samples = [source.train_sample(index) for index in range(count)]
    return [(sample.tokens.tobytes(), sample.labels.tobytes(), sample.loss_mask.tobytes()) for sample in samples]


@pytest.mark.distributed
def test_training_samples_are_the_documents(tmp_path: Path, workers: object) -> None:
    documents = write_index(tmp_path / "data")
    source = IndexedSource(section(tmp_path / "data"), 5)
    held_out = sum(map(len, documents)) - sum(len(document) for document in documents[: source._first_validation])
    assert 0.3 * sum(LENGTHS) <= held_out < 0.6 * sum(LENGTHS)
    per_epoch = (sum(len(document) for document in documents[: source._first_validation]) - 1) // 16
    pool: DistributedPool = workers(2)
    ranks = pool.run(read_training, section(tmp_path / "data"), tmp_path / "cache", per_epoch)
    assert ranks[0] == ranks[1]
    assert ranks[0] == pool.run(read_training, section(tmp_path / "data"), tmp_path / "cache", per_epoch)[0], "from the cache"
    assert ranks[0] != pool.run(read_training, section(tmp_path / "data"), tmp_path / "other", per_epoch, 6)[0], "another seed"
    # Every sample is a run of 17 tokens of training documents in some order: look for its neighbours in the documents.
    pairs = {(int(a), int(b)) for document in documents[: source._first_validation] for a, b in zip(document[:-1], document[1:])}
    starts = {int(document[0]) for document in documents[: source._first_validation]}
    for tokens, labels, mask in ranks[0]:
        t, l, m = np.frombuffer(tokens, np.int64), np.frombuffer(labels, np.int64), np.frombuffer(mask, np.float32)
        assert np.array_equal(t[1:], l[:-1])
        assert np.array_equal(m, (t != END).astype(np.float32))
        assert all((a, b) in pairs or (a == END and b in starts) for a, b in zip(t.tolist(), l.tolist()))


@pytest.mark.distributed
def test_a_cached_index_of_other_content_is_not_used(tmp_path: Path, workers: object) -> None:
    write_index(tmp_path / "data")
    pool: DistributedPool = workers(1)
    pool.run(read_training, section(tmp_path / "data"), tmp_path / "cache", 20)
    write_index(tmp_path / "data", lengths=LENGTHS[::-1])
    again = [pool.run(read_training, section(tmp_path / "data"), tmp_path / cache, 20) for cache in ("cache", "other")]
    assert again[0] == again[1]


@pytest.mark.distributed
@pytest.mark.parametrize("left", [0, 100, -8])
def test_a_cached_index_that_was_cut_short_is_built_again(tmp_path: Path, workers: object, left: int) -> None:
    """A full disk or a kill may leave it so, and Megatron takes files that exist for whole."""
    write_index(tmp_path / "data")
    pool: DistributedPool = workers(2)
    expected = pool.run(read_training, section(tmp_path / "data"), tmp_path / "cache", 20)
    for file in (tmp_path / "cache").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:left])
    assert pool.run(read_training, section(tmp_path / "data"), tmp_path / "cache", 20) == expected


@pytest.mark.distributed
def test_a_run_with_a_vocabulary_file_can_be_evaluated_and_resumed_by_its_own_config(tmp_path: Path, workers: object) -> None:
    write_index(tmp_path / "data", lengths=[40] * 40)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(f"w{i}" for i in range(100)), encoding="utf-8")
    fixed = ["data.kind=indexed", f"data.paths=[{tmp_path / 'data'}]", f"data.vocab_file={vocabulary}"]
    config = tiny_config(tmp_path / "runs", *fixed)
    workers(1).run(train_here, config)
    again = load_config(config.run_dir / "config.yaml")
    assert workers(1).run(figures_here, again, 4)[0]["step"] == 4
    rewind(config, 2)
    workers(1).run(train_here, again, True)
    with pytest.raises(UserError, match="data.vocab_size = 99, but data.vocab_file = .* has 100; leave one out"):
        IndexedSource(section(tmp_path / "data", vocab_size=99, vocab_file=str(vocabulary)), 1)


def test_validation_is_the_last_documents_in_order(tmp_path: Path) -> None:
    documents = write_index(tmp_path / "data")
    sources = [IndexedSource(section(tmp_path / "data"), seed) for seed in (1, 2)]
    tail = np.concatenate(documents[sources[0]._first_validation :])
    assert sources[0].num_validation_samples == (len(tail) - 1) // 16
    for source in sources:
        for index in range(source.num_validation_samples):
            sample = source.validation_sample(index)
            assert np.array_equal(sample.tokens, tail[16 * index : 16 * index + 16])
            assert np.array_equal(sample.labels, tail[16 * index + 1 : 16 * index + 17])
            assert np.array_equal(sample.loss_mask == 0, sample.tokens == END)
    assert 0 < sources[0].unigram_bits_per_byte()[0] < np.log2(100)


def test_the_fingerprint_is_the_contents_of_both_files(tmp_path: Path) -> None:
    found = []
    for name, changes in (("a", {}), ("b", {}), ("c", dict(seed=4)), ("d", dict(lengths=LENGTHS[::-1]))):
        write_index(tmp_path / name, **changes)
        found.append(IndexedSource(section(tmp_path / name), 1).fingerprint)
    assert found[0] == found[1] and len(set(found)) == 3


def test_vocabulary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_index(tmp_path / "data")
    lines, table = tmp_path / "vocab.txt", tmp_path / "vocab.json"
    lines.write_text("\n".join(f"w{i}" for i in range(100)), encoding="utf-8")
    table.write_text(json.dumps({f"w{i}": i for i in reversed(range(100))}))
    for prefix, path in ((tmp_path / "data", lines), ("~/data", "~/vocab.json")):
        source = IndexedSource(section(prefix, vocab_size=None, vocab_file=str(path)), 1)
        assert source.vocab_size == 100
        assert source.decode(source.encode("w3 unknown w99")) == "w3 w99"


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (lambda p: p.with_suffix(".idx").unlink(), "data.idx does not exist; data.paths takes the prefix"),
        (lambda p: p.with_suffix(".bin").unlink(), "data.bin does not exist"),
        (lambda p: p.with_suffix(".idx").write_bytes(b"not an index"), "is not a Megatron index"),
        (
            lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:20]),
            "truncated: 20 bytes are less than its header of 34",
        ),
        (
            lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:60]),
            "truncated: 60 bytes where 8 sequences need",
        ),
        (
            lambda p: p.with_suffix(".bin").write_bytes(p.with_suffix(".bin").read_bytes()[:-2]),
            "truncated: 810 bytes where its index says 812",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: object, pattern: str) -> None:
    write_index(tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(UserError, match=pattern):
        IndexedSource(section(tmp_path / "data"), 1)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        (dict(vocab_size=99, end_of_document=None), "token id 99, outside the vocabulary of 99"),
        (dict(vocab_size=99), "end_of_document = 99 is not below the vocabulary's size of 99"),
        (dict(vocab_size=None, vocab_file="none.txt"), "vocabulary file none.txt does not exist"),
        (dict(sequence_length=300), "406 tokens in 8 documents, too few .* = 301 tokens"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(tmp_path: Path, changes: dict, pattern: str) -> None:
    write_index(tmp_path / "data")
    with pytest.raises(UserError, match=pattern):
        IndexedSource(section(tmp_path / "data", **changes), 1)


@pytest.mark.parametrize(
    ("name", "text", "pattern"),
    [
        ("v.json", "{", "not valid JSON at line 1"),
        ("v.json", '{"a": 1}', "maps tokens to the ids 0, 1, 2"),
        ("v.txt", "", "has no tokens"),
    ],
)
def test_malformed_vocabularies_are_refused(tmp_path: Path, name: str, text: str, pattern: str) -> None:
    write_index(tmp_path / "data")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=pattern):
        IndexedSource(section(tmp_path / "data", vocab_size=None, vocab_file=str(tmp_path / name)), 1)


def test_an_empty_index_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path / "data", lengths=[])
    with pytest.raises(UserError, match="is empty .0 sequences."):
        IndexedSource(section(tmp_path / "data"), 1)


@pytest.mark.distributed
def test_unequal_masks_do_not_make_the_loss_depend_on_the_layout(tmp_path: Path, workers: object) -> None:
    """END tokens are masked and fall unevenly on processes and micro-batches; losses and gradients divide by the whole batch."""
    write_index(tmp_path / "data", lengths=[23, 5, 61, 9, 2, 44, 31, 70, 12, 50] * 4)
    fixed = ["data.kind=indexed", f"data.paths=[{tmp_path / 'data'}]", "data.vocab_size=100", f"data.end_of_document={END}"]
    layouts = {
        "one": (1, []),
        "rows": (1, ["train.micro_batch_size=2"]),
        "cp2": (2, ["parallel.context=2"]),
        "dp2": (2, []),
        "dp2cp2": (4, ["parallel.context=2", "parallel.distributed_optimizer=true"]),
    }
    found = {}
    for name, (world, overrides) in layouts.items():
        config = tiny_config(tmp_path / "runs", f"name={name}", *fixed, *overrides)
        workers(world).run(train_here, config)
        found[name] = metrics(config, "loss", "grad_norm", "tokens")
        assert (config.run_dir / "index_cache").is_dir() and len(metrics(config, "val_loss")) == 4
    assert all(tokens < 4 * 64 for _, _, tokens in found["one"]), "some labels are masked"
    for name, rows in found.items():
        for row, expected in zip(rows, found["one"]):
            assert row == pytest.approx(expected, rel=2e-5), name


@pytest.mark.distributed
def test_a_resume_that_may_shuffle_otherwise_says_so(tmp_path: Path, workers: object) -> None:
    write_index(tmp_path / "data", lengths=[40] * 40)
    fixed = ["data.kind=indexed", f"data.paths=[{tmp_path / 'data'}]", "data.vocab_size=100", f"data.end_of_document={END}"]
    config = tiny_config(tmp_path / "runs", *fixed)
    workers(1).run(train_here, config)
    rewind(config, 2)
    assert workers(1).run(printed_here, config, "shuffled", resume=True) == [[]]
    longer = tiny_config(tmp_path / "runs", *fixed, "train.steps=6")
    ((line,),) = workers(1).run(printed_here, longer, "shuffled", resume=True)
    assert "24 training sequences in all, 16 before: indexed data may be shuffled otherwise" in line
