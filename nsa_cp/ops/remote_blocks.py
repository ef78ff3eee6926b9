"""How much of what other ranks hold the local queries chose: the figures that decide whether fetching on demand would pay."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops.plan import get_plan


class RemoteBlocks(NamedTuple):
    """Float32 scalars on the device of the blocks; reading one waits for the device.

    A block is remote when another rank holds any row of it.

    Attributes:
        chosen: of the blocks that local queries chose, counted once a query and group, the fraction that is remote.
        needed: of the remote blocks of the sequence, counted once a group, the fraction that some local query chose. The gather
            of the selected branch brings all of them; fetching on demand would bring this fraction.
    """

    chosen: torch.Tensor
    needed: torch.Tensor


@torch.no_grad()
def remote_blocks(blocks: torch.Tensor, layout: SequenceLayout, config: NSAConfig) -> RemoteBlocks:
    """Compare a selection with what this rank holds; nothing waits for the device.

    Args:
        blocks: int32 [T, G, n], what ``native_sparse_attention`` chose for the rows of ``layout``; -1 is no block.
        config: the settings it was chosen with.

    Returns:
        both fractions; 0 where there is nothing to choose or nothing is remote, as on a single process.
    """
    if layout.cp_size == 1:
        return RemoteBlocks(*torch.zeros(2, device=blocks.device))
    plan = get_plan(layout, config, blocks.device)
    is_remote = plan.block_is_remote
    # Choices of no block are counted on a row of their own behind the last block.
    number = torch.where(blocks >= 0, blocks + plan.block_base[:, None, None], len(is_remote)).long()
    picks = blocks.new_zeros(len(is_remote) + 1, blocks.shape[1])
    rows = number.transpose(1, 2).flatten(0, 1)
    picks.scatter_(0, rows, 1)
    chosen = torch.cat([is_remote, is_remote.new_zeros(1)])[number].sum() / (blocks >= 0).sum().clamp(min=1)
    needed = (picks[:-1] * is_remote[:, None]).sum() / (is_remote.sum() * blocks.shape[1]).clamp(min=1)
    return RemoteBlocks(chosen.float(), needed.float())
