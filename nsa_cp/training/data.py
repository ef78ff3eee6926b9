"""Training and validation data: the SampleSource protocol, text read as bytes, and batches of samples.

A sample is one whole sequence and depends on (seed, index) alone. All context-parallel processes build it, and each then keeps
its own part.
"""

from __future__ import annotations

import codecs
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nsa_cp.training.config import NUM_BYTES, DataSection
from nsa_cp.training.errors import UserError
from nsa_cp.training.files import expanded

DOCUMENT_SEPARATOR = b"\n\n"
_CHUNK = 1 << 20
_PIECE, _PIECES = 1 << 16, 256


class Sample(NamedTuple):
    """One sequence of S tokens.

    Attributes:
        tokens: [S] int64, the input.
        labels: [S] int64, the token after each input token.
        loss_mask: [S] float32, 1 where the label counts.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray


class SampleSource(Protocol):
    """What the trainer needs of a data set.

    Attributes:
        vocab_size: number of token ids.
        bytes_per_token: mean bytes of text in one token.
        num_validation_samples: number of validation sequences.
        fingerprint: changes with the data's content but not with their place on disk (see :meth:`ByteStream.fingerprint`).
    """

    vocab_size: int
    bytes_per_token: float
    num_validation_samples: int
    fingerprint: str

    def train_sample(self, index: int) -> Sample:
        """Training sequence ``index``, for any index >= 0; the same on every process and in every run with the same seed."""

    def validation_sample(self, index: int) -> Sample:
        """Validation sequence ``index`` of ``num_validation_samples``; they do not overlap and do not depend on the seed."""

    def unigram_bits_per_byte(self) -> tuple[float, float]:
        """Entropy of single tokens over the data and over the validation sequences, in bits per byte."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Readable text of token ids."""


class ByteStream:
    """Documents laid end to end as one stream of bytes, an empty line between them, without copying them.

    Args:
        documents: uint8 arrays; memory maps will do.
    """

    def __init__(self, documents: Sequence[np.ndarray]) -> None:
        separator = np.frombuffer(DOCUMENT_SEPARATOR, dtype=np.uint8)
        parts: list[np.ndarray] = []
        for document in documents:
            parts += [separator, document] if parts else [document]
        self._parts = parts
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Bytes [start, start + length) as int64; the range must lie inside the stream."""
        assert start >= 0 and start + length <= len(self), "range outside the stream"
        out = np.empty(length, dtype=np.int64)
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        filled = 0
        while filled < length:
            offset = start + filled - int(self._starts[part])
            piece = self._parts[part][offset : offset + length - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            part += 1
        return out

    def histogram(self, start: int = 0) -> np.ndarray:
        """How often each byte value occurs at or after byte ``start``: [256] int64."""
        counts = np.zeros(NUM_BYTES, dtype=np.int64)
        for begin in range(start, len(self), _CHUNK):
            counts += np.bincount(self.read(begin, min(_CHUNK, len(self) - begin)), minlength=NUM_BYTES)
        return counts

    def fingerprint(self) -> str:
        """Length and a hash: of all bytes up to 16 MiB; of longer streams, to be cheap, of 16 MiB in pieces spread all over."""
        digest = hashlib.sha256(self._starts.tobytes())
        for begin in range(0, len(self), max(_PIECE, len(self) // _PIECES)):
            digest.update(self.read(begin, min(_PIECE, len(self) - begin)).astype(np.uint8))
        return f"{len(self)} bytes with hash {digest.hexdigest()[:16]}"


class ByteSource:
    """A SampleSource of text as bytes: the stream's first part is for training, its end for validation.

    Each epoch cuts the training part into sequences, starting at a random byte, and visits them in random order. Both are drawn
    from (seed, epoch), so that a sample depends on (seed, index) alone and a resumed run goes on exactly where it was.

    Args:
        documents: uint8 arrays of UTF-8 text.
        sequence_length: S, bytes of a sequence.
        validation_fraction: share of the bytes held out at the end.
        seed: of the order of training samples.
        vocab_size: number of the model's token ids; at least 256.
        origin: what messages call the data.

    Raises:
        UserError: no text, or too little for one training and one validation sequence.
    """

    bytes_per_token = 1.0

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        *,
        sequence_length: int,
        validation_fraction: float,
        seed: int,
        vocab_size: int = NUM_BYTES,
        origin: str = "the text",
    ) -> None:
        self.stream, self.sequence_length, self.seed, self.vocab_size = ByteStream(documents), sequence_length, seed, vocab_size
        total, need = len(self.stream), sequence_length + 1
        if total == 0:
            raise UserError(f"{origin} is empty; training needs at least {2 * need} bytes")
        self.num_train_bytes = total - max(need, math.ceil(total * validation_fraction))
        if self.num_train_bytes < need:
            raise UserError(
                f"{origin} has {total} bytes, too few for one training and one validation sequence of "
                f"data.sequence_length + 1 = {need} bytes with data.validation_fraction = {validation_fraction}; "
                f"add text or shorten the sequences"
            )
        self.num_validation_samples = (total - self.num_train_bytes - 1) // sequence_length
        self.fingerprint = self.stream.fingerprint()
        self.samples_per_epoch = max(1, (self.num_train_bytes - 1) // sequence_length - 1)
        self._epoch: tuple[int, int, np.ndarray] = (-1, 0, np.empty(0))

    def train_sample(self, index: int) -> Sample:
        """See SampleSource."""
        epoch, position = divmod(index, self.samples_per_epoch)
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            slack = self.num_train_bytes - 1 - self.samples_per_epoch * self.sequence_length
            self._epoch = (epoch, int(rng.integers(slack + 1)), rng.permutation(self.samples_per_epoch))
        _, offset, order = self._epoch
        return self._sample(offset + int(order[position]) * self.sequence_length)

    def validation_sample(self, index: int) -> Sample:
        """See SampleSource."""
        assert 0 <= index < self.num_validation_samples, "validation index out of range"
        return self._sample(self.num_train_bytes + index * self.sequence_length)

    def unigram_bits_per_byte(self) -> tuple[float, float]:
        """See SampleSource; over the whole text and over its validation part."""
        return entropy_bits(self.stream.histogram()), entropy_bits(self.stream.histogram(self.num_train_bytes))

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of ``text``."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of bytes; what is not UTF-8 shows as the replacement character."""
        return bytes(token for token in tokens if token < NUM_BYTES).decode("utf-8", errors="replace")

    def _sample(self, start: int) -> Sample:
        window = self.stream.read(start, self.sequence_length + 1)
        return Sample(window[:-1].copy(), window[1:].copy(), np.ones(self.sequence_length, dtype=np.float32))


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy of the distribution with these counts, in bits; 0 for no counts."""
    total = counts.sum()
    if total == 0:
        return 0.0
    p = counts[counts > 0] / total
    return float((p * np.log2(1 / p)).sum())  # not minus the sum, which of a single symbol would be -0


def load_text(data: DataSection, seed: int) -> ByteSource:
    """The source for ``data.kind`` pydoc_topics or text. Local: touches no process group.

    Raises:
        UserError: a file is missing, unreadable, empty or not UTF-8, or there is too little text.
    """
    if data.kind == "pydoc_topics":
        from pydoc_data.topics import topics

        # A fixed shuffle: in alphabetical order the held-out end would lie inside one long table.
        keys = sorted(topics, key=lambda key: hashlib.md5(key.encode(), usedforsecurity=False).digest())
        documents = [np.frombuffer(topics[key].strip().encode(), dtype=np.uint8) for key in keys]
        origin = "the text of pydoc_data.topics"
    else:
        documents = [read_utf8(path) for path in data.paths]
        origin = f"data.paths = {', '.join(data.paths)}"
    return ByteSource(
        documents,
        sequence_length=data.sequence_length,
        validation_fraction=data.validation_fraction,
        seed=seed,
        vocab_size=data.vocab_size or NUM_BYTES,
        origin=origin,
    )


def read_utf8(path: str) -> np.ndarray:
    """Memory-map a UTF-8 file as uint8, after checking every byte of it.

    Raises:
        UserError: missing, not a regular file, empty, unreadable, or not UTF-8 (with the offset of the first bad byte).
    """
    file = expanded(path)
    if not file.is_file():
        raise UserError(f"data file {path} {'is not a file' if file.exists() else 'does not exist'}; correct data.paths")
    if file.stat().st_size == 0:
        raise UserError(f"data file {path} is empty (0 bytes); remove it from data.paths or give another")
    try:
        mapped = np.memmap(file, dtype=np.uint8, mode="r")
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}; correct data.paths") from error
    decoder = codecs.getincrementaldecoder("utf-8")()
    for begin in range(0, len(mapped), _CHUNK):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(mapped[begin : begin + _CHUNK].tobytes(), final=begin + _CHUNK >= len(mapped))
        except UnicodeDecodeError as error:
            where = begin - pending + error.start
            raise UserError(f"data file {path} is not UTF-8 text: byte {where} is invalid; convert it to UTF-8") from error
    return mapped


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Stack samples into a micro-batch of whole sequences.

    Returns:
        ``tokens``, ``labels`` and ``position_ids`` [b, S] int64, and ``loss_mask`` [b, S] float32.
    """
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    labels = torch.from_numpy(np.stack([sample.labels for sample in samples]))
    mask = torch.from_numpy(np.stack([sample.loss_mask for sample in samples]))
    position_ids = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1).contiguous()
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": position_ids}


def train_batches(
    source: SampleSource, first_sample: int, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[dict[str, Tensor]]:
    """This data-parallel rank's micro-batches of one optimizer step.

    The step uses samples [first_sample, first_sample + global_batch_size), whatever the number of ranks.
    """
    rows = micro_batch_size * dp_size
    for micro in range(global_batch_size // rows):
        first = first_sample + micro * rows + dp_rank * micro_batch_size
        yield collate([source.train_sample(first + row) for row in range(micro_batch_size)])


def validation_batches(
    source: SampleSource,
    *,
    num_sequences: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    rounds_multiple: int = 1,
) -> tuple[int, Callable[[], Iterator[dict[str, Tensor]]]]:
    """This rank's micro-batches of the fixed validation sequences.

    Every rank gets the same number of micro-batches, as the schedule needs; surplus sequences have an all-zero loss mask.

    Args:
        source: the data.
        num_sequences: number of validation sequences to use; fewer if the source has fewer.
        micro_batch_size: sequences in a micro-batch.
        dp_rank: this data-parallel rank.
        dp_size: number of data-parallel ranks.
        rounds_multiple: make the number of micro-batches a multiple of this.

    Returns:
        The number of micro-batches and a function that starts an iterator over them.
    """
    count = min(num_sequences, source.num_validation_samples)
    rounds = -(-count // (micro_batch_size * dp_size * rounds_multiple)) * rounds_multiple

    def start() -> Iterator[dict[str, Tensor]]:
        for micro in range(rounds):
            first = (micro * dp_size + dp_rank) * micro_batch_size
            rows = [source.validation_sample(min(first + row, count - 1)) for row in range(micro_batch_size)]
            for row, sample in enumerate(rows):
                if first + row >= count:
                    rows[row] = sample._replace(loss_mask=np.zeros_like(sample.loss_mask))
            yield collate(rows)

    return rounds, start
