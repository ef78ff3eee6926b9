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


def combine_forward(outs: Sequence[torch.Tensor], gates: torch.Tensor) -> torch.Tensor:
    """``sum_b gates[..., b] * outs[b]``: outs [T, N, Dv] each, gates [T, N or 1, branches] in (0, 1); dtype of outs[0]."""
    accumulator = accumulator_dtype(outs[0])
    total = sum(out.to(accumulator) * gates[..., b, None] for b, out in enumerate(outs))
    return total.to(outs[0].dtype)


def combine_backward(grad: torch.Tensor, outs: Sequence[torch.Tensor], gates: torch.Tensor) -> GateGradients:
    """Row sums r_b = sum(grad * out_b): the gates' gradient is r_b, the softmax delta of branch b is gate_b * r_b."""
    accumulator = accumulator_dtype(grad)
    heads = grad.shape[1]
    row_sums = [(grad.to(accumulator) * out).sum(-1) for out in outs]
    gate = tuple(g.expand(-1, heads).contiguous() for g in gates.to(accumulator).unbind(-1))
    dgates = torch.stack(row_sums, -1)
    if gates.shape[1] == 1:
        dgates = dgates.sum(1, keepdim=True)
    return GateGradients(dgates.to(gates.dtype), gate, tuple(g * r for g, r in zip(gate, row_sums, strict=True)))
