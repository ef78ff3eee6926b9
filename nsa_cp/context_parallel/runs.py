"""Rows interleaved from several sources, described as runs of consecutive rows, so that one concatenation of slices joins them.

That moves every byte once, at the speed of a copy, which gathering by an index for every row does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

# With more runs than this (many short documents) slicing takes the host longer than indexing takes the device.
MAX_RUNS = 64

# (source, first row in it, number of rows)
Run = tuple[int, int, int]


def find_runs(source: np.ndarray, row: np.ndarray) -> list[Run] | None:
    """The runs of a target whose row m is row ``row[m]`` of source ``source[m]``; None if there are more than MAX_RUNS."""
    breaks = np.flatnonzero((np.diff(source) != 0) | (np.diff(row) != 1)) + 1
    edges = [0, *breaks.tolist(), len(row)] if len(row) else []
    if len(edges) > MAX_RUNS + 1:
        return None
    return [(int(source[a]), int(row[a]), b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def join_runs(sources: Sequence[torch.Tensor], runs: Sequence[Run]) -> torch.Tensor:
    """Build the target [M, ...] from its sources."""
    pieces = [sources[source][first : first + count] for source, first, count in runs]
    return torch.cat(pieces) if pieces else sources[0][:0]


def slices_from(runs: Sequence[Run], source: int) -> list[slice]:
    """Slices of the target that came from ``source``, in the order of the rows in that source: the inverse of a join."""
    starts = np.cumsum([0, *(count for _, _, count in runs)]).tolist()
    found = sorted((first, start, count) for start, (origin, first, count) in zip(starts, runs, strict=False) if origin == source)
    return [slice(start, start + count) for _, start, count in found]
