"""Rank and size of an optional process group, and whether a layout is cut for it."""

from __future__ import annotations

import torch.distributed as dist

from nsa_cp.context_parallel.layout import SequenceLayout


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks in ``group``; None stands for this process alone."""
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in ``group``; 0 for None."""
    return 0 if group is None else group.rank()


def check_group(layout: SequenceLayout, group: dist.ProcessGroup | None) -> None:
    """Check that the layout is cut for as many ranks as the group has, and describes this one's rows.

    Raises:
        ValueError: with both numbers.
    """
    if layout.cp_size != group_size(group):
        raise ValueError(
            f"the layout is cut for {layout.cp_size} ranks, the process group has {group_size(group)}; build it for the group"
        )
    if layout.cp_rank != group_rank(group):
        raise ValueError(
            f"the layout describes rank {layout.cp_rank}, this process is rank {group_rank(group)} of the group; build it with "
            f"cp_rank = {group_rank(group)}"
        )
