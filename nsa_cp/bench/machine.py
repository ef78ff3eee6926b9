"""Describes what a measurement was made on: GPU, versions of packages, commit."""

from __future__ import annotations

import subprocess

import torch


def machine_facts(device: torch.device) -> dict[str, str]:
    """``gpu``, ``torch``, ``triton`` and ``commit`` (of the working directory, ``-dirty`` if it has changes), as CSV
    columns carry them."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": f"{commit}-dirty" if changed else commit or "unknown",
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
