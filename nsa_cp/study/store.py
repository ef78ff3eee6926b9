"""The file of a study's finished runs: one JSON object a line, only ever appended to, so an interrupted study loses nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from nsa_cp.training.files import json_lines

Record = dict[str, Any]


class RunStore:
    """The runs of one study.

    A line holds ``run`` (see ``RunSettings.run_id``), ``status`` (``done`` or ``failed``) and the run's results. Of several lines
    about one run the last counts.

    Args:
        path: the file; it and its folder are created when the first run is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, Record]:
        """Records by run id, in the order in which they were added. Unreadable lines, such as one cut off by a crash, are left
        out, so their runs are made again."""
        if not self.path.is_file():
            return {}
        return {record["run"]: record for record in json_lines(self.path.read_bytes()) if isinstance(record.get("run"), str)}

    def add(self, record: Record) -> None:
        """Append a record, on disk before this returns. Numbers that are not finite become null."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(_finite(record), allow_nan=False)
        with self.path.open("a+b") as file:
            # If the last line was cut off, end it first.
            file.seek(0, os.SEEK_END)
            if file.tell() and _last_byte(file) != b"\n":
                file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
