"""Which rank holds which tokens: the one description of a sequence that all other parts read positions from. Host data only.

Global rows number the tokens of the packed sequence from 0 to S - 1; a rank's local rows are the global rows it holds, in
ascending order; a position counts from the start of a token's document. Ranges are half open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from operator import index

import numpy as np
import torch

from nsa_cp.config import LayoutKind


@dataclass(frozen=True)
class SequenceLayout:
    """A packed sequence of S tokens, cut into chunks of consecutive global rows, each held by one rank.

    Make one with :meth:`build` or :meth:`from_chunks`, which check their arguments.

    Args:
        cu_seqlens: document d covers global rows ``cu_seqlens[d] .. cu_seqlens[d+1]``; the last entry is S.
        chunks: for each rank the ``(start, end)`` of its chunks, ascending and disjoint; those of all ranks cover 0 .. S.
        cp_rank: this process's rank.
        kind: the rule that made the chunks: ``zigzag``, ``contiguous`` or ``custom``.
    """

    cu_seqlens: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, int], ...], ...]
    cp_rank: int
    kind: str

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once, because every plan is looked up by it; of integers alone, so that it is the same in every process."""
        return hash((self.cu_seqlens, self.chunks, self.cp_rank))

    @classmethod
    def build(
        cls,
        cu_seqlens: Sequence[int] | torch.Tensor | int,
        *,
        cp_size: int = 1,
        cp_rank: int = 0,
        kind: LayoutKind = "zigzag",
        per_document: bool = True,
    ) -> SequenceLayout:
        """Cut a sequence for ``cp_size`` ranks, in pieces as even as possible.

        ``zigzag`` cuts into 2 * cp_size pieces and gives rank r pieces r and 2 * cp_size - 1 - r, which balances causal
        work; ``contiguous`` cuts into cp_size pieces, one per rank.

        Args:
            cu_seqlens: document borders 0, ..., S, or the length S of a single document. A batch of b sequences of s tokens is
                the pack ``[0, s, 2s, ..., b*s]``.
            cp_size, cp_rank: number of ranks, and which one this process is.
            kind: ``"zigzag"`` or ``"contiguous"``.
            per_document: cut every document by this rule, as Megatron does; False cuts the pack as a whole, so that a document
                may lie on any of the ranks.

        Raises:
            ValueError: borders that are not whole numbers, do not start at 0 or descend; a rank outside cp_size; an unknown
                kind.
        """
        borders = _borders(cu_seqlens)
        _check_rank(cp_rank, cp_size)
        if kind not in ("zigzag", "contiguous"):
            raise ValueError(f"layout kind {kind!r} is unknown; use 'zigzag' or 'contiguous'")
        spans = zip(borders[:-1], borders[1:], strict=True) if per_document else [(0, borders[-1])]
        pieces = 2 * cp_size if kind == "zigzag" else cp_size
        held: list[list[tuple[int, int]]] = [[] for _ in range(cp_size)]
        for start, end in spans:
            for piece in range(pieces):
                chunk = tuple(start + (end - start) * edge // pieces for edge in (piece, piece + 1))
                if chunk[0] < chunk[1]:
                    held[min(piece, pieces - 1 - piece) if kind == "zigzag" else piece].append(chunk)
        return cls.from_chunks(borders, held, cp_rank=cp_rank, kind=kind)

    @classmethod
    def from_chunks(
        cls, cu_seqlens: Sequence[int], chunks: Sequence[Sequence[tuple[int, int]]], *, cp_rank: int = 0, kind: str = "custom"
    ) -> SequenceLayout:
        """A layout from explicit chunks of any lengths: ``chunks[rank] = [(start, end), ...]`` in global rows.

        Raises:
            ValueError: chunks that overlap or leave rows out; borders that do not start at 0 or descend; a rank without chunks.
        """
        borders = _borders(cu_seqlens)
        _check_rank(cp_rank, len(chunks))
        ordered = sorted(chunk for rank_chunks in chunks for chunk in rank_chunks if chunk[0] < chunk[1])
        covered = 0
        for start, end in ordered:
            if start != covered:
                raise ValueError(f"chunks leave or repeat rows between {covered} and {start}; every row needs exactly one rank")
            covered = end
        if covered != borders[-1]:
            raise ValueError(f"chunks cover {covered} rows of {borders[-1]}; every row needs exactly one rank")
        # Adjacent chunks of one rank are merged, so that the same cut always has the same chunks.
        merged = tuple(_merge(sorted(chunk for chunk in rank_chunks if chunk[0] < chunk[1])) for rank_chunks in chunks)
        return cls(borders, merged, cp_rank, kind)

    @property
    def cp_size(self) -> int:
        """Number of ranks."""
        return len(self.chunks)

    @property
    def num_tokens(self) -> int:
        """S, tokens of the whole pack."""
        return self.cu_seqlens[-1]

    @property
    def num_local_tokens(self) -> int:
        """T, tokens this rank holds."""
        return sum(end - start for start, end in self.chunks[self.cp_rank])

    @property
    def num_documents(self) -> int:
        """Number of documents in the pack, including empty ones."""
        return len(self.cu_seqlens) - 1

    def rows_of(self, rank: int) -> np.ndarray:
        """Ascending int64 global rows that ``rank`` holds."""
        return self._rows[rank]

    @cached_property
    def _rows(self) -> tuple[np.ndarray, ...]:
        return tuple(expand_ranges([c[0] for c in chunks], [c[1] for c in chunks]) for chunks in self.chunks)

    @property
    def local_rows(self) -> np.ndarray:
        """Ascending int64 global rows of this rank, [T]."""
        return self._rows[self.cp_rank]

    @cached_property
    def row_owner(self) -> np.ndarray:
        """Rank that holds each global row, int32 [S]."""
        owner = np.empty(self.num_tokens, dtype=np.int32)
        for rank, chunks in enumerate(self.chunks):
            for start, end in chunks:
                owner[start:end] = rank
        return owner

    @cached_property
    def local_documents(self) -> np.ndarray:
        """Index of each local row's document, int64 [T]."""
        return np.searchsorted(np.asarray(self.cu_seqlens[1:]), self.local_rows, side="right")

    @cached_property
    def local_document_starts(self) -> np.ndarray:
        """Global row at which each local row's document starts, int64 [T]."""
        return np.asarray(self.cu_seqlens, dtype=np.int64)[self.local_documents]

    @cached_property
    def local_positions(self) -> np.ndarray:
        """Position of each local row in its document, int64 [T]."""
        return self.local_rows - self.local_document_starts

    def shard(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's rows of a global tensor whose dimension ``dim`` has size S.

        Raises:
            ValueError: that dimension has another size.
        """
        if x.shape[dim] != self.num_tokens:
            raise ValueError(f"dimension {dim} has {x.shape[dim]} rows, the layout {self.num_tokens}; pass the whole pack")
        return x.index_select(dim, torch.from_numpy(self.local_rows).to(x.device))

    def unshard(self, shards: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """The global tensor from the local tensors of all ranks, in rank order; the inverse of :meth:`shard`."""
        order = np.argsort(np.concatenate([self.rows_of(rank) for rank in range(self.cp_size)]), kind="stable")
        return torch.cat(tuple(shards), dim).index_select(dim, torch.from_numpy(order).to(shards[0].device))

    def halo_rows(self, rank: int, depth: int) -> np.ndarray:
        """Global rows of other ranks at most ``depth`` rows before a row of ``rank``, in the same document; ascending int64.

        If the chunk before is shorter than ``depth``, rows of chunks further back belong to it, too.
        """
        if depth <= 0:
            return np.empty(0, dtype=np.int64)
        borders = np.asarray(self.cu_seqlens, dtype=np.int64)
        starts = np.asarray([chunk[0] for chunk in self.chunks[rank]], dtype=np.int64)
        # A chunk's first row reaches furthest back; documents that start inside a chunk need nothing from outside it.
        document_starts = borders[np.searchsorted(borders[1:], starts, side="right")]
        # Stop at the start of this rank's chunk before, whose own range covers what lies further back: ranges stay disjoint.
        first = np.maximum(np.maximum(document_starts, starts - depth), np.concatenate([[0], starts])[:-1])
        rows = expand_ranges(first, starts)
        return rows[self.row_owner[rows] != rank]


def expand_ranges(starts: Sequence[int] | np.ndarray, ends: Sequence[int] | np.ndarray) -> np.ndarray:
    """The integers of all ranges ``starts[i] .. ends[i]``, one range after the other, int64."""
    first, last = np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64)
    lengths = last - first
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(first - offsets, lengths)


def _check_rank(cp_rank: int, cp_size: int) -> None:
    if not 0 <= cp_rank < cp_size:
        raise ValueError(f"cp_rank = {cp_rank} lies outside cp_size = {cp_size}; pass a rank in 0..{cp_size - 1}")


def _borders(cu_seqlens: Sequence[int] | torch.Tensor | int) -> tuple[int, ...]:
    if isinstance(cu_seqlens, torch.Tensor):
        cu_seqlens = cu_seqlens.tolist()
    given = (0, cu_seqlens) if isinstance(cu_seqlens, (Integral, float)) else tuple(cu_seqlens)
    try:
        borders = tuple(index(border) for border in given)
    except TypeError:
        raise ValueError(f"cu_seqlens = {given[:4]}... are not whole numbers; give token counts as integers") from None
    if len(borders) < 2 or borders[0] != 0:
        raise ValueError(f"cu_seqlens = {borders[:4]}... must hold at least two borders and start at 0")
    for left, right in zip(borders[:-1], borders[1:], strict=True):
        if right < left:
            raise ValueError(f"cu_seqlens descends from {left} to {right}; borders must not descend")
    return borders


def _merge(chunks: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, end in chunks:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)
