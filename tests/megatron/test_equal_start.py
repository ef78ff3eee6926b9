"""Branches whose key and value projections start with equal weights: which rows are copied, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import megatron_harness as harness
import pytest
import torch
from megatron_harness import INDEPENDENT, SHARED, Model, Parallel

from nsa_cp.megatron import AttentionSettings
from nsa_cp.testing import DistributedPool

pytestmark = pytest.mark.distributed

# Rows of one group in the harness's fused projection, counted by hand: two queries of 8, a key of 8 and a value of 4 for each of
# three branches, three gate logits for each of two heads.
WIDTH, QUERIES = 16 + 3 * 12 + 6, slice(0, 16)
BRANCHES, GATES = [slice(16, 28), slice(28, 40), slice(40, 52)], slice(52, 58)


def _projections(rank: int, world: int, model: Model) -> list[tuple[str, torch.Tensor]]:
    """This rank's shards of the fused projections, [groups, rows of a group, ...], with their layers' kinds."""
    parallel = Parallel(tp=world)
    with harness.megatron(parallel):
        _, chunks = harness.build(model, parallel)
        found = []
        for layer in chunks[0].decoder.layers:
            attention = layer.self_attention
            for parameter in (attention.linear_qkv.weight, attention.linear_qkv.bias):
                if parameter is not None:
                    found.append((attention.layer_type, parameter.detach().unflatten(0, (4 // world, -1)).clone()))
        return found


@pytest.mark.parametrize("world", [1, 2])
def test_branches_start_alike_and_nothing_else_changes(workers: Callable[[int], DistributedPool], world: int) -> None:
    model = INDEPENDENT.with_extra(add_qkv_bias=True)
    usual = workers(world).run(_projections, model.with_extra(equal_start=False))
    equal = workers(world).run(_projections, model.with_extra(equal_start=True))
    kinds = [kind for kind, _ in equal[0]]
    assert kinds == [kind for kind in ("nsa", "full", "window", "nsa") for _ in ("weight", "bias")]
    for before, after in zip(usual, equal, strict=True):
        for (kind, x), (_, y) in zip(before, after, strict=True):
            if kind != "nsa":
                assert torch.equal(x, y)
                continue
            assert x.shape[1] == WIDTH and torch.equal(x[:, QUERIES], y[:, QUERIES]) and torch.equal(x[:, GATES], y[:, GATES])
            for branch in BRANCHES:
                assert torch.equal(y[:, branch], x[:, BRANCHES[0]])
            # Biases start at 0.
            assert x.dim() == 2 or not torch.equal(x[:, BRANCHES[0]], x[:, BRANCHES[1]])


@pytest.mark.parametrize("equal_start", [True, False])
def test_one_key_and_value_for_all_branches_starts_the_same_either_way(
    workers: Callable[[int], DistributedPool], equal_start: bool
) -> None:
    default, asked = (workers(1).run(_projections, model)[0] for model in (SHARED, SHARED.with_extra(equal_start=equal_start)))
    assert len(default) == 4 and all(torch.equal(x, y) for (_, x), (_, y) in zip(default, asked, strict=True))


def test_it_is_the_default() -> None:
    assert AttentionSettings().equal_start and harness.make_config(SHARED, Parallel()).attention_settings.equal_start
