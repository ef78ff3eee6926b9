"""A control for block selection: as many blocks for each query, of which the forced ones stay and the others are random."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from nsa_cp.attention import NativeSparseAttention
from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import SequenceLayout

# Rows whose random scores are held at once.
_ROWS_AT_ONCE = 8192


class RandomBlockAttention(NativeSparseAttention):
    """Native sparse attention with random blocks, drawn once for every token of a layout and fixed from then on.

    Args:
        seed: of the random blocks. The other arguments are those of :class:`NativeSparseAttention`.
    """

    def __init__(self, config: NSAConfig, *, seed: int, num_query_groups: int, **settings: Any) -> None:
        super().__init__(config, num_query_groups=num_query_groups, **settings)
        self.seed, self.num_query_groups = seed, num_query_groups
        self._blocks: dict[SequenceLayout, torch.Tensor] = {}

    def _given_blocks(self, q: torch.Tensor, k: Sequence[torch.Tensor], layout: SequenceLayout) -> torch.Tensor:
        if layout not in self._blocks:
            self._blocks[layout] = random_blocks(layout, self.config, self.num_query_groups, self.seed, q.device)
        return self._blocks[layout]


@lru_cache(maxsize=16)
def random_blocks(layout: SequenceLayout, config: NSAConfig, groups: int, seed: int, device: torch.device) -> torch.Tensor:
    """A random selection of visible blocks, including the forced ones; the same for equal arguments on every device.

    Returns:
        int32 [T, G, n], block indices within the query's document, ascending, padded with -1, as ``select_blocks`` returns them.
    """
    generator = torch.Generator().manual_seed(seed)
    own = torch.from_numpy(layout.local_positions // config.select_block_size)
    blocks = int(own.max()) + 1 if len(own) else 0
    chunks = [_choose(part, blocks, config, groups, generator, device) for part in own.split(_ROWS_AT_ONCE)]
    return torch.cat(chunks)


def _choose(
    own: torch.Tensor, blocks: int, config: NSAConfig, groups: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    n = config.num_selected_blocks
    score = torch.rand(len(own), groups, max(blocks, n), generator=generator).to(device)
    own = own.to(device)[:, None, None]
    block = torch.arange(score.shape[-1], device=device)
    forced = (block < config.num_init_blocks) | (block > own - config.num_local_blocks)
    score = score.masked_fill(forced, 2.0).masked_fill(block > own, -1.0)
    best, chosen = score.topk(n, dim=-1)
    last = score.shape[-1]
    chosen = chosen.masked_fill(best < 0, last).sort(-1).values
    return chosen.masked_fill(chosen == last, -1).to(torch.int32)
