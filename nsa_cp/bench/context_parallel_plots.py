"""Plots of what ``nsa-cp bench context-parallel`` measured: efficiency, exposed communication and memory against length."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path

from nsa_cp.bench.context_parallel import ONE_GPU, PASSES
from nsa_cp.bench.plots import _GRID, _INK, _MUTED, _STAGE_COLOURS, _axes, _finish, _length_axis

# Least distance between labels at the ends of lines, as a fraction of the axis.
_LABEL_GAP = 0.05


def plot_context_parallel(path: Path, folder: Path) -> list[Path]:
    """Draw the CSV file ``path`` of ``nsa-cp bench context-parallel``; returns the PNG files, named after it, in ``folder``."""
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
        title = "Peak memory a rank, inputs included; backward: forward and backward together"
        drawn.append(_plot(rows, title, "GiB", lambda row: float(row["peak_gib"]), folder / f"{path.stem}_memory.png"))
    return drawn


def _name(row: dict[str, str]) -> str:
    if row["comm"] == ONE_GPU:
        return "1 GPU"
    split = f"CP {row['cp']}" + (f" x TP {row['tp']}" if row["tp"] != "1" else "")
    return f"{split}, {row['layout']}, {row['comm'].replace('_', '-')}"


def _plot(rows: list[dict[str, str]], title: str, ylabel: str, value: Callable[[dict[str, str]], float], path: Path) -> Path:
    """A panel for each pass, with a line for each number of GPUs, layout and transport, coloured alike in all panels."""
    series: dict[str, dict[str, dict[int, float]]] = {pass_: defaultdict(dict) for pass_ in PASSES}
    for row in rows:
        series[row["pass"]][_name(row)][int(row["seq_len"])] = value(row)
    names = list(dict.fromkeys(_name(row) for row in rows if row["comm"] != ONE_GPU))
    figure, panels, key = _panels(title, ylabel)
    for panel, pass_ in zip(panels, PASSES, strict=True):
        for name, points in series[pass_].items():
            colour = _STAGE_COLOURS[names.index(name) % len(_STAGE_COLOURS)] if name in names else _MUTED
            lengths = sorted(points)
            heights = [points[length] for length in lengths]
            panel.plot(lengths, heights, color=colour, linewidth=2, marker="o", markersize=5, label=name)
        _length_axis(panel, {int(row["seq_len"]) for row in rows})
    for panel, pass_ in zip(panels, PASSES, strict=True):
        _label_ends(panel, series[pass_].values())
    handles = panels[0].get_legend_handles_labels()
    key.legend(*handles, loc="center", ncols=3, frameon=False, fontsize=8, labelcolor=_MUTED)
    return _finish(figure, path)


def _panels(title: str, ylabel: str):  # noqa: ANN202 - matplotlib is imported late
    """The figure, a panel for each pass (side by side, on one scale), and empty axes below for the legend."""
    figure, first = _axes(PASSES[0], ylabel)
    figure.set_size_inches(9, 4.8)
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=11)
    grid = figure.add_gridspec(2, len(PASSES), height_ratios=(9, 1))
    first.set_subplotspec(grid[0, 0])
    panels = [first]
    for column, pass_ in enumerate(PASSES[1:], 1):
        panel = figure.add_subplot(grid[0, column], sharey=first)
        panel.set_title(pass_, loc="left", color=_INK, fontsize=11)
        panel.grid(axis="y", color=_GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=_MUTED, length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color(_GRID)
        panels.append(panel)
    key = figure.add_subplot(grid[1, :])
    key.set_axis_off()
    return figure, panels, key


def _label_ends(axes, series: Collection[dict[int, float]]) -> None:  # noqa: ANN001
    """Write each line's last value to its right; labels that would overlap are moved up, one above the other."""
    ends: dict[int, set[str]] = defaultdict(set)
    for points in series:
        ends[max(points)].add(f"{points[max(points)]:.1f}")
    bottom, top = axes.get_ylim()
    for length, labels in ends.items():
        place = float("-inf")
        for label in sorted(labels, key=float):
            place = max(float(label), place + _LABEL_GAP * (top - bottom))
            at = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
            axes.annotate(label, (length, place), **at, fontsize=8, color=_INK)
