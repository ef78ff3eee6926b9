"""Every Triton kernel once, forward and backward, on small inputs full of borders: what a memory checker is run over.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all python3 -m nsa_cp.testing.sanitize

``racecheck`` and ``initcheck`` are used in the same way. PyTorch's caching allocator hands out pieces of large blocks, so an
address past the end of a tensor lies in the next one; without caching every tensor is an allocation of its own, and such an
address is an error. Run it once without the checker first, to fill Triton's cache, so that nothing is compiled under it.

Every result is also compared with the torch path in float64. The exit status is 1 if one is wrong, 2 if nothing can run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from unittest import mock

import torch

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.ops import (
    branches_backward,
    combine_branches,
    compress_kv,
    compressed_attention,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_cp.testing.cases import AttentionProblem, make_problem
from nsa_cp.testing.comparison import relative_error

# Borders of documents of one token, shorter than a block, empty, and of lengths that are multiples of nothing.
_DOCUMENTS = (0, 1, 34, 34, 163, 421)
_SHORT = NSAConfig(
    compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=5, window_size=37, backend="triton"
)


@dataclass(frozen=True)
class Case:
    """Settings, and N query heads over G groups of Dk and Dv channels in ``dtype``."""

    config: NSAConfig
    heads: int
    groups: int
    qk_dim: int
    v_dim: int
    dtype: torch.dtype
    documents: tuple[int, ...] = _DOCUMENTS


CASES = {
    "16 heads a group, l' 64": Case(
        NSAConfig(num_selected_blocks=4, window_size=100, backend="triton"), 32, 2, 128, 128, torch.bfloat16
    ),
    "5 heads a group, l' 128, 192/128": Case(
        replace(_SHORT, compressor="linear", select_block_size=128, num_selected_blocks=3, shared_kv=True), 5, 1, 192, 128,
        torch.bfloat16,
    ),
    "2 heads a group, l' 64": Case(
        NSAConfig(num_selected_blocks=4, window_size=100, backend="triton"), 4, 2, 64, 64, torch.bfloat16
    ),
    "4 heads a group, l' 64": Case(
        NSAConfig(num_selected_blocks=4, window_size=100, backend="triton"), 8, 2, 128, 128, torch.bfloat16, (0, 300)
    ),
    "1 head a group, l' 32, no window": Case(
        replace(_SHORT, compressor="mean", window_size=0, gate="branch"), 2, 2, 64, 96, torch.float16, (0, 331)
    ),
}  # fmt: skip
_BOUNDS = {torch.bfloat16: 2.5e-2, torch.float16: 4e-3}

Tensors = Sequence[torch.Tensor]
# (outputs that a gradient goes into, other outputs, leaves)
Answer = tuple[Tensors, Tensors, Tensors]


def _compression(p: AttentionProblem, backend: str, blocks: torch.Tensor) -> Answer:
    outs = compress_kv(p.k[0], p.v[0], p.k_weights, p.v_weights, p.config, p.cu_seqlens, backend=backend)
    return outs, [], [p.k[0], p.v[0], *p.k_weights, *p.v_weights]


def _compressed_tokens(p: AttentionProblem) -> Tensors:
    """As many rows of k and v as there are compressed tokens, to stand in for these."""
    with torch.no_grad():
        count = compress_kv(p.k[0], p.v[0], p.k_weights, p.v_weights, p.config, p.cu_seqlens, backend="torch")[0].shape[0]
    return [x[:count].detach().clone().requires_grad_() for x in (p.k[0], p.v[0])]


def _compressed(p: AttentionProblem, backend: str, blocks: torch.Tensor) -> Answer:
    leaves = [p.q, *_compressed_tokens(p)]
    out, lse = compressed_attention(*leaves, p.config, p.cu_seqlens, backend=backend)
    return [out], [lse], leaves


def _selection(p: AttentionProblem, backend: str, blocks: torch.Tensor) -> Answer:
    chosen = select_blocks(p.q.detach(), _compressed_tokens(p)[0].detach(), p.config, p.cu_seqlens, backend=backend)
    return [], [chosen], []


def _selected(p: AttentionProblem, backend: str, blocks: torch.Tensor) -> Answer:
    leaves = [p.q, p.k[-1], p.v[-1]]
    out, lse = selected_attention(*leaves, blocks, p.config, p.cu_seqlens, backend=backend)
    return [out], [lse], leaves


def _window(p: AttentionProblem, backend: str, blocks: torch.Tensor) -> Answer:
    leaves = [p.q, p.k[-1], p.v[-1]]
    out, lse = window_attention(*leaves, p.config, p.cu_seqlens, backend=backend)
    return [out], [lse], leaves


def _gating(p: AttentionProblem, backend: str, blocks: torch.Tensor) -> Answer:
    outs = [x.detach().clone().requires_grad_() for x in (p.grad, 0.5 * p.grad, p.grad.flip(0))]
    return [combine_branches(outs, p.gates, backend)], [], [*outs, p.gates]


def _whole(p: AttentionProblem, backend: str, blocks: torch.Tensor) -> Answer:
    leaves = [p.q, *p.k, *p.v, p.gates, *p.k_weights, *p.v_weights]
    config = replace(p.config, backend=backend)
    # Without rotation nothing depends on the key position encoding of a linear compressor: its exact gradient would be 0.
    result = native_sparse_attention(
        p.q, p.k, p.v, p.gates, p.k_weights, p.v_weights, config, p.cu_seqlens, RotaryConfig(), blocks=blocks
    )
    return [result.out], [result.lse_compressed, result.lse_selected, result.lse_window], leaves


# The whole with the backward of a long sequence: on Hopper the fused one of 5 products, if its kernel takes the tensors.
# Elsewhere it is the same as the whole.
_LONG = "whole_long"
KERNELS: dict[str, Callable[[AttentionProblem, str, torch.Tensor], Answer]] = {
    "compression": _compression,
    "compressed": _compressed,
    "selection": _selection,
    "selected": _selected,
    "window": _window,
    "gating": _gating,
    "whole": _whole,
    _LONG: _whole,
}


def check(kernel: str, case: Case, device: torch.device) -> list[str]:
    """Run one kernel's forward and backward on a case; returns what is wrong with the results, one line each."""
    problem = make_problem(
        case.config, case.documents, num_heads=case.heads, num_groups=case.groups, qk_dim=case.qk_dim, v_dim=case.v_dim,
        dtype=case.dtype,
    ).to(device)  # fmt: skip
    blocks = _selection(problem, "torch", torch.empty(0))[1][0]
    with mock.patch.object(branches_backward, "LEAST_PAIRS", 0) if kernel == _LONG else nullcontext():
        ours = _results(KERNELS[kernel](_with_leaves(problem, case.dtype), "triton", blocks), problem.grad)
    exact = _results(KERNELS[kernel](_with_leaves(problem, torch.float64), "torch", blocks), problem.grad)
    wrong = []
    for name, value in exact.items():
        if value.dtype == torch.int32:
            differing = float((ours[name] != value).any(-1).float().mean())
            # Scores that are equal but for their rounding may be ranked either way.
            if not differing <= 0.01:
                wrong.append(f"{name}: {differing:.1%} of the selections differ")
        elif value.numel() and not (error := relative_error(ours[name], value)) <= _BOUNDS[case.dtype]:
            wrong.append(f"{name}: relative error {error:.2e}, bound {_BOUNDS[case.dtype]:.1e}")
    return wrong


def _with_leaves(problem: AttentionProblem, dtype: torch.dtype) -> AttentionProblem:
    copy = problem.to(dtype)
    lists = {
        name: tuple(x.detach().requires_grad_() for x in getattr(copy, name)) for name in ("k", "v", "k_weights", "v_weights")
    }
    return replace(copy, q=copy.q.detach().requires_grad_(), gates=copy.gates.detach().requires_grad_(), **lists)


def _results(answer: Answer, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs and gradients, named by their order."""
    outs, others, leaves = answer
    upstream = [grad.reshape(-1)[: out.numel()].view(out.shape).to(out.dtype) for out in outs]
    gradients = torch.autograd.grad(outs, leaves, upstream, allow_unused=True) if outs else []
    named = {f"output {i}": x.detach() for i, x in enumerate([*outs, *others])}
    # An unused leaf (values of a branch that is off) has no gradient on either path.
    named |= {f"gradient {i}": g for i, g in enumerate(gradients) if g is not None}
    return named


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module's description."""
    parser = argparse.ArgumentParser(prog="python -m nsa_cp.testing.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS), help="default: all")
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(CASES)), choices=range(len(CASES)), help="default: all")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        print("sanitize: there is no CUDA device; kernels run there, or slowly anywhere with TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    faults = 0
    for number in chosen.cases:
        name, case = list(CASES.items())[number]
        if device.type == "cpu":
            # The interpreter computes bfloat16 wrongly.
            case = replace(case, dtype=torch.float16)
        for kernel in chosen.kernels:
            wrong = check(kernel, case, device)
            faults += len(wrong)
            print(f"{kernel:>12}, {name}: {'; '.join(wrong) or 'right'}", flush=True)
    print(f"{faults} wrong results" if faults else "all results are right")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
