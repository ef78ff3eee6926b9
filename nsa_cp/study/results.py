"""Arranges finished runs by arm: the chosen learning rate, its runs by seed, and comparisons between arms."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsa_cp.study.statistics import Interval, mean_interval, paired_difference
from nsa_cp.study.store import Record
from nsa_cp.study.table import Study, pick_lr


@dataclass(frozen=True)
class ArmResult:
    """One arm: ``sweep``, the first seed's record for each learning rate, and ``runs``, those of the chosen rate by seed."""

    name: str
    description: str
    lr: float
    sweep: dict[float, Record]
    runs: dict[int, Record]

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return next(iter(self.runs.values()))["parameters"]

    def values(self, metric: str) -> dict[int, float]:
        """A test figure by seed, for the seeds where it is finite."""
        found = {seed: record["test"].get(metric) for seed, record in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, metric: str) -> Interval | None:
        """Mean and interval of a test figure over seeds; None without any value."""
        values = list(self.values(metric).values())
        return mean_interval(values) if values else None


def newest_table(records: Iterable[Record], scale: str) -> list[Record]:
    """The finished runs of that table of the scale (``RunSettings.table_id``) that was worked on last."""
    done = [record for record in records if record["status"] == "done" and record["scale"] == scale]
    if not done:
        return []
    newest = max(done, key=lambda record: record["finished"])["table"]
    return [record for record in done if record["table"] == newest]


def trained_alike(study: Study, records: Iterable[Record]) -> list[Record]:
    """The records whose training settings are the study's."""
    wanted = json.loads(json.dumps(asdict(study.train)))
    return [record for record in records if record["settings"]["train"] == wanted]


def current_runs(study: Study, records: Iterable[Record]) -> list[Record]:
    """The records whose model is that of the study's arm of that name today: definitions of arms change while names stay."""
    wanted = {arm.name: study.run(arm.name, study.lrs[0], study.seeds[0]).as_dict()["model"] for arm in study.arms}
    return [record for record in records if record["settings"]["model"] == wanted.get(record["arm"])]


def arrange(study: Study, records: Sequence[Record]) -> dict[str, ArmResult]:
    """Results by arm, in the study's order; arms without a run are left out."""
    arranged = {}
    for arm in study.arms:
        own = [record for record in records if record["arm"] == arm.name]
        if not own:
            continue
        first = min(record["seed"] for record in own)
        sweep = {record["lr"]: record for record in sorted(own, key=lambda r: r["lr"]) if record["seed"] == first}
        lr = pick_lr(list(sweep.values()), study.select_by, study.select_highest)
        if lr is not None:
            runs = {record["seed"]: record for record in sorted(own, key=lambda r: r["seed"]) if record["lr"] == lr}
            arranged[arm.name] = ArmResult(arm.name, arm.description, lr, sweep, runs)
    return arranged


def difference(ours: ArmResult, theirs: ArmResult, metric: str) -> Interval | None:
    """Ours minus theirs, paired over the seeds that both have; None without any."""
    a, b = ours.values(metric), theirs.values(metric)
    seeds = sorted(a.keys() & b.keys())
    return paired_difference([a[seed] for seed in seeds], [b[seed] for seed in seeds]) if seeds else None


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Write one line per run: what identifies it and its figures, nested ones spread over columns."""
    rows = [_flat({key: value for key, value in record.items() if key not in ("curve", "settings")}) for record in records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries and lists into one dictionary, names joined by dots."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {name: value}
    return {column: x for key, each in items for column, x in _flat(each, f"{name}.{key}" if name else str(key)).items()}
