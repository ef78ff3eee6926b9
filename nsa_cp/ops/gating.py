"""The gated sum of the branches (paper eq. 5), and the per-row statistics that its backward hands to the branches' backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nsa_cp.ops.dispatch import accumulator_dtype


class BranchStatistics(NamedTuple):
    """What one branch's backward needs of its forward, [T, N] each (a number per query and head) in the accumulator's dtype.

    shift: ``lse - log(gate)``, so that ``exp(score - shift)`` is the gate times the softmax; +inf, which makes that 0, where the
    query sees nothing or the gate is 0. delta: ``sum(grad * out)`` over channels with the gated sum's gradient, which is also
    the gate's gradient (without the sigmoid's slope).
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


def row_statistics(
    grad: torch.Tensor, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], gates: torch.Tensor, backend: str
) -> torch.Tensor:
    """The statistics of all branches (see :class:`BranchStatistics`) in one tensor [2, branches, T, N]: shifts, then deltas.

    ``grad`` [T, N, Dv] is the gradient of the gated sum.
    """
    if backend == "triton":
        from nsa_cp.kernels.gating.backward import combine_backward as kernel

        return kernel(grad, outs, lses, gates)
    accumulator = accumulator_dtype(grad)
    wide = grad.to(accumulator)
    lse = torch.stack(tuple(lses))
    shift = lse - gates.to(accumulator).log().expand(-1, grad.shape[1], -1).movedim(-1, 0)
    delta = torch.stack([(wide * out).sum(-1) for out in outs])
    return torch.stack([shift.masked_fill(lse == float("-inf"), float("inf")), delta])


def split_statistics(statistics: torch.Tensor) -> list[BranchStatistics]:
    """The result of :func:`row_statistics` as one :class:`BranchStatistics` per branch."""
    return [BranchStatistics(shift, delta) for shift, delta in zip(*statistics, strict=True)]


def gate_gradients(statistics: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Gradient of the gates, in their shape and dtype, from :func:`row_statistics`."""
    row_sums = statistics[1].movedim(0, -1)
    return (row_sums if gates.shape[1] == row_sums.shape[1] else row_sums.sum(1, keepdim=True)).to(gates.dtype)


def softmax_statistics(
    grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor, backend: str
) -> BranchStatistics:
    """The statistics of an attention by itself, without a gate, whose lse is an output too, with gradient ``grad_lse``."""
    ungated = grad.new_ones(1, 1, 1).expand(grad.shape[0], 1, 1)
    ((shift,), (delta,)) = row_statistics(grad, [out], [lse], ungated, backend)
    return BranchStatistics(shift, delta - grad_lse)
