"""Connects the cost model with the benchmarks' CSV files: reads kernel times, and compares predictions with measurements."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from nsa_cp.bench.context_parallel import ONE_GPU, PASSES
from nsa_cp.bench.cost_model import UNIT, CostModel, KernelTimes, fit_kernel_times
from nsa_cp.bench.inputs import HeadLayout

_HEADS = ("num_heads", "num_groups", "qk_dim", "v_dim")
# Columns that are read of ``attention.csv`` and of ``context_parallel.csv``.
ATTENTION_COLUMNS = ("seq_len", *_HEADS, "inputs", "impl", "stage", "pass", "p50_ms", "peak_gib")
PARALLEL_COLUMNS = ("seq_len", *_HEADS, "cp", "tp", "layout", "comm", "pass", "p50_ms", "exposed_ms", "peak_gib")


class Compared(NamedTuple):
    """One measured point and its prediction; the error of the time is relative, that of exposure in per cent of the time."""

    seq_len: int
    cp: int
    tp: int
    layout: str
    comm: str
    pass_: str
    measured_ms: float
    predicted_ms: float
    measured_exposed_ms: float
    predicted_exposed_ms: float
    measured_gib: float
    predicted_gib: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured time."""
        return self.predicted_ms / self.measured_ms - 1


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a benchmark's CSV file.

    Args:
        columns: those that it must have.

    Raises:
        ValueError: no such file, or a file without rows or without one of the columns.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; make it with nsa-cp bench, or name another file")
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows; make it again with nsa-cp bench")
    missing = [name for name in columns if name not in rows[0]]
    if missing:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)}; is it the CSV file of another benchmark? Name the right one"
        )
    return rows


def kernel_times(attention: Sequence[dict[str, str]], heads: HeadLayout, one_gpu: Sequence[dict[str, str]] = ()) -> KernelTimes:
    """Kernel times from benchmark rows.

    Args:
        attention: rows of ``attention.csv``, of which those of random inputs give the shares of the stages and, without
            ``one_gpu``, the totals.
        heads: whose rows to take.
        one_gpu: rows of ``context_parallel.csv``. Its measurements on one GPU, if there are any, give totals and memory, because
            they were made on the GPUs that ran in parallel.

    Raises:
        ValueError: no rows of stages for these heads.
    """
    own = [row for row in attention if row["impl"] == "nsa" and row["inputs"] == "random" and _heads(row) == heads]
    lengths = [int(row["seq_len"]) for row in own if row["stage"] != "all"]
    if not lengths:
        raise ValueError(f"no stages of {heads} were measured; run nsa-cp bench attention --stages --heads {heads}")
    # Of several lengths the one nearest to those for which context parallelism is used.
    nearest = min(lengths, key=lambda length: abs(length - UNIT))
    stages = {
        (row["pass"], row["stage"]): float(row["p50_ms"])
        for row in own
        if row["stage"] != "all" and int(row["seq_len"]) == nearest
    }
    if ("forward", "compression") in stages:
        # One GPU's backward, too, runs the compressor again.
        stages["backward", "recompression"] = stages["forward", "compression"]
    source = [row for row in one_gpu if row["comm"] == ONE_GPU and _heads(row) == heads] or [
        r for r in own if r["stage"] == "all"
    ]
    totals: dict[str, dict[int, float]] = {pass_: {} for pass_ in PASSES}
    peaks: dict[str, dict[int, float]] = {pass_: {} for pass_ in PASSES}
    for row in source:
        totals[row["pass"]][int(row["seq_len"])] = float(row["p50_ms"])
        peaks[row["pass"]][int(row["seq_len"])] = float(row["peak_gib"])
    return fit_kernel_times(totals, stages, peaks, heads)


def compare(rows: Sequence[dict[str, str]], model: CostModel) -> Iterator[Compared]:
    """A prediction of ``model`` for every row of ``context_parallel.csv`` measured on several GPUs with its kernels' heads.

    Layout and transport are taken from the row. The benchmark repeats one layout, so the model's ``new_layout`` should be off.
    """
    for row in rows:
        if row["comm"] == ONE_GPU or _heads(row) != model.kernels.heads:
            continue
        config = replace(model.config, layout=row["layout"], compressed_comm=row["comm"])
        seq_len, cp, tp = int(row["seq_len"]), int(row["cp"]), int(row["tp"])
        predicted = replace(model, config=config, kernels=model.kernels.shard(tp)).predict(row["pass"], seq_len, cp)
        yield Compared(
            seq_len, cp, tp, row["layout"], row["comm"], row["pass"], float(row["p50_ms"]), predicted.ms,
            float(row["exposed_ms"]), predicted.exposed_ms, float(row["peak_gib"]), predicted.peak_gib,
        )  # fmt: skip


def summary(compared: Sequence[Compared]) -> str:
    """Mean and largest error of the predicted times by pass and transport, one line each."""
    by_case: dict[tuple[str, str], list[float]] = defaultdict(list)
    for point in compared:
        by_case[point.comm, point.pass_].append(abs(point.error))
    lines = [
        f"{comm}, {pass_}: mean error {statistics.mean(errors):.1%}, largest {max(errors):.1%}, of {len(errors)} points"
        for (comm, pass_), errors in by_case.items()
    ]
    return "\n".join(lines)


def prediction_table(models: dict[str, CostModel], seq_lens: Sequence[int], sizes: Sequence[int]) -> str:
    """A Markdown table with a line for each length and number of ranks that leaves at least 1024 tokens a rank, and three columns
    for each named model.

    Memory is the first model's: the models should differ in the link only.
    """
    heading = ["tokens", "CP", "GiB a rank", *(f"{name}: {what}" for name in models for what in ("ms", "exposed", "efficiency"))]
    lines = [f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}"]
    for seq_len in seq_lens:
        for cp in sizes:
            if seq_len // cp < 1024:
                continue
            cells: list[str] = []
            for model in models.values():
                forward, backward = (model.predict(pass_, seq_len, cp) for pass_ in PASSES)
                exposed = (forward.exposed_ms + backward.exposed_ms) / (forward.ms + backward.ms)
                alone = sum(model.kernels.total(pass_, seq_len) for pass_ in PASSES)
                efficiency = alone / cp / (forward.ms + backward.ms)
                cells = cells or [f"{backward.peak_gib:.1f}"]
                cells += [f"{forward.ms:.1f} + {backward.ms:.1f}", f"{exposed:.1%}", f"{efficiency:.0%}"]
            length = f"{seq_len >> 20}M" if seq_len % (1 << 20) == 0 else f"{seq_len >> 10}k"
            lines.append(f"| {length} | {cp} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _heads(row: dict[str, str]) -> HeadLayout:
    return HeadLayout(*(int(row[name]) for name in _HEADS))
