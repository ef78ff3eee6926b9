"""Writes benchmark rows as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any


def write_csv(row_type: type, rows: Sequence[Any], path: Path) -> None:
    """Write rows, instances of the dataclass ``row_type``, under a header of its field names; creates the folder if needed.

    The header leaves out trailing underscores of field names, which only avoid keywords of Python (``pass_``).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name.rstrip("_") for field in fields(row_type))
        writer.writerows(map(astuple, rows))
