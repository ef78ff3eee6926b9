"""Real processes for distributed tests: started once, shared by many tests, killed when one of them fails or hangs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from nsa_cp.testing.shipping import reference_to
from nsa_cp.testing.worker import Failure, exit_file, stack_file

START_TIMEOUT_SECONDS = 180.0
CALL_TIMEOUT_SECONDS = 120.0
# After the first failure the other ranks get this long to report theirs; they usually hang in a collective.
GRACE_SECONDS = 1.0


class RankError(RuntimeError):
    """A rank's failure as text: which rank, its traceback, and what the other ranks were doing."""


class DistributedPool:
    """``world_size`` processes joined by torch.distributed, one thread each, which run one function after another.

    Every call starts with only the default process group (groups made by an earlier call are destroyed), seed 0 and float32
    as the default dtype; modules stay imported, so what a call leaves in their globals is seen by the next one.

    Args:
        world_size: number of processes.
        backend: torch.distributed's communication library; ``gloo`` runs anywhere.
        collective_timeout: seconds after which a collective gives up by itself.

    Raises:
        ValueError: a world size below 1.
        RankError: a process did not start.
    """

    def __init__(self, world_size: int, *, backend: str = "gloo", collective_timeout: float = 600.0) -> None:
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}: at least one process is needed")
        self.world_size = world_size
        self._directory = tempfile.mkdtemp(prefix="nsa_cp_pool_")
        # The store lives here and takes any free port: no port is guessed, so none can be taken in between.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._end = weakref.finalize(self, _end, self._processes, self._connections, self._directory)
        # Forking one process into all ranks saves importing torch in each; it is safe only where fork is (Linux).
        ranks = range(world_size)
        for group in [tuple(ranks)] if sys.platform == "linux" else [(rank,) for rank in ranks]:
            self._start(group, backend, collective_timeout)
        self._process_ids: list[int] = []
        self._process_ids = self._collect("starting", START_TIMEOUT_SECONDS)

    @property
    def alive(self) -> bool:
        """False once a call failed or the pool was closed: its processes are gone, make another pool."""
        return self._end.alive

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = CALL_TIMEOUT_SECONDS, **kwargs: Any) -> list[Any]:
        """``function(rank, world_size, *args, **kwargs)`` on every rank; its results, rank by rank.

        Args:
            function: defined at the top level of any file, a test module too; args, kwargs and results are pickled.
            timeout: seconds for the whole call, after which all processes are killed.

        Raises:
            Exception: that of the first rank that failed, with a `RankError` that holds the traceback as its cause (or the
                `RankError` itself if the exception cannot be pickled). The pool is closed then.
            TimeoutError: with the stacks of the ranks that hang. The pool is closed then.
            RuntimeError: the pool was closed before.
        """
        if not self.alive:
            raise RuntimeError("this pool is closed: an earlier call failed or close() was called; make another one")
        call = pickle.dumps((reference_to(function), pickle.dumps((args, kwargs))))
        for connection in self._connections:
            connection.send_bytes(call)
        return self._collect(getattr(function, "__name__", "call"), timeout)

    def close(self) -> None:
        """End all processes, at once and whatever they are doing. May be called twice."""
        self._end()

    def __enter__(self) -> DistributedPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self, ranks: tuple[int, ...], backend: str, collective_timeout: float) -> None:
        pairs = [Pipe() for _ in ranks]
        settings = dict(
            world_size=self.world_size,
            ranks=ranks,
            descriptors=[theirs.fileno() for _, theirs in pairs],
            port=self._store.port,
            backend=backend,
            timeout_seconds=collective_timeout,
            directory=self._directory,
        )
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-c", "from nsa_cp.testing import worker; worker.main()", json.dumps(settings)],
                env=_environment(self._store.port),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno() for _, theirs in pairs],
                start_new_session=True,
            )
        )
        for ours, theirs in pairs:
            theirs.close()
            self._connections.append(ours)

    def _collect(self, what: str, timeout: float) -> list[Any]:
        """Every rank's answer; anything but success closes the pool and raises."""
        try:
            return self._answers(what, time.monotonic() + timeout, timeout)
        except BaseException:  # KeyboardInterrupt and pytest's own timeout leave ranks in mid-call as well
            self.close()
            raise

    def _answers(self, what: str, deadline: float, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    answer = pickle.loads(connection.recv_bytes())
                    results[rank] = None if isinstance(answer, Failure) else pickle.loads(answer)
                except (EOFError, ConnectionError):
                    answer = self._death(rank)
                if isinstance(answer, Failure):
                    deadline = deadline if failures else min(deadline, time.monotonic() + GRACE_SECONDS)
                    failures[rank] = answer
        if failures:
            _raise_first(what, failures, sorted(pending.values()), self.world_size)
        if pending:
            raise TimeoutError(self._timeout_report(what, timeout, sorted(pending.values())))
        return [results[rank] for rank in range(self.world_size)]

    def _death(self, rank: int) -> Failure:
        """The failure of a rank whose connection closed without an answer; its exit status arrives a moment later."""
        status = "of unknown status"
        for _ in range(20):
            if exit_file(self._directory, rank).exists():
                status = exit_file(self._directory, rank).read_text()
            elif len(self._processes) == self.world_size and (code := self._processes[rank].poll()) is not None:
                status = str(code)
            if status.lstrip("-").isdigit():
                break
            time.sleep(0.05)
        return Failure(None, f"the process ended in mid-call, exit status {status} (negative: killed by that signal)\n")

    def _timeout_report(self, what: str, timeout: float, ranks: list[int]) -> str:
        """One sentence, and the stacks of each rank that hangs."""
        for rank in ranks if self._process_ids else ():
            _ask_for_stacks(self._process_ids[rank])
        time.sleep(0.5)
        lines = [f"{what}: no answer from ranks {ranks} of {self.world_size} after {timeout:g} s; all ranks killed"]
        for rank in ranks:
            path = stack_file(self._directory, rank)
            stacks = path.read_text(encoding="utf-8") if path.exists() else ""
            lines.append(f"--- rank {rank} stands at (innermost call first)\n{stacks or '(no stacks)'}")
        return "\n".join(lines)


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = CALL_TIMEOUT_SECONDS, **kwargs: Any
) -> list[Any]:
    """``function(rank, world_size, *args, **kwargs)`` in fresh gloo processes that end with it; results rank by rank.

    Tests that do not mind warm processes should share a `DistributedPool` instead (in this project's tests: the ``workers``
    fixture). Arguments, results and exceptions are those of `DistributedPool.run`.
    """
    with DistributedPool(world_size) as pool:
        return pool.run(function, *args, timeout=timeout, **kwargs)


def _environment(port: int) -> dict[str, str]:
    """The ranks' environment: this process's, its import path, one thread, and the rendezvous as torchrun would give it."""
    environment = dict(os.environ)
    environment.update(
        PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path),
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        # Rank 0 must join the pool's store instead of opening another one on its port.
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    # The ranks meet on this machine; a host name that resolves to an unreachable address must not matter.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    return environment


def _raise_first(what: str, failures: dict[int, Failure], silent: list[int], world_size: int) -> None:
    rank, failure = next(iter(failures.items()))
    others = f"; {len(failures) - 1} other ranks failed too: {sorted(set(failures) - {rank})}" if len(failures) > 1 else ""
    waiting = f"; killed without an answer: {silent}" if silent else ""
    report = RankError(f"{what}: rank {rank} of {world_size} failed{others}{waiting}\n{failure.text}")
    if failure.exception is None:
        raise report
    raise pickle.loads(failure.exception) from report


def _ask_for_stacks(process_id: int) -> None:
    try:
        os.kill(process_id, signal.SIGUSR1)
    except ProcessLookupError:
        pass  # it ended in this very moment, which the report shows as missing stacks


def _end(processes: list[subprocess.Popen[bytes]], connections: list[Connection], directory: str) -> None:
    """Kill every process group; a module-level function, so that the finalizer holds no reference to the pool."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the whole group is gone already
        process.wait()
    for connection in connections:
        connection.close()
    shutil.rmtree(directory, ignore_errors=True)
