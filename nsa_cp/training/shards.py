"""The content of a checkpoint's large files, its shards: read back when written, and checked before they are loaded.

All functions here are collective. The processes share the reading, and all of them find the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nsa_cp.training.errors import UserError
from nsa_cp.training.manifest import Shard, damaged

_BYTES_AT_ONCE = 1 << 24


def read_back(own: Iterable[Path]) -> dict[str, Shard]:
    """Size and checksum of shards that have just been written, by name.

    Args:
        own: those that this process wrote. Others may not see them yet on network storage.

    Raises:
        UserError: one cannot be read.
    """
    found, fault = {}, ""
    try:
        found = {file.name: Shard(file.stat().st_size, _crc32(file)) for file in own}
    except OSError as error:
        fault = str(error)
    parts = _gather((found, fault))
    if faults := [fault for _, fault in parts if fault]:
        raise UserError(f"a checkpoint could not be read back: {faults[0]}; the one before is kept: go on with --resume")
    return {name: shard for part, _ in parts for name, shard in part.items()}


def check_shards(path: Path, manifest: dict[str, Any]) -> None:
    """Check that a checkpoint's shards hold what was written. Earlier versions noted no checksums; then nothing is checked.

    Args:
        path, manifest: the checkpoint, and what ``read_manifest`` returned for it.

    Raises:
        UserError: one holds something else, or cannot be read.
    """
    names = sorted(manifest.get("crc32", {}))[dist.get_rank() :: dist.get_world_size()]
    own = [fault for name in names if (fault := _fault(path / name, manifest["crc32"][name]))]
    if faults := [fault for part in _gather(own) for fault in part]:
        raise damaged(path, min(faults))


def _gather(mine: Any) -> list[Any]:
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def _fault(file: Path, written: int) -> str:
    try:
        return "" if _crc32(file) == written else f"{file.name} does not hold the bytes that were written"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while piece := stream.read(_BYTES_AT_ONCE):
            value = zlib.crc32(piece, value)
    return value
