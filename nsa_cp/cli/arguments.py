"""Command-line arguments that several commands share: checked numbers, paths, devices, and the attention's sizes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_cp.training.errors import UserError
from nsa_cp.training.files import expanded

if TYPE_CHECKING:
    import torch

_SIZES = (
    "compress_block_size", "compress_stride", "select_block_size", "num_selected_blocks", "num_init_blocks", "num_local_blocks",
    "window_size",
)  # fmt: skip


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of the attention's sizes. One that is not given leaves NSAConfig's default."""
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, metavar="N")


def given_sizes(arguments: argparse.Namespace) -> dict[str, int]:
    """The attention's sizes given on the command line, by their names in NSAConfig."""
    return {name: size for name in _SIZES if (size := getattr(arguments, name)) is not None}


def place(text: str) -> Path:
    """Argument type of a file or folder. Expands a leading ``~``, which a shell leaves alone in ``--csv=~/rows.csv``."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """Argument type of a count: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def rate(text: str) -> float:
    """Argument type of a rate in units a second: finite and above 0."""
    return _above_0(text, ", so nothing would ever arrive; give a rate, for example 50")


def factor(text: str) -> float:
    """Argument type of a factor or a learning rate: finite and above 0."""
    return _above_0(text, "; give for example 0.001")


def seconds(text: str) -> float:
    """Argument type of a time in seconds: finite and above 0."""
    return _above_0(text, "; give seconds, for example 0.5")


def duration(text: str) -> float:
    """Argument type of a time in milliseconds: finite, 0 or more."""
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0; give milliseconds, for example 0.05")
    return value


def _above_0(text: str, remedy: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0{remedy}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number; give one, for example 0.5")
    return value


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names: ``cuda`` or ``cpu``; if empty, CUDA where it is available.

    Raises:
        UserError: another name, or CUDA where there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch finds no GPU (0 devices); use --device cpu")
    if name not in ("", "cpu", "cuda"):
        raise UserError(f"--device {name!r} is unknown; use cuda or cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
