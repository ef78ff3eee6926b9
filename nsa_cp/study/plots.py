"""Plots of a study: figures by arm with their intervals, learning curves, depth x length maps, loss by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsa_cp.study.results import ArmResult

# An arm's colour is the same in every plot; further arms repeat the colours with dashed lines.
_COLOURS = ("#2a78d6", "#1baf7a", "#eb6834", "#eda100", "#e87ba4", "#008300")
_INK, _MUTED, _GRID = "#0b0b0b", "#52514e", "#e1e0d9"


def plot_study(name: str, results: dict[str, ArmResult], metrics: Sequence[str], folder: Path) -> list[Path]:
    """Draw what there is to draw; returns the PNG files written.

    Args:
        metrics: test figures, one panel each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_plot_arms(results, metrics, folder / f"{name}_arms.png")]
    drawn.append(_plot_curves(results, metrics[0], folder / f"{name}_curves.png"))
    tests = [next(iter(result.runs.values()))["test"] for result in results.values()]
    if all("grid" in test for test in tests):
        drawn.append(_plot_grids(results, folder / f"{name}_depth_length.png"))
    if all("bins" in test for test in tests):
        drawn.append(_plot_bins(results, folder / f"{name}_positions.png"))
    return drawn


def _subplots(rows: int, columns: int, size: tuple[float, float]):  # noqa: ANN202 - matplotlib is imported late
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, dpi=130, squeeze=False)
    for each in axes.flat:
        each.grid(color=_GRID, linewidth=0.8)
        each.set_axisbelow(True)
        each.tick_params(colors=_MUTED, length=0, labelsize=8)
        for side in ("top", "right", "left"):
            each.spines[side].set_visible(False)
        each.spines["bottom"].set_color(_GRID)
    return figure, axes


def _finish(figure, path: Path) -> Path:  # noqa: ANN001
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _line(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": "-" if number < len(_COLOURS) else "--"}


def _plot_arms(results: dict[str, ArmResult], metrics: Sequence[str], path: Path) -> Path:
    """A row for each arm: every seed a dot, the mean a bar, the 95% interval a line."""
    figure, axes = _subplots(1, len(metrics), (1.2 + 3.6 * len(metrics), 0.9 + 0.32 * len(results)))
    for metric, each in zip(metrics, axes[0], strict=True):
        for place, (number, result) in zip(range(len(results), 0, -1), enumerate(results.values()), strict=True):
            colour, interval = _line(number)["color"], result.mean(metric)
            if interval is None:
                continue
            values = list(result.values(metric).values())
            each.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.6)
            each.plot([interval.mean], [place], "|", color=_INK, markersize=14)
            if math.isfinite(interval.low):
                each.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
        each.set_yticks(range(len(results), 0, -1), list(results))
        each.set_title(f"{metric} (mean, 95% interval)", loc="left", fontsize=9, color=_INK)
    return _finish(figure, path)


def _plot_curves(results: dict[str, ArmResult], metric: str, path: Path) -> Path:
    """Validation over training steps, one thin line a seed, and the mean gates of the arm ``nsa`` beside it."""
    figure, axes = _subplots(1, 2, (10, 3.8))
    for number, result in enumerate(results.values()):
        for index, record in enumerate(result.runs.values()):
            points = [(point["step"], _validated(point, metric)) for point in record["curve"]]
            axes[0][0].plot(*zip(*points, strict=True), **_line(number), linewidth=1.2, label=None if index else result.name)
    axes[0][0].set_title(f"validation {metric.split('_')[0]} of the stage over steps", loc="left", fontsize=9, color=_INK)
    axes[0][0].legend(frameon=False, fontsize=7, labelcolor=_MUTED)
    _draw_gates(results.get("nsa"), axes[0][1])
    return _finish(figure, path)


def _validated(point: dict[str, Any], metric: str) -> float:
    # The figures by length of the test have no counterpart while training: the overall one stands in.
    value = point.get(metric, point.get(metric.split("_")[0]))
    return math.nan if value is None else value


def _draw_gates(result: ArmResult | None, axes) -> None:  # noqa: ANN001
    axes.set_title("nsa: mean gate by branch and layer, first seed", loc="left", fontsize=9, color=_INK)
    axes.set_ylim(0, 1)
    curve = next(iter(result.runs.values()))["curve"] if result is not None else []
    if not curve:
        return
    gates = np.asarray([point["gates"] for point in curve])
    for branch, name in enumerate(("compressed", "selected", "window")):
        for layer in range(gates.shape[1]):
            style = ("-", "--", "-.", ":")[layer % 4]
            label = name if layer == 0 else None
            axes.plot([p["step"] for p in curve], gates[:, layer, branch], style, color=_COLOURS[branch], label=label)
    axes.legend(frameon=False, fontsize=7, labelcolor=_MUTED)


def _plot_grids(results: dict[str, ArmResult], path: Path) -> Path:
    """For each arm a map of accuracy, mean over seeds: depth down, length across."""
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure, axes = _subplots(rows, columns, (2.6 * columns, 2.4 * rows))
    for result, each in zip(results.values(), axes.flat, strict=False):
        grids = [record["test"]["grid"] for record in result.runs.values()]
        lengths, depths = list(grids[0]), list(next(iter(grids[0].values())))
        table = np.mean([[[grid[length][depth] for length in lengths] for depth in depths] for grid in grids], axis=0)
        each.grid(False)
        each.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        each.set_xticks(range(len(lengths)), [_tokens(int(length)) for length in lengths])
        each.set_yticks(range(len(depths)), depths)
        each.set_title(f"{result.name}: {table.mean():.0%}", loc="left", fontsize=8, color=_INK)
        for row, column in np.ndindex(*table.shape):
            shade = "white" if table[row, column] < 0.6 else _INK
            each.text(column, row, f"{100 * table[row, column]:.0f}", ha="center", va="center", fontsize=6, color=shade)
    for each in list(axes.flat)[len(results) :]:
        each.set_visible(False)
    return _finish(figure, path)


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _plot_bins(results: dict[str, ArmResult], path: Path) -> Path:
    """Loss by position, and its difference from full attention's."""
    figure, axes = _subplots(1, 2, (10, 3.8))
    means = {}
    for name, result in results.items():
        bins = [record["test"]["bins"] for record in result.runs.values()]
        means[name] = np.mean([list(each.values()) for each in bins], axis=0)
    labels = list(next(iter(next(iter(results.values())).runs.values()))["test"]["bins"])
    for number, (name, values) in enumerate(means.items()):
        axes[0][0].plot(range(len(labels)), values, **_line(number), marker="o", markersize=3, label=name)
        if "full" in means:
            relative = 100 * (values / means["full"] - 1)
            axes[0][1].plot(range(len(labels)), relative, **_line(number), marker="o", markersize=3, label=name)
    for each, title in zip(axes[0], ("loss by position (nats a byte)", "difference from full attention (%)"), strict=True):
        each.set_title(title, loc="left", fontsize=9, color=_INK)
        each.set_xticks(range(len(labels)), labels, rotation=30, fontsize=7)
    axes[0][0].legend(frameon=False, fontsize=7, labelcolor=_MUTED)
    return _finish(figure, path)
