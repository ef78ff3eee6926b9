"""Recompute reuses the selection of the first run: no second choice, whatever the order of microbatches, nothing left behind."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from unittest import mock

import megatron_harness as harness
import pytest
import torch
from megatron.core import tensor_parallel
from megatron_harness import INDEPENDENT, Model, Parallel

from nsa_cp.megatron.recompute import reuse_selections, stop_reusing_selections
from nsa_cp.ops import pipeline
from nsa_cp.ops.recompute import SelectionMemory, recall_selection, remember_selection
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


@pytest.fixture
def unwrapped(monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    """A checkpoint of Megatron's that nothing has been put around: it runs its function and hands back the recomputation."""

    def checkpoint(function, distribute_saved_activations, *args):  # noqa: ANN001, ANN202
        return function(*args), lambda: function(*args)

    monkeypatch.setattr(tensor_parallel, "checkpoint", checkpoint)
    return checkpoint


def _layer(made: list[torch.Tensor]) -> torch.Tensor:
    """Chooses blocks that no other choice is equal to, unless it recalls some."""
    blocks = recall_selection()
    if blocks is None:
        blocks = torch.tensor(len(made))
        made.append(blocks)
    remember_selection(blocks)
    return blocks


def test_the_checkpoint_is_wrapped_once_and_unwrapped_again(unwrapped) -> None:
    made: list[torch.Tensor] = []
    reuse_selections()
    wrapped = tensor_parallel.checkpoint
    assert wrapped is not unwrapped and wrapped.__name__ == "checkpoint"
    reuse_selections()
    assert tensor_parallel.checkpoint is wrapped
    first, recompute = tensor_parallel.checkpoint(_layer, False, made)
    stop_reusing_selections()
    stop_reusing_selections()
    assert tensor_parallel.checkpoint is unwrapped
    assert torch.equal(recompute(), first) and len(made) == 1, "what was in flight keeps its blocks"
    first, recompute = tensor_parallel.checkpoint(_layer, False, made)
    assert not torch.equal(recompute(), first), "unwrapped, a recomputation chooses again"
    reuse_selections()
    first, recompute = tensor_parallel.checkpoint(_layer, False, made)
    assert torch.equal(recompute(), first), "and it can be wrapped again"


def test_a_wrapper_around_ours_is_left_alone(unwrapped) -> None:
    reuse_selections()
    ours = tensor_parallel.checkpoint

    @functools.wraps(ours)
    def theirs(*arguments: object) -> object:
        return ours(*arguments)

    tensor_parallel.checkpoint = theirs
    reuse_selections()
    assert tensor_parallel.checkpoint is theirs
    with pytest.raises(RuntimeError, match="is now .* around nsa_cp's; take that off first"):
        stop_reusing_selections()
    assert tensor_parallel.checkpoint is theirs
    tensor_parallel.checkpoint = ours
    stop_reusing_selections()
    assert tensor_parallel.checkpoint is unwrapped


def _restored(rank: int, world_size: int) -> tuple[bool, bool, int, int]:
    """Layers wrap Megatron's checkpoint; taken off, the same model chooses in the recomputation too."""
    parallel, model = Parallel(cp=world_size), INDEPENDENT.with_extra(**SETTINGS["full"])
    stop_reusing_selections()
    own, counts = tensor_parallel.checkpoint, []
    with harness.megatron(parallel), _choices() as calls:
        config, (chunk,) = harness.build(model, parallel)
        wrapped = tensor_parallel.checkpoint
        try:
            for stop in (False, True):
                if stop:
                    stop_reusing_selections()
                calls[0] = 0
                logits, loss = harness.exact_step(harness.batches("plain", config), chunk)
                loss(logits)[0].backward()
                counts.append(calls[0])
        finally:
            reuse_selections()
    return wrapped is not own, tensor_parallel.checkpoint is not own, *counts


def test_layers_wrap_megatrons_checkpoint_and_it_can_be_restored(workers) -> None:
    assert workers(1).run(_restored) == [(True, True, LAYERS, 2 * LAYERS)]
