"""Gated sum of the branches, backward: row sums of the upstream gradient with each branch's output, in one pass.

With r_b = sum(do * out_b): the gradient of gate b is r_b, and the softmax delta of branch b is gate_b * r_b. The branches'
kernels multiply by the gate themselves, so gate_b * do is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..common import channels_last
from .forward import branch_rows, check_branches, head_rows, rows_at_once


@triton.jit
def _row_sum(
    do, out_ptr, stride_t, stride_h, gate_ptr, sums_ptr, delta_ptr, token, head, mask,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Row sum of one branch to ``sums_ptr`` and, times the gate, to ``delta_ptr``."""
    total = tl.sum(do * branch_rows(out_ptr, stride_t, stride_h, token, head, mask, WIDTH, PADDED), 1)
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr, total, mask=mask)
    tl.store(delta_ptr, total * gate, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def combine_backward_kernel(
    do_ptr, a_ptr, b_ptr, c_ptr, gates_ptr, sums_ptr, delta_ptr,
    do_stride_t, do_stride_h, a_stride_t, a_stride_h, b_stride_t, b_stride_h, c_stride_t, c_stride_h,
    gates_stride_t, gates_stride_h, gates_stride_b, num_rows, num_heads,
    BRANCHES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows (token, head); sums [T, N, branches], delta [branches, T, N]."""
    token, head, mask = head_rows(num_rows, num_heads, ROWS)
    do = branch_rows(do_ptr, do_stride_t, do_stride_h, token, head, mask, WIDTH, PADDED)
    row = token * num_heads + head
    gate_ptr = gates_ptr + token * gates_stride_t + head * gates_stride_h
    sums_ptr += row * BRANCHES
    delta_ptr += row
    _row_sum(do, a_ptr, a_stride_t, a_stride_h, gate_ptr, sums_ptr, delta_ptr, token, head, mask, WIDTH, PADDED)
    if BRANCHES > 1:
        gate_ptr += gates_stride_b
        delta_ptr += num_rows
        _row_sum(do, b_ptr, b_stride_t, b_stride_h, gate_ptr, sums_ptr + 1, delta_ptr, token, head, mask, WIDTH, PADDED)
    if BRANCHES > 2:
        gate_ptr += gates_stride_b
        delta_ptr += num_rows
        _row_sum(do, c_ptr, c_stride_t, c_stride_h, gate_ptr, sums_ptr + 2, delta_ptr, token, head, mask, WIDTH, PADDED)


def combine_backward(
    do: torch.Tensor, outs: Sequence[torch.Tensor], gates: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Gradient of the gates and the softmax deltas that the branches' backward passes start from.

    Args:
        do: [T, N, Dv], gradient of the gated sum; any strides.
        outs, gates: as in :func:`..forward.combine_forward`.

    Returns:
        ``dgates`` float32 of the shape of ``gates``, and for each branch ``delta`` float32 [T, N] = gate * sum(do * out).
        The row factors that go with them are ``gates[..., b].expand(-1, N)``.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_branches(outs, gates)
    tokens, heads, width = outs[0].shape
    sums = torch.empty(tokens, heads, len(outs), dtype=torch.float32, device=do.device)
    delta = torch.empty(len(outs), tokens, heads, dtype=torch.float32, device=do.device)
    if sums.numel():
        branches = [channels_last(x) for x in outs]
        filled = [channels_last(do), *branches, *[branches[0]] * (3 - len(branches))]
        wide = gates.expand(-1, heads, -1)
        rows, padded = rows_at_once(width)
        combine_backward_kernel[(triton.cdiv(tokens * heads, rows),)](
            *filled, wide, sums, delta, *(s for x in filled for s in x.stride()[:2]), *wide.stride(), tokens * heads, heads,
            BRANCHES=len(outs), WIDTH=width, PADDED=padded, ROWS=rows, num_warps=4,
        )  # fmt: skip
    dgates = sums if gates.shape[1] == heads else sums.sum(1, keepdim=True)
    return dgates, tuple(delta.unbind(0))
