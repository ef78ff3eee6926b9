"""Recompute reuses the selection of the first run: no second choice, whatever the order of microbatches, nothing left behind."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from unittest import mock

import megatron_harness as harness
import pytest
import torch
from megatron_harness import INDEPENDENT, Model, Parallel

from nsa_cp.ops import pipeline
from nsa_cp.ops.recompute import SelectionMemory
from nsa_cp.testing import assert_close

pytestmark = pytest.mark.distributed

SETTINGS = {
    "core_attn": dict(recompute_granularity="selective"),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    # Two layers, one of them of another kind, in one checkpoint.
    "full_by_pairs": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2),
}
LAYERS = 2  # NSA layers of the model: the pattern is nsa, full, window, nsa


@contextlib.contextmanager
def _choices(in_turn: bool = False) -> Iterator[list[int]]:
    """Counts selections. ``in_turn``: no two choices are alike, so that one made again would show."""
    select, calls = pipeline.select_blocks_forward, [0]

    def counted(*arguments: object) -> torch.Tensor:
        calls[0] += 1
        blocks = select(*arguments)
        return torch.where(blocks > 0, (blocks + calls[0]) % 2, blocks) if in_turn else blocks

    with mock.patch.object(pipeline, "select_blocks_forward", counted):
        yield calls


def _two_in_flight(rank: int, world_size: int, model: Model, evaluate: bool) -> dict:
    """Two microbatches forward, an evaluation after each, then backward, in both orders: losses, gradients, choices, remains."""
    parallel, answers = Parallel(cp=world_size), []
    with harness.megatron(parallel), _choices() as calls:
        config, (chunk,) = harness.build(model, parallel)
        for backward_order in ((0, 1), (1, 0)):
            chunk.zero_grad(set_to_none=True)
            calls[0] = 0
            iterator, losses = harness.batches("plain", config), []
            for _ in range(2):
                logits, loss = harness.exact_step(iterator, chunk)
                losses.append(loss(logits)[0])
                if evaluate:
                    _evaluate(config, chunk, calls)
            for index in backward_order:
                losses[index].backward()
            gradients = {name: p.grad.clone() for name, p in chunk.named_parameters() if p.grad is not None}
            answers.append({"losses": [float(loss) for loss in losses], "gradients": gradients, "choices": calls[0]})
            del losses, loss, logits
        gc.collect()
        left = sum(isinstance(thing, SelectionMemory) for thing in gc.get_objects())
        return {"answers": answers, "left": left}


def _evaluate(config: object, chunk: torch.nn.Module, calls: list[int]) -> None:
    """A forward of other data without gradients, not counted."""
    before = calls[0]
    chunk.eval()
    with torch.no_grad():
        harness.exact_step(harness.batches("masked", config), chunk)
    chunk.train()
    calls[0] = before


def test_two_microbatches_in_any_order_and_an_evaluation(workers) -> None:
    expected = workers(2).run(_two_in_flight, INDEPENDENT, False)
    for name in ("core_attn", "full_by_pairs"):
        settings = SETTINGS[name]
        ranks = workers(2).run(_two_in_flight, INDEPENDENT.with_extra(**settings), True)
        for rank, wanted in zip(ranks, expected, strict=True):
            assert rank["left"] == 0, f"{name}: selections are left behind"
            for answer, reference in zip(rank["answers"], wanted["answers"], strict=True):
                assert answer["choices"] == 2 * LAYERS, f"{name}: blocks were chosen again"
                assert answer["losses"] == reference["losses"]
                assert_close(answer["gradients"], reference["gradients"], name=name)


def _pipelined(rank: int, world_size: int, model: Model, parallel: Parallel, in_turn: bool) -> tuple[float, int]:
    with harness.megatron(parallel), _choices(in_turn) as calls:
        config, chunks = harness.build(model, parallel)
        wrapped = harness.wrap(config, chunks)
        harness.forward_backward(config, wrapped, "packed", parallel)
        return harness.gradient_norm(chunks), calls[0]


@pytest.mark.parametrize("name", ["core_attn", "full"])
@pytest.mark.parametrize("parallel", [Parallel(pp=2, vpp=2), Parallel(tp=2, sp=True)], ids=str)
def test_pipelines_and_tensor_parallelism_choose_once(workers, parallel: Parallel, name: str) -> None:
    """With choices that change from call to call, choosing again would give other gradients."""
    expected = workers(parallel.world).run(_pipelined, INDEPENDENT, parallel, True)
    model = INDEPENDENT.with_extra(**SETTINGS[name])
    assert workers(parallel.world).run(_pipelined, model, parallel, True) == expected
    ranks_of_a_stage = parallel.cp * parallel.tp
    assert sum(calls for _, calls in expected) == LAYERS * harness.MICROBATCHES * ranks_of_a_stage


def _without_memory(rank: int, world_size: int, parallel: Parallel) -> tuple[float, int]:
    from nsa_cp import attention

    model = INDEPENDENT.with_extra(**SETTINGS["full"])
    with mock.patch.object(attention, "recall_selection", lambda: None):
        return _pipelined(rank, world_size, model, parallel, True)


def test_without_memory_the_same_test_fails(workers) -> None:
    parallel = Parallel(tp=2, sp=True)
    expected = workers(2).run(_pipelined, INDEPENDENT, parallel, True)
    for (norm, calls), (wanted, wanted_calls) in zip(workers(2).run(_without_memory, parallel), expected, strict=True):
        assert calls == 2 * wanted_calls and norm != wanted
