"""The gated sum of the branches (paper eq. 5) and its row sums in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nsa_cp.ops.dispatch import accumulator_dtype


class GateGradients(NamedTuple):
    """What the branches' backward passes start from.

    dgates [T, N or 1, 3] in the gates' dtype; gate and delta: for each branch [T, N] in the accumulator's dtype, with
    delta = gate * sum(grad * out).
    """

    dgates: torch.Tensor
    gate: tuple[torch.Tensor, ...]
    delta: tuple[torch.Tensor, ...]


def combine_forward(outs: Sequence[torch.Tensor], gates: torch.Tensor, backend: str) -> torch.Tensor:
    """``sum_b gates[..., b] * outs[b]``: outs [T, N, Dv] each, gates [T, N or 1, branches] in (0, 1); dtype of outs[0]."""
    if backend == "triton":
        from nsa_cp.kernels.gating.forward import combine_forward as kernel

        return kernel(outs, gates)
    accumulator = accumulator_dtype(outs[0])
    total = sum(out.to(accumulator) * gates[..., b, None] for b, out in enumerate(outs))
    return total.to(outs[0].dtype)


def combine_backward(grad: torch.Tensor, outs: Sequence[torch.Tensor], gates: torch.Tensor, backend: str) -> GateGradients:
    """Row sums r_b = sum(grad * out_b): the gates' gradient is r_b, the softmax delta of branch b is gate_b * r_b."""
    accumulator = accumulator_dtype(grad)
    gate = tuple(g.expand(-1, grad.shape[1]) for g in gates.to(accumulator).unbind(-1))
    if backend == "triton":
        from nsa_cp.kernels.gating.backward import combine_backward as kernel

        dgates, delta = kernel(grad, outs, gates)
        return GateGradients(dgates.to(gates.dtype), gate, delta)
    row_sums = [(grad.to(accumulator) * out).sum(-1) for out in outs]
    dgates = torch.stack(row_sums, -1)
    if gates.shape[1] == 1:
        dgates = dgates.sum(1, keepdim=True)
    return GateGradients(dgates.to(gates.dtype), gate, tuple(g * r for g, r in zip(gate, row_sums, strict=True)))


def softmax_delta(grad: torch.Tensor, out: torch.Tensor, grad_lse: torch.Tensor, backend: str) -> torch.Tensor:
    """``sum(grad * out) - grad_lse`` [T, N]: what an attention that returns its lse too starts its backward from."""
    ungated = grad.new_ones(1, 1, 1).expand(grad.shape[0], 1, 1)
    return combine_backward(grad, [out], ungated, backend).delta[0] - grad_lse
