"""The run for memory checkers: it says what is wrong by its exit status, and a wrong kernel does not pass."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nsa_cp.testing import sanitize

ON_GPU = torch.cuda.is_available()


def test_one_kernel_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "nsa_cp.testing.sanitize", "--kernels", "gating", "--cases", "2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "right" in result.stdout and "all results are right" in result.stdout


@pytest.mark.skipif(ON_GPU, reason="where there is a GPU the kernels run")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert sanitize.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.fixture
def torch_in_place_of_kernels(monkeypatch: pytest.MonkeyPatch) -> sanitize.Case:
    """Both sides of the comparison on the torch path, so that only the comparison is tested; and a small case."""
    for name, function in sanitize.KERNELS.items():
        monkeypatch.setitem(sanitize.KERNELS, name, lambda p, backend, blocks, f=function: f(p, "torch", blocks))
    case = list(sanitize.CASES.values())[1]
    return replace(case, documents=(0, 1, 70, 150), qk_dim=24, v_dim=16, dtype=torch.float16)


@pytest.mark.parametrize("kernel", sanitize.KERNELS)
def test_wrong_results_are_found(kernel: str, torch_in_place_of_kernels: sanitize.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case, cpu = torch_in_place_of_kernels, torch.device("cpu")
    assert sanitize.check(kernel, case, cpu) == []
    right = sanitize.KERNELS[kernel]

    def wrong(p: object, backend: str, blocks: torch.Tensor) -> sanitize.Answer:
        outs, others, leaves = right(p, backend, blocks)
        if backend == "triton":
            outs, others = [1.05 * out for out in outs], [x + 1 for x in others]
        return outs, others, leaves

    monkeypatch.setitem(sanitize.KERNELS, kernel, wrong)
    assert sanitize.check(kernel, case, cpu)
