"""Plans: the index tensors that a layout (and NSA's settings) imply, built once per device and shared by all layers and steps.

They are computed on the host from the layout alone, so no kernel derives a position from a rank and nothing is read back from the
device. Ranges are half open. A local row is a token of this rank; a global row is its place in the whole packed sequence.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np
import torch

from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import HaloRows, RowPartition, SequenceLayout
from nsa_cp.context_parallel.autograd import makes_kept_tensors
from nsa_cp.context_parallel.layout import expand_ranges
from nsa_cp.ops.intervals import Intervals

# Plans kept of each kind. At a million tokens one takes some 60 MiB on the device and 90 MiB on the host, and the layout of a
# freshly drawn pack never recurs, so only as many are kept as a pipeline has microbatches in flight.
_PLANS_KEPT = 8


class LayoutPlan:
    """Index tensors that depend on the layout alone, for every kind of attention. Get one from :func:`get_layout_plan`."""

    def __init__(self, layout: SequenceLayout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        # Digests of the calls with this layout on which a group's ranks have been found to agree; kept for `start_agreement`.
        self.agreed: dict[tuple, int] = {}

    @cached_property
    def position(self) -> torch.Tensor:
        """Position of each local row in its document, int32 [T]."""
        return self._tensor(self.layout.local_positions)

    @cached_property
    def row_partition(self) -> RowPartition:
        """Which rank holds which token of the sequence."""
        return RowPartition(self.layout.row_owner, self.layout.cp_size).to(self.device)

    @cached_property
    def consecutive_runs(self) -> list[tuple[int, int, int]]:
        """Runs of local rows consecutive in a document: ``(number of rows, document, its tokens up to the last row)``."""
        rows, documents, positions = self.layout.local_rows, self.layout.local_documents, self.layout.local_positions
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(documents) != 0)) + 1
        edges = [0, *breaks.tolist(), len(rows)] if len(rows) else []
        pairs = zip(edges[:-1], edges[1:], strict=True)
        return [(last - first, int(documents[first]), int(positions[last - 1]) + 1) for first, last in pairs]

    @makes_kept_tensors
    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values).astype(np.int32)).to(self.device, non_blocking=True)


class NSAPlan(LayoutPlan):
    """Index tensors of NSA: positions, intervals and owners that its stages read.

    Compressed tokens and blocks are numbered consecutively over all documents of the pack. Get one from :func:`get_plan`.
    """

    def __init__(self, layout: SequenceLayout, config: NSAConfig, device: torch.device) -> None:
        super().__init__(layout, device)
        self.config = config
        lengths = np.diff(layout.cu_seqlens).tolist()
        self.compressed_counts = np.asarray([config.num_compressed_tokens(n) for n in lengths], dtype=np.int64)
        self.block_counts = np.asarray([config.num_select_blocks(n) for n in lengths], dtype=np.int64)
        self._document_starts = np.asarray(layout.cu_seqlens[:-1], dtype=np.int64)

    # --- documents -----------------------------------------------------------------------------------------------------

    @cached_property
    def key_start(self) -> torch.Tensor:
        """Global row at which each local row's document starts, int32 [T]."""
        return self._tensor(self.layout.local_document_starts)

    @cached_property
    def document_runs(self) -> list[tuple[int, int, int]]:
        """Maximal runs of local rows of one document, ``(first row, end row, document)``; gaps between chunks do not end one."""
        documents = self.layout.local_documents
        edges = np.flatnonzero(np.diff(documents, prepend=-1, append=-1)) if len(documents) else np.zeros(1, dtype=np.int64)
        return [(int(a), int(b), int(documents[a])) for a, b in zip(edges[:-1], edges[1:], strict=True)]

    # --- compression ---------------------------------------------------------------------------------------------------

    @cached_property
    def compressed_base(self) -> np.ndarray:
        """Number of each document's first compressed token, then the total C: int64 [documents + 1]."""
        return np.concatenate([[0], np.cumsum(self.compressed_counts)])

    @cached_property
    def compressed_position(self) -> np.ndarray:
        """Document position of the first token of each compressed token, int64 [C]."""
        return expand_ranges(np.zeros_like(self.compressed_counts), self.compressed_counts) * self.config.compress_stride

    @cached_property
    def compressed_start(self) -> np.ndarray:
        """Global row of the first token of each compressed token, int64 [C]."""
        return self.compressed_position + np.repeat(self._document_starts, self.compressed_counts)

    @cached_property
    def compressed_partition(self) -> RowPartition:
        """Which rank makes which compressed token: that of the block's last row, so that a halo on the left is enough."""
        owner = self.layout.row_owner[self.compressed_start + self.config.compress_block_size - 1]
        return RowPartition(owner, self.layout.cp_size).to(self.device)

    @cached_property
    def own_compressed(self) -> np.ndarray:
        """Numbers of the compressed tokens that this rank makes, ascending int64."""
        return self.compressed_partition.rows[self.layout.cp_rank]

    @cached_property
    def compression_halo(self) -> HaloRows:
        """The l - 1 rows before each of this rank's chunks."""
        return HaloRows(self.layout, self.config.compress_block_size - 1).to(self.device)

    @cached_property
    def compression_starts(self) -> torch.Tensor:
        """Row of the compression buffer (own rows and halo) at which the block of each own compressed token starts, int32."""
        return self._tensor(np.searchsorted(self.compression_halo.buffer_rows, self.compressed_start[self.own_compressed]))

    @cached_property
    def compression_is_gapless(self) -> bool:
        """Whether own blocks that overlap always start exactly d apart, as the Triton compressor needs.

        False only where a chunk of another rank, shorter than l, lies between chunks of this one.
        """
        steps = np.diff(self.compressed_start[self.own_compressed])
        return bool(np.all((steps == self.config.compress_stride) | (steps >= self.config.compress_block_size)))

    @cached_property
    def own_compressed_position(self) -> torch.Tensor:
        """Document position of the first token of each own compressed token, int32: where its key is rotated."""
        return self._tensor(self.compressed_position[self.own_compressed])

    # --- compressed attention ------------------------------------------------------------------------------------------

    @cached_property
    def _compressed_range(self) -> tuple[np.ndarray, np.ndarray]:
        """First and end number of the compressed tokens that each local query sees: token i iff i*d + l - 1 <= position."""
        base = self.compressed_base[self.layout.local_documents]
        last_seen = self.layout.local_positions - self.config.compress_block_size + 1
        visible = np.maximum(0, last_seen // self.config.compress_stride + 1)
        return base, base + visible

    @cached_property
    def compressed_intervals(self) -> Intervals:
        """Compressed tokens that each local query sees in the complete buffer of C."""
        return Intervals(*self._compressed_range, int(self.compressed_base[-1]), self.device)

    @cached_property
    def shard_intervals(self) -> tuple[Intervals, ...]:
        """For each rank, the compressed tokens that each local query sees in that rank's shard."""
        return tuple(Intervals.between(*self._compressed_range, rows, self.device) for rows in self.compressed_partition.rows)

    @cached_property
    @makes_kept_tensors
    def shard_rows(self) -> tuple[torch.Tensor, ...]:
        """For each rank, the rows of the complete buffer that its shard fills, int64."""
        return tuple(torch.from_numpy(rows).to(self.device) for rows in self.compressed_partition.rows)

    # --- window --------------------------------------------------------------------------------------------------------

    @property
    def window_halo(self) -> HaloRows:
        """The w - 1 rows before each of this rank's chunks."""
        return self._window[0]

    @property
    def window_intervals(self) -> Intervals:
        """Rows of the window buffer (own rows and halo) that each local query sees: up to w, the query's own last."""
        return self._window[1]

    @cached_property
    def _window(self) -> tuple[HaloRows, Intervals]:
        return get_window_plan(self.layout, self.config.window_size, self.device)

    # --- selected branch -----------------------------------------------------------------------------------------------

    @cached_property
    def block_base(self) -> torch.Tensor:
        """Number of the first block of each local query's document, int32 [T]: added to a block's index in the document."""
        base = np.cumsum(self.block_counts) - self.block_counts
        return self._tensor(base[self.layout.local_documents])

    @cached_property
    def block_start(self) -> torch.Tensor:
        """Global row at which each block starts, int32 [blocks of all documents]."""
        return self._tensor(self._block_start)

    @cached_property
    def _block_start(self) -> np.ndarray:
        within = expand_ranges(np.zeros_like(self.block_counts), self.block_counts) * self.config.select_block_size
        return within + np.repeat(self._document_starts, self.block_counts)

    @cached_property
    def max_blocks(self) -> int:
        """Most blocks any document has."""
        return int(self.block_counts.max(initial=0))

    @cached_property
    @makes_kept_tensors
    def block_is_remote(self) -> torch.Tensor:
        """Whether a block has a row that another rank holds, bool [blocks of all documents]."""
        foreign = np.concatenate([[0], np.cumsum(self.layout.row_owner != self.layout.cp_rank)])
        document_end = np.repeat(np.asarray(self.layout.cu_seqlens[1:]), self.block_counts)
        end = np.minimum(self._block_start + self.config.select_block_size, document_end)
        return torch.from_numpy(foreign[end] > foreign[self._block_start]).to(self.device)


@lru_cache(maxsize=_PLANS_KEPT)
def get_layout_plan(layout: SequenceLayout, device: torch.device) -> LayoutPlan:
    """The plan of a layout alone on a device. The most recent ones are cached."""
    return LayoutPlan(layout, device)


@lru_cache(maxsize=_PLANS_KEPT)
def get_plan(layout: SequenceLayout, config: NSAConfig, device: torch.device) -> NSAPlan:
    """The plan of a layout and NSA's settings on a device. The most recent ones are cached."""
    return NSAPlan(layout, config, device)


@lru_cache(maxsize=_PLANS_KEPT)
def get_window_plan(layout: SequenceLayout, window_size: int, device: torch.device) -> tuple[HaloRows, Intervals]:
    """Halo and intervals of a sliding window of ``window_size`` keys, the query's own included. Recent ones are cached."""
    halo, rows = HaloRows(layout, window_size - 1), layout.local_rows
    first = np.maximum(layout.local_document_starts, rows - window_size + 1)
    return halo.to(device), Intervals.between(first, rows + 1, halo.buffer_rows, device, window_size)
