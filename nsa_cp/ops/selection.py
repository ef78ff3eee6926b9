"""Block selection: importance of each block from the compressed scores, then the top n (paper eq. 8 to 12)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nsa_cp.config import NSAConfig
from nsa_cp.ops.dispatch import accumulator_dtype, chunk_elements
from nsa_cp.ops.plan import NSAPlan


@torch.no_grad()
def select_blocks_forward(
    q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor | None, plan: NSAPlan, backend: str, v_dim: int
) -> torch.Tensor:
    """The n blocks each query attends to, one choice for all heads of a group.

    Args:
        q: [T, N, Dk], rotated, of this rank. k_cmp: [C, G, Dk], rotated, of all ranks, in global order.
        lse: [T, N] of the compressed branch, computed over all of ``k_cmp`` in one pass; None recomputes it, to the same bits.
            The torch path ignores it and normalises the scores it has at hand.
        v_dim: Dv of the compressed branch, by which the kernel that recomputes the lse picks its tiles.

    Returns:
        int32 [T, G, n], block indices within the query's document, ascending, padded with -1.
    """
    config = plan.config
    if backend == "triton":
        from nsa_cp.kernels.block_selection.forward import select_blocks_forward as kernel
        from nsa_cp.kernels.interval_attention.forward import interval_lse

        begin, end = plan.compressed_intervals.of_queries
        if lse is None:
            lse = interval_lse(q, k_cmp, begin, end, q.shape[-1] ** -0.5, v_dim, span=plan.compressed_intervals.span)
        return kernel(
            q, k_cmp, lse, begin, end, plan.position,
            config.compress_block_size, config.compress_stride, config.select_block_size,
            config.num_selected_blocks, config.num_init_blocks, config.num_local_blocks,
            q.shape[-1] ** -0.5, plan.max_blocks,
        )  # fmt: skip
    chosen = torch.full((q.shape[0], k_cmp.shape[1], config.num_selected_blocks), -1, dtype=torch.int32, device=q.device)
    for first, last, document in plan.document_runs:
        base, count = int(plan.compressed_base[document]), int(plan.compressed_counts[document])
        blocks = int(plan.block_counts[document])
        step = max(16, chunk_elements(q) // max(1, q.shape[1] * count))
        for row in range(first, last, step):
            rows = slice(row, min(row + step, last))
            position = plan.position[rows].to(torch.int64)
            p = _group_probabilities(q[rows], k_cmp[base : base + count], position, config)
            chosen[rows] = _top_blocks(_block_scores(p, blocks, config), position, config)
    return chosen


def _group_probabilities(q: torch.Tensor, k_cmp: torch.Tensor, position: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    """Softmax over the visible compressed tokens of one document, summed over each group's heads: [rows, G, C].

    The paper sums over heads last (eq. 10); both sums are linear, so their order does not matter.
    """
    rows, heads, dim = q.shape
    groups, accumulator = k_cmp.shape[1], accumulator_dtype(q)
    grouped = q.to(accumulator).view(rows, groups, -1, dim).transpose(0, 1).reshape(groups, -1, dim)
    scores = (grouped @ k_cmp.to(accumulator).permute(1, 2, 0)).mul_(dim**-0.5).view(groups, rows, heads // groups, -1)
    last_token = torch.arange(k_cmp.shape[0], device=q.device) * config.compress_stride + config.compress_block_size - 1
    scores.masked_fill_((last_token > position[:, None])[:, None], float("-inf"))
    # A query that sees nothing has softmax NaN; its probabilities are 0.
    return scores.softmax(-1).nan_to_num_(0.0).sum(2).transpose(0, 1)


def _block_scores(p: torch.Tensor, blocks: int, config: NSAConfig) -> torch.Tensor:
    """Importance [rows, G, blocks]: compressed tokens weighted by their overlap with each block (paper eq. 9)."""
    weights = p.new_tensor(config.overlap_weights())
    stride = config.select_block_size // config.compress_stride
    before = config.compress_block_size // config.compress_stride - 1
    after = blocks * stride - p.shape[-1]
    return F.pad(p, (before, after)).unfold(-1, len(weights), stride) @ weights


def _top_blocks(scores: torch.Tensor, position: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    """Forced blocks, then those of highest score, ties to the lowest index: int32 [rows, G, n], ascending, padded with -1."""
    blocks, n = scores.shape[-1], config.num_selected_blocks
    own = (position // config.select_block_size)[:, None, None]
    block = torch.arange(blocks, device=scores.device)
    forced = (block < config.num_init_blocks) | (block > own - config.num_local_blocks)
    ranked = scores.masked_fill(forced, float("inf")).masked_fill(block > own, float("-inf"))
    # A stable descending sort leaves equal scores in ascending block order.
    best, order = ranked.sort(dim=-1, descending=True, stable=True)
    order = order.masked_fill(best == float("-inf"), blocks)[..., :n].sort(-1).values
    padded = F.pad(order, (0, n - order.shape[-1]), value=blocks)
    return padded.masked_fill(padded == blocks, -1).to(torch.int32)
