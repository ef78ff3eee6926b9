"""Bytes moved and remote blocks chosen, against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import SequenceLayout, count_traffic
from nsa_cp.ops import native_sparse_attention, remote_blocks
from nsa_cp.ops.plan import get_plan
from nsa_cp.testing.cases import make_problem

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=16, backend="torch"
)
TOKENS, GROUPS, QK, V = 128, 2, 16, 12
ITEM = 8  # float64


def _traffic(rank: int, world_size: int, config: NSAConfig) -> tuple[list[dict], dict]:
    """Bytes by pattern of the forward and of the backward, and the remote figures with a count by loops beside them."""
    layout = SequenceLayout.build(TOKENS, cp_size=world_size, cp_rank=rank, kind=config.layout)
    x = make_problem(config, (0, TOKENS), num_groups=GROUPS, qk_dim=QK, v_dim=V).shard(layout)
    k = tuple(tensor.requires_grad_() for tensor in x.k)
    with count_traffic() as both, count_traffic() as forward:
        result = native_sparse_attention(
            x.q, k, x.v, x.gates, x.k_weights, x.v_weights, config, layout=layout, group=dist.group.WORLD
        )
    with count_traffic() as backward:
        result.out.backward(x.grad)
    assert both.by_pattern == forward.by_pattern and (both.sent, both.received) == (forward.sent, forward.received)
    return [forward.by_pattern, backward.by_pattern], _remote(result.blocks, layout, config)


def _remote(blocks: torch.Tensor, layout: SequenceLayout, config: NSAConfig) -> dict:
    measured = remote_blocks(blocks, layout, config)
    size, own = config.select_block_size, set(layout.local_rows.tolist())
    remote = [b for b in range(TOKENS // size) if not set(range(b * size, (b + 1) * size)) <= own]
    picks = [(g, b) for row in blocks.tolist() for g, chosen in enumerate(row) for b in chosen if b >= 0]
    expected = (
        sum(b in remote for _, b in picks) / len(picks),
        len({pick for pick in picks if pick[1] in remote}) / max(1, len(remote) * GROUPS),
    )
    return {"measured": tuple(map(float, measured)), "expected": expected}


def _by_hand(world_size: int, kind: str, shared: bool, rank: int) -> list[dict]:
    """What a plain sequence of equal chunks moves, written down from the method and not from the code."""
    if world_size == 1:
        return [{}, {}]
    raw = (world_size - 1) * TOKENS // world_size * GROUPS * (QK + V)
    # Compressed tokens belong to the rank of their last row; messages are as long as the longest.
    ends = [4 * i + 7 for i in range((TOKENS - 8) // 4 + 1)]
    chunks = SequenceLayout.build(TOKENS, cp_size=world_size, kind=kind).chunks
    own = [sum(any(start <= end < stop for start, stop in held) for end in ends) for held in chunks]
    compressed = (world_size - 1) * max(own) * GROUPS * (QK + V)
    # A halo for each chunk whose left neighbour is another rank's; zigzag's innermost two chunks are one rank's.
    depth = 15 if shared else 15 + 7
    receive = depth * GROUPS * (QK + V) * sum(start > 0 for start, _ in chunks[rank])
    stops = {stop: owner for owner, held in enumerate(chunks) for _, stop in held}
    lent = [stops[start] for held in chunks for start, _ in held if start > 0]
    send = depth * GROUPS * (QK + V) * lent.count(rank)
    forward = {"exchange": (send * ITEM, receive * ITEM), "all_gather": ((raw + compressed) * ITEM,) * 2}
    # Halo rows are kept; only their gradients travel, the other way.
    backward = {
        "exchange": (receive * ITEM, send * ITEM),
        "all_gather": forward["all_gather"],
        "reduce_scatter": ((raw + compressed) * ITEM,) * 2,
    }
    return [forward, backward]


@pytest.mark.distributed
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bytes_and_remote_blocks_are_those_counted_by_hand(workers, world_size: int, kind: str, shared: bool) -> None:
    config = replace(CONFIG, layout=kind, shared_kv=shared, compressed_rope="before" if shared else "after")
    answers = workers(world_size).run(_traffic, config)
    for rank, (patterns, remote) in enumerate(answers):
        assert patterns == _by_hand(world_size, kind, shared, rank)
        assert remote["measured"] == pytest.approx(remote["expected"])
    assert world_size == 1 or max(remote["measured"][1] for _, remote in answers) > 0, "nothing remote was chosen"


def test_remote_blocks_of_a_selection_written_down() -> None:
    layout = SequenceLayout.build(64, cp_size=2, cp_rank=0, kind="contiguous")
    blocks = torch.full((32, 1, 4), -1, dtype=torch.int32)
    assert tuple(map(float, remote_blocks(blocks, layout, CONFIG))) == (0, 0)
    blocks[:, 0, 0], blocks[5, 0, 1], blocks[6, 0, 1] = 0, 7, 7  # blocks 4 to 7 are the other rank's
    chosen, needed = remote_blocks(blocks, layout, CONFIG)
    assert (float(chosen), float(needed)) == pytest.approx((2 / 34, 1 / 4))
    assert get_plan(layout, CONFIG, blocks.device).block_is_remote.tolist() == [False] * 4 + [True] * 4
