"""Calls that run each stage of Native Sparse Attention alone, on the results of the stages before it, for timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from nsa_cp.bench.inputs import AttentionInputs
from nsa_cp.config import NSAConfig
from nsa_cp.ops import (
    combine_branches,
    compress_kv,
    compressed_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_cp.ops.dispatch import accumulator_dtype, resolve_backend
from nsa_cp.ops.gating import gate_gradients, row_statistics

STAGES = ("compression", "compressed", "selection", "selected", "window", "gating")
Call = Callable[[], object]


def stage_passes(config: NSAConfig, x: AttentionInputs) -> Iterator[tuple[str, str, Call]]:
    """``(stage, "forward" or "backward", call)`` of every stage in order; selection has no backward.

    Stages do not add up to the whole: a branch's backward alone includes its own row sums of ``grad * out`` and its own query
    gradient, rounded to the inputs' dtype, which the whole computes once for all branches. Gating's backward is the whole's: row
    sums and the gradient of the gates, without gradients of the branches' outputs.
    """
    backend = config.backend
    slc, win = 1 % len(x.k), 2 % len(x.k)
    weights = (*x.k_weights, *x.v_weights)
    with torch.no_grad():
        k_cmp, v_cmp = compress_kv(x.k[0], x.v[0], x.k_weights, x.v_weights, config, backend=backend)
        lse = compressed_attention(x.q, k_cmp, v_cmp, config, backend=backend)[1]
        blocks = select_blocks(x.q, k_cmp, config, lse=lse, backend=backend)
    k_cmp, v_cmp = k_cmp.requires_grad_(), v_cmp.requires_grad_()

    def compression() -> Sequence[torch.Tensor]:
        return compress_kv(x.k[0], x.v[0], x.k_weights, x.v_weights, config, backend=backend)

    def compressed() -> Sequence[torch.Tensor]:
        return compressed_attention(x.q, k_cmp, v_cmp, config, backend=backend)[:1]

    def selected() -> Sequence[torch.Tensor]:
        return selected_attention(x.q, x.k[slc], x.v[slc], blocks, config, backend=backend)[:1]

    def window() -> Sequence[torch.Tensor]:
        return window_attention(x.q, x.k[win], x.v[win], config, backend=backend)[:1]

    yield from _differentiated("compression", compression, [x.k[0], x.v[0], *weights])
    yield from _differentiated("compressed", compressed, [x.q, k_cmp, v_cmp])
    yield "selection", "forward", lambda: select_blocks(x.q.detach(), k_cmp.detach(), config, lse=lse, backend=backend)
    yield from _differentiated("selected", selected, [x.q, x.k[slc], x.v[slc]])
    yield from _differentiated("window", window, [x.q, x.k[win], x.v[win]])
    yield from _gating(config, x)


def _differentiated(
    stage: str, forward: Callable[[], Sequence[torch.Tensor]], leaves: Sequence[torch.Tensor]
) -> Iterator[tuple[str, str, Call]]:
    yield stage, "forward", forward
    outs = forward()
    upstream = [torch.randn_like(out) for out in outs]
    yield stage, "backward", lambda: torch.autograd.grad(outs, leaves, upstream, retain_graph=True)


def _gating(config: NSAConfig, x: AttentionInputs) -> Iterator[tuple[str, str, Call]]:
    outs = [torch.randn_like(x.grad) for _ in range(config.num_gates)]
    gates = x.gates.detach()
    backend = resolve_backend(config.backend, x.grad)
    lses = [torch.randn(x.grad.shape[:2], dtype=accumulator_dtype(x.grad), device=x.grad.device) for _ in outs]

    def backward() -> object:
        statistics = row_statistics(x.grad, outs, lses, gates, backend)
        return statistics, gate_gradients(statistics, gates)

    yield "gating", "forward", lambda: combine_branches(outs, gates, config.backend)
    yield "gating", "backward", backward
