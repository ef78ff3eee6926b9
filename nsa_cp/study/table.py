"""A study as a table of runs, and which of them to make next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from nsa_cp.study.arms import Arm, model_of
from nsa_cp.study.model import ModelSettings
from nsa_cp.study.settings import RunSettings, TrainSettings
from nsa_cp.study.store import Record
from nsa_cp.study.task import Task


@dataclass(frozen=True, kw_only=True)
class Claim:
    """ "No worse than full attention by more than ``margin``".

    Args:
        metric: name of a test figure.
        margin: in the metric's own unit, or as a fraction of full attention's value if ``relative``.
        higher_is_better: whether higher values of the metric are better.
        arm: the arm that the claim is about.
    """

    metric: str
    margin: float
    relative: bool = False
    higher_is_better: bool = True
    arm: str = "nsa"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms x learning rates x seeds on one task.

    Every arm is run at every learning rate with the first seed; the rate with the best validation figure then gets the other
    seeds.

    Args:
        title: of the page.
        model: that of the arm ``nsa``; other arms are derived from it.
        select_by: the validation figure by which the learning rate is chosen.
        select_highest: whether higher values of it are better.
        claims: what is to be shown; the first claim is about the main figure.
    """

    name: str
    scale: str
    title: str
    task: Task
    model: ModelSettings
    train: TrainSettings
    arms: tuple[Arm, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    select_by: str
    select_highest: bool
    claims: tuple[Claim, ...]

    @property
    def metrics(self) -> list[str]:
        """The figures that the claims are about, each once."""
        return list(dict.fromkeys(claim.metric for claim in self.claims))

    @cached_property
    def _models(self) -> dict[str, ModelSettings]:
        return {arm.name: model_of(arm, self.model) for arm in self.arms}

    def run(self, arm: str, lr: float, seed: int) -> RunSettings:
        """One row of the table."""
        common = {"study": self.name, "scale": self.scale, "train": self.train, "task": self.task}
        return RunSettings(arm=arm, lr=lr, seed=seed, model=self._models[arm], **common)

    def restricted(self, arms: Collection[str], lrs: Collection[float], seeds: Collection[int]) -> Study:
        """The part of the table with these arms, rates and seeds; an empty collection keeps all."""
        return replace(
            self,
            arms=tuple(arm for arm in self.arms if not arms or arm.name in arms),
            lrs=tuple(lr for lr in self.lrs if not lrs or lr in lrs),
            seeds=tuple(seed for seed in self.seeds if not seeds or seed in seeds),
        )


def pending_runs(study: Study, records: Mapping[str, Record]) -> Iterator[RunSettings]:
    """Runs that can be made now, the most informative first: main arms before those that test defaults, sweeps before repeats.

    Args:
        records: by run id; runs in it, done or failed, are not made again.
    """
    for main in (True, False):
        arms = [arm.name for arm in study.arms if arm.tests_default is not main]
        sweep = [study.run(arm, lr, study.seeds[0]) for arm in arms for lr in study.lrs]
        yield from (run for run in sweep if run.run_id not in records)
        for arm in arms:
            lr = best_lr(study, arm, records)
            repeats = [study.run(arm, lr, seed) for seed in study.seeds[1:]] if lr is not None else []
            yield from (run for run in repeats if run.run_id not in records)


def best_lr(study: Study, arm: str, records: Mapping[str, Record]) -> float | None:
    """The learning rate whose run with the first seed validated best; None if one of these is missing or all failed."""
    swept = [records.get(study.run(arm, lr, study.seeds[0]).run_id) for lr in study.lrs]
    if any(record is None for record in swept):
        return None
    return pick_lr([record for record in swept if record is not None], study.select_by, study.select_highest)


def pick_lr(records: Sequence[Record], metric: str, highest: bool) -> float | None:
    """The learning rate of the record whose validation ``metric`` is best; None if no record has it."""
    valued = [(record["valid"][metric], record["lr"]) for record in records if _has(record, metric)]
    if not valued:
        return None
    # Of equal figures the smaller rate wins.
    return min(valued, key=lambda pair: (-pair[0] if highest else pair[0], pair[1]))[1]


def _has(record: Record, metric: str) -> bool:
    return record["status"] == "done" and record["valid"].get(metric) is not None
