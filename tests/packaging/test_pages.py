"""The scripts of the pages and the module of the README run as they stand there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def _code(page: str, containing: str) -> str:
    """The one block of Python on a page that has these characters in it."""
    blocks = [block.split("```")[0] for block in (ROOT / page).read_text().split("```python\n")[1:]]
    (code,) = (block for block in blocks if containing in block)
    return code


def _run(*arguments: str, folder: Path) -> str:
    """What Python prints, without GPUs, started with these arguments in an otherwise empty folder."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.distributed
def test_the_plug_in_as_a_script_on_a_cpu(tmp_path: Path) -> None:
    code = _code("docs/megatron.md", containing="init_process_group")
    # 256 bytes drawn evenly: ln 256 = 5.545.
    assert 5.0 < float(_run("-c", code, folder=tmp_path).split()[-1]) < 6.5


@pytest.mark.distributed
def test_the_model_with_fsdp_learns_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    """With the same losses and gradients."""
    (tmp_path / "model.py").write_text(_code("docs/pytorch.md", containing="fully_shard"))
    (one, one_norm), (two, two_norm) = (_losses_and_norms(tmp_path, processes) for processes in (1, 2))
    assert len(one) == 10
    assert two == pytest.approx(one, abs=2e-3)
    # AdamW alone would not notice gradients of another scale.
    assert two_norm == pytest.approx(one_norm, rel=1e-2)
    # 256 bytes drawn evenly: ln 256 = 5.545.
    assert one[-1] < 3.5 < 5 < one[0] < 6.5


def _losses_and_norms(folder: Path, processes: int) -> list[list[float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    steps = [line.split() for line in _run(*launcher, "model.py", folder=folder).splitlines()]
    return [[float(step[column]) for step in steps] for column in (1, 2)]


def test_the_module_of_the_readme() -> None:
    """Run with the tensors that its comment describes."""
    code = _code("README.md", containing="SequenceLayout.build")
    torch.manual_seed(1)
    given = {name: torch.randn(96, 2, 128) for name in ("k_cmp", "k_slc", "k_win", "v_cmp", "v_slc", "v_win")}
    given |= {"q": torch.randn(96, 32, 128), "gate_logits": torch.randn(96, 32, 3), "device": "cpu", "dtype": torch.float32}
    exec(compile(code, "README.md", "exec"), given)
    assert given["out"].shape == (96, 32, 128) and given["out"].isfinite().all() and given["out"].std() > 0.01
