"""Chooses the device a process trains on, before CUDA is touched: PyTorch reads CUDA_VISIBLE_DEVICES only once."""

from __future__ import annotations

import os

import torch

from nsa_cp.training.errors import UserError


def restrict_devices(wanted: str) -> str | None:
    """Hide the GPUs if training is to run on the CPU. Call it before anything asks PyTorch for CUDA.

    Args:
        wanted: ``train.device``. ``auto`` takes the CPU if this machine has fewer GPUs than processes.

    Returns:
        A sentence for the user if ``auto`` chose the CPU on a machine that has GPUs, else None.

    Raises:
        UserError: LOCAL_WORLD_SIZE is not a number.
    """
    if wanted == "cuda":
        return None
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not text.isdecimal():
        raise UserError(f"LOCAL_WORLD_SIZE = {text!r} is not a whole number; start with torchrun, which sets it")
    processes = int(text)
    gpus = torch.cuda.device_count()  # asks the driver without initialising CUDA
    if wanted == "auto" and processes <= gpus:
        return None
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if wanted == "auto" and gpus:
        return f"{processes} processes on this machine share {gpus} GPU: training on the CPU; start at most {gpus} to use the GPU"
    return None


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this process.

    Args:
        wanted: ``train.device``.
        local_rank: this process's rank on its machine.

    Raises:
        UserError: CUDA is asked for and absent, GPUs are visible in a run on the CPU, or there are fewer GPUs than processes.
    """
    available = torch.cuda.is_available()
    if wanted == "cpu" and available:
        raise UserError(
            "train.device = cpu, but CUDA is in use in this process already; start it with CUDA_VISIBLE_DEVICES= (empty)"
        )
    if wanted == "cuda" and not available:
        raise UserError(
            "train.device = cuda, but PyTorch finds no GPU (0 devices); use train.device=cpu or install a CUDA build of PyTorch"
        )
    if not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: the machine has {torch.cuda.device_count()}; "
            f"start at most that many processes on it"
        )
    return torch.device("cuda", local_rank)
