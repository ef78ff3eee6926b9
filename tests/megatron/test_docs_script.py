"""The script of docs/megatron.md runs as it stands there, and the module of the README as a script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_the_module_of_the_readme() -> None:
    """Run as it stands there, with the tensors that its comment describes."""
    blocks = [block.split("```")[0] for block in (ROOT / "README.md").read_text().split("```python\n")]
    (code,) = (block for block in blocks if "SequenceLayout.build" in block)
    torch.manual_seed(1)
    given = {name: torch.randn(96, 2, 128) for name in ("k_cmp", "k_slc", "k_win", "v_cmp", "v_slc", "v_win")}
    given |= {"q": torch.randn(96, 32, 128), "gate_logits": torch.randn(96, 32, 3), "device": "cpu", "dtype": torch.float32}
    exec(compile(code, "README.md", "exec"), given)
    assert given["out"].shape == (96, 32, 128) and given["out"].isfinite().all() and given["out"].std() > 0.01
