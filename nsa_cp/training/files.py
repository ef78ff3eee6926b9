"""Helpers for files: paths that begin with ~, atomic writes, and files with one JSON object a line."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from nsa_cp.training.errors import UserError


def expanded(path: str | Path) -> Path:
    """``path`` with the home folder for a leading ``~``. Shells replace ``~`` only at the start of a word, not in ``key=~/x``.

    Raises:
        UserError: ``~name`` of an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} begins with ~, but that home folder is not known; write the whole path") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at ``path`` by ``content`` (text as UTF-8) in one step: no reader sees, and no crash leaves, half of it.
    If several processes write the same file, the last one wins."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def json_lines(content: bytes) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; unreadable lines, such as one cut short by a crash, are left out."""
    rows = []
    for line in content.split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]
