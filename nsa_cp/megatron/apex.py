"""Tells NVIDIA's apex, which Megatron-Core can use, from the unrelated package of that name on PyPI, which breaks it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path


def has_apex() -> bool:
    """Whether NVIDIA's apex with its CUDA extensions is installed, judged by its compiled module and not by its name."""
    return importlib.util.find_spec("amp_C") is not None


def check_apex() -> bool:
    """Whether Megatron-Core will use NVIDIA's apex, which is optional. Imports nothing.

    Raises:
        ValueError: the installed package ``apex`` is not NVIDIA's, but Megatron-Core would take it for that.
    """
    if has_apex():
        return True
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(next(iter(spec.submodule_search_locations)))
    if (folder / "normalization").is_dir() and (folder / "multi_tensor_apply").is_dir():
        return False  # NVIDIA's, installed without its CUDA extensions: Megatron-Core falls back by itself
    raise ValueError(
        f"the installed package 'apex' {_version()} at {folder} is not NVIDIA's: PyPI gives that name to a toolkit for the "
        "Pyramid web framework, and Megatron-Core would take it for the other; run `pip uninstall apex` (NVIDIA's apex is "
        "optional and is built from its repository)"
    )


def _version() -> str:
    try:
        return importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        return "(of unknown version)"
