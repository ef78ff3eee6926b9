"""What a measurement was made on: GPU, versions, commit."""

from __future__ import annotations

import subprocess

import torch


def machine_facts(device: torch.device) -> dict[str, str]:
    """``gpu``, ``torch``, ``triton`` and ``commit`` (of the working directory), as CSV columns carry them."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton_version, "commit": answer.stdout.strip() or "unknown"}
