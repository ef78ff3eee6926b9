"""Files that are there whole or not at all."""

from __future__ import annotations

import uuid
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content`` (text as UTF-8) in one step, so that a reader or a crash never meets half of it. Several
    processes may write the same file: the last one stays."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
