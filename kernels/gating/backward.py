"""Gated sum of the branches, backward: row sums of the upstream gradient with each branch's output, in one pass.

With r_b = sum(do * out_b): the gradient of gate b is r_b, which is also the softmax delta of branch b. The branches' kernels take
the gate as a shift of their scores, so gate_b * do is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..common import channels_last
from .forward import branch_rows, check_branches, head_rows, rows_at_once


@triton.jit
def _branch(
    do, out_ptr, stride_t, stride_h, gate_ptr, lse_ptr, shift_ptr, delta_ptr, token, head, mask,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Row sums and shifts of one branch."""
    total = tl.sum(do * branch_rows(out_ptr, stride_t, stride_h, token, head, mask, WIDTH, PADDED), 1)
    gate = tl.load(gate_ptr, mask=mask, other=1.0).to(tl.float32)
    lse = tl.load(lse_ptr, mask=mask, other=0.0)
    tl.store(delta_ptr, total, mask=mask)
    # A row that saw nothing, lse = -inf, or whose gate is 0 gets no gradient.
    tl.store(shift_ptr, tl.where(lse == float("-inf"), float("inf"), lse - tl.log(gate)), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def combine_backward_kernel(
    do_ptr, a_ptr, b_ptr, c_ptr, a_lse_ptr, b_lse_ptr, c_lse_ptr, gates_ptr, shift_ptr, delta_ptr,
    do_stride_t, do_stride_h, a_stride_t, a_stride_h, b_stride_t, b_stride_h, c_stride_t, c_stride_h,
    gates_stride_t, gates_stride_h, gates_stride_b, num_rows, num_heads,
    BRANCHES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows (token, head); shift and delta [branches, T, N]."""
    token, head, mask = head_rows(num_rows, num_heads, ROWS)
    do = branch_rows(do_ptr, do_stride_t, do_stride_h, token, head, mask, WIDTH, PADDED)
    row = token * num_heads + head
    gate_ptr = gates_ptr + token * gates_stride_t + head * gates_stride_h
    shift_ptr += row
    delta_ptr += row
    _branch(do, a_ptr, a_stride_t, a_stride_h, gate_ptr, a_lse_ptr + row, shift_ptr, delta_ptr, token, head, mask, WIDTH, PADDED)
    if BRANCHES > 1:
        gate_ptr += gates_stride_b
        shift_ptr += num_rows
        delta_ptr += num_rows
        _branch(
            do, b_ptr, b_stride_t, b_stride_h, gate_ptr, b_lse_ptr + row, shift_ptr, delta_ptr, token, head, mask, WIDTH, PADDED
        )
    if BRANCHES > 2:
        gate_ptr += gates_stride_b
        shift_ptr += num_rows
        delta_ptr += num_rows
        _branch(
            do, c_ptr, c_stride_t, c_stride_h, gate_ptr, c_lse_ptr + row, shift_ptr, delta_ptr, token, head, mask, WIDTH, PADDED
        )


def combine_backward(
    do: torch.Tensor, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], gates: torch.Tensor
) -> torch.Tensor:
    """The per-row statistics from which the branches' backward passes start (see ``nsa_cp.ops.gating.BranchStatistics``).

    Args:
        do: [T, N, Dv], gradient of the gated sum; any strides.
        outs, gates: as in :func:`..forward.combine_forward`; gates not negative.
        lses: float32 [T, N] for each branch, the log-sum-exp that belongs to its output.

    Returns:
        float32 [2, branches, T, N]: ``shift = lse - log(gate)``, +inf where a row saw nothing or its gate is 0; then
        ``delta = sum(do * out)``, which is also the gradient of the row's gate.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_branches(outs, gates)
    tokens, heads, width = outs[0].shape
    statistics = torch.empty(2, len(outs), tokens, heads, dtype=torch.float32, device=do.device)
    if statistics.numel():
        branches = [channels_last(x) for x in outs]
        filled = [channels_last(do), *branches, *[branches[0]] * (3 - len(branches))]
        logs = [x.contiguous() for x in lses]
        logs += [logs[0]] * (3 - len(logs))
        wide = gates.expand(-1, heads, -1)
        rows, padded = rows_at_once(width)
        combine_backward_kernel[(triton.cdiv(tokens * heads, rows),)](
            *filled, *logs, wide, statistics[0], statistics[1], *(s for x in filled for s in x.stride()[:2]), *wide.stride(),
            tokens * heads, heads, BRANCHES=len(outs), WIDTH=width, PADDED=padded, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return statistics
