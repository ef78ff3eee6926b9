"""Kinds of numbers that commands take."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """An argument that counts something: at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def rate(text: str) -> float:
    """An argument in units a second: finite and above 0."""
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0, so nothing would ever arrive; give a rate, for example 50")
    return value


def seconds(text: str) -> float:
    """An argument in seconds: finite and above 0."""
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0; give seconds, for example 0.5")
    return value


def duration(text: str) -> float:
    """An argument in milliseconds: finite, 0 or more."""
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0; give milliseconds, for example 0.05")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number; give one, for example 0.5")
    return value
