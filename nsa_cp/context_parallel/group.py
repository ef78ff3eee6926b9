"""Rank and size of an optional process group, and the agreement check that turns a would-be hang into an error."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from nsa_cp.context_parallel.layout import SequenceLayout
from nsa_cp.context_parallel.transfer import all_gather


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in ``group``; None is a group of this process alone."""
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in ``group``; 0 for None."""
    return 0 if group is None else group.rank()


def check_agreement(description: str, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Let all ranks of ``group`` compare ``description`` before they depend on each other's shapes.

    One small all-gather and one host synchronisation: call it once for each new shape, never on the hot path.

    Raises:
        ValueError: on every rank, naming the ranks that differ from rank 0 of the group and this rank's own description.
    """
    if group_size(group) == 1:
        return
    digest = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")
    mine = torch.tensor([digest], dtype=torch.int64, device=device)
    gathered = torch.empty(group.size(), dtype=torch.int64, device=device)
    all_gather(gathered, mine, group=group)
    digests = gathered.tolist()
    differing = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if differing:
        raise ValueError(
            f"context-parallel ranks {differing} differ from rank 0 in layout, shapes, dtype or settings; give every rank of "
            f"the group the same. Rank {group.rank()} has: {description}"
        )


def check_group(layout: SequenceLayout, group: dist.ProcessGroup | None) -> None:
    """The layout is cut for as many ranks as the group has.

    Raises:
        ValueError: naming both.
    """
    if layout.cp_size != group_size(group):
        raise ValueError(
            f"the layout is cut for {layout.cp_size} ranks, the process group has {group_size(group)}; build it for the group"
        )


def agree_once(
    confirmed: set[tuple], layout: SequenceLayout, facts: tuple, group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Check that all ranks of ``group`` hold the same layout and ``facts``, unless ``confirmed`` says they did before.

    The check is a collective for the ranks that meet the layout for the first time. A rank that at the same moment repeats an
    older layout takes no part in it; that mismatch ends at the process group's timeout.

    Args:
        confirmed: remembers what was checked; the caller keeps it beside what it caches for the layout.
        facts: shapes, dtypes and settings.

    Raises:
        ValueError: as :func:`check_agreement`.
    """
    if group_size(group) == 1 or (group.group_name, facts) in confirmed:
        return
    check_agreement(f"documents {layout.cu_seqlens}, chunks {layout.chunks}, and {facts}", group, device)
    confirmed.add((group.group_name, facts))
