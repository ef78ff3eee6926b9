"""Makes a study's runs: several at a time on one device, in worker processes that each take one run after the other."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch

from nsa_cp.study.probe import save_selections
from nsa_cp.study.settings import RunSettings
from nsa_cp.study.store import Record, RunStore
from nsa_cp.study.table import Study, pending_runs, pick_lr
from nsa_cp.study.trainer import CaptureFailed, OutOfTime, Trainer

# Seconds past the deadline after which a process that is still at work is ended.
_GRACE = 20.0
# Seconds between looks at the clock while nothing is reported.
_TICK = 1.0
# Longest sequence, in tokens, whose selections are saved: about 10 MiB.
LONGEST_SAVED = 8192

# What a worker reports. After ``warm`` (kernels are compiled) and ``point`` (of the curve) it is still at work on its job.
Message = tuple[Literal["warm", "point", "done", "failed", "out_of_time", "no_graph"], Any]


@dataclass(frozen=True)
class Job:
    """One run for a worker; ``selections`` is the file for the trained model's selections, None not to save them."""

    settings: RunSettings
    use_graph: bool = True
    deadline: float | None = None
    selections: Path | None = None


@dataclass
class Worker:
    """A process, the connection to it, and the job it is at work on."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: Job | None = None


def make_run(job: Job, device: torch.device, tell: Callable[[Message], None] = lambda message: None) -> Record:
    """Train and test one model, in this process; returns the record for the store.

    Args:
        tell: called with messages ``warm`` and ``point`` on the way.
    """
    settings = job.settings
    trained = Trainer(
        settings, device, use_graph=job.use_graph, deadline=job.deadline,
        on_warm=lambda: tell(("warm", None)), on_point=lambda point: tell(("point", point)),
    ).run()  # fmt: skip
    if job.selections is not None:
        stages = settings.task.stages
        stage = max(number for number, stage in enumerate(stages) if number == 0 or stage.length <= LONGEST_SAVED)
        group, dtype = next(iter(settings.task.valid(stage))), getattr(torch, settings.train.precision)
        save_selections(trained.model, group, dtype, job.selections, identity(settings))
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    figures = {"parameters": parameters, **trained.figures, "curve": trained.curve}
    return {**identity(settings), "status": "done", **machine(device), **figures, "settings": settings.as_dict()}


def identity(settings: RunSettings) -> Record:
    """The part of a record that identifies the run."""
    return {
        "run": settings.run_id,
        "table": settings.table_id,
        "study": settings.study,
        "scale": settings.scale,
        "arm": settings.arm,
        "lr": settings.lr,
        "seed": settings.seed,
    }


def machine(device: torch.device) -> Record:
    """The part of a record that says on what, and when, the run was made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "finished": round(time.time())}


@dataclass
class Table:
    """Makes the runs of a study's table until none is pending or the time is up.

    Args:
        num_workers: number of processes; 0 makes every run in this process.
        deadline: by ``time.monotonic``, None for no limit: no run starts after it, and those at work give up.
        use_graph: replay steps as CUDA graphs. If that fails for a model, its runs are made without.
        report: called with a line for every event.
        verbose: also report every validation.
        should_stop: asked now and then; True has the effect of a deadline that has passed.
    """

    study: Study
    store: RunStore
    device: torch.device
    num_workers: int = 1
    deadline: float | None = None
    use_graph: bool = True
    report: Callable[[str], None] = print
    verbose: bool = False
    should_stop: Callable[[], bool] = lambda: False
    # Records of runs that are done, or failed in this call; and ids of those at work.
    records: dict[str, Record] = field(default_factory=dict)
    _in_work: set[str] = field(default_factory=set)
    # Keys of kernels (RunSettings.kernels) that are compiled, that one run is compiling now, and that no CUDA graph can capture.
    _warm: set[str] = field(default_factory=lambda: {""})
    _warming: set[str] = field(default_factory=set)
    _without_graph: set[str] = field(default_factory=set)
    # Duration in seconds of each arm's latest run.
    _seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> bool:
        """Make the runs; returns whether the table is complete."""
        # Failed runs are tried again in the next call, not in this one.
        self.records = {run: record for run, record in self.store.load().items() if record["status"] == "done"}
        if self.num_workers == 0:
            self._run_here()
        else:
            self._run_in_workers()
        return next(pending_runs(self.study, self.records), None) is None

    def _next(self) -> Job | None:
        """The most informative run that may start now, or None."""
        if self._time_is_up():
            return None
        for settings in pending_runs(self.study, self.records):
            if settings.run_id in self._in_work or settings.kernels in self._warming or self._would_not_end(settings):
                continue
            use_graph = self.use_graph and settings.kernels not in self._without_graph
            if settings.kernels not in self._warm:
                self._warming.add(settings.kernels)
            self._in_work.add(settings.run_id)
            return Job(settings, use_graph, self.deadline, self._selections_of(settings))
        return None

    def _selections_of(self, settings: RunSettings) -> Path | None:
        """A temporary file for a run's selections, which are saved for the first seed of the arm ``nsa`` only."""
        wanted = settings.arm == "nsa" and settings.seed == self.study.seeds[0]
        return self.store.path.with_suffix(f".{settings.run_id}.pt") if wanted else None

    def _keep_best_selections(self, job: Job) -> None:
        """Keep one file of selections: that of the learning rate that validates best so far."""
        if job.selections is None or not job.selections.is_file():
            return
        settings, study = job.settings, self.study
        swept = [
            self.records[run.run_id]
            for run in (study.run("nsa", lr, settings.seed) for lr in study.lrs)
            if run.run_id in self.records
        ]
        if pick_lr(swept, study.select_by, study.select_highest) == settings.lr:
            job.selections.replace(self.store.path.with_name(f"{self.store.path.stem}_selections.pt"))
        else:
            job.selections.unlink()

    def _would_not_end(self, settings: RunSettings) -> bool:
        expected = self._seconds.get(settings.arm)
        return self.deadline is not None and expected is not None and time.monotonic() + expected > self.deadline

    def _time_is_up(self) -> bool:
        return self.should_stop() or (self.deadline is not None and time.monotonic() > self.deadline)

    def _take(self, job: Job, message: Message) -> None:
        """Act on a worker's message."""
        kind, content = message
        settings = job.settings
        name = f"{settings.arm} lr {settings.lr:g} seed {settings.seed}"
        if kind == "warm":
            self._warm.add(settings.kernels)
            self._warming.discard(settings.kernels)
            return
        if kind == "point":
            if self.verbose:
                self.report(f"{name}, {_readable(content)}")
            return
        self._in_work.discard(settings.run_id)
        self._warming.discard(settings.kernels)
        if kind == "no_graph":
            self._without_graph.add(settings.kernels)
            self.report(f"{name}: no CUDA graph, again without ({content})")
        elif kind == "out_of_time":
            self.report(f"{name}: stopped, time is up")
        else:
            if kind == "done":
                self._warm.add(settings.kernels)
            record = content if kind == "done" else {**identity(settings), "status": "failed", "error": content}
            self.store.add(record)
            self.records[settings.run_id] = record
            self._keep_best_selections(job)
            self.report(f"{name}: {self._summary(record)}")

    def _summary(self, record: Record) -> str:
        if record["status"] == "failed":
            return f"failed: {record['error'].strip().splitlines()[-1]}"
        self._seconds[record["arm"]] = record["seconds"]
        metric = self.study.claims[0].metric
        value = record["test"].get(metric)
        return f"{metric} {value if value is None else round(value, 4)}, {record['steps']} steps, {record['seconds']:.1f} s"

    def _run_here(self) -> None:
        while (job := self._next()) is not None:
            self._take(job, attempt(job, self.device, partial(self._take, job)))

    def _run_in_workers(self) -> None:
        workers = [self._start() for _ in range(self.num_workers)]
        try:
            while True:
                for worker in workers:
                    if worker.job is None and (job := self._next()) is not None:
                        worker.job = job
                        # If the process has died meanwhile, that is noticed when it is listened to.
                        with suppress(ConnectionError):
                            worker.connection.send(job)
                busy = [worker for worker in workers if worker.job is not None]
                if not busy or self.should_stop() or self._overdue():
                    return
                ready = wait([worker.connection for worker in busy], timeout=_TICK)
                for index, worker in enumerate(workers):
                    if worker.connection in ready:
                        workers[index] = self._listen(worker)
        finally:
            for worker in workers:
                worker.connection.close()
            for worker in workers:
                end(worker)

    def _overdue(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline + _GRACE

    def _listen(self, worker: Worker) -> Worker:
        """Take one message; returns the worker, or a new one if its process died or its CUDA state is in doubt."""
        assert worker.job is not None
        try:
            message: Message = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join(_GRACE)
            message = ("failed", f"the process ended with exit code {worker.process.exitcode}")
        self._take(worker.job, message)
        if message[0] in ("warm", "point"):
            return worker
        worker.job = None
        if message[0] in ("failed", "no_graph"):
            end(worker)
            return self._start()
        return worker

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        cores = os.cpu_count() or 1
        threads = 1 if self.device.type == "cuda" else max(1, cores // self.num_workers)
        process = context.Process(target=_serve, args=(theirs, str(self.device), threads), daemon=True)
        process.start()
        # Now only the process holds its end, so that its death closes the pipe.
        theirs.close()
        return Worker(process, ours)


def _readable(point: dict[str, Any]) -> str:
    """A point of the curve in a line."""
    figures = {key: value for key, value in point.items() if isinstance(value, (int, float))}
    return ", ".join(f"{key} {value:.4g}" for key, value in figures.items()) + (
        f", gates {point['gates']}" if point["gates"] else ""
    )


def attempt(job: Job, device: torch.device, tell: Callable[[Message], None] = lambda message: None) -> Message:
    """Make a run; returns the message about how it went."""
    try:
        return "done", make_run(job, device, tell)
    except OutOfTime:
        return "out_of_time", None
    except CaptureFailed as error:
        return "no_graph", str(error).strip().splitlines()[0]
    except Exception:  # whatever went wrong is the record: the other runs go on
        return "failed", traceback.format_exc()


def end(worker: Worker) -> None:
    """End a worker's process, at work or not."""
    worker.connection.close()
    if worker.job is not None:
        worker.process.terminate()
    worker.process.join(_GRACE)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _serve(connection: Connection, device: str, threads: int) -> None:
    """What a worker process does: one job after the other, until the other end of the pipe closes."""
    # An interrupt from the keyboard reaches every process; the parent decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Steps before the capture use a capturable optimizer outside a graph, about which PyTorch warns.
    warnings.filterwarnings("ignore", message=".*capturable=True.*")
    torch.set_num_threads(threads)
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        connection.send(attempt(job, torch.device(device), connection.send))
        if device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()
