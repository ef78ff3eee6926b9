"""``nsa-cp env``: the versions and devices that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

import torch

import nsa_cp


def report() -> str:
    """The report of ``nsa-cp env``: one line ``name: value`` for each version, device or launcher."""
    facts = {
        "nsa-cp": nsa_cp.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}",
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "megatron-core", "transformer-engine", "numpy", "pydantic")},
        "apex": _apex(),
        "cuda": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        if torch.cuda.is_available()
        else "not available",
        **_devices(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not available",
        "mpi": _mpi(),
    }
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    devices = {}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices[f"gpu {index}"] = (
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"compute capability {properties.major}.{properties.minor}"
            )
    return devices


def _apex() -> str:
    from nsa_cp.megatron import check_apex

    try:
        if check_apex():
            return "NVIDIA's, with its CUDA extensions"
    except ValueError as error:
        return str(error)
    return "NVIDIA's, without its CUDA extensions" if importlib.util.find_spec("apex") else "not installed"


def _mpi() -> str:
    launcher = shutil.which("mpirun") or "no mpirun on PATH"
    if importlib.util.find_spec("mpi4py") is None:
        return f"mpi4py not installed, {launcher}"
    return f"mpi4py {_version('mpi4py')}, {launcher}"
