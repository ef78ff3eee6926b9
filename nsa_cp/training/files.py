"""Paths as users write them, files that are there whole or not at all, and files to which lines are added."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from nsa_cp.training.errors import UserError


def expanded(path: str | Path) -> Path:
    """``path`` with the home folder for a leading ``~``, which a shell puts in only where it stands at the start of a word.

    Raises:
        UserError: ``~name`` of a user that is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} begins with ~, but that home folder is not known; write the whole path") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content`` (text as UTF-8) in one step, so that a reader or a crash never meets half of it. Several
    processes may write the same file: the last one stays."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def json_lines(content: bytes) -> list[dict[str, Any]]:
    """The objects of a text with one JSON object a line; lines that cannot be read, such as a last one that a crash cut short,
    are left out."""
    rows = []
    for line in content.split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]
