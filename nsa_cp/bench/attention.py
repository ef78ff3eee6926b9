"""``nsa-cp bench attention``: Native Sparse Attention beside dense attention on one device, forward and backward, by stage.

    nsa-cp bench attention --seq-lens 8192 65536 --heads 64/4x128 32/8x128 --stages --csv docs/benchmarks/attention.csv

Attention only: no projections, no position embedding. Every row of the CSV is one (case, implementation, stage, pass).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_cp.bench.inputs import AttentionInputs, HeadLayout, make_inputs, neighbour_agreement
from nsa_cp.bench.machine import machine_facts
from nsa_cp.bench.timing import Timing, measure, peak_memory
from nsa_cp.config import NSAConfig
from nsa_cp.ops import (
    combine_branches,
    compress_kv,
    compressed_attention,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

IMPLEMENTATIONS = ("nsa", "dense_cudnn", "dense_flash")
STAGES = ("compression", "compressed", "selection", "selected", "window", "gating")


@dataclass(frozen=True)
class Row:
    """One line of ``docs/benchmarks/attention.csv``: times in milliseconds; memory in GiB for the whole, 0 for stages.

    Memory is the peak of allocations, inputs included: of a forward, or (pass backward) of forward and backward together.
    """

    seq_len: int
    num_heads: int
    num_groups: int
    qk_dim: int
    v_dim: int
    dtype: str
    inputs: str
    agreement: float
    impl: str
    stage: str
    # `pass` is a keyword of Python; the CSV header says pass.
    pass_: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_gib: float
    gpu: str
    torch: str
    triton: str
    commit: str


@dataclass(frozen=True)
class Case:
    """What is measured: one sequence of ``seq_len`` tokens with the given heads and inputs."""

    seq_len: int
    heads: HeadLayout
    inputs: str
    config: NSAConfig
    dtype: torch.dtype
    device: torch.device


def run_attention_benchmark(
    cases: Sequence[Case],
    *,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    stages: bool = False,
    repetitions: int = 10,
) -> Iterator[Row]:
    """Measure every case; rows come as they are measured.

    Args:
        implementations: of ``nsa``, ``dense_cudnn``, ``dense_flash``; a dense one that the device refuses is left out.
        stages: also time each stage of ``nsa`` alone.
    """
    machine = machine_facts(cases[0].device) if cases else {}
    for case in cases:
        inputs = [_inputs(case, seed=0)]
        peaks = {impl: _peaks(case, impl, inputs[0]) for impl in implementations}
        # Timed on two sets of inputs in turn; memory is measured while there is only one.
        inputs.append(_inputs(case, seed=1))
        agreement = _agreement(case, inputs[0])
        for impl in implementations:
            if peaks[impl] is None:
                continue
            for stage, pass_, timing in _measure_case(case, impl, inputs, stages and impl == "nsa", repetitions):
                yield Row(
                    case.seq_len,
                    **asdict(case.heads),
                    dtype=str(case.dtype).removeprefix("torch."),
                    inputs=case.inputs,
                    agreement=round(agreement, 3),
                    impl=impl,
                    stage=stage,
                    pass_=pass_,
                    **Timing(*(round(x, 4) for x in timing))._asdict(),
                    peak_gib=round(peaks[impl][pass_], 3) if stage == "all" else 0.0,
                    **machine,
                )


def _inputs(case: Case, seed: int) -> AttentionInputs:
    return make_inputs(case.config, case.heads, case.seq_len, case.inputs, seed=seed, device=case.device, dtype=case.dtype)


def _peaks(case: Case, impl: str, x: AttentionInputs) -> dict[str, float] | None:
    """Peak memory of a forward, and of forward and backward, inputs and gradients included; None where it cannot run."""
    forward = _implementation(case, impl)

    def both() -> list[torch.Tensor]:
        out, leaves = forward(x)
        return [out, *torch.autograd.grad(out, leaves, x.grad)]

    try:
        return {"forward": peak_memory(lambda: forward(x), case.device), "backward": peak_memory(both, case.device)}
    except RuntimeError as error:
        if impl == "nsa" or not str(error).startswith(("No available kernel", "No viable backend")):
            raise
        return None


def _measure_case(
    case: Case, impl: str, rotation: list[AttentionInputs], stages: bool, repetitions: int
) -> Iterator[tuple[str, str, Timing]]:
    yield from _measure_passes("all", _implementation(case, impl), rotation, case.device, repetitions)
    if stages:
        for stage in STAGES:
            yield from _measure_passes(stage, _stage(case, stage, rotation[0]), rotation[:1], case.device, repetitions)


def _measure_passes(
    stage: str,
    forward: Callable[[AttentionInputs], tuple[torch.Tensor, list[torch.Tensor]]],
    rotation: list[AttentionInputs],
    device: torch.device,
    repetitions: int,
) -> Iterator[tuple[str, str, Timing]]:
    """Forward alone, then backward alone: all graphs of a round are kept, and every backward runs on one of them."""
    yield stage, "forward", measure(lambda i: forward(rotation[i % len(rotation)]), device, repetitions=repetitions)
    graphs = []
    for inputs in rotation:
        out, leaves = forward(inputs)
        if not out.requires_grad:
            return
        grad = inputs.grad if out.shape == inputs.grad.shape else torch.randn_like(out)
        graphs.append((out, leaves, grad))

    def backward(i: int) -> None:
        out, leaves, grad = graphs[i % len(graphs)]
        torch.autograd.grad(out, leaves, grad, retain_graph=True)

    yield stage, "backward", measure(backward, device, repetitions=repetitions)


def _implementation(case: Case, impl: str) -> Callable[[AttentionInputs], tuple[torch.Tensor, list[torch.Tensor]]]:
    def nsa(x: AttentionInputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        result = native_sparse_attention(x.q, x.k, x.v, x.gates, x.k_weights, x.v_weights, case.config)
        return result.out, x.leaves

    def dense(x: AttentionInputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        q, k, v = (y.transpose(0, 1)[None] for y in (x.q, x.k[0], x.v[0]))
        backend = {"dense_cudnn": SDPBackend.CUDNN_ATTENTION, "dense_flash": SDPBackend.FLASH_ATTENTION}[impl]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1), [x.q, x.k[0], x.v[0]]

    return nsa if impl == "nsa" else dense


def _stage(case: Case, stage: str, x: AttentionInputs) -> Callable[[AttentionInputs], tuple[torch.Tensor, list[torch.Tensor]]]:
    """One stage on what the stages before it make of ``x``, computed once."""
    config = case.config
    with torch.no_grad():
        k_cmp, v_cmp = compress_kv(x.k[0], x.v[0], x.k_weights, x.v_weights, config)
        out_cmp, lse = compressed_attention(x.q, k_cmp, v_cmp, config, backend=config.backend)
        blocks = select_blocks(x.q, k_cmp, config, lse=lse, backend=config.backend)
    k_cmp, v_cmp = k_cmp.requires_grad_(), v_cmp.requires_grad_()
    slc, win = 1 % len(x.k), 2 % len(x.k)
    outs = [torch.randn_like(out_cmp).requires_grad_() for _ in range(3)] if stage == "gating" else []

    def compression(x: AttentionInputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        k, v = compress_kv(x.k[0], x.v[0], x.k_weights, x.v_weights, config, backend=config.backend)
        return torch.cat([k.flatten(), v.flatten()]), [x.k[0], x.v[0], *x.k_weights, *x.v_weights]

    def selection(x: AttentionInputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return select_blocks(x.q.detach(), k_cmp.detach(), config, lse=lse, backend=config.backend), []

    return {
        "compression": compression,
        "compressed": lambda x: (
            compressed_attention(x.q, k_cmp, v_cmp, config, backend=config.backend)[0],
            [x.q, k_cmp, v_cmp],
        ),
        "selection": selection,
        "selected": lambda x: (
            selected_attention(x.q, x.k[slc], x.v[slc], blocks, config, backend=config.backend)[0],
            [x.q, x.k[slc], x.v[slc]],
        ),
        "window": lambda x: (
            window_attention(x.q, x.k[win], x.v[win], config, backend=config.backend)[0],
            [x.q, x.k[win], x.v[win]],
        ),
        "gating": lambda x: (combine_branches(outs, x.gates, config.backend), [*outs, x.gates]),
    }[stage]


@torch.no_grad()
def _agreement(case: Case, x: AttentionInputs) -> float:
    """Measured on one group of the whole sequence, which is what the kernels will meet."""
    heads = case.heads.num_heads // case.heads.num_groups
    k_cmp, _ = compress_kv(x.k[0], x.v[0], x.k_weights, x.v_weights, case.config)
    blocks = select_blocks(x.q[:, :heads], k_cmp[:, :1], case.config, backend=case.config.backend)
    return neighbour_agreement(blocks, case.config)


def default_cases(
    seq_lens: Sequence[int],
    heads: Sequence[str],
    inputs: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    **settings: object,
) -> list[Case]:
    """Every combination, with the paper's settings unless ``settings`` (fields of NSAConfig) say otherwise."""
    config = replace(NSAConfig(), **settings)
    layouts = [HeadLayout.parse(text) for text in heads]
    return [Case(s, h, kind, config, dtype, device) for s in seq_lens for h in layouts for kind in inputs]
