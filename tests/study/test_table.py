"""The table of runs: which are made, in what order, what survives an interruption, and what a crash does to the others."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cp.study import workers
from nsa_cp.study.arms import ARMS
from nsa_cp.study.settings import RunSettings
from nsa_cp.study.store import RunStore
from nsa_cp.study.studies import build_study, scale_steps
from nsa_cp.study.table import Study, best_lr, pending_runs
from nsa_cp.study.workers import Job, Table, attempt

CPU = torch.device("cpu")


def small(arms: tuple[str, ...] = ("full",), lrs: tuple[float, ...] = (1e-3, 4e-3), seeds: tuple[int, ...] = (0, 1)) -> Study:
    study = build_study("mqar", "tiny")
    return replace(study, arms=tuple(arm for arm in ARMS if arm.name in arms), lrs=lrs, seeds=seeds)


def record_of(run: RunSettings, accuracy: float | None = 0.5, status: str = "done") -> dict[str, Any]:
    return {**workers.identity(run), "status": status, "valid": {"accuracy": accuracy}, "test": {"accuracy": accuracy}}


def names(runs: Any) -> list[tuple[str, float, int]]:
    return [(run.arm, run.lr, run.seed) for run in runs]


def test_the_sweep_comes_first_and_its_best_rate_gets_the_other_seeds() -> None:
    study = small(("full", "nsa", "shared_kv"), seeds=(0, 1, 2))
    records: dict[str, Any] = {}
    first = names(pending_runs(study, records))
    assert first == [(arm, lr, 0) for arm in ("full", "nsa", "shared_kv") for lr in (1e-3, 4e-3)]
    for lr, accuracy in ((1e-3, 0.2), (4e-3, 0.9)):
        run = study.run("full", lr, 0)
        records[run.run_id] = record_of(run, accuracy)
    assert best_lr(study, "full", records) == 4e-3 and best_lr(study, "nsa", records) is None
    assert names(pending_runs(study, records)) == [
        ("nsa", 1e-3, 0), ("nsa", 4e-3, 0), ("full", 4e-3, 1), ("full", 4e-3, 2), ("shared_kv", 1e-3, 0), ("shared_kv", 4e-3, 0),
    ]  # fmt: skip


def test_a_failed_or_diverged_rate_is_never_the_best() -> None:
    study = small(lrs=(1e-3, 2e-3, 4e-3))
    runs = [study.run("full", lr, 0) for lr in study.lrs]
    outcomes = [(None, "failed"), (0.3, "done"), (None, "done")]
    records = {run.run_id: record_of(run, *outcome) for run, outcome in zip(runs, outcomes, strict=True)}
    assert best_lr(study, "full", records) == 2e-3
    failed = {run.run_id: record_of(run, None, "failed") for run in runs}
    assert best_lr(study, "full", failed) is None and names(pending_runs(study, failed)) == []


def test_a_run_is_known_by_everything_that_decides_it() -> None:
    study = small()
    run = study.run("full", 1e-3, 0)
    assert run.run_id == small().run("full", 1e-3, 0).run_id
    others = [
        study.run("full", 4e-3, 0), study.run("full", 1e-3, 1), small(("nsa",)).run("nsa", 1e-3, 0),
        scale_steps(study, 2.0).run("full", 1e-3, 0), replace(run, train=replace(run.train, weight_decay=0.1)),
    ]  # fmt: skip
    assert len({run.run_id, *(other.run_id for other in others)}) == 6
    assert run.table_id == others[0].table_id == others[2].table_id != others[3].table_id


def test_an_interrupted_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Stopped after two runs, then again: those two are not made twice, and the whole is as if made at once."""
    study, events = small(), []

    def table(folder: str, stop_after: int | None = None) -> bool:
        events.clear()
        stop = (lambda: len(events) >= stop_after) if stop_after else (lambda: False)
        store = RunStore(tmp_path / folder / "mqar.jsonl")
        return Table(study, store, CPU, num_workers=0, report=events.append, should_stop=stop).run()

    assert not table("a", stop_after=2) and len(events) == 2
    # As if killed while writing.
    with (tmp_path / "a" / "mqar.jsonl").open("a") as file:
        file.write('{"run": "cut off')
    assert table("a") and len(events) == 1
    assert table("a") and events == []
    assert table("b")
    both = [RunStore(tmp_path / folder / "mqar.jsonl").load() for folder in "ab"]
    assert list(both[0]) == list(both[1]) and len(both[0]) == 3
    for run, record in both[0].items():
        assert record["test"] == both[1][run]["test"] and record["curve"] == both[1][run]["curve"]


def test_a_run_past_the_deadline_leaves_nothing(tmp_path: Path) -> None:
    study = small()
    store = RunStore(tmp_path / "x.jsonl")
    assert attempt(Job(study.run("full", 1e-3, 0), deadline=time.monotonic() - 1), CPU) == ("out_of_time", None)
    assert not Table(study, store, CPU, num_workers=0, deadline=time.monotonic() - 1, report=lambda _: None).run()
    assert not store.path.exists()


def test_a_failing_run_is_recorded_and_tried_again_only_by_the_next_call(tmp_path: Path) -> None:
    study = small(("full", "window"), seeds=(0,))
    broken = replace(study, train=replace(study.train, precision="float33"))
    store, events = RunStore(tmp_path / "x.jsonl"), []
    assert Table(broken, store, CPU, num_workers=0, report=events.append).run()
    assert len(events) == 4 and all("failed: " in event and "float33" in event for event in events)
    assert {record["status"] for record in store.load().values()} == {"failed"}
    assert Table(broken, store, CPU, num_workers=0, report=events.append).run() and len(events) == 8


@pytest.mark.distributed
@pytest.mark.parametrize("wait", [False, True], ids=["just before its job", "long before"])
def test_several_processes_one_of_which_is_killed(wait: bool, tmp_path: Path) -> None:
    """Two workers; the first run to be at work loses its process. The others are made, by a new process too."""
    study = small(("full", "window"), lrs=(4e-3,), seeds=(0, 1))
    store, killed, events = RunStore(tmp_path / "x.jsonl"), [], []
    table = Table(study, store, CPU, num_workers=2, report=events.append)
    start, next_job = table._start, table._next
    started = []
    table._start = lambda: started.append(start()) or started[-1]

    def kill_after_the_first_job() -> Job | None:
        job = next_job()
        if job is not None and not killed:
            killed.append(job.settings.run_id)
            os.kill(started[0].process.pid, signal.SIGKILL)
            if wait:
                started[0].process.join()
        return job

    table._next = kill_after_the_first_job
    table.run()
    records = store.load()
    assert records[killed[0]]["status"] == "failed" and "exit code -9" in records[killed[0]]["error"]
    assert sum(record["status"] == "done" for record in records.values()) == 2  # window: its one rate, and its second seed
    assert len(started) == 3 and all(not worker.process.is_alive() for worker in started)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "x.jsonl")
    store.add({"run": "a", "loss": float("nan"), "curve": [{"x": float("inf")}]})
    assert json.loads(store.path.read_text()) == {"run": "a", "loss": None, "curve": [{"x": None}]}


def test_runs_wait_while_another_compiles_their_kernels(tmp_path: Path) -> None:
    study = small(("full", "nsa", "compressor_mean"), lrs=(1e-3, 4e-3), seeds=(0,))
    table = Table(study, RunStore(tmp_path / "x.jsonl"), CPU)
    started = [table._next() for _ in range(5)]
    assert names(job.settings for job in started if job) == [
        ("full", 1e-3, 0), ("full", 4e-3, 0), ("nsa", 1e-3, 0), ("compressor_mean", 1e-3, 0),
    ]  # fmt: skip
    table._take(started[2], ("warm", None))
    assert names([table._next().settings]) == [("nsa", 4e-3, 0)] and table._next() is None
    # A model whose capture fails is made again without graphs, and so are its likes.
    table._take(started[2], ("no_graph", "why"))
    again = table._next()
    assert again.settings == started[2].settings and not again.use_graph and started[0].use_graph


@pytest.mark.parametrize("folder", ["learning", "learning/fresh_seeds"])
@pytest.mark.parametrize("name", ["mqar", "passkey"])
def test_the_published_runs_are_of_todays_table(name: str, folder: str) -> None:
    """A change of an arm or of the settings orphans them: make them again, or take them out."""
    path = Path(__file__).parents[2] / "docs" / folder / f"{name}.jsonl"
    table, records = build_study(name, "full"), RunStore(path).load().values()
    assert records and all(record["run"] == table.run(record["arm"], record["lr"], record["seed"]).run_id for record in records)
