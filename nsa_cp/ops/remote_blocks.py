"""How many of the chosen blocks lie on other ranks: figures that tell whether fetching blocks on demand would pay."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops.plan import get_plan


class RemoteBlocks(NamedTuple):
    """Two fractions as float32 scalars on the device of the blocks; reading one waits for the device.

    A block is remote if another rank holds any of its rows.

    Attributes:
        chosen: of all choices of local queries (one per query, group and block), the fraction that is remote.
        needed: of all remote blocks of the sequence (counted per group), the fraction that at least one local query chose. The
            selected branch's all-gather brings every remote block; fetching on demand would bring only this fraction.
    """

    chosen: torch.Tensor
    needed: torch.Tensor


@torch.no_grad()
def remote_blocks(blocks: torch.Tensor, layout: SequenceLayout, config: NSAConfig) -> RemoteBlocks:
    """Compare a selection with what this rank holds, without waiting for the device.

    Args:
        blocks: int32 [T, G, n], what ``native_sparse_attention`` chose for this rank's rows of ``layout``; -1 is no block.
        layout, config: those of the call that chose them.

    Returns:
        Both fractions; 0 where nothing was chosen or nothing is remote, as on a single process.
    """
    if layout.cp_size == 1:
        return RemoteBlocks(*torch.zeros(2, device=blocks.device))
    plan = get_plan(layout, config, blocks.device)
    is_remote = plan.block_is_remote
    # Padding (-1) is counted in an extra row behind the last block.
    number = torch.where(blocks >= 0, blocks + plan.block_base[:, None, None], len(is_remote)).long()
    picks = blocks.new_zeros(len(is_remote) + 1, blocks.shape[1])
    rows = number.transpose(1, 2).flatten(0, 1)
    picks.scatter_(0, rows, 1)
    chosen = torch.cat([is_remote, is_remote.new_zeros(1)])[number].sum() / (blocks >= 0).sum().clamp(min=1)
    needed = (picks[:-1] * is_remote[:, None]).sum() / (is_remote.sum() * blocks.shape[1]).clamp(min=1)
    return RemoteBlocks(chosen.float(), needed.float())
