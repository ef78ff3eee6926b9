"""Backward of the three branches for a slice of the groups: each branch's dk and dv as soon as its keys arrive, dq last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nsa_cp.ops.gating import BranchStatistics
from nsa_cp.ops.interval_attention import AttentionGradients, interval_attention_backward
from nsa_cp.ops.intervals import Intervals
from nsa_cp.ops.plan import NSAPlan
from nsa_cp.ops.selected import selected_attention_backward, selection_of

KeyGradients = tuple[torch.Tensor, torch.Tensor]

# The compressed branch has a fused backward that makes dk, dv and dq in one kernel: 5 matrix products a tile, where separate
# kernels for (dk, dv) and dq take 4 + 3. It starts and ends slowly (docs/kernels.md), so it is used from this many pairs of a
# query head and a visible compressed token in one launch on: those of 64k tokens with 32 heads, or of half the queries of 128k
# tokens with 16 heads.
LEAST_PAIRS = 4_000_000_000
# Limits in bytes of its float32 dq buffer: the first is aimed at by taking fewer groups at a time, the second is never exceeded.
_BUFFER_BYTES, _MOST_BUFFER_BYTES = 1 << 30, 1 << 32


class Branch(NamedTuple):
    """Keys [M, G, Dk] and values [M, G, Dv] that a branch attends to, and the statistics [T, N] of its forward."""

    k: torch.Tensor
    v: torch.Tensor
    statistics: BranchStatistics


class ChosenBlocks:
    """The chosen blocks and, for the Triton kernels, the inverse (for each block, the queries that chose it, its visitors).

    The inverse is sorted once, for all groups.

    Args:
        blocks: int32 [T, G, n].
    """

    def __init__(self, blocks: torch.Tensor, plan: NSAPlan, backend: str) -> None:
        self.blocks, self.visitors, self.base_group = blocks, None, 0
        if backend == "triton" and blocks.numel():
            from nsa_cp.kernels.selected_attention.unions import find_visitors

            self.visitors = find_visitors(selection_of(blocks, plan))

    def of(self, groups: slice) -> ChosenBlocks:
        """The same for a slice of the groups."""
        part = object.__new__(ChosenBlocks)
        part.blocks, part.visitors, part.base_group = self.blocks[:, groups], self.visitors, self.base_group + groups.start
        return part


def fused_backward_groups(
    q: torch.Tensor,
    grad: torch.Tensor,
    keys: Sequence[torch.Tensor],
    plan: NSAPlan,
    backend: str,
    most: int,
    *,
    fewer: bool,
) -> int:
    """How many K/V groups to take at a time with the fused backward of the compressed branch (5 products, see
    ``LEAST_PAIRS``); 0 if it is not to be used.

    The result divides the number of groups, because kernels are compiled for a number of groups.

    Args:
        q, grad: as for :class:`BranchesBackward`. keys: k and v of one or more branches, with all groups.
        most: upper bound of the result; divides the number of groups.
        fewer: whether the result may be less than ``most``; if not it is ``most`` or 0. The answer depends on this rank's sizes,
            so ranks that exchange slices of groups could otherwise slice differently.
    """
    if not _takes_fused_backward(q, grad, keys, plan, backend):
        return 0
    from nsa_cp.kernels.interval_attention.hopper_fused_backward import dq_bytes

    groups = keys[0].shape[1]
    heads = q.shape[1] // groups
    buffer = dq_bytes(len(q), heads)
    fitting = min(most, max(1, _BUFFER_BYTES // max(1, buffer))) if fewer else most
    at_once = max(n for n in range(1, fitting + 1) if groups % n == 0)
    pairs = plan.compressed_intervals.num_visible * heads * at_once
    return at_once if pairs >= LEAST_PAIRS and at_once * buffer <= _MOST_BUFFER_BYTES else 0


def _takes_fused_backward(q: torch.Tensor, grad: torch.Tensor, keys: Sequence[torch.Tensor], plan: NSAPlan, backend: str) -> bool:
    """Whether the fused kernel takes these tensors, and the dq kernel of all branches can continue from its buffer's layout."""
    if backend != "triton":
        return False
    from nsa_cp.kernels.query_gradients.backward import goes_to_hopper

    if not goes_to_hopper(q, grad, keys, plan.config.select_block_size):
        return False
    from nsa_cp.kernels.interval_attention.hopper_fused_backward import takes

    return takes(q, *keys[:2], grad)


class BranchesBackward:
    """Gradients of the gated sum of the branches. The gates come in through the statistics (see ``BranchStatistics``).

    Call :meth:`window`, :meth:`compressed` and :meth:`selected`, in this order; each returns (dk, dv) in the accumulator's dtype.
    Then :meth:`query_gradients` gives dq. With the Triton kernels that is one kernel over all branches (several with very few
    heads a group), which runs while the last dk and dv travel; the fused kernel makes the compressed branch's part of it earlier.

    Args:
        q: [T, N, Dk]. grad: [T, N, Dv], gradient of the gated sum.
        chosen: blocks of these groups.
        fused: use the fused kernel of :func:`fused_backward_groups`, unless it cannot take the memory layout of this slice.
    """

    def __init__(
        self, q: torch.Tensor, grad: torch.Tensor, chosen: ChosenBlocks, plan: NSAPlan, backend: str, fused: bool = False
    ) -> None:
        self.q, self.grad, self.chosen, self.plan, self.backend = q, grad, chosen, plan, backend
        self.fused = fused
        self.branches: list[Branch] = []
        # Torch path: dq summed over the branches so far.
        self.dq: torch.Tensor | None = None
        # Fused kernel: the compressed branch's dq, in that kernel's own layout.
        self.begun: torch.Tensor | None = None

    def window(self, branch: Branch) -> KeyGradients:
        """dk and dv of the window's buffer (own rows and halo)."""
        return self._interval(branch, self.plan.window_intervals)

    def compressed(self, branch: Branch) -> KeyGradients:
        """dk and dv of the compressed tokens of all ranks, as far as this rank's queries see them."""
        keys = [x for each in (branch, *self.branches) for x in (each.k, each.v)]
        if not (self.fused and _takes_fused_backward(self.q, self.grad, keys, self.plan, self.backend)):
            return self._interval(branch, self.plan.compressed_intervals)
        from nsa_cp.kernels.interval_attention.hopper_fused_backward import interval_attention_fused_backward as kernel

        self.branches.append(branch)
        inputs = (self.q, branch.k, branch.v, self.grad, *branch.statistics)
        self.begun, *gradients = kernel(*inputs, *self.plan.compressed_intervals.of_keys, self._scale)
        return tuple(gradients)

    def selected(self, branch: Branch) -> KeyGradients:
        """dk and dv of the whole sequence's rows, from this rank's queries."""
        self.branches.append(branch)
        plan, chosen = self.plan, self.chosen
        if self.backend == "triton":
            from nsa_cp.kernels.selected_attention.backward import selected_attention_backward_dkv as kernel

            inputs = (self.q, branch.k, branch.v, self.grad, *branch.statistics)
            choices = (selection_of(chosen.blocks, plan), chosen.visitors)
            return kernel(*inputs, *choices, self._scale, base_group=chosen.base_group)
        k, v, statistics = branch
        return self._add(selected_attention_backward(self.q, k, v, self.grad, statistics, chosen.blocks, plan, self.backend))

    def query_gradients(self, out: torch.Tensor) -> None:
        """Write dq, summed over the branches, to ``out`` [T, N, Dk] in its dtype. Call it last."""
        assert len(self.branches) == 3
        if self.backend != "triton":
            out.copy_(self.dq)
            return
        from nsa_cp.kernels.query_gradients import backward as kernel

        plan = self.plan
        window, compressed, selected = (kernel.Branch(b.k, b.v, *b.statistics) for b in self.branches)
        ranges = (plan.window_intervals.of_queries, plan.compressed_intervals.of_queries)
        selection = selection_of(self.chosen.blocks, plan)
        branches = (window, compressed, selected)
        kernel.query_gradients(self.q, self.grad, *branches, *ranges, selection, self._scale, out=out, begun=self.begun)

    @property
    def _scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def _interval(self, branch: Branch, intervals: Intervals) -> KeyGradients:
        self.branches.append(branch)
        if self.backend == "triton":
            from nsa_cp.kernels.interval_attention.backward import interval_attention_backward_dkv as kernel

            return kernel(self.q, branch.k, branch.v, self.grad, *branch.statistics, *intervals.of_keys, self._scale)
        k, v, statistics = branch
        return self._add(interval_attention_backward(self.q, k, v, self.grad, statistics, intervals, self.backend))

    def _add(self, gradients: AttentionGradients) -> KeyGradients:
        dq, dk, dv = gradients
        self.dq = dq if self.dq is None else self.dq.add_(dq)
        return dk, dv
