"""Plots of benchmark CSV files: time against length, speed-up over dense attention, and where the time goes."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

# One validated set of hues, in a fixed order; an implementation keeps its colour in every plot.
_COLOURS = {
    "nsa": "#2a78d6", "dense_cudnn": "#eb6834", "dense_flash": "#1baf7a", "fla": "#eda100", "flash_nsa": "#e87ba4",
}  # fmt: skip
_STAGE_COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300")
_INK, _MUTED, _GRID = "#0b0b0b", "#52514e", "#e1e0d9"


def plot_attention(path: Path, folder: Path) -> list[Path]:
    """Draw the CSV file ``path`` of ``nsa-cp bench attention``; returns the PNG files written to ``folder``.

    ``attention_time.png`` and ``attention_speedup.png`` need two lengths or more of a head layout, ``attention_stages.png``
    needs rows made with ``--stages``.
    """
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    drawn = []
    totals = _totals(rows)
    lengths = {length for series in totals.values() for length in series}
    if len(lengths) > 1:
        drawn += [_plot_times(totals, folder / "attention_time.png"), _plot_speedups(totals, folder / "attention_speedup.png")]
    stages = [row for row in rows if row["stage"] != "all"]
    if stages:
        drawn.append(_plot_stages(stages, folder / "attention_stages.png"))
    return drawn


def _totals(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], dict[int, float]]:
    """Forward plus backward in ms: (heads, inputs, implementation) -> length -> time."""
    totals: dict[tuple[str, str, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        if row["stage"] == "all":
            heads = f"{row['num_heads']}/{row['num_groups']} x {row['qk_dim']}/{row['v_dim']}"
            totals[heads, row["inputs"], row["impl"]][int(row["seq_len"])] += float(row["p50_ms"])
    return {key: dict(sorted(series.items())) for key, series in totals.items()}


def _axes(title: str, ylabel: str):  # noqa: ANN202 - matplotlib is imported late
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    axes.set_ylabel(ylabel, color=_MUTED)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    return figure, axes


def _finish(figure, path: Path) -> Path:  # noqa: ANN001
    figure.tight_layout()
    figure.savefig(path)
    figure.clf()
    return path


def _length_axis(axes, lengths: set[int]) -> None:  # noqa: ANN001
    ticks = sorted(lengths)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("sequence length (tokens)", color=_MUTED)


def _plot_times(totals: dict[tuple[str, str, str], dict[int, float]], path: Path) -> Path:
    figure, axes = _axes("Attention, forward and backward", "milliseconds (log)")
    for (heads, inputs, impl), series in totals.items():
        dashes = "--" if inputs != "random" else "-"
        axes.plot(series.keys(), series.values(), dashes, color=_COLOURS[impl], linewidth=2, marker="o", markersize=5,
                  label=f"{impl}, {heads}, {inputs}")  # fmt: skip
    axes.set_yscale("log")
    _length_axis(axes, {length for series in totals.values() for length in series})
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7, labelcolor=_MUTED)
    return _finish(figure, path)


def _plot_speedups(totals: dict[tuple[str, str, str], dict[int, float]], path: Path) -> Path:
    figure, axes = _axes("NSA's speed-up over other attention, forward and backward", "times faster")
    cases = list(dict.fromkeys((heads, inputs) for heads, inputs, _ in totals))
    for (heads, inputs, impl), series in totals.items():
        own = totals.get((heads, inputs, "nsa"), {})
        shared = [length for length in series if length in own]
        if impl == "nsa" or not shared:
            continue
        ratios = [series[length] / own[length] for length in shared]
        colour = _STAGE_COLOURS[cases.index((heads, inputs)) % len(_STAGE_COLOURS)]
        dashes = "-" if impl == "dense_cudnn" else "--"
        label = f"over {impl}, {heads}, {inputs}"
        axes.plot(shared, ratios, dashes, color=colour, linewidth=2, marker="o", markersize=5, label=label)
        for length, ratio in zip(shared, ratios, strict=True):
            axes.annotate(f"{ratio:.1f}", (length, ratio), textcoords="offset points", xytext=(6, -3), fontsize=8, color=_INK)
    axes.axhline(1, color=_MUTED, linewidth=0.8)
    _length_axis(axes, {length for series in totals.values() for length in series})
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7, labelcolor=_MUTED)
    return _finish(figure, path)


def _plot_stages(rows: list[dict[str, str]], path: Path) -> Path:
    """Stacked bars: one for each case and pass, a segment for each stage."""
    figure, axes = _axes("NSA by stage, each timed alone", "milliseconds")
    bars: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        length = int(row["seq_len"])
        heads = f"{row['num_heads']}/{row['num_groups']}x{row['qk_dim']}"
        bars[f"{length // 1024 or length}k {heads}\n{row['inputs']} {row['pass']}"][row["stage"]] = float(row["p50_ms"])
    names = list(dict.fromkeys(row["stage"] for row in rows))
    for place, parts in enumerate(bars.values()):
        bottom = 0.0
        for name, colour in zip(names, _STAGE_COLOURS, strict=False):
            value = parts.get(name, 0.0)
            axes.bar(place, value, bottom=bottom, color=colour, width=0.6, edgecolor="white", linewidth=1.5,
                     label=name if place == 0 else None)  # fmt: skip
            bottom += value
        axes.annotate(f"{bottom:.1f}", (place, bottom), ha="center", va="bottom", fontsize=8, color=_INK)
    axes.set_xticks(range(len(bars)), list(bars), fontsize=7)
    axes.margins(y=0.25)
    axes.legend(frameon=False, fontsize=8, labelcolor=_MUTED, ncols=3)
    return _finish(figure, path)
