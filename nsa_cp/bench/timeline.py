"""``nsa-cp bench timeline``: when kernels compute and when NCCL's move data, from a profiler trace of one step on every rank.

torchrun --nproc-per-node 2 -m nsa_cp.cli.main bench timeline --seq-len 131072 --png docs/context-parallel-timeline.png
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

# A kernel belongs to the first stage of which a part occurs in its name; all others are torch's, for packing and sums.
STAGES = {
    "transfers": ("nccl",),
    "compression": ("block_product", "block_mean", "block_weight_gradient", "block_row_gradient", "activation_gradient"),
    "selection": ("block_scores", "top_blocks"),
    "selected": ("selected_attention", "build_unions", "list_numbers"),
    "window + compressed": ("interval_attention", "add_queries", "finish_rows"),
    "query gradients": ("query_gradients",),
    "gating": ("combine_forward", "combine_backward"),
}
OTHER = "copies and sums"
TRANSFERS = "transfers"
_COLOURS = {
    "window + compressed": "#2a78d6", "selected": "#eb6834", "selection": "#1baf7a", "compression": "#eda100",
    "query gradients": "#008300", "gating": "#e87ba4", OTHER: "#9b9a93", TRANSFERS: "#0b0b0b",
}  # fmt: skip
_STEP = "nsa_cp step"
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")


class Kernel(NamedTuple):
    """One kernel or copy on the device: start and end in microseconds of the trace's clock."""

    name: str
    stage: str
    stream: str
    start: float
    end: float


class Overlap(NamedTuple):
    """Milliseconds of one rank: in which an NCCL kernel ran (transfers), of those with a compute kernel beside it (hidden) and
    without (exposed); in which a compute kernel ran (compute); and from the first kernel's start to the last one's end (span)."""

    transfers_ms: float
    hidden_ms: float
    exposed_ms: float
    compute_ms: float
    span_ms: float


def trace_kernels(step: Callable[[], object], start_together: Callable[[], object]) -> list[Kernel]:
    """Run ``step`` (warmed up by the caller) once under torch's profiler and return the kernels that ran on this process's GPU.

    Profilers start at different times on different ranks, so ``start_together``, a collective, is run and waited for under the
    profiler first; its kernels are left out.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        start_together()
        torch.cuda.synchronize()
        with torch.profiler.record_function(_STEP):
            step()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    begin = _step_start(trace)
    return [kernel for kernel in parse_trace(trace) if kernel.start >= begin]


def _step_start(trace: dict[str, Any]) -> float:
    """When the host began the step, in microseconds of the trace's clock."""
    base = float(trace.get("baseTimeNanoseconds", 0)) / 1e3
    return base + min(float(e["ts"]) for e in trace["traceEvents"] if e.get("name") == _STEP and e.get("ph") == "X")


def parse_trace(trace: Any) -> list[Kernel]:
    """Kernels and copies of a trace in Chrome's format, ascending by start; other events and incomplete ones are skipped.

    Args:
        trace: the parsed JSON: a list of events, or an object that holds one as ``traceEvents``.
    """
    events = trace.get("traceEvents", []) if isinstance(trace, dict) else trace
    base = float(trace.get("baseTimeNanoseconds", 0)) / 1e3 if isinstance(trace, dict) else 0.0
    kernels = []
    for event in events if isinstance(events, list) else ():
        if not isinstance(event, dict) or event.get("ph") != "X" or str(event.get("cat", "")).lower() not in _KERNELS:
            continue
        try:
            start, duration = float(event["ts"]), float(event["dur"])
        except (KeyError, TypeError, ValueError):
            continue
        name, arguments = str(event.get("name", "")), event.get("args")
        stream = arguments.get("stream", event.get("tid")) if isinstance(arguments, dict) else event.get("tid")
        kernels.append(Kernel(name, stage_of(name), str(stream), base + start, base + start + duration))
    return sorted(kernels, key=lambda kernel: kernel.start)


def stage_of(name: str) -> str:
    """The stage a kernel belongs to."""
    lowered = name.lower()
    return next((stage for stage, parts in STAGES.items() if any(part in lowered for part in parts)), OTHER)


def overlap_of(kernels: Iterable[Kernel]) -> Overlap:
    """How much of the time of NCCL's kernels had a compute kernel beside it. NCCL's waiting for other ranks is included."""
    kernels = list(kernels)
    transfers = _union((k.start, k.end) for k in kernels if k.stage == TRANSFERS)
    compute = _union((k.start, k.end) for k in kernels if k.stage != TRANSFERS)
    moved, computed = _length(transfers), _length(compute)
    hidden = moved + computed - _length(_union([*transfers, *compute]))
    span = max((k.end for k in kernels), default=0.0) - min((k.start for k in kernels), default=0.0)
    return Overlap(*(x / 1e3 for x in (moved, hidden, moved - hidden, computed, span)))


def draw_timeline(ranks: list[list[Kernel]], title: str, path: Path) -> None:
    """Draw two lanes for each rank, compute above transfers, coloured by stage; time begins with the first kernel of any rank."""
    from nsa_cp.bench.plots import _MUTED, _axes, _finish

    figure, axes = _axes(title, "")
    figure.set_size_inches(13, 1.4 + 1.1 * len(ranks))
    first = min((k.start for kernels in ranks for k in kernels), default=0.0)
    labelled: set[str] = set()
    ticks = {}
    for rank, kernels in enumerate(ranks):
        overlap = overlap_of(kernels)
        for lane, is_transfer in enumerate((False, True)):
            height = -(2.8 * rank + lane)
            ticks[height] = f"rank {rank} {'NCCL' if is_transfer else 'compute'}"
            for stage, colour in _COLOURS.items():
                bars = [
                    ((k.start - first) / 1e3, (k.end - k.start) / 1e3)
                    for k in kernels
                    if k.stage == stage and (stage == TRANSFERS) == is_transfer
                ]
                if bars:
                    label = None if stage in labelled else stage
                    labelled.add(stage)
                    axes.broken_barh(bars, (height - 0.4, 0.8), color=colour, linewidth=0, label=label)
        note = f"NCCL {overlap.transfers_ms:.2f} ms, of that {overlap.exposed_ms:.2f} ms without compute beside it"
        below = (1.0, -(2.8 * rank + 1.45))
        axes.annotate(note, below, xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=8, color=_MUTED)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds", color=_MUTED)
    axes.margins(x=0.01, y=0.12)
    axes.legend(frameon=False, fontsize=8, labelcolor=_MUTED, ncols=len(labelled) or 1, loc="lower left", bbox_to_anchor=(0, 1))
    axes.set_title(title, loc="left", pad=28, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    _finish(figure, path)


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merge intervals into disjoint, ascending ones that cover the same time."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)
