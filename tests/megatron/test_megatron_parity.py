"""One model, however it is spread: losses, gradient norms and every parameter's gradient, over real gloo processes.

All of these train the same weights: a checkpoint saved by one process and loaded into every layout. In float64 what is left
is rounding; a forgotten reduction, a wrong slice or a rank's lost gradient is of order one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_harness as harness
import pytest
import torch
from megatron_harness import INDEPENDENT, SHARED, Model, Parallel, Result, assemble

from nsa_cp.testing import DistributedPool, assert_close

pytestmark = pytest.mark.distributed

Workers = Callable[[int], DistributedPool]
Reference = Callable[[Model], "tuple[str, dict[str, Result]]"]

SCENARIOS = ("plain", "masked", "packed")
MODELS = {"independent": INDEPENDENT, "shared": SHARED}
LAYOUTS = [
    Parallel(tp=2),
    Parallel(tp=2, sp=True),
    Parallel(pp=2),
    Parallel(pp=2, vpp=2),
    Parallel(cp=2),
    Parallel(cp=4),
    Parallel(tp=2, cp=2),
    Parallel(tp=2, cp=2, sp=True),
    Parallel(pp=2, cp=2),
    Parallel(tp=2, pp=2, cp=2),
    Parallel(tp=2, pp=2, cp=2, sp=True),
]
EXACT = 1e-11
ROUNDED = 1e-5
FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


@pytest.fixture(scope="module")
def reference(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """``reference(model)``: a checkpoint of the model's weights, and what one process makes of every scenario."""
    known: dict[str, tuple[str, dict[str, Result]]] = {}

    def of(model: Model) -> tuple[str, dict[str, Result]]:
        if repr(model) not in known:
            directory = str(tmp_path_factory.mktemp("checkpoint") / "model")
            workers(1).run(harness.make_checkpoint, model, directory)
            known[repr(model)] = directory, step(workers, model, Parallel(), (*SCENARIOS, "uneven", "single"), directory)
        return known[repr(model)]

    return of


def step(
    workers: Workers, model: Model, parallel: Parallel, scenarios: tuple[str, ...], directory: str, **saving: object
) -> dict[str, Result]:
    """Every scenario's outcome from the weights in ``directory``; computed once for each combination."""
    key = (repr(model), parallel, scenarios, directory)
    if key not in _outcomes or saving:
        ranks = workers(parallel.world).run(harness.run_step, model, parallel, scenarios, directory, **saving)
        _outcomes[key] = {scenario: assemble([rank[scenario] for rank in ranks]) for scenario in scenarios}
    return _outcomes[key]


_outcomes: dict[tuple[object, ...], dict[str, Result]] = {}


def check_results(actual: dict[str, Result], expected: dict[str, Result], tolerance: float) -> None:
    for scenario, result in actual.items():
        wanted = expected[scenario]
        assert result.loss == pytest.approx(wanted.loss, rel=tolerance), scenario
        assert result.norm == pytest.approx(wanted.norm, rel=tolerance), scenario
        assert_close(result.gradients, wanted.gradients, max_relative_error=tolerance, name=scenario)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_layouts_agree(workers: Workers, reference: Reference, parallel: Parallel, name: str) -> None:
    model = MODELS[name]
    directory, expected = reference(model)
    check_results(step(workers, model, parallel, SCENARIOS, directory), expected, EXACT)


@pytest.mark.parametrize("parallel", [Parallel(cp=2), Parallel(cp=4), Parallel(tp=2, cp=2)], ids=str)
def test_documents_of_any_length_agree(workers: Workers, reference: Reference, parallel: Parallel) -> None:
    directory, expected = reference(INDEPENDENT)
    check_results(step(workers, INDEPENDENT, parallel, ("uneven", "single"), directory), expected, EXACT)


@pytest.mark.parametrize("parallel", [Parallel(cp=2), Parallel(cp=4), Parallel(tp=2, pp=2, cp=2)], ids=str)
def test_contiguous_layout_agrees(workers: Workers, reference: Reference, parallel: Parallel) -> None:
    directory, expected = reference(SHARED)
    check_results(step(workers, SHARED.with_nsa(layout="contiguous"), parallel, SCENARIOS, directory), expected, EXACT)


@pytest.mark.parametrize("parallel", [Parallel(tp=2, sp=True), Parallel(cp=4), Parallel(tp=2, pp=2, cp=2)], ids=str)
def test_layouts_agree_in_float32_with_megatrons_loss(workers: Workers, reference: Reference, parallel: Parallel) -> None:
    model = replace(INDEPENDENT, dtype=torch.float32)
    directory, expected = reference(model)
    check_results(step(workers, model, parallel, SCENARIOS, directory), expected, ROUNDED)


def test_every_parameter_learns(reference: Reference) -> None:
    """Otherwise the comparisons above would compare zeros."""
    for model in MODELS.values():
        for scenario, result in reference(model)[1].items():
            if scenario == "single":  # too short for a compressed token
                continue
            for name, gradient in result.gradients.items():
                assert gradient.norm() > 1e-5 * result.norm, f"{scenario}: {name}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [dict(recompute_granularity="selective"), FULL_RECOMPUTE], ids=["core_attn", "full"])
@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2, cp=2, sp=True)], ids=str)
def test_recompute_changes_nothing(
    workers: Workers, reference: Reference, parallel: Parallel, settings: dict[str, object], name: str
) -> None:
    model = MODELS[name]
    directory, _ = reference(model)
    again = step(workers, model.with_extra(**settings), parallel, SCENARIOS, directory)
    check_results(again, step(workers, model, parallel, SCENARIOS, directory), 0.0)


def test_recompute_repeats_dropout(workers: Workers, reference: Reference) -> None:
    directory, without = reference(INDEPENDENT)
    model = INDEPENDENT.with_extra(hidden_dropout=0.2)
    plain, again = (step(workers, each, Parallel(), SCENARIOS, directory) for each in (model, model.with_extra(**FULL_RECOMPUTE)))
    assert abs(plain["plain"].loss - without["plain"].loss) > 1e-3
    check_results(again, plain, 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_do_not_depend_on_tensor_parallelism(workers: Workers, name: str) -> None:
    one, two = (
        assemble(workers(parallel.world).run(harness.initial_weights, MODELS[name], parallel)).gradients
        for parallel in (Parallel(), Parallel(tp=2))
    )
    assert_close(two, one)
    w1 = one["decoder.layers.1.self_attention.core_attention.k_compressor." + ("weight" if name == "independent" else "w1")]
    assert w1.shape[0] == 4
    if name == "shared":
        assert not torch.equal(w1[0], w1[2]), "groups of different ranks start alike"


def test_checkpoint_moves_between_layouts(workers: Workers, reference: Reference, tmp_path: Path) -> None:
    """Weights changed on TP2xCP2 and saved there mean the same on CP4, and saved again on CP4 the same on one process."""
    directory, before = reference(SHARED)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    step(workers, SHARED, Parallel(tp=2, cp=2), ("plain",), directory, save_to=first, rate=0.01)
    on_cp4 = step(workers, SHARED, Parallel(cp=4), SCENARIOS, first, save_to=second)
    on_one = step(workers, SHARED, Parallel(), SCENARIOS, second)
    check_results(on_cp4, on_one, EXACT)
    assert abs(on_one["plain"].loss - before["plain"].loss) > 1e-3


@pytest.mark.parametrize("parallel", [Parallel(tp=2, sp=True), Parallel(tp=2, cp=2), Parallel(tp=2, pp=2, cp=2)], ids=str)
def test_megatrons_optimizer_takes_the_same_steps(workers: Workers, reference: Reference, parallel: Parallel) -> None:
    model = replace(SHARED, dtype=torch.float32)
    directory, _ = reference(model)
    one, many = (workers(each.world).run(harness.run_optimizer, model, each, directory, 3) for each in (Parallel(), parallel))
    losses = [[figure[0] for figure in rank] for rank in many if rank[0][0] is not None]
    for ranks in losses:
        assert ranks == pytest.approx([figure[0] for figure in one[0]], rel=ROUNDED)
    for rank in many:
        assert [norm for _, norm in rank] == pytest.approx([norm for _, norm in one[0]], rel=ROUNDED)


def test_bfloat16_follows_float32(workers: Workers, reference: Reference) -> None:
    model = replace(INDEPENDENT, dtype=torch.float32)
    directory, _ = reference(model)
    half = replace(model, dtype=torch.bfloat16).with_extra(bf16=True)
    wanted, actual = (workers(1).run(harness.run_optimizer, each, Parallel(), directory, 3)[0] for each in (model, half))
    for (loss, norm), (exact_loss, exact_norm) in zip(actual, wanted):
        assert loss == pytest.approx(exact_loss, rel=0.03)
        assert norm == pytest.approx(exact_norm, rel=0.1)
    assert actual[-1][0] < actual[0][0]


def test_layer_spec_object_serves_a_plain_transformer_config(workers: Workers, reference: Reference) -> None:
    """The way of Megatron-LM's ``--spec``: a layer spec that carries NSA's settings, and Megatron's own configuration."""
    directory, expected = reference(INDEPENDENT)
    loss = workers(1).run(harness.loss_with_layer_spec, INDEPENDENT, directory)[0]
    # Megatron chooses the final norm here, and that has a float32 weight.
    assert loss == pytest.approx(expected["plain"].loss, rel=1e-6)


def _sum_and_count_step(iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Forward step whose loss function returns three values, as Megatron-LM's does: this rank's sum, its count, and a report."""
    batch, packed = next(iterator)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        mask = batch["loss_mask"].to(output.dtype)
        return (output * mask).sum(), mask.sum().to(torch.int32), {"loss": torch.zeros(())}

    return losses, loss


def _gradient_norm(rank: int, world: int, model: Model, three_values: bool) -> float:
    """Norm of the gradient of the ``masked`` scenario, over ``world`` context-parallel ranks, which count unlike tokens."""
    parallel = Parallel(cp=world)
    with harness.megatron(parallel):
        config, chunks = harness.build(model, parallel)
        wrapped = harness.wrap(config, chunks)
        harness.forward_backward(
            config, wrapped, "masked", parallel, _sum_and_count_step if three_values else harness.megatron_step
        )
        return harness.gradient_norm(chunks)


@pytest.mark.parametrize("three_values", [False, True])
def test_what_a_loss_function_has_to_return(workers: Workers, three_values: bool) -> None:
    """As docs/megatron.md says: of two values, the loss by the count of all ranks; of three, this rank's own sum and count."""
    model = replace(INDEPENDENT, dtype=torch.float32).with_extra(calculate_per_token_loss=three_values)
    one, two = (workers(cp).run(_gradient_norm, model, three_values)[0] for cp in (1, 2))
    assert two == pytest.approx(one, rel=ROUNDED)


def test_forward_refuses_what_it_would_ignore(workers: Workers) -> None:
    messages = workers(1).run(harness.forward_refusals, INDEPENDENT)[0]
    assert 'position_embedding_type="none"' in messages["rotary_pos_emb"]
    assert "create_attention_mask=False" in messages["attention_mask"]
    assert "attention_bias" in messages["attention_bias"]
    assert "key_value_states" in messages["key_value_states"]
    assert "whole sequence" in messages["inference_context"]
    assert "batch of 1" in messages["packed batch"]
    assert "holds 128" in messages["packed length"]
    assert "groups" in messages["plain config"] or "AttentionSettings" in messages["plain config"]
    assert 'leave position_embedding_type at "none"' in messages["position embedding"]
    assert "vocab_size = 0" in messages["vocabulary"]


def test_a_rank_with_a_wrong_length_is_refused(workers: Workers) -> None:
    for message in workers(2).run(harness.odd_length_refusal, INDEPENDENT):
        assert "sequence length 66 is not a multiple of 2 * context_parallel_size = 4" in message
        assert "pad to 68" in message
