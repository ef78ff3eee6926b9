"""``nsa-cp bench context-parallel``: one GPU beside many, under torchrun; efficiency, exposed communication, memory.

    torchrun --nproc-per-node 2 -m nsa_cp.cli.main bench context-parallel --seq-lens 65536 131072

Efficiency is one GPU's time / CP over the time under CP. Exposed communication is the time under CP less the time of the
same work with every transfer answered from memory at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist

from nsa_cp.bench.inputs import AttentionInputs, HeadLayout, make_inputs
from nsa_cp.bench.machine import machine_facts
from nsa_cp.bench.timing import measure, peak_memory
from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import SequenceLayout, transfer
from nsa_cp.context_parallel import gather as gather_module
from nsa_cp.ops import native_sparse_attention


@dataclass(frozen=True)
class Row:
    """One line of ``docs/benchmarks/context_parallel.csv``: times in milliseconds, memory a rank in GiB."""

    seq_len: int
    num_heads: int
    num_groups: int
    qk_dim: int
    v_dim: int
    cp: int
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


class _Answered:
    """A finished transfer."""

    def wait(self) -> None:
        """Nothing to wait for."""


@contextlib.contextmanager
def communication_switched_off() -> Iterator[None]:
    """Every transfer is answered at once with random numbers: the kernels' work without the wires'.

    What arrives must look like data, because the kernels' speed depends on how far neighbouring queries agree.
    """
    prepared: dict[tuple[int, torch.device], torch.Tensor] = {}

    def fill(output: torch.Tensor) -> None:
        key = (output.nbytes, output.device)
        if key not in prepared:
            prepared[key] = torch.randn(output.nbytes // 2 + 1, dtype=torch.bfloat16, device=output.device)
        output.view(torch.uint8).copy_(prepared[key].view(torch.uint8)[: output.nbytes])

    def collective(output: torch.Tensor, *_: object, **__: object) -> _Answered:
        fill(output)
        return _Answered()

    def exchange(operations: Sequence[dist.P2POp]) -> list[_Answered]:
        for operation in operations:
            if operation.op is dist.irecv:
                fill(operation.tensor)
        return []

    with (
        mock.patch.object(gather_module, "all_gather", collective),
        mock.patch.object(gather_module, "reduce_scatter", collective),
        mock.patch.object(transfer.dist, "batch_isend_irecv", exchange),
    ):
        yield


def run_context_parallel_benchmark(
    seq_lens: Sequence[int],
    heads: HeadLayout,
    *,
    layouts: Sequence[str],
    comms: Sequence[str],
    config: NSAConfig,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
    repetitions: int = 10,
) -> Iterator[Row]:
    """Measure every combination on all ranks of ``group``; every rank gets the same rows (times of the slowest rank)."""
    machine = machine_facts(device)
    for seq_len in seq_lens:
        alone = _measure(seq_len, heads, config, dtype, device, None, repetitions)
        for kind in layouts:
            for comm in comms:
                settings = replace(config, layout=kind, compressed_comm=comm)
                together = _measure(seq_len, heads, settings, dtype, device, group, repetitions)
                with communication_switched_off():
                    silent = _measure(seq_len, heads, settings, dtype, device, group, repetitions)
                for pass_ in ("forward", "backward"):
                    yield Row(
                        seq_len,
                        **asdict(heads),
                        cp=group.size(),
                        layout=kind,
                        comm=comm,
                        pass_=pass_,
                        p50_ms=round(together[pass_], 4),
                        one_gpu_p50_ms=round(alone[pass_], 4),
                        efficiency=round(alone[pass_] / group.size() / together[pass_], 4),
                        exposed_ms=round(together[pass_] - silent[pass_], 4),
                        peak_gib=round(together["peak"], 3),
                        gpu=machine["gpu"],
                        commit=machine["commit"],
                    )


def _measure(
    seq_len: int,
    heads: HeadLayout,
    config: NSAConfig,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None,
    repetitions: int,
) -> dict[str, float]:
    """Median forward and backward in ms and peak memory in GiB, each the largest over the ranks."""
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    layout = SequenceLayout.build(seq_len, cp_size=size, cp_rank=rank, kind=config.layout)
    # Inputs of a shard, not a shard of inputs: timings do not depend on values, and one rank need not hold the whole.
    x = make_inputs(config, heads, layout.num_local_tokens, "random", seed=rank, device=device, dtype=dtype)

    def forward() -> torch.Tensor:
        return native_sparse_attention(x.q, x.k, x.v, x.gates, x.k_weights, x.v_weights, config, layout=layout, group=group).out

    peak = peak_memory(lambda: _gradients(forward(), x), device)
    times = {"forward": measure(lambda _: forward(), device, repetitions=repetitions).p50_ms}
    out = forward()
    times["backward"] = measure(lambda _: _gradients(out, x, keep=True), device, repetitions=repetitions).p50_ms
    slowest = torch.tensor([times["forward"], times["backward"], peak], device=device, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(("forward", "backward", "peak"), slowest.tolist(), strict=True))


def _gradients(out: torch.Tensor, x: AttentionInputs, *, keep: bool = False) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out, x.leaves, x.grad, retain_graph=keep)
