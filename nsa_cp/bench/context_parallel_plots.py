"""Plots of ``docs/benchmarks/context_parallel.csv``: efficiency, exposed communication and memory against length."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from nsa_cp.bench.context_parallel import ONE_GPU
from nsa_cp.bench.plots import _INK, _MUTED, _STAGE_COLOURS, _axes, _finish, _length_axis


def plot_context_parallel(path: Path, folder: Path) -> list[Path]:
    """Draw what the CSV of ``nsa-cp bench context-parallel`` holds; returns the PNG files, named after it, in ``folder``."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    parallel = [row for row in rows if row["comm"] != ONE_GPU]
    known = [row for row in parallel if row["efficiency"] != "nan"]
    drawn = []
    if known:
        title = "Strong scaling: one GPU's time / GPUs over the time on all"
        drawn.append(
            _plot(known, title, "per cent", lambda row: 100 * float(row["efficiency"]), folder / f"{path.stem}_efficiency.png")
        )
    if parallel:
        drawn.append(
            _plot(
                parallel, "Exposed communication", "per cent of the time",
                lambda row: 100 * float(row["exposed_ms"]) / float(row["p50_ms"]), folder / f"{path.stem}_exposed.png",
            )
        )  # fmt: skip
        backward = [row for row in rows if row["pass"] == "backward"]
        title = "Peak memory a rank, forward and backward, inputs included"
        drawn.append(_plot(backward, title, "GiB", lambda row: float(row["peak_gib"]), folder / f"{path.stem}_memory.png"))
    return drawn


def _name(row: dict[str, str]) -> str:
    split = f"CP {row['cp']}" + (f" x TP {row['tp']}" if row["tp"] != "1" else "")
    return f"{split}, {row['layout']}, {row['comm'].replace('_', '-')}"


def _plot(rows: list[dict[str, str]], title: str, ylabel: str, value: Callable[[dict[str, str]], float], path: Path) -> Path:
    """One line for each number of GPUs, layout and transport (a colour) and pass (forward dashed)."""
    series: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        name = "1 GPU" if row["comm"] == ONE_GPU else _name(row)
        series[name, row["pass"]][int(row["seq_len"])] = value(row)
    names = list(dict.fromkeys(name for name, _ in series))
    figure, axes = _axes(title, ylabel)
    for (name, pass_), points in series.items():
        colour = _STAGE_COLOURS[names.index(name) % len(_STAGE_COLOURS)]
        lengths = sorted(points)
        heights = [points[length] for length in lengths]
        dashes = "--" if pass_ == "forward" else "-"
        axes.plot(lengths, heights, dashes, color=colour, linewidth=2, marker="o", markersize=5, label=f"{name}, {pass_}")
        axes.annotate(
            f"{heights[-1]:.1f}", (lengths[-1], heights[-1]), textcoords="offset points", xytext=(6, -3), fontsize=8, color=_INK
        )
    _length_axis(axes, {length for points in series.values() for length in points})
    axes.legend(frameon=False, fontsize=7, labelcolor=_MUTED)
    return _finish(figure, path)
