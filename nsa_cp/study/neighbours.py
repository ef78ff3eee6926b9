"""How many blocks the selections of neighbouring queries share, on which the speed of the selected branch's kernels depends."""

from __future__ import annotations

import torch

from nsa_cp.config import NSAConfig


def neighbour_agreement(blocks: torch.Tensor, config: NSAConfig) -> float:
    """Fraction of freely chosen (not forced) blocks that the token before chose freely, too, over tokens that had a choice.

    Args:
        blocks: int32 [T, G, n] of one document.
    """
    own = torch.arange(blocks.shape[0], device=blocks.device)[:, None, None] // config.select_block_size
    free = (blocks >= config.num_init_blocks) & (blocks <= own - config.num_local_blocks)
    # A young document leaves no choice: there every visible block is taken.
    free &= own >= 2 * config.num_selected_blocks
    kept = total = 0
    for rows in torch.arange(1, blocks.shape[0], device=blocks.device).split(4096):
        same = (blocks[rows][..., :, None] == blocks[rows - 1][..., None, :]) & free[rows - 1][..., None, :]
        kept += int((same.any(-1) & free[rows]).sum())
        total += int(free[rows].sum())
    return kept / max(1, total)
