"""The script of docs/megatron.md runs as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
def test_the_plug_in_as_a_script_on_a_cpu(tmp_path: Path) -> None:
    _, _, after = (ROOT / "docs" / "megatron.md").read_text().partition("The plug-in from above as a script")
    code = after.split("```python\n")[1].split("```")[0]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # 256 bytes drawn evenly: ln 256 = 5.545.
    assert 5.0 < float(done.stdout.split()[-1]) < 6.5
