"""Megatron's indexed datasets (a .bin file of tokens and an .idx file of document lengths) as a SampleSource.

Training sequences come from Megatron-Core's GPTDataset, whose order depends on the seed and on the number of samples requested.
Validation sequences are cut from the last documents in their order on disk, and depend on neither.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.utils import Split

from nsa_cp.training.config import DataSection
from nsa_cp.training.data import ByteStream, Sample, entropy_bits
from nsa_cp.training.errors import UserError
from nsa_cp.training.files import expanded

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the token dtype, sequences, document bounds
_TOKENS_CHECKED = 1 << 20


class IndexVocabulary:
    """The vocabulary of an indexed dataset, with the attributes that GPTDataset expects of a tokenizer.

    Args:
        vocab_size: number of token ids.
        end_of_document: token id that ends a document, or None.
        tokens: text of each id, to print samples; None if unknown.
    """

    def __init__(self, vocab_size: int, end_of_document: int | None, tokens: list[str] | None) -> None:
        self.vocab_size, self.eod, self.tokens = vocab_size, end_of_document, tokens
        # GPTDataset makes this part of the key of its cached indices.
        self.unique_identifiers = {"class": type(self).__name__, "vocab_size": vocab_size, "eod": end_of_document}


def read_vocabulary(data: DataSection) -> IndexVocabulary:
    """The vocabulary that ``data.vocab_size`` or ``data.vocab_file`` describes.

    Raises:
        UserError: the file is missing, empty or malformed, or is not of size ``vocab_size``; or ``end_of_document`` is not one of
            its ids.
    """
    tokens = None if data.vocab_file is None else _read_vocab_file(expanded(data.vocab_file))
    if tokens is not None and data.vocab_size not in (None, len(tokens)):
        raise UserError(
            f"data.vocab_size = {data.vocab_size}, but data.vocab_file = {data.vocab_file} has {len(tokens)}; leave one out"
        )
    size = len(tokens) if tokens is not None else data.vocab_size
    assert size is not None, "config_checks lets none through without one of the two"
    if data.end_of_document is not None and data.end_of_document >= size:
        raise UserError(
            f"data.end_of_document = {data.end_of_document} is not below the vocabulary's size of {size}; correct one of them"
        )
    return IndexVocabulary(size, data.end_of_document, tokens)


def _read_vocab_file(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"vocabulary file {path} does not exist; correct data.vocab_file or give data.vocab_size")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"vocabulary file {path} is not UTF-8 text: byte {error.start} is invalid; convert it to UTF-8"
        ) from error
    if path.suffix != ".json":
        tokens = text.splitlines()
    else:
        try:
            table = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"vocabulary file {path} is not valid JSON at line {error.lineno}: {error.msg}") from error
        ids = sorted(table.values()) if isinstance(table, dict) else None
        if ids is None or ids != list(range(len(ids))):
            raise UserError(f"vocabulary file {path} is not a JSON object that maps tokens to the ids 0, 1, 2, ...")
        tokens = sorted(table, key=table.__getitem__)
    if not tokens:
        raise UserError(f"vocabulary file {path} has no tokens; correct data.vocab_file or give data.vocab_size")
    return tokens


def check_index(prefix: str, vocab_size: int) -> None:
    """Check the two files of an indexed dataset, reading no more than the index and the first million tokens.

    Args:
        prefix: path of both files, without ``.idx`` and ``.bin``.
        vocab_size: number of token ids.

    Raises:
        UserError: a file is missing, is not an index, is truncated, or holds token ids outside the vocabulary.
    """
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    for file in (idx, bin_):
        if not file.is_file():
            raise UserError(
                f"data file {file} does not exist; data.paths takes the prefix of a .bin and an .idx file, without the ending"
            )
    with open(idx, "rb") as stream:
        head = stream.read(_HEADER.size)
    if not head.startswith(_MAGIC):
        raise UserError(
            f"data file {idx} is not a Megatron index: it does not begin with MMIDIDX; build one with IndexedDatasetBuilder"
        )
    if len(head) < _HEADER.size:
        raise UserError(
            f"data file {idx} is truncated: {len(head)} bytes are less than its header of {_HEADER.size}; build it again"
        )
    _, version, code, sequences, documents = _HEADER.unpack(head)
    if version != 1 or code not in {item.value for item in DType}:
        raise UserError(
            f"data file {idx} has version {version} and token type {code}; only version 1 with types 1 to 8 can be read"
        )
    need = _HEADER.size + 12 * sequences + 8 * documents
    if idx.stat().st_size < need:
        raise UserError(
            f"data file {idx} is truncated: {idx.stat().st_size} bytes where {sequences} sequences need {need}; build it again"
        )
    if sequences == 0:
        raise UserError(f"data file {idx} is empty (0 sequences); build it from some text")
    dtype = np.dtype(DType.dtype_from_code(code))
    lengths = np.fromfile(idx, dtype=np.int32, count=sequences, offset=_HEADER.size)
    size = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    if bin_.stat().st_size < size:
        raise UserError(f"data file {bin_} is truncated: {bin_.stat().st_size} bytes where its index says {size}; build it again")
    first = np.fromfile(bin_, dtype=dtype, count=min(_TOKENS_CHECKED, size // dtype.itemsize))
    _check_ids(first, vocab_size, prefix)


def _check_ids(tokens: np.ndarray, vocab_size: int, prefix: str) -> None:
    if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        bad = int(tokens.max()) if int(tokens.max()) >= vocab_size else int(tokens.min())
        raise UserError(
            f"data file {prefix}.bin holds token id {bad}, outside the vocabulary of {vocab_size}; correct data.vocab_size"
        )


class IndexedSource:
    """A SampleSource over one indexed dataset.

    Construction is local and checks everything; :meth:`open_training` builds Megatron's sample index and needs every process.

    Args:
        data: the run's data section, of kind indexed.
        seed: of the order of training samples.

    Raises:
        UserError: see ``read_vocabulary`` and ``check_index``; or too few documents or tokens for the two splits.
    """

    def __init__(self, data: DataSection, seed: int) -> None:
        self.prefix, self.sequence_length, self.seed = str(expanded(data.paths[0])), data.sequence_length, seed
        self.vocabulary = read_vocabulary(data)
        self.vocab_size, self.bytes_per_token = self.vocabulary.vocab_size, data.bytes_per_token
        check_index(self.prefix, self.vocab_size)
        self._index = IndexedDataset(self.prefix, mmap=True)
        self._lengths = np.asarray(self._index.sequence_lengths, dtype=np.int64)
        self._first_validation = self._split(data.validation_fraction)
        self._bounds = np.concatenate([[0], np.cumsum(self._lengths[self._first_validation :])])
        self.num_validation_samples = (int(self._bounds[-1]) - 1) // self.sequence_length
        files = [np.memmap(self.prefix + ending, dtype=np.uint8, mode="r") for ending in (".idx", ".bin")]
        self.fingerprint = ByteStream(files).fingerprint()
        # So that a cached index of other documents that were under the same path is not used.
        self.vocabulary.unique_identifiers["fingerprint"] = self.fingerprint
        self._train: GPTDataset | None = None

    def _split(self, fraction: float) -> int:
        """Index of the first validation document. Those from it on are the fewest that hold ``fraction`` of all tokens, and at
        least one sequence."""
        total, need = int(self._lengths.sum()), self.sequence_length + 1
        wanted = max(need, fraction * total)
        from_end = np.cumsum(self._lengths[::-1])
        count = int(np.searchsorted(from_end, wanted)) + 1
        first = len(self._lengths) - count
        training = int(self._lengths[: max(first, 0)].sum())
        if first < 1 or training < need:
            raise UserError(
                f"data.paths = {self.prefix} has {total} tokens in {len(self._lengths)} documents, too few for one training "
                f"and one validation sequence of data.sequence_length + 1 = {need} tokens from different documents; "
                f"add documents or shorten the sequences"
            )
        return first

    def open_training(self, num_samples: int, cache_dir: Path) -> None:
        """Build the index of training samples on the first process and open it on all. Collective: every process calls it.

        Args:
            num_samples: number of training samples of the whole run.
            cache_dir: folder for the index, on storage that all processes share.
        """
        config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.sequence_length,
            blend=([self.prefix], None),
            split="1,0,0",
            path_to_cache=str(cache_dir),
            tokenizer=self.vocabulary,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=self.vocabulary.eod is not None,
            create_attention_mask=False,
        )

        def build() -> GPTDataset:
            documents = np.arange(self._first_validation, dtype=np.int32)
            return GPTDataset(self._index, self.prefix, documents, num_samples, Split.train, config)

        if dist.get_rank() == 0:
            try:
                self._train = build()
            except (ValueError, EOFError):
                # A cached index that was cut short, by a full disk or a kill while it was written: Megatron takes it for whole.
                shutil.rmtree(cache_dir)
                self._train = build()
        dist.barrier()
        if self._train is None:
            self._train = build()

    def train_sample(self, index: int) -> Sample:
        """See SampleSource; ``open_training`` must have run."""
        assert self._train is not None, "open_training has not run"
        item = self._train[index % len(self._train)]
        return self._checked(item["tokens"].numpy(), item["labels"].numpy(), item["loss_mask"].numpy())

    def validation_sample(self, index: int) -> Sample:
        """See SampleSource."""
        window = self._read_validation(index * self.sequence_length, self.sequence_length + 1)
        mask = np.ones(self.sequence_length, dtype=np.float32)
        if self.vocabulary.eod is not None:
            mask[window[:-1] == self.vocabulary.eod] = 0.0
        return self._checked(window[:-1].copy(), window[1:].copy(), mask)

    def unigram_bits_per_byte(self) -> tuple[float, float]:
        """See SampleSource; both figures are of the validation documents, because the whole data set may be too large to read."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for document in range(self._first_validation, len(self._lengths)):
            counts += np.bincount(self._index.get(document).astype(np.int64), minlength=self.vocab_size)
        bits = entropy_bits(counts) / self.bytes_per_token
        return bits, bits

    def encode(self, text: str) -> list[int]:
        """Ids of the white-space separated words of ``text`` that are in the vocabulary; no tokenizer is involved."""
        tokens = self.vocabulary.tokens
        table = {} if tokens is None else {token: index for index, token in enumerate(tokens)}
        return [table[word] for word in text.split() if word in table]

    def decode(self, tokens: Sequence[int]) -> str:
        """The vocabulary's tokens, or their ids where there is no vocabulary file, separated by spaces."""
        names = self.vocabulary.tokens
        return " ".join(str(token) if names is None else names[token] for token in tokens)

    def _read_validation(self, start: int, length: int) -> np.ndarray:
        parts: list[np.ndarray] = []
        document = int(np.searchsorted(self._bounds, start, side="right")) - 1
        offset = start - int(self._bounds[document])
        while length > 0:
            take = min(length, int(self._bounds[document + 1] - self._bounds[document]) - offset)
            if take:
                parts.append(self._index.get(self._first_validation + document, offset=offset, length=take))
            length, document, offset = length - take, document + 1, 0
        return np.concatenate(parts).astype(np.int64)

    def _checked(self, tokens: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> Sample:
        _check_ids(tokens, self.vocab_size, self.prefix)
        _check_ids(labels, self.vocab_size, self.prefix)
        return Sample(tokens, labels, mask.astype(np.float32))
