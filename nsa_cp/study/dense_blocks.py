"""An upper bound for block selection: the blocks that dense attention weights most, whatever the compressed branch scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nsa_cp.attention import NativeSparseAttention
from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops import compressed_attention, select_blocks
from nsa_cp.ops.dispatch import accumulator_dtype
from nsa_cp.ops.plan import get_layout_plan
from nsa_cp.ops.rope import apply_rope, rotary_tables


class DenseBlockAttention(NativeSparseAttention):
    """Native sparse attention that chooses blocks by dense attention of the selected branch's own queries and keys.

    It costs as much as dense attention and is not a method to use. It separates what is lost by scoring blocks from compressed
    keys from what is lost by attending to few blocks. For one process; arguments are those of :class:`NativeSparseAttention`.
    """

    def _given_blocks(self, q: torch.Tensor, k: Sequence[torch.Tensor], layout: SequenceLayout) -> torch.Tensor:
        return dense_blocks(q, k[1 % len(k)], self.config, self.rotary, layout)


@torch.no_grad()
def dense_blocks(
    q: torch.Tensor, k: torch.Tensor, config: NSAConfig, rotary: RotaryConfig | None, layout: SequenceLayout
) -> torch.Tensor:
    """The forced blocks and those that dense causal attention, summed over the heads of a group, weights most.

    Args:
        q: [T, N, Dk], unrotated. k: [T, G, Dk], unrotated.

    Returns:
        int32 [T, G, n] as :func:`nsa_cp.ops.select_blocks` returns them.
    """
    if rotary is not None:
        tables = rotary_tables(get_layout_plan(layout, q.device).position, rotary, q.shape[-1], accumulator_dtype(q))
        q, k = apply_rope(q, *tables), apply_rope(k, *tables)
    # With l = d = 1 compressed tokens are the tokens themselves, so their scores are dense attention's.
    every_token = replace(config, compress_block_size=1, compress_stride=1)
    _, lse = compressed_attention(q, k, k, every_token, layout.cu_seqlens)
    return select_blocks(q, k, every_token, layout.cu_seqlens, lse)
