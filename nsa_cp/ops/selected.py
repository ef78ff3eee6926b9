"""Attention over the tokens of each query's chosen blocks (paper section 3.3.2); the torch path gathers them chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from nsa_cp.ops.dispatch import accumulator_dtype, chunk_elements
from nsa_cp.ops.gating import BranchStatistics
from nsa_cp.ops.interval_attention import AttentionGradients, finite
from nsa_cp.ops.plan import NSAPlan

if TYPE_CHECKING:
    from nsa_cp.kernels.selected_attention.unions import Selection


def selection_of(blocks: torch.Tensor, plan: NSAPlan) -> Selection:
    """Chosen blocks, int32 [T, G, n], together with the plan's index tables, as the Triton kernels take them."""
    from nsa_cp.kernels.selected_attention.unions import Selection

    tables = (plan.position, plan.key_start, plan.block_start, plan.block_base)
    return Selection(blocks, *tables, plan.config.select_block_size)


def selected_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    plan: NSAPlan,
    backend: str,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention over the chosen blocks.

    Args:
        q: [T, N, Dk], queries of this rank.
        k: [S, G, Dk], v: [S, G, Dv]: the whole sequence in global order. G may be a slice of the model's groups; q then has the
            N = G * H heads of these.
        blocks: int32 [T, G, n], block indices within the query's document, ascending, padded with -1.
        out: [T, N, Dv] with contiguous channels, to write to instead of a new tensor.

    Returns:
        ``out`` [T, N, Dv] in the dtype of q, ``lse`` [T, N] in the accumulator's dtype.
    """
    if backend == "triton":
        from nsa_cp.kernels.selected_attention.forward import selected_attention_forward as kernel

        return kernel(q, k, v, selection_of(blocks, plan), q.shape[-1] ** -0.5, out=out)
    out = q.new_empty(*q.shape[:2], v.shape[-1]) if out is None else out
    lse = q.new_empty(q.shape[:2], dtype=accumulator_dtype(q))
    for rows, keys, hidden in _chunks(q, k, blocks, plan):
        scores = _scores(q[rows], _gather(k, keys), hidden)
        log_sum = scores.logsumexp(-1, keepdim=True)
        out[rows] = ((scores - finite(log_sum)).exp_() @ _gather(v, keys)).flatten(1, 2)
        lse[rows] = log_sum.flatten(1)
    return out, lse


def selected_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    statistics: BranchStatistics,
    blocks: torch.Tensor,
    plan: NSAPlan,
    backend: str,
) -> AttentionGradients:
    """Gradients of :func:`selected_attention_forward`; ``grad`` and ``statistics`` as in ``interval_attention_backward``."""
    if backend == "triton":
        from nsa_cp.kernels.selected_attention.backward import selected_attention_backward as kernel

        return AttentionGradients(*kernel(q, k, v, grad, *statistics, selection_of(blocks, plan), q.shape[-1] ** -0.5))
    (shift, delta), accumulator, scale = statistics, accumulator_dtype(q), q.shape[-1] ** -0.5
    groups = k.shape[1]
    dq = torch.zeros_like(q, dtype=accumulator)
    dk = torch.zeros(k.shape[0] * groups, k.shape[2], dtype=accumulator, device=k.device)
    dv = torch.zeros(v.shape[0] * groups, v.shape[2], dtype=accumulator, device=v.device)
    for rows, keys, hidden in _chunks(q, k, blocks, plan):
        k_chosen, upstream = _gather(k, keys), _by_group(grad[rows], groups)
        # The gate times the softmax: the shift contains -log(gate).
        p = (_scores(q[rows], k_chosen, hidden) - _by_group(shift[rows, :, None], groups)).exp_()
        dp = upstream @ _gather(v, keys).mT
        ds = dp.sub_(_by_group(delta[rows, :, None], groups)).mul_(p).mul_(scale)
        dq[rows] += (ds @ k_chosen).flatten(1, 2)
        flat = keys.flatten()
        _add_rows(dk, flat, (ds.mT @ _by_group(q[rows], groups)).flatten(0, 2))
        _add_rows(dv, flat, (p.mT @ upstream).flatten(0, 2))
    return AttentionGradients(dq, dk.view(k.shape), dv.view(v.shape))


def _chunks(
    q: torch.Tensor, k: torch.Tensor, blocks: torch.Tensor, plan: NSAPlan
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Chunk by chunk: a slice of query rows, flat key indices ``row * G + group`` [rows, G, n*l'], and the mask of hidden keys
    [rows, G, 1, n*l']."""
    size, groups = plan.config.select_block_size, k.shape[1]
    step = max(1, chunk_elements(q) // (groups * blocks.shape[-1] * size * k.shape[2]))
    offset = torch.arange(size, device=q.device)
    group = torch.arange(groups, device=q.device)[:, None]
    for first in range(0, q.shape[0], step):
        rows = slice(first, min(first + step, q.shape[0]))
        chosen = blocks[rows].to(torch.int64)
        token = (chosen[..., None] * size + offset).flatten(2)
        hidden = (token < 0) | (token > plan.position[rows, None, None])
        # Hidden entries must read some valid row: the first of the query's document.
        key = token.masked_fill(hidden, 0) + plan.key_start[rows, None, None]
        yield rows, key * groups + group, hidden[:, :, None]


def _gather(x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[S, G, D] at flat indices [rows, G, keys] -> [rows, G, keys, D] in the accumulator's dtype."""
    # x[keys] would take three times as long on a CPU.
    rows = x.reshape(-1, x.shape[-1]).index_select(0, keys.flatten())
    return rows.view(*keys.shape, -1).to(accumulator_dtype(x))


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[rows, N, D] -> [rows, G, H, D] in the accumulator's dtype."""
    return x.to(accumulator_dtype(x)).view(x.shape[0], groups, -1, x.shape[-1])


def _scores(q: torch.Tensor, k_chosen: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Scaled scores [rows, G, H, keys], -inf where hidden."""
    scores = _by_group(q, k_chosen.shape[1]) @ k_chosen.mT
    return scores.mul_(q.shape[-1] ** -0.5).masked_fill_(hidden, float("-inf"))


def _add_rows(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """``target[rows] += values`` where rows may repeat, in an order that is the same in every run."""
    if target.is_cuda:
        target.index_put_((rows,), values, accumulate=True)
    else:
        target.index_add_(0, rows, values)
