"""`import nsa_cp` is cheap and its public names are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import nsa_cp

ROOT = Path(__file__).parents[2]


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter in the checkout has loaded after ``code``."""
    program = f"import sys\n{code}\nimport json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_else():
    loaded = modules_after("import nsa_cp; nsa_cp.__version__; dir(nsa_cp); nsa_cp.NSAConfig()")
    assert not loaded & {"torch", "numpy", "megatron", "matplotlib", "tensorboard", "pydantic", "triton", "yaml"}
    assert {name for name in loaded if name.split(".")[0] == "nsa_cp"} == {"nsa_cp", "nsa_cp.config"}


def test_the_core_needs_neither_megatron_nor_plotting():
    loaded = modules_after("from nsa_cp import NativeSparseAttention, SequenceLayout, native_sparse_attention")
    assert "torch" in loaded
    assert not loaded & {"megatron", "matplotlib", "tensorboard", "pydantic", "nsa_cp.testing", "nsa_cp.reference"}


@pytest.mark.parametrize("name", nsa_cp.__all__)
def test_every_public_name_is_there(name):
    assert getattr(nsa_cp, name).__name__ == name
    assert name in dir(nsa_cp)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'nsa_cp' has no attribute 'nothing'"):
        nsa_cp.nothing  # noqa: B018
