"""Imports run downward only: one floor of the house knows those below it and nothing of those above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nsa_cp

ROOT = Path(__file__).parents[2]
# From the ground up. A part may import parts of lower floors and itself.
FLOORS = [
    {"kernels", "config", "reference"},
    {"context_parallel"},
    {"ops"},
    {"attention"},
    {"testing"},
    {"megatron"},
    {"training"},
    {"study"},
    {"bench"},
    {"cli"},
]
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
# Narrower than their floors allow. The oracle stands alone so that it can contradict the rest.
ONLY = {"kernels": {"kernels"}, "config": {"config"}, "reference": {"reference", "config"}}
MAY_USE_TESTING = {"testing", "bench"}
MAY_USE_MEGATRON_CORE = {"megatron", "training"}


def module_of(path: Path) -> str:
    """The import name of a source file of the checkout; files of kernels/ are nsa_cp.kernels.*"""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "nsa_cp")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    """Every source file of the package, each once: kernels/ by its own folder and not through the link."""
    inside = [p for p in (ROOT / "nsa_cp").rglob("*.py") if p.relative_to(ROOT).parts[1] != "kernels"]
    return sorted(inside + list((ROOT / "kernels").rglob("*.py")))


def imported(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Dotted names that a file imports, anywhere in it; ``from a import b`` counts as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def part_of(name: str) -> str | None:
    """The part of the project that an imported name belongs to; None for other packages and for nsa_cp itself."""
    pieces = name.split(".")
    if pieces[0] != "nsa_cp" or len(pieces) == 1:
        return None
    return nsa_cp._HOME.get(pieces[1], name).split(".")[1]


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for every import (and, in kernels, every use) that the rules above forbid."""
    part, tree = module.split(".")[1], ast.parse(source)
    found = []
    names = imported(tree, module, is_package)
    for name in sorted(names):
        target = part_of(name)
        if target is None:
            if name.split(".")[0] in ("megatron", "kernels") and not (
                name.startswith("megatron") and part in MAY_USE_MEGATRON_CORE
            ):
                found.append(f"{module} imports {name}")
        elif target not in FLOOR_OF:
            if not target.startswith("__"):
                found.append(f"{module} imports {name}, which stands on no floor")
        elif target != part and (
            FLOOR_OF[target] > FLOOR_OF[part]
            or target not in ONLY.get(part, {target})
            or (target == "testing" and part not in MAY_USE_TESTING)
        ):
            found.append(f"{module} imports {name}")
    if part == "kernels":
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | names
        for banned in ("torch.distributed", "autograd.Function"):
            if any(f".{banned}." in f".{name}." for name in used):
                found.append(f"{module} uses {banned}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    module = module_of(path)
    if module == "nsa_cp":
        return  # its lazy names reach every floor on purpose; test_light_import.py watches it
    assert module.split(".")[1] in FLOOR_OF, f"{module} stands on no floor: add it to FLOORS"
    assert violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nsa_cp.ops.selected", "from nsa_cp.attention import NativeSparseAttention"),
        ("nsa_cp.ops.selected", "from nsa_cp import NativeSparseAttention"),
        ("nsa_cp.ops.selected", "def f():\n    import nsa_cp.training.loop"),
        ("nsa_cp.ops.selected", "from ..megatron import spec"),
        ("nsa_cp.context_parallel.halo", "from nsa_cp import ops"),
        ("nsa_cp.attention", "import megatron.core"),
        ("nsa_cp.cli.main", "from megatron.core import parallel_state"),
        ("nsa_cp.megatron.spec", "from nsa_cp.testing import assert_close"),
        ("nsa_cp.study.model", "from nsa_cp.bench.inputs import make_inputs"),
        ("nsa_cp.study.model", "from megatron.core import parallel_state"),
        ("nsa_cp.testing.pool", "from nsa_cp.megatron import spec"),
        ("nsa_cp.reference", "from nsa_cp.ops import compress_kv"),
        ("nsa_cp.config", "from nsa_cp.reference import reference_attention"),
        ("nsa_cp.ops.selected", "from kernels.selected_attention import forward"),
        ("nsa_cp.ops.selected", "from nsa_cp.helpers import f"),
        ("nsa_cp.kernels.gating.forward", "from nsa_cp.config import NSAConfig"),
        ("nsa_cp.kernels.gating.forward", "import torch.distributed as dist"),
        ("nsa_cp.kernels.gating.forward", "from torch import distributed"),
        ("nsa_cp.kernels.gating.forward", "import torch\nclass Gate(torch.autograd.Function): pass"),
        ("nsa_cp.kernels.gating.forward", "from torch.autograd import Function"),
    ],
)
def test_the_checker_catches(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nsa_cp.ops.selected", "from nsa_cp.kernels.selected_attention import forward\nfrom . import dispatch"),
        ("nsa_cp.training.loop", "from megatron.core import parallel_state\nfrom nsa_cp.megatron.spec import get_nsa_layer_spec"),
        ("nsa_cp.cli.main", "from nsa_cp import NSAConfig, __version__\nimport nsa_cp"),
        ("nsa_cp.kernels.gating.forward", "from nsa_cp.kernels.common import cdiv\nimport torch.autograd.profiler"),
        ("nsa_cp.bench.speed", "from nsa_cp.testing import assert_close"),
    ],
)
def test_the_checker_allows(module, source):
    assert violations(source, module) == []


def test_relative_imports_are_resolved():
    tree = ast.parse("from . import a\nfrom .b import c\nfrom ..d import e")
    assert imported(tree, "nsa_cp.ops.x", False) == {"nsa_cp.ops.a", "nsa_cp.ops.b.c", "nsa_cp.d.e"}
    assert imported(tree, "nsa_cp.ops", True) == {"nsa_cp.ops.a", "nsa_cp.ops.b.c", "nsa_cp.d.e"}
