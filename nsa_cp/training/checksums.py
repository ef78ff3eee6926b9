"""Checksums of the large files of a checkpoint, computed by all processes together."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

_BYTES_AT_ONCE = 1 << 24


def checksums(own: Iterable[Path]) -> dict[str, int | None]:
    """The CRC-32 of every file by its name, None for one that cannot be read; the same on all processes. Collective.

    Args:
        own: the files that this process reads.
    """
    parts: list[dict[str, int | None]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, {file.name: _crc32(file) for file in own})
    return {name: value for part in parts for name, value in part.items()}


def _crc32(file: Path) -> int | None:
    value = 0
    try:
        with file.open("rb") as stream:
            while piece := stream.read(_BYTES_AT_ONCE):
                value = zlib.crc32(piece, value)
    except OSError:
        return None
    return value
