"""Runs the kernel tests of each stage under Triton's interpreter, which needs processes that import Triton so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

# The largest first: as many run at a time as there are cores, and the last should be a short one.
FILES = sorted(Path(__file__).parent.glob("test_*_kernels.py"), key=lambda path: -path.stat().st_size)


def _run(path: Path) -> subprocess.CompletedProcess[str]:
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *options, str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future]]:
    """Of the files whose tests were asked for."""
    paths = [item.callspec.params["path"] for item in request.session.items if item.path == Path(__file__)]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {path: pool.submit(_run, path) for path in paths}
    pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(660)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kernels_under_the_interpreter(path: Path, runs: dict[Path, Future]) -> None:
    result = runs[path].result()
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
