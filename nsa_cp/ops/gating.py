"""The gated sum of the branches (paper eq. 5) and its row sums in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nsa_cp.ops.dispatch import accumulator_dtype


class BranchStatistics(NamedTuple):
    """Row statistics that one branch's backward starts from, [T, N] in the accumulator's dtype.

    shift: ``lse - log(gate)``: ``exp(score - shift)`` is the gate times the softmax. +inf, which makes it 0, where the row sees
    nothing or the gate is 0. delta: ``sum(grad * out)``, without the gate; the gradient of the gate.
    """

    shift: torch.Tensor
    delta: torch.Tensor


def combine_forward(outs: Sequence[torch.Tensor], gates: torch.Tensor, backend: str) -> torch.Tensor:
    """``sum_b gates[..., b] * outs[b]``: outs [T, N, Dv] each, gates [T, N or 1, branches]; dtype of outs[0]."""
    if backend == "triton":
        from nsa_cp.kernels.gating.forward import combine_forward as kernel

        return kernel(outs, gates)
    accumulator = accumulator_dtype(outs[0])
    total = sum(out.to(accumulator) * gates[..., b, None] for b, out in enumerate(outs))
    return total.to(outs[0].dtype)


def branch_statistics(
    grad: torch.Tensor, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], gates: torch.Tensor, backend: str
) -> list[BranchStatistics]:
    """The statistics of each branch; ``grad`` [T, N, Dv] is the gradient of the gated sum."""
    if backend == "triton":
        from nsa_cp.kernels.gating.backward import combine_backward as kernel

        return [BranchStatistics(*pair) for pair in zip(*kernel(grad, outs, lses, gates), strict=True)]
    accumulator = accumulator_dtype(grad)
    wide = grad.to(accumulator)
    log_gates = gates.to(accumulator).log().expand(-1, grad.shape[1], -1).unbind(-1)
    return [
        BranchStatistics((lse - log_gate).masked_fill(lse == float("-inf"), float("inf")), (wide * out).sum(-1))
        for out, lse, log_gate in zip(outs, lses, log_gates, strict=True)
    ]


def gate_gradients(statistics: Sequence[BranchStatistics], gates: torch.Tensor) -> torch.Tensor:
    """Gradient of the gates, in their shape and dtype."""
    row_sums = torch.stack([branch.delta for branch in statistics], -1)
    return (row_sums if gates.shape[1] == row_sums.shape[1] else row_sums.sum(1, keepdim=True)).to(gates.dtype)


def softmax_statistics(
    grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor, backend: str
) -> BranchStatistics:
    """The statistics of an attention without a gate that returns its lse too, whose gradient is ``grad_lse``."""
    ungated = grad.new_ones(1, 1, 1).expand(grad.shape[0], 1, 1)
    shift, delta = branch_statistics(grad, [out], [lse], ungated, backend)[0]
    return BranchStatistics(shift, delta - grad_lse)
