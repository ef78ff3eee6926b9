"""Which keys each query sees, given as one contiguous range of key rows for each query row.

Window, compressed and dense causal attention all have this form, on one process and under context parallelism alike: every
buffer keeps its rows in ascending global order, so the keys that a query sees are adjacent in it.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from nsa_cp.context_parallel.autograd import makes_kept_tensors


class Intervals:
    """Query row t sees key rows ``begin[t] .. end[t]`` (half open, possibly none) of a buffer of ``num_keys`` rows.

    Args:
        begin: int64 [T], never descending.
        end: int64 [T], never descending, at least ``begin``.
        num_keys: M, rows of the key buffer.
        device: where the index tensors for kernels live.
        span: upper bound of the keys one query sees, equal on all ranks, because kernels choose tiles (and so roundings) by it;
            default ``num_keys``.
    """

    def __init__(self, begin: np.ndarray, end: np.ndarray, num_keys: int, device: torch.device, span: int | None = None) -> None:
        assert len(begin) == len(end) and np.all(begin <= end)
        assert np.all(np.diff(begin) >= 0) and np.all(np.diff(end) >= 0), "rows must stand in global order"
        self.begin, self.end, self.num_keys, self.device = begin, end, num_keys, device
        self.span = num_keys if span is None else span

    @classmethod
    def between(
        cls, low: np.ndarray, high: np.ndarray, keys: np.ndarray, device: torch.device, span: int | None = None
    ) -> Intervals:
        """Intervals of queries that see global indices ``low[t] .. high[t]`` (half open), in a buffer whose rows have the
        ascending global indices ``keys``."""
        return cls(np.searchsorted(keys, low), np.searchsorted(keys, high), len(keys), device, span)

    @cached_property
    def num_visible(self) -> int:
        """Number of (query, key) pairs, summed over queries."""
        return int((self.end - self.begin).sum())

    @cached_property
    def of_queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``begin``, ``end`` as int32 tensors [T] on the device."""
        return self._to_device(self.begin), self._to_device(self.end)

    @cached_property
    def of_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse: first and end query row that see key row j, int32 [M] each. A range, because both bounds ascend."""
        keys = np.arange(self.num_keys)
        first = np.searchsorted(self.end, keys, side="right")
        last = np.searchsorted(self.begin, keys, side="right")
        return self._to_device(first), self._to_device(np.maximum(first, last))

    def query_chunks(self, heads: int, budget: int) -> list[tuple[int, int, int, int]]:
        """Split the queries into chunks ``(first, last, key_first, key_last)``, half open, whose scores fit in memory.

        A chunk scores all its queries against all keys that any of them sees: at most ``budget`` elements over ``heads`` heads
        (except in chunks of 16 queries, the smallest), and not many more keys than each query sees, which would waste work.
        """
        chunks, row, total = [], 0, len(self.begin)
        longest = int((self.end - self.begin).max(initial=0))
        while row < total:
            size = 2048
            while size > 16:
                last = min(row + size, total)
                span = int(self.end[last - 1] - self.begin[row])
                if span * (last - row) * heads <= budget and span <= 2 * longest + 64:
                    break
                size //= 2
            last = min(row + size, total)
            chunks.append((row, last, int(self.begin[row]), int(self.end[last - 1])))
            row = last
        return chunks

    @makes_kept_tensors
    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self.device, non_blocking=True)
