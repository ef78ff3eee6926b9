"""Runs the kernel tests of each stage under Triton's interpreter, which needs a process that imports Triton so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(path.name for path in Path(__file__).parent.glob("test_*_kernels.py"))


@pytest.mark.parametrize("name", FILES)
def test_kernels_under_the_interpreter(name: str) -> None:
    path = Path(__file__).parent / name
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(path),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
