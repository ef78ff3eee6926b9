"""What the processes (ranks) of a `DistributedPool` run; the pool starts `main`.

One process imports torch and forks into all ranks (on Linux; elsewhere each rank is started by itself), then waits for them. A
rank that loses its connection to the pool kills its whole process group, so that nothing outlives the tests.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from nsa_cp.testing import shipping


@dataclass(frozen=True)
class WorkerSettings:
    """What the pool tells its ranks on the command line.

    Attributes:
        world_size: number of ranks.
        ranks: the ranks this process becomes.
        descriptors: open file descriptors of their connections to the pool, in the same order.
        port: where the pool's key-value store listens on this machine.
        backend: torch.distributed's name of the communication library.
        timeout_seconds: bound on one collective.
        directory: scratch folder, for stack traces and exit statuses.
    """

    world_size: int
    ranks: tuple[int, ...]
    descriptors: tuple[int, ...]
    port: int
    backend: str
    timeout_seconds: float
    directory: str


@dataclass(frozen=True)
class Failure:
    """What a rank sends when its function raised: the exception, pickled (None if that fails), and its traceback as text."""

    exception: bytes | None
    text: str


def main() -> None:
    """Become the ranks that the command line's one argument (JSON) describes; returns when the last of them has ended."""
    values = json.loads(sys.argv[1])
    settings = WorkerSettings(**{**values, "ranks": tuple(values["ranks"]), "descriptors": tuple(values["descriptors"])})
    if len(settings.ranks) == 1:
        _serve(settings, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    children: dict[int, int] = {}
    for index, rank in enumerate(settings.ranks):
        child = os.fork()
        if child == 0:
            _run_child(settings, index)
        children[child] = rank
    for descriptor in settings.descriptors:
        os.close(descriptor)
    while children:
        child, status = os.wait()
        if child in children:
            exit_file(settings.directory, children.pop(child)).write_text(str(os.waitstatus_to_exitcode(status)))


def exit_file(directory: str, rank: int) -> Path:
    """Where the exit status of a rank that died is noted."""
    return Path(directory) / f"rank{rank}.exit"


def stack_file(directory: str, rank: int) -> Path:
    """Where a rank writes the stacks of its threads on SIGUSR1."""
    return Path(directory) / f"rank{rank}.stacks"


def _run_child(settings: WorkerSettings, index: int) -> NoReturn:
    """A forked rank: never returns into the parent's code."""
    try:
        for other, descriptor in enumerate(settings.descriptors):
            if other != index:
                os.close(descriptor)
        _serve(settings, index)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def _serve(settings: WorkerSettings, index: int) -> NoReturn:
    """Run what the pool sends, one call after another, until the connection ends (and with it this process group)."""
    rank = settings.ranks[index]
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(settings.world_size), LOCAL_WORLD_SIZE=str(settings.world_size)
    )
    torch.set_num_threads(1)
    connection = Connection(settings.descriptors[index])
    with open(stack_file(settings.directory, rank), "w", encoding="utf-8") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        # A thread reads the connection, so that the end of the pool is noticed even in the middle of a call.
        calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(connection, calls), daemon=True).start()
        store = dist.TCPStore("127.0.0.1", settings.port, is_master=False, timeout=timedelta(seconds=settings.timeout_seconds))
        number = 0
        answer = _guarded(_prepare, settings, store, rank, number)
        while True:
            connection.send_bytes(pickle.dumps(answer))
            call = calls.get()
            number += 1
            answer = _guarded(_call, settings, store, rank, number, call)


def _read(connection: Connection, calls: queue.SimpleQueue[bytes]) -> None:
    try:
        while True:
            calls.put(connection.recv_bytes())
    except (EOFError, OSError):
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _guarded(function: Any, *arguments: Any) -> bytes | Failure:
    """The pickled result of ``function``, or its failure; of any BaseException, since pytest's are not all Exceptions."""
    try:
        return pickle.dumps(function(*arguments))
    except BaseException as error:
        return Failure(_pickled(error), traceback.format_exc())


def _pickled(error: BaseException) -> bytes | None:
    """``error`` pickled, or None where it does not survive the round trip (extra constructor arguments are common)."""
    try:
        data = pickle.dumps(error)
        return data if type(pickle.loads(data)) is type(error) else None
    except Exception:
        return None


def _prepare(settings: WorkerSettings, store: dist.Store, rank: int, number: int) -> int:
    """A fresh state for call ``number``: the default process group and no other, one seed, torch's default dtype.

    Returns this rank's process id.
    """
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
    else:
        dist.init_process_group(
            settings.backend,
            store=dist.PrefixStore(f"call{number}", store),
            rank=rank,
            world_size=settings.world_size,
            timeout=timedelta(seconds=settings.timeout_seconds),
        )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    return os.getpid()


def _call(settings: WorkerSettings, store: dist.Store, rank: int, number: int, call: bytes) -> Any:
    _prepare(settings, store, rank, number)
    reference, payload = pickle.loads(call)
    function = shipping.resolve(reference)
    arguments, keywords = pickle.loads(payload)
    return function(rank, settings.world_size, *arguments, **keywords)

