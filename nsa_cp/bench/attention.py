"""``nsa-cp bench attention``: Native Sparse Attention beside dense attention on one device, forward and backward, by stage.

    nsa-cp bench attention --seq-lens 8192 65536 --heads 64/4x128 32/8x128 --stages --csv docs/benchmarks/attention.csv

Attention only: no projections, no position embedding. Every row of the CSV is one (case, implementation, stage, pass).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nsa_cp.bench.inputs import AttentionInputs, HeadLayout, make_inputs, trained_config
from nsa_cp.bench.machine import machine_facts
from nsa_cp.bench.peers import PEERS, Forward, Leaves, make_peer, reason
from nsa_cp.bench.stages import stage_passes
from nsa_cp.bench.timing import Timing, measure, peak_memory
from nsa_cp.config import NSAConfig
from nsa_cp.ops import compress_kv, native_sparse_attention, select_blocks
from nsa_cp.study.neighbours import neighbour_agreement

IMPLEMENTATIONS = ("nsa", *PEERS)


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

    @property
    def key(self) -> tuple[int, str, str]:
        """Length, heads and inputs: which case this row belongs to."""
        return self.seq_len, str(HeadLayout(self.num_heads, self.num_groups, self.qk_dim, self.v_dim)), self.inputs


@dataclass(frozen=True)
class Case:
    """What is measured: one sequence of ``seq_len`` tokens with the given heads and inputs.

    ``trained_file`` holds the tensors of ``inputs = "trained"``.
    """

    seq_len: int
    heads: HeadLayout
    inputs: str
    config: NSAConfig
    dtype: torch.dtype
    device: torch.device
    trained_file: Path | None = None

    @property
    def key(self) -> tuple[int, str, str]:
        """Length, heads and inputs, as in :attr:`Row.key`."""
        return self.seq_len, str(self.heads), self.inputs


def run_attention_benchmark(
    cases: Sequence[Case],
    *,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    stages: bool = False,
    repetitions: int = 10,
    notice: Callable[[str], None] = print,
) -> Iterator[Row]:
    """Measure every case and yield each row as soon as it is measured.

    Args:
        implementations: ``nsa`` and names of :data:`nsa_cp.bench.peers.PEERS`; a peer that cannot run is left out.
        stages: also time each stage of ``nsa`` alone.
        notice: called with one line for each peer that is left out, and why, or that computes something else.

    Raises:
        ValueError: trained inputs that do not fit the case.
    """
    machine = machine_facts(cases[0].device) if cases else {}
    told: set[str] = set()

    def tell_once(line: str) -> None:
        if line not in told:
            told.add(line)
            notice(line)

    for case in cases:
        inputs = [_inputs(case, seed=0)]
        runs = {}
        for impl in implementations:
            runnable = _runnable(case, impl, inputs[0], tell_once)
            if runnable is not None:
                runs[impl] = runnable
        # Timed on two sets of inputs in turn; memory is measured while there is only one.
        inputs.append(_inputs(case, seed=1))
        agreement = _agreement(case, inputs[0])
        for impl, (forward, peaks) in runs.items():
            for stage, pass_, timing in _measure(case, forward, inputs, stages and impl == "nsa", repetitions):
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
                    peak_gib=round(peaks[pass_], 3) if stage == "all" else 0.0,
                    **machine,
                )


def _inputs(case: Case, seed: int) -> AttentionInputs:
    return make_inputs(
        case.config, case.heads, case.seq_len, case.inputs, seed=seed, device=case.device, dtype=case.dtype,
        trained_file=case.trained_file,
    )  # fmt: skip


def _runnable(
    case: Case, impl: str, x: AttentionInputs, notice: Callable[[str], None]
) -> tuple[Forward, dict[str, float]] | None:
    """The implementation and its peak memory in GiB by pass; None, and a notice, where a peer cannot run."""
    if impl == "nsa":

        def nsa(x: AttentionInputs) -> tuple[torch.Tensor, Leaves]:
            return native_sparse_attention(x.q, x.k, x.v, x.gates, x.k_weights, x.v_weights, case.config).out, x.leaves

        return nsa, _peaks(nsa, x, case.device)
    forward = make_peer(impl, case.config, case.heads)
    if isinstance(forward, str):
        notice(f"{impl} is not measured here: {forward}")
        return None
    try:
        peaks = _peaks(forward, x, case.device)
    except Exception as error:  # whatever a peer says to heads or lengths that it does not take
        notice(f"{impl} is not measured at {case.seq_len} tokens, heads {case.heads}: {reason(error)}")
        return None
    if PEERS[impl].differs:
        notice(f"{impl} differs: {PEERS[impl].differs}")
    return forward, peaks


def _peaks(forward: Forward, x: AttentionInputs, device: torch.device) -> dict[str, float]:
    """Peak memory of a forward, and of forward and backward, inputs and gradients included."""

    def both() -> list[torch.Tensor]:
        out, leaves = forward(x)
        return [out, *torch.autograd.grad(out, leaves, x.grad)]

    # One call before, so that what compilation and first calls allocate is not counted.
    both()
    return {"forward": peak_memory(lambda: forward(x), device), "backward": peak_memory(both, device)}


def _measure(
    case: Case, forward: Forward, rotation: list[AttentionInputs], stages: bool, repetitions: int
) -> Iterator[tuple[str, str, Timing]]:
    """Time the forward alone, then the backward alone, which runs on graphs kept for each set of inputs."""
    count, device = len(rotation), case.device
    yield "all", "forward", measure(lambda i: forward(rotation[i % count]), device, repetitions=repetitions)
    graphs = [(*forward(x), x.grad) for x in rotation]

    def backward(i: int) -> None:
        out, leaves, grad = graphs[i % count]
        torch.autograd.grad(out, leaves, grad, retain_graph=True)

    yield "all", "backward", measure(backward, device, repetitions=repetitions)
    graphs.clear()
    if stages:
        for stage, pass_, call in stage_passes(case.config, rotation[0]):
            yield stage, pass_, measure(lambda i, call=call: call(), device, repetitions=repetitions)


@torch.no_grad()
def _agreement(case: Case, x: AttentionInputs) -> float:
    """How much neighbouring queries' choices agree, over the whole sequence and all groups: what the kernels will meet."""
    k_cmp, _ = compress_kv(x.k[0], x.v[0], x.k_weights, x.v_weights, case.config, backend=case.config.backend)
    return neighbour_agreement(select_blocks(x.q, k_cmp, case.config, backend=case.config.backend), case.config)


def default_cases(
    seq_lens: Sequence[int],
    heads: Sequence[str],
    inputs: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    trained_file: Path | None = None,
    **settings: object,
) -> list[Case]:
    """Every combination, with NSAConfig's defaults (the paper's settings) unless ``settings`` (its fields) say otherwise.

    Trained inputs bring their compressor, sharing of K/V and kind of gate along.

    Raises:
        ValueError: settings that do not fit together or not the trained file, or trained inputs without a file.
    """
    config = replace(NSAConfig(), **settings)
    configs = dict.fromkeys(inputs, config)
    if "trained" in configs:
        if trained_file is None:
            raise ValueError("inputs 'trained' need a file of a trained model's tensors; give one with --trained-file FILE")
        configs["trained"] = trained_config(trained_file, config)
    layouts = [HeadLayout.parse(text) for text in heads]
    return [Case(s, h, kind, configs[kind], dtype, device, trained_file) for s in seq_lens for h in layouts for kind in inputs]
