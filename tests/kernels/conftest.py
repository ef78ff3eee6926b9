"""Kernel tests run natively on a GPU and under Triton's interpreter on a CPU.

Triton decides for one or the other when it is first imported, and other tests import it compiled. So without a GPU the tests
here are collected only where TRITON_INTERPRET=1 is set, and ``test_interpreted.py`` runs each file so, in a process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = ["test_interpreted.py"] if ON_GPU or INTERPRETED else ["test_*_kernels.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU these tests belong to ``pytest -m gpu``."""
    if ON_GPU:
        for item in items:
            if "tests/kernels" in item.path.as_posix():
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(params=["float32", "float16", "bfloat16"] if ON_GPU else ["float32", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Element types of the inputs; the interpreter computes bfloat16 wrongly."""
    return getattr(torch, request.param)


@pytest.fixture
def tolerance(dtype: torch.dtype) -> float:
    """Bound on the relative error against float64: some roundings of the inputs' element type."""
    return {torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}[dtype]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN (or an absurd integer) until they are written: what a kernel leaves out shows."""
    original = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(1 << 20))

    monkeypatch.setattr(torch, "empty", poisoned)
    torch.manual_seed(20)
