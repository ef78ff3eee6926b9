"""Attention in which each query sees one contiguous range of keys: the window and compressed branches, and dense causal.

Forward and backward are plain functions here; the autograd Functions around them are in ``stages`` and ``pipeline``. Scores
are never kept: the backward recomputes them, and the softmax from the saved log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from nsa_cp.ops.dispatch import accumulator_dtype, chunk_elements
from nsa_cp.ops.gating import BranchStatistics
from nsa_cp.ops.intervals import Intervals


class AttentionGradients(NamedTuple):
    """Gradients dq [T, N, Dk], dk [M, G, Dk], dv [M, G, Dv], in the accumulator's dtype because they are still to be summed."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def interval_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T / sqrt(Dk)) v over each query's interval of keys.

    Args:
        q: [T, N, Dk]; query head h reads K/V group h // (N / G).
        k: [M, G, Dk]. v: [M, G, Dv].
        intervals: the keys each query sees.
        backend: ``torch`` or ``triton``.

    Returns:
        ``out`` [T, N, Dv] in the dtype of q and ``lse`` [T, N], natural logarithm, in the accumulator's dtype. A query that
        sees nothing has out 0 and lse -inf.
    """
    if backend == "triton":
        from nsa_cp.kernels.interval_attention.forward import interval_attention_forward as kernel

        return kernel(q, k, v, *intervals.of_queries, q.shape[-1] ** -0.5, span=intervals.span)
    accumulator = accumulator_dtype(q)
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=accumulator)
    for rows, keys, hidden in _chunks(intervals, q):
        if keys.start == keys.stop:
            continue
        scores = _scores(q[rows], k[keys], hidden)
        log_sum = scores.logsumexp(-1, keepdim=True)
        p = (scores - finite(log_sum)).exp_()
        out[rows] = _from_groups(p.flatten(1, 2) @ _group_first(v[keys]), rows.stop - rows.start)
        lse[rows] = _rows_first(log_sum.squeeze(-1))
    return out, lse


def interval_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    statistics: BranchStatistics,
    intervals: Intervals,
    backend: str,
) -> AttentionGradients:
    """Gradients of :func:`interval_attention_forward`.

    Args:
        grad: [T, N, Dv], gradient of the gated sum. That of this branch's output is ``gate * grad``, which is never formed: the
            gate is in ``statistics``.
        statistics: of the branch over **all** keys a query sees, even when ``k`` and ``v`` hold only some of them.
    """
    if backend == "triton":
        from nsa_cp.kernels.interval_attention.backward import interval_attention_backward as kernel

        bounds = (*intervals.of_queries, *intervals.of_keys)
        return AttentionGradients(*kernel(q, k, v, grad, *statistics, *bounds, q.shape[-1] ** -0.5))
    (shift, delta), accumulator, scale = statistics, accumulator_dtype(q), q.shape[-1] ** -0.5
    dq, dk, dv = (torch.zeros_like(x, dtype=accumulator) for x in (q, k, v))
    groups = k.shape[1]
    for rows, keys, hidden in _chunks(intervals, q):
        if keys.start == keys.stop:
            continue
        count = rows.stop - rows.start
        # The gate times the softmax: the shift contains -log(gate).
        p = (_scores(q[rows], k[keys], hidden) - _heads_first(shift[rows], groups)).exp_()
        upstream = _to_groups(grad[rows], groups)
        dp = (upstream @ _group_first(v[keys]).mT).view_as(p)
        ds = dp.sub_(_heads_first(delta[rows], groups)).mul_(p).flatten(1, 2)
        dq[rows] += _from_groups(ds @ _group_first(k[keys]), count) * scale
        dk[keys] += (ds.mT @ _to_groups(q[rows], groups)).transpose(0, 1) * scale
        dv[keys] += (p.flatten(1, 2).mT @ upstream).transpose(0, 1)
    return AttentionGradients(dq, dk, dv)


def merge_attention(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge attention over further keys, ``part`` and ``part_lse``, into ``out`` and ``lse`` in place, by log-sum-exp.

    Args:
        out: [T, N, Dv] and lse: [T, N], in the accumulator's dtype; lse is -inf where a query has seen nothing.
        part: [T, N, Dv] and part_lse: [T, N], over keys disjoint from those before.
    """
    for first in range(0, out.shape[0], 4096):
        rows = slice(first, first + 4096)
        total = torch.logaddexp(lse[rows], part_lse[rows])
        reference = finite(total)
        out[rows] *= (lse[rows] - reference).exp()[..., None]
        out[rows] += part[rows] * (part_lse[rows] - reference).exp()[..., None]
        lse[rows] = total


def finite(lse: torch.Tensor) -> torch.Tensor:
    """lse with 0 for -inf: where a query sees nothing, weights are then exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _chunks(intervals: Intervals, q: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Chunk by chunk: a slice of query rows, the slice of keys they see, and the mask of hidden keys, [rows, 1, keys]."""
    begin, end = (bound.to(torch.int64) for bound in intervals.of_queries)

    def chunk(first: int, last: int, key_first: int, key_last: int) -> tuple[slice, slice, torch.Tensor]:
        key = torch.arange(key_first, key_last, device=q.device)
        hidden = (key < begin[first:last, None]) | (key >= end[first:last, None])
        return slice(first, last), slice(key_first, key_last), hidden[:, None]

    return (chunk(*bounds) for bounds in intervals.query_chunks(q.shape[1], chunk_elements(q)))


def _scores(q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Scaled scores [G, rows, H, keys], -inf where hidden."""
    rows, heads, dim = q.shape
    groups = k.shape[1]
    scores = _to_groups(q, groups) @ _group_first(k).mT
    return scores.mul_(dim**-0.5).view(groups, rows, heads // groups, -1).masked_fill_(hidden, float("-inf"))


def _group_first(x: torch.Tensor) -> torch.Tensor:
    """[rows, G, D] -> [G, rows, D] in the accumulator's dtype."""
    return x.to(accumulator_dtype(x)).transpose(0, 1)


def _to_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[rows, N, D] -> [G, rows * H, D] in the accumulator's dtype."""
    rows, heads, dim = x.shape
    x = x.to(accumulator_dtype(x)).view(rows, groups, heads // groups, dim)
    return x.transpose(0, 1).reshape(groups, -1, dim)


def _from_groups(x: torch.Tensor, rows: int) -> torch.Tensor:
    """[G, rows * H, D] -> [rows, N, D]."""
    return x.view(x.shape[0], rows, -1, x.shape[-1]).transpose(0, 1).flatten(1, 2)


def _heads_first(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[rows, N] -> [G, rows, H, 1]."""
    return x.view(x.shape[0], groups, -1).transpose(0, 1)[..., None]


def _rows_first(x: torch.Tensor) -> torch.Tensor:
    """[G, rows, H] -> [rows, N]."""
    return x.transpose(0, 1).flatten(1, 2)
