"""``nsa-cp bench context-parallel``: one GPU beside many, under torchrun; efficiency, exposed communication, memory.

    torchrun --nproc-per-node 2 -m nsa_cp.cli.main bench context-parallel --csv docs/benchmarks/context_parallel.csv

Strong scaling: the same sequence on one GPU and on all. Efficiency is (one GPU's time / number of GPUs) / (time on all). With
tensor parallelism heads are divided, too; its own communication is outside the attention and not measured here. Exposed
communication is the time under CP minus the time of the same work with every transfer answered from memory at once
(``replay.py``); it includes waiting and what kernels lose to transfers that run beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from nsa_cp.bench.inputs import AttentionInputs, HeadLayout, make_inputs
from nsa_cp.bench.machine import machine_facts
from nsa_cp.bench.replay import RecordedTransfers
from nsa_cp.bench.timing import measure, peak_memory
from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import SequenceLayout, count_traffic
from nsa_cp.ops import NSAOutput, native_sparse_attention, remote_blocks

PASSES = ("forward", "backward")
ONE_GPU = "none"


@dataclass(frozen=True)
class Row:
    """One line of ``docs/benchmarks/context_parallel.csv``: times in milliseconds, memory a rank in GiB.

    Times and memory are those of the slowest and fullest rank. Memory is the peak of allocations, inputs included: of a
    forward, or (pass backward) of forward and backward together. Heads are those of all tensor-parallel ranks. One GPU's own
    row has cp 1, tp 1 and comm ``none``. Where one GPU cannot hold the sequence, ``one_gpu_p50_ms`` and ``efficiency`` are nan.
    """

    seq_len: int
    num_heads: int
    num_groups: int
    qk_dim: int
    v_dim: int
    cp: int
    tp: int
    layout: str
    comm: str
    # `pass` is a keyword of Python; the CSV header says pass.
    pass_: str
    p50_ms: float
    one_gpu_p50_ms: float
    efficiency: float
    exposed_ms: float
    peak_gib: float
    gpu: str
    commit: str


class Measured(NamedTuple):
    """A row, and figures without a column: bytes that a rank sends and receives, and the fraction of remote blocks it needs."""

    row: Row
    sent: int
    received: int
    remote_blocks_needed: float


@dataclass(frozen=True)
class Settings:
    """What all measurements of a run share.

    Attributes:
        heads: of the whole model, over all tensor-parallel ranks.
        world: all processes, CP x TP.
        group: this process's context-parallel group; ``world`` is divided into as many as there are tensor-parallel ranks.
        repetitions: upper limit of repetitions for each timing.
        seconds: about how long each timing may take: long sequences are repeated less often, but at least three times unless a
            single run takes longer than this.
    """

    heads: HeadLayout
    config: NSAConfig
    dtype: torch.dtype
    device: torch.device
    world: dist.ProcessGroup
    group: dist.ProcessGroup
    repetitions: int = 10
    seconds: float = 3.0

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self.world.size() // self.group.size()

    @property
    def local_heads(self) -> HeadLayout:
        """Heads of one tensor-parallel rank."""
        return self.heads.shard(self.tp)


class _Figures(NamedTuple):
    """By pass, each the largest over ranks: times in ms, with communication and (silent) without; peaks in GiB; bytes sent and
    received."""

    times: dict[str, float]
    silent: dict[str, float]
    peaks: dict[str, float]
    traffic: dict[str, tuple[int, int]]
    remote_blocks_needed: float


def run_context_parallel_benchmark(
    seq_lens: Sequence[int], settings: Settings, *, layouts: Sequence[str], comms: Sequence[str]
) -> Iterator[Measured]:
    """Measure every combination on all ranks of the group; every rank gets the same rows. Collective."""
    machine = machine_facts(settings.device)
    facts = {"gpu": machine["gpu"], "commit": machine["commit"], **asdict(settings.heads)}
    cp, tp = settings.group.size(), settings.tp
    for seq_len in seq_lens:
        alone = _measure_alone(seq_len, settings)
        unknown = dict.fromkeys(PASSES, float("nan"))
        reference = unknown if alone is None else alone.times
        for pass_ in PASSES if alone is not None else ():
            times = {"p50_ms": round(alone.times[pass_], 4), "one_gpu_p50_ms": round(alone.times[pass_], 4)}
            yield Measured(
                Row(
                    seq_len, cp=1, tp=1, layout=settings.config.layout, comm=ONE_GPU, pass_=pass_, **times, efficiency=1.0,
                    exposed_ms=0.0, peak_gib=round(alone.peaks[pass_], 3), **facts,
                ), 0, 0, 0.0,
            )  # fmt: skip
        for kind in layouts:
            for comm in comms:
                config = replace(settings.config, layout=kind, compressed_comm=comm)
                together = _measure(seq_len, replace(settings, config=config), settings.group)
                for pass_ in PASSES:
                    time = together.times[pass_]
                    row = Row(
                        seq_len, cp=cp, tp=tp, layout=kind, comm=comm, pass_=pass_, p50_ms=round(time, 4),
                        one_gpu_p50_ms=round(reference[pass_], 4),
                        efficiency=round(reference[pass_] / (cp * tp) / time, 4),
                        exposed_ms=round(time - together.silent[pass_], 4), peak_gib=round(together.peaks[pass_], 3), **facts,
                    )  # fmt: skip
                    yield Measured(row, *together.traffic[pass_], together.remote_blocks_needed)


def _measure_alone(seq_len: int, settings: Settings) -> _Figures | None:
    """One GPU with the whole sequence (measured on every rank); None if that does not fit in one GPU's memory."""
    figures, fits = None, True
    try:
        figures = _local_figures(seq_len, settings, None)
    except torch.cuda.OutOfMemoryError:
        fits = False
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    fit = torch.tensor(float(fits), device=settings.device)
    dist.all_reduce(fit, dist.ReduceOp.MIN, group=settings.world)
    return _slowest(figures, settings) if bool(fit) else None


def _measure(seq_len: int, settings: Settings, group: dist.ProcessGroup) -> _Figures:
    return _slowest(_local_figures(seq_len, settings, group), settings)


def _local_figures(seq_len: int, settings: Settings, group: dist.ProcessGroup | None) -> _Figures:
    """This rank's own figures, of its shard under ``group`` or of the whole sequence without one."""
    config, device = settings.config, settings.device
    layout, x = _shard(seq_len, settings, group)

    def forward() -> NSAOutput:
        return _attend(x, config, layout, group)

    def both() -> tuple[torch.Tensor, ...]:
        return _gradients(forward().out, x)

    peaks = {"forward": peak_memory(forward, device), "backward": peak_memory(both, device)}
    timed = {"forward": _timed(forward, settings, group)}
    # Only now: a graph kept while forwards are timed would nearly double the memory that one GPU needs.
    result = forward()
    timed["backward"] = _timed(lambda: _gradients(result.out, x, keep=True), settings, group)
    needed = float(remote_blocks(result.blocks, layout, config).needed)
    times, silent, traffic = ({pass_: figures[i] for pass_, figures in timed.items()} for i in range(3))
    return _Figures(times, {} if group is None else silent, peaks, traffic, needed)


def _timed(
    call: Callable[[], object], settings: Settings, group: dist.ProcessGroup | None
) -> tuple[float, float, tuple[int, int]]:
    """For one pass: ms, ms with communication switched off (nan without ``group``), and bytes sent and received."""
    recorded, silent = RecordedTransfers(), float("nan")
    with count_traffic() as counted, recorded.record():
        call()
    time, repetitions = _time(call, settings, group)
    if group is not None:
        replayed = partial(_replayed, call, recorded)
        silent = measure(lambda _: replayed(), settings.device, repetitions=repetitions).p50_ms
    return time, silent, (counted.sent, counted.received)


def make_step(seq_len: int, settings: Settings) -> Callable[[], object]:
    """One forward and backward under context parallelism, to be called on every rank of the group."""
    layout, x = _shard(seq_len, settings, settings.group)
    return lambda: _gradients(_attend(x, settings.config, layout, settings.group).out, x)


def _shard(seq_len: int, settings: Settings, group: dist.ProcessGroup | None) -> tuple[SequenceLayout, AttentionInputs]:
    """The layout and random inputs for this rank's shard alone, so that no rank has to hold the whole sequence's."""
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    heads = settings.heads if group is None else settings.local_heads
    layout = SequenceLayout.build(seq_len, cp_size=size, cp_rank=rank, kind=settings.config.layout)
    tokens, device, dtype = layout.num_local_tokens, settings.device, settings.dtype
    return layout, make_inputs(settings.config, heads, tokens, "random", seed=rank, device=device, dtype=dtype)


def _attend(x: AttentionInputs, config: NSAConfig, layout: SequenceLayout, group: dist.ProcessGroup | None) -> NSAOutput:
    return native_sparse_attention(x.q, x.k, x.v, x.gates, x.k_weights, x.v_weights, config, layout=layout, group=group)


def _gradients(out: torch.Tensor, x: AttentionInputs, *, keep: bool = False) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out, x.leaves, x.grad, retain_graph=keep)


def _replayed(call: Callable[[], object], recorded: RecordedTransfers) -> None:
    with recorded.replay():
        call()


def _time(call: Callable[[], object], settings: Settings, group: dist.ProcessGroup | None) -> tuple[float, int]:
    """The median in ms, and the repetitions it was taken from, which under ``group`` must be those of all ranks."""
    if group is not None:
        # Ranks start together: one that was done earlier would count its waiting for the others.
        dist.all_reduce(torch.zeros(1, device=settings.device), group=settings.world)
    # Calls before this one, for memory and traffic, have warmed up.
    once = measure(lambda _: call(), settings.device, repetitions=1, warmup=0).p50_ms
    slowest = torch.tensor(once, device=settings.device)
    if group is not None:
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=settings.world)
    fitting = settings.seconds * 1e3 / max(float(slowest), 1e-3)
    if fitting < 1:
        return once, 1
    repetitions = min(settings.repetitions, max(3, int(fitting)))
    return measure(lambda _: call(), settings.device, repetitions=repetitions, warmup=1).p50_ms, repetitions


def _slowest(figures: _Figures, settings: Settings) -> _Figures:
    """Every figure's largest value over the ranks. Collective."""
    named = {
        (name, pass_): values
        for name, by_pass in zip(figures._fields[:4], figures[:4], strict=True)
        for pass_, values in by_pass.items()
    }
    flat = [float(x) for values in named.values() for x in (values if isinstance(values, tuple) else (values,))]
    largest = torch.tensor([*flat, figures.remote_blocks_needed], dtype=torch.float64, device=settings.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=settings.world)
    left = iter(largest.tolist())
    found: dict[str, dict] = {name: {} for name in figures._fields[:4]}
    for (name, pass_), values in named.items():
        found[name][pass_] = (int(next(left)), int(next(left))) if isinstance(values, tuple) else next(left)
    return _Figures(**found, remote_blocks_needed=next(left))
