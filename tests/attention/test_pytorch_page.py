"""The script of docs/pytorch.md runs as it stands there, on one process and on several, with the same losses
and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
def test_the_model_with_fsdp_learns_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    code = (ROOT / "docs" / "pytorch.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "model.py").write_text(code)
    (one, one_norm), (two, two_norm) = (_losses_and_norms(tmp_path, processes) for processes in (1, 2))
    assert len(one) == 10
    assert two == pytest.approx(one, abs=2e-3)
    # AdamW alone would not notice gradients of another scale.
    assert two_norm == pytest.approx(one_norm, rel=1e-2)
    # 256 bytes drawn evenly: ln 256 = 5.545.
    assert one[-1] < 3.5 < 5 < one[0] < 6.5


def _losses_and_norms(folder: Path, processes: int) -> list[list[float]]:
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "model.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [line.split() for line in done.stdout.splitlines()]
    return [[float(step[column]) for step in steps] for column in (1, 2)]
