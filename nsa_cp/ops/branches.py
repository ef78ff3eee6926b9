"""The backward of the three branches, for some of the groups: each branch's dk and dv as soon as its keys are there, then dq."""

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

# From so many pairs of a query's head and a compressed token in one launch on, the compressed branch's backward makes dq, too: 5
# products a tile where two kernels take 4 and 3, but a kernel that starts and ends slowly (docs/kernels.md). 64k tokens of 32
# heads have so many, and half of 128k tokens of 16 heads.
LEAST_PAIRS = 4_000_000_000
# Bytes of its buffer with dq in float32: as many groups at once as fit in the first, and at most the second.
_BUFFER_BYTES, _MOST_BUFFER_BYTES = 1 << 30, 1 << 32


class Branch(NamedTuple):
    """Keys [M, G, Dk] and values [M, G, Dv] that a branch attends to, and its row statistics [T, N]."""

    k: torch.Tensor
    v: torch.Tensor
    statistics: BranchStatistics


class ChosenBlocks:
    """The chosen blocks and, for the Triton kernels, the queries that chose each: sorted once for all groups.

    Args:
        blocks: int32 [T, G, n].
    """

    def __init__(self, blocks: torch.Tensor, plan: NSAPlan, backend: str) -> None:
        self.blocks, self.visitors, self.base_group = blocks, None, 0
        if backend == "triton" and blocks.numel():
            from nsa_cp.kernels.selected_attention.unions import find_visitors

            self.visitors = find_visitors(selection_of(blocks, plan))

    def of(self, groups: slice) -> ChosenBlocks:
        """Those of a slice of groups."""
        part = object.__new__(ChosenBlocks)
        part.blocks, part.visitors, part.base_group = self.blocks[:, groups], self.visitors, self.base_group + groups.start
        return part


def five_product_groups(
    q: torch.Tensor,
    grad: torch.Tensor,
    keys: Sequence[torch.Tensor],
    plan: NSAPlan,
    backend: str,
    most: int,
    *,
    fewer: bool,
) -> int:
    """K/V groups at a time, at most ``most``, for which the compressed branch's backward makes dq, too; 0 if it does not. They
    divide the groups: kernels are compiled for a number of groups.

    Args:
        q, grad: as of :class:`BranchesBackward`. keys: k, v of one or more branches, with all groups.
        most: divides the groups.
        fewer: or fewer groups; otherwise ``most`` or none. What is asked here is about this rank alone, so ranks that send
            each other slices of groups could come to different slices.
    """
    if not _takes_five_products(q, grad, keys, plan, backend):
        return 0
    from nsa_cp.kernels.interval_attention.hopper_whole_backward import dq_bytes

    groups = keys[0].shape[1]
    heads = q.shape[1] // groups
    buffer = dq_bytes(len(q), heads)
    fitting = min(most, max(1, _BUFFER_BYTES // max(1, buffer))) if fewer else most
    at_once = max(n for n in range(1, fitting + 1) if groups % n == 0)
    pairs = plan.compressed_intervals.num_visible * heads * at_once
    return at_once if pairs >= LEAST_PAIRS and at_once * buffer <= _MOST_BUFFER_BYTES else 0


def _takes_five_products(q: torch.Tensor, grad: torch.Tensor, keys: Sequence[torch.Tensor], plan: NSAPlan, backend: str) -> bool:
    """Whether the kernel of 5 products takes these tensors, and the one for dq of all branches reads its buffer as it lies."""
    if backend != "triton":
        return False
    from nsa_cp.kernels.query_gradients.backward import goes_to_hopper

    if not goes_to_hopper(q, grad, keys, plan.config.select_block_size):
        return False
    from nsa_cp.kernels.interval_attention.hopper_whole_backward import takes

    return takes(q, *keys[:2], grad)


class BranchesBackward:
    """Gradients of the gated sum of the branches, whose gates are part of the statistics.

    Each branch in turn gives (dk, dv) in the accumulator's dtype; after all three :meth:`query_gradients` gives dq. With the
    Triton kernels dq is one kernel over all branches (with very few heads a group, several), which then runs while the last
    branch's dk and dv travel; with five products the compressed branch's part of it is made before.

    Args:
        q: [T, N, Dk]. grad: [T, N, Dv], gradient of the gated sum.
        five_products: of :func:`five_product_groups`; without effect where a slice's tensors lie otherwise.
    """

    def __init__(
        self, q: torch.Tensor, grad: torch.Tensor, chosen: ChosenBlocks, plan: NSAPlan, backend: str, five_products: bool = False
    ) -> None:
        self.q, self.grad, self.chosen, self.plan, self.backend = q, grad, chosen, plan, backend
        self.five_products = five_products
        self.branches: list[Branch] = []
        # The torch path's sum over the branches so far.
        self.dq: torch.Tensor | None = None
        # The compressed branch's dq where it is there already, as its kernel leaves it.
        self.begun: torch.Tensor | None = None

    def window(self, branch: Branch) -> KeyGradients:
        """dk, dv of the window's buffer."""
        return self._interval(branch, self.plan.window_intervals)

    def compressed(self, branch: Branch) -> KeyGradients:
        """dk, dv of the compressed tokens."""
        keys = [x for each in (branch, *self.branches) for x in (each.k, each.v)]
        if not (self.five_products and _takes_five_products(self.q, self.grad, keys, self.plan, self.backend)):
            return self._interval(branch, self.plan.compressed_intervals)
        from nsa_cp.kernels.interval_attention.hopper_whole_backward import interval_attention_whole_backward as kernel

        self.branches.append(branch)
        inputs = (self.q, branch.k, branch.v, self.grad, *branch.statistics)
        self.begun, *gradients = kernel(*inputs, *self.plan.compressed_intervals.of_keys, self._scale)
        return tuple(gradients)

    def selected(self, branch: Branch) -> KeyGradients:
        """dk, dv of the whole sequence."""
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
        """Write dq of all branches to ``out`` [T, N, Dk], in its dtype; called last."""
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
