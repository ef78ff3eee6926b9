"""Timing on CUDA events (or the host's clock on a CPU): warm-up, many repetitions, percentiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """20th, 50th and 80th percentile in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


def measure(call: Callable[[int], object], device: torch.device, *, warmup: int = 2, repetitions: int = 10) -> Timing:
    """Percentiles of the time of ``call(i)``; i is the number of the repetition, by which the caller can rotate its inputs."""
    for i in range(warmup):
        call(i)
    if device.type != "cuda":
        return Timing(*_percentiles([_host_time(call, i) for i in range(repetitions)]))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for i, (start, end) in enumerate(events):
        start.record()
        call(i)
        end.record()
    torch.cuda.synchronize(device)
    return Timing(*_percentiles([start.elapsed_time(end) for start, end in events]))


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Peak of allocated memory during ``call`` in GiB, including what was allocated before it; 0 on a CPU."""
    if device.type != "cuda":
        call()
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def _host_time(call: Callable[[int], object], i: int) -> float:
    start = time.perf_counter()
    call(i)
    return (time.perf_counter() - start) * 1e3


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return p20, statistics.median(times), p80
