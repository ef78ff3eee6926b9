"""The backward of the three branches, for some of the groups: each branch's dk and dv as soon as its keys are there, then dq."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nsa_cp.ops.gating import BranchStatistics
from nsa_cp.ops.interval_attention import interval_attention_backward
from nsa_cp.ops.intervals import Intervals
from nsa_cp.ops.plan import NSAPlan
from nsa_cp.ops.selected import selected_attention_backward

KeyGradients = tuple[torch.Tensor, torch.Tensor]


class Branch(NamedTuple):
    """Keys [M, G, Dk] and values [M, G, Dv] that a branch attends to, and its row statistics [T, N]."""

    k: torch.Tensor
    v: torch.Tensor
    statistics: BranchStatistics


class BranchesBackward:
    """Gradients of the gated sum of the branches, whose gates are part of the statistics.

    Each branch in turn gives (dk, dv) in the accumulator's dtype; after all three :meth:`query_gradients` gives dq. With the
    Triton kernels dq is one kernel over all branches, which then runs while the last branch's dk and dv travel.

    Args:
        q: [T, N, Dk]. grad: [T, N, Dv], gradient of the gated sum.
        blocks: int32 [T, G, n], the chosen blocks.
    """

    def __init__(self, q: torch.Tensor, grad: torch.Tensor, blocks: torch.Tensor, plan: NSAPlan, backend: str) -> None:
        self.q, self.grad, self.blocks, self.plan, self.backend = q, grad, blocks, plan, backend
        self.branches: list[Branch] = []
        # The torch path's sum over the branches so far.
        self.dq: torch.Tensor | None = None

    def window(self, branch: Branch) -> KeyGradients:
        """dk, dv of the window's buffer."""
        return self._interval(branch, self.plan.window_intervals)

    def compressed(self, branch: Branch) -> KeyGradients:
        """dk, dv of the compressed tokens."""
        return self._interval(branch, self.plan.compressed_intervals)

    def selected(self, branch: Branch) -> KeyGradients:
        """dk, dv of the whole sequence."""
        self.branches.append(branch)
        plan = self.plan
        if self.backend == "triton":
            from nsa_cp.kernels.selected_attention.backward import selected_attention_backward_dkv as kernel

            tables = (plan.position, plan.key_start, plan.block_start, plan.block_base)
            size = plan.config.select_block_size
            return kernel(self.q, branch.k, branch.v, self.grad, *branch.statistics, self.blocks, *tables, size, self._scale)
        k, v, statistics = branch
        self.dq, *gradients = selected_attention_backward(
            self.q, k, v, self.grad, statistics, self.blocks, plan, self.backend, self.dq
        )
        return tuple(gradients)

    def query_gradients(self, out: torch.Tensor) -> None:
        """Write dq of all branches to ``out`` [T, N, Dk], in its dtype; called last."""
        assert len(self.branches) == 3
        if self.backend != "triton":
            out.copy_(self.dq)
            return
        from nsa_cp.kernels.query_gradients import backward as kernel

        plan = self.plan
        window, compressed, selected = (kernel.Branch(b.k, b.v, *b.statistics) for b in self.branches)
        ranges = (plan.window_intervals.of_queries, plan.compressed_intervals.of_queries)
        tables = (self.blocks, plan.position, plan.key_start, plan.config.select_block_size)
        kernel.query_gradients(self.q, self.grad, window, compressed, selected, *ranges, *tables, self._scale, out=out)

    @property
    def _scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def _interval(self, branch: Branch, intervals: Intervals) -> KeyGradients:
        self.branches.append(branch)
        if self.backend == "triton":
            from nsa_cp.kernels.interval_attention.backward import interval_attention_backward_dkv as kernel

            return kernel(self.q, branch.k, branch.v, self.grad, *branch.statistics, *intervals.of_keys, self._scale)
        k, v, statistics = branch
        self.dq, *gradients = interval_attention_backward(self.q, k, v, self.grad, statistics, intervals, self.backend, self.dq)
        return tuple(gradients)
