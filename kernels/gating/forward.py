"""Gated sum of the branches, forward (paper equation 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..common import channels_last

# Elements of each branch's output that a program handles.
_TILE_ELEMENTS = 4096


@triton.jit
def head_rows(num_rows, num_heads, ROWS: tl.constexpr):
    """Token and head of a program's rows of a [T, N, ...] tensor, and which exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row // num_heads, row % num_heads, row < num_rows


@triton.jit
def branch_rows(base, stride_t, stride_h, token, head, mask, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of one branch's output, float32, 0 past the end."""
    column = tl.arange(0, PADDED)
    offset = token * stride_t + head * stride_h
    keep = mask[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + offset[:, None] + column[None, :], mask=keep, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def combine_forward_kernel(
    a_ptr, b_ptr, c_ptr, gates_ptr, out_ptr,
    a_stride_t, a_stride_h, b_stride_t, b_stride_h, c_stride_t, c_stride_h, gates_stride_t, gates_stride_h, gates_stride_b,
    num_rows, num_heads,
    BRANCHES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows (token, head)."""
    token, head, mask = head_rows(num_rows, num_heads, ROWS)
    gate_ptr = gates_ptr + token * gates_stride_t + head * gates_stride_h
    total = branch_rows(a_ptr, a_stride_t, a_stride_h, token, head, mask, WIDTH, PADDED)
    total *= tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)[:, None]
    if BRANCHES > 1:
        gate = tl.load(gate_ptr + gates_stride_b, mask=mask, other=0.0).to(tl.float32)
        total += gate[:, None] * branch_rows(b_ptr, b_stride_t, b_stride_h, token, head, mask, WIDTH, PADDED)
    if BRANCHES > 2:
        gate = tl.load(gate_ptr + 2 * gates_stride_b, mask=mask, other=0.0).to(tl.float32)
        total += gate[:, None] * branch_rows(c_ptr, c_stride_t, c_stride_h, token, head, mask, WIDTH, PADDED)
    column = tl.arange(0, PADDED)
    offset = (token * num_heads + head) * WIDTH
    keep = mask[:, None] & (column < WIDTH)[None, :]
    tl.store(out_ptr + offset[:, None] + column[None, :], total.to(out_ptr.dtype.element_ty), mask=keep)


def check_branches(outs: Sequence[torch.Tensor], gates: torch.Tensor) -> None:
    """Raises:
    ValueError: not one to three branches of one shape with a gate each.
    """
    tokens, heads = outs[0].shape[:2] if outs else (0, 0)
    same = all(out.shape == outs[0].shape for out in outs)
    if not 1 <= len(outs) <= 3 or not same or tuple(gates.shape) not in ((tokens, heads, len(outs)), (tokens, 1, len(outs))):
        raise ValueError(
            f"{len(outs)} branches of shapes {[tuple(out.shape) for out in outs]} do not fit gates {tuple(gates.shape)}; "
            "pass one to three outputs [T, N, Dv] and gates [T, N or 1, branches]"
        )


def rows_at_once(width: int) -> tuple[int, int]:
    """Rows, and columns padded to a power of two, of a program's tile."""
    padded = triton.next_power_of_2(width)
    return max(1, _TILE_ELEMENTS // padded), padded


def combine_forward(outs: Sequence[torch.Tensor], gates: torch.Tensor) -> torch.Tensor:
    """``sum_b gates[..., b] * outs[b]`` in float32.

    Args:
        outs: one to three tensors [T, N, Dv], in the order of the gates; any strides.
        gates: [T, N or 1, branches], any floating dtype and strides.

    Returns:
        [T, N, Dv] in the dtype of ``outs[0]``.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_branches(outs, gates)
    tokens, heads, width = outs[0].shape
    out = torch.empty(tokens, heads, width, dtype=outs[0].dtype, device=outs[0].device)
    if out.numel() == 0:
        return out
    branches = [channels_last(x) for x in outs]
    filled = branches + [branches[0]] * (3 - len(branches))
    gates = gates.expand(-1, heads, -1)
    rows, padded = rows_at_once(width)
    combine_forward_kernel[(triton.cdiv(tokens * heads, rows),)](
        *filled, gates, out, *(s for x in filled for s in x.stride()[:2]), *gates.stride(), tokens * heads, heads,
        BRANCHES=len(outs), WIDTH=width, PADDED=padded, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return out
