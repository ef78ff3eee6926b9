"""The selected branch closed for a time: what it is then, what it begins with, and that the optimizer's main weights follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import megatron_harness as harness
import pytest
import torch
from megatron_harness import INDEPENDENT, SHARED, Model, Parallel, RankResult, assemble

from nsa_cp.testing import DistributedPool

pytestmark = pytest.mark.distributed

Workers = Callable[[int], DistributedPool]
MODELS = {"independent": INDEPENDENT, "shared": SHARED}
RECOMPUTE = {
    "kept": {},
    "core_attn": dict(recompute_granularity="selective"),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}
# Rows of one group in the harness's fused projection, counted by hand: two queries of 8, then a key of 8 and a value of 4 for
# compressed, selected and window branch, then three gate logits for each of the two heads.
COMPRESSED, SELECTED, WINDOW = slice(16, 28), slice(28, 40), slice(40, 52)
SELECTED_GATES = [53, 56]
NSA_LAYERS = (1, 4)  # the pattern is nsa, full, window, nsa


def nsa_projections(chunk: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's shards of the NSA layers' fused projections, weights and biases, [groups, rows of a group, ...]; no copies."""
    for layer in chunk.decoder.layers:
        if layer.layer_number in NSA_LAYERS:
            linear = layer.self_attention.linear_qkv
            for name, parameter in linear.named_parameters():
                yield name, parameter.data.unflatten(0, (4 // linear.tp_group.size(), -1))


@pytest.fixture(scope="module")
def weights(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Model], str]:
    """A checkpoint of random weights for a model."""
    known: dict[str, str] = {}

    def of(model: Model) -> str:
        if repr(model) not in known:
            known[repr(model)] = str(tmp_path_factory.mktemp("weights") / "model")
            workers(1).run(harness.make_checkpoint, model, known[repr(model)])
        return known[repr(model)]

    return of


# --- closed -----------------------------------------------------------------------------------------------------------------


def _gate_of_minus_infinity(core: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of the attention itself: the selected branch's logit is -inf, whatever the layer says."""
    *head, logits, layout = arguments
    return (*head, logits.index_fill(-1, torch.tensor([1]), float("-inf")), layout)


def _closed_and_open(rank: int, world: int, model: Model, directory: str) -> dict[str, RankResult]:
    """One step's loss and gradients: open, closed, closed by hand; then with other selected keys and values, closed and open."""
    from nsa_cp.megatron import close_selected_branches

    with harness.megatron(Parallel()):
        config, chunks = harness.build(model, Parallel())
        harness.load(chunks, directory)
        wrapped = harness.wrap(config, chunks)
        layers = [layer.self_attention for layer in chunks[0].decoder.layers]
        cores = [layer.core_attention for layer in layers if layer.core_attention is not None]

        def step() -> RankResult:
            return harness.collect(chunks, harness.forward_backward(config, wrapped, "packed", Parallel()))

        results = {"open": step()}
        hooks = [core.register_forward_pre_hook(_gate_of_minus_infinity) for core in cores]
        results["by hand"] = step()
        for hook in hooks:
            hook.remove()
        close_selected_branches(chunks)
        assert [layer.selected_is_open for layer in layers] == [False, True, True, False]
        results["closed"] = step()
        assert [float(core.last_metrics["gate_selected"]) for core in cores] == [0.0, 0.0]
        if not model.nsa.shared_kv:
            for _, rows in nsa_projections(chunks[0]):
                rows[:, SELECTED].normal_()
            results["other, closed"] = step()
            for layer in layers:
                layer.selected_is_open = True
            results["other, open"] = step()
        return results


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", MODELS)
def test_closed_is_a_gate_of_exactly_zero(workers: Workers, weights: Callable[[Model], str], name: str, recompute: str) -> None:
    model = MODELS[name]
    ranks = workers(1).run(_closed_and_open, model.with_extra(**RECOMPUTE[recompute]), weights(model))
    results = {key: assemble([ranks[0][key]]) for key in ranks[0]}
    closed = results["closed"]
    for same in {"by hand", "other, closed"} & results.keys():
        assert results[same].loss == closed.loss, same
        for key, gradient in closed.gradients.items():
            assert torch.equal(results[same].gradients[key], gradient), (same, key)
    assert abs(results["open"].loss - closed.loss) > 1e-3
    if name == "independent":
        assert abs(results["other, open"].loss - results["open"].loss) > 1e-3
    _check_rows(results, name)


def _check_rows(results: dict[str, Any], name: str) -> None:
    """The selected branch's rows, and no others, have a gradient of exactly 0 while it is closed."""
    for layer in NSA_LAYERS:
        key = f"decoder.layers.{layer}.self_attention."
        closed, opened = (results[state].gradients for state in ("closed", "open"))
        if name == "shared":
            gate = key + "linear_gate.weight"
            assert not closed[gate][1].any() and closed[gate][0].any() and closed[gate][2].any() and opened[gate][1].any()
            continue
        rows = closed[key + "linear_qkv.weight"].unflatten(0, (4, -1))
        assert rows.shape[1] == 58
        assert not rows[:, SELECTED].any() and not rows[:, SELECTED_GATES].any()
        others = sorted(set(range(58)) - set(range(58)[SELECTED]) - set(SELECTED_GATES))
        assert rows[:, others].flatten(2).any(-1).all()
        assert opened[key + "linear_qkv.weight"].unflatten(0, (4, -1)).flatten(2).any(-1).all()


# --- opening ----------------------------------------------------------------------------------------------------------------


def _weights_after_opening(rank: int, world: int, model: Model, parallel: Parallel) -> None:
    """Close, open, open again; every weight of this rank against what was there before."""
    with harness.megatron(parallel):
        _, (chunk,) = harness.build(model, parallel)
        for parameter in chunk.parameters():
            parameter.data.normal_()
        layers = [layer.self_attention for layer in chunk.decoder.layers]
        before = {name: parameter.clone() for name, parameter in chunk.named_parameters()}
        for layer in layers:
            layer.open_selected()
        for name, parameter in chunk.named_parameters():
            assert torch.equal(parameter, before[name]), "opening what is open changes nothing"
        for layer in layers:
            layer.close_selected()
            layer.open_selected()
        assert all(layer.selected_is_open for layer in layers)
        seen = []
        for index, layer in enumerate(chunk.decoder.layers):
            for kind in ("weight", "bias"):
                expected = before.get(f"decoder.layers.{index}.self_attention.linear_qkv.{kind}")
                if layer.layer_number in NSA_LAYERS and not model.nsa.shared_kv and expected is not None:
                    groups = expected.data.unflatten(0, (4 // parallel.tp, -1))
                    assert not torch.equal(groups[:, SELECTED], groups[:, WINDOW])
                    groups[:, SELECTED] = groups[:, WINDOW]
                    assert not torch.equal(groups[0, SELECTED], groups[1, SELECTED])
                    seen.append(kind)
        assert len(seen) == (0 if model.nsa.shared_kv else 4)
        for name, parameter in chunk.named_parameters():
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", [INDEPENDENT, INDEPENDENT.with_nsa(gate="branch"), SHARED], ids=["head", "branch", "shared"])
def test_the_selected_branch_begins_with_the_windows_rows(workers: Workers, model: Model, tp: int) -> None:
    workers(tp).run(_weights_after_opening, model.with_extra(add_qkv_bias=True), Parallel(tp=tp))


def _across_the_opening(
    rank: int, world: int, model: Model, parallel: Parallel, directory: str, open_before: int | None
) -> list[tuple[float | None, float]]:
    """(loss, gradient norm) of four steps of Megatron's optimizer; the branch opens before one of them, or never."""
    from nsa_cp.megatron import close_selected_branches, open_selected_branches

    with harness.megatron(parallel):
        config, chunks = harness.build(model, parallel)
        harness.load(chunks, directory)
        wrapped = harness.wrap(config, chunks)
        optimizer = _optimizer(wrapped)
        close_selected_branches(wrapped)
        figures = []
        for number in range(4):
            if number == open_before:
                open_selected_branches(wrapped, optimizer)
            optimizer.zero_grad()
            loss = harness.forward_backward(config, wrapped, "plain", parallel, harness.megatron_step)
            figures.append((loss, float(optimizer.step()[1])))
        return figures


def _optimizer(wrapped: Sequence[Any], **settings: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    return get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, **settings), list(wrapped))


LAYOUTS = [Parallel(tp=2), Parallel(tp=2, sp=True), Parallel(pp=2, vpp=2), Parallel(cp=2)]


def test_layouts_agree_across_the_opening(workers: Workers, weights: Callable[[Model], str]) -> None:
    model = replace(INDEPENDENT, dtype=torch.float32)
    directory = weights(model)
    [one] = workers(1).run(_across_the_opening, model, Parallel(), directory, 2)
    [never] = workers(1).run(_across_the_opening, model, Parallel(), directory, None)
    assert one[:2] == never[:2]
    assert abs(one[2][0] - never[2][0]) > 1e-3 and abs(one[3][0] - never[3][0]) > 1e-3
    for parallel in LAYOUTS:
        for rank in workers(parallel.world).run(_across_the_opening, model, parallel, directory, 2):
            for (loss, norm), (wanted_loss, wanted_norm) in zip(rank, one, strict=True):
                assert loss is None or loss == pytest.approx(wanted_loss, rel=1e-5), parallel
                assert norm == pytest.approx(wanted_norm, rel=1e-5), parallel


# --- main weights -----------------------------------------------------------------------------------------------------------


def _main_weights(rank: int, world: int, directory: str, ddp: dict[str, bool], reload: bool) -> dict[str, Any]:
    """Open in bfloat16 after a closed step, then a step at rate 0, which writes the main weights into the model.

    Returns:
        How many weights changed on opening: of the model, of this rank's main ones, and of those by a bare reload afterwards;
        whether the selected rows are the window's after opening and after the step; and the model's weights after opening.
    """
    from megatron.core.transformer.module import Float16Module

    from nsa_cp.megatron import close_selected_branches, open_selected_branches

    model = replace(INDEPENDENT, dtype=torch.bfloat16).with_extra(bf16=True)
    with harness.megatron(Parallel()):
        config, chunks = harness.build(model, Parallel())
        harness.load(chunks, directory)
        close_selected_branches(chunks)
        wrapped = harness.wrap(config, [Float16Module(config, chunk) for chunk in chunks], grad_reduce_in_fp32=True, **ddp)
        distributed = ddp.get("use_distributed_optimizer", False)
        optimizer = _optimizer(wrapped, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=distributed)

        def step() -> None:
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            harness.forward_backward(config, wrapped, "plain", Parallel(), harness.megatron_step)
            optimizer.step()

        def copies() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            mains = [main.clone() for group in optimizer.param_groups for main in group["params"]]
            return [parameter.detach().clone() for parameter in chunks[0].parameters()], mains

        def is_the_windows() -> bool:
            return all(torch.equal(rows[:, SELECTED], rows[:, WINDOW]) for _, rows in nsa_projections(chunks[0]))

        step()
        before = copies()
        assert not is_the_windows()
        if reload:
            open_selected_branches(wrapped, optimizer)
        else:
            for layer in chunks[0].decoder.layers:
                layer.self_attention.open_selected()
        after, opened = copies(), is_the_windows()
        optimizer.reload_model_params()
        bare = copies()
        for mains, kept in zip((main for group in optimizer.param_groups for main in group["params"]), after[1], strict=True):
            mains.data.copy_(kept)
        for group in optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        step()
        if ddp.get("overlap_param_gather"):
            wrapped[0].start_param_sync(force_sync=True)
        return {
            "model": _changed(before[0], after[0]),
            "mains": _changed(before[1], after[1]),
            "bare": _changed(after[1], bare[1]),
            "opened": opened,
            "weights": after[0],
            "stays": is_the_windows(),
        }


def _changed(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> int:
    return sum(int((x != y).sum()) for x, y in zip(before, after, strict=True))


DDP = {
    "plain": (1, {}),
    "distributed": (2, dict(use_distributed_optimizer=True)),
    "overlapped": (2, dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)),
}


@pytest.mark.parametrize("kind", DDP)
def test_main_weights_follow_and_no_others_change(workers: Workers, weights: Callable[[Model], str], kind: str) -> None:
    world, ddp = DDP[kind]
    directory = weights(replace(INDEPENDENT, dtype=torch.bfloat16).with_extra(bf16=True))
    ranks = workers(world).run(_main_weights, directory, ddp, True)
    assert all(rank["opened"] and rank["stays"] for rank in ranks)
    if kind == "overlapped":
        # Here the model's weights are those of different steps before the opening, and must not be after it.
        for rank, wanted in zip(ranks, workers(world).run(_main_weights, directory, DDP["distributed"][1], True), strict=True):
            assert rank["mains"] == wanted["mains"]
            assert all(map(torch.equal, rank["weights"], wanted["weights"]))
    else:
        assert len({rank["model"] for rank in ranks}) == 1 and ranks[0]["model"] > 0
        assert sum(rank["mains"] for rank in ranks) == ranks[0]["model"]
    assert min(rank["bare"] for rank in ranks) > 1000, "Megatron's reload alone rounds every main weight"
    for rank in workers(world).run(_main_weights, directory, ddp, False):
        assert rank["opened"] and not rank["stays"] and rank["mains"] == 0, "without the optimizer the copy is lost again"


def _refusal(rank: int, world: int, model: Model) -> tuple[str | None, list[bool]]:
    from nsa_cp.megatron import close_selected_branches, open_selected_branches

    config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True)
    optimizer = SimpleNamespace(config=config, param_groups=[], reload_model_params=lambda: None)
    with harness.megatron(Parallel()):
        _, chunks = harness.build(model, Parallel())
        open_selected_branches(chunks, optimizer)  # nothing is closed
        close_selected_branches(chunks)
        message = None
        if model.nsa.shared_kv:
            open_selected_branches(chunks, optimizer)
        else:
            message = harness.refusal(open_selected_branches, chunks, optimizer)
        return message, [layer.self_attention.selected_is_open for layer in chunks[0].decoder.layers]


def test_an_optimizer_that_would_overwrite_the_copy_is_refused(workers: Workers) -> None:
    [(message, states)] = workers(1).run(_refusal, INDEPENDENT)
    assert "use_precision_aware_optimizer=False" in message and states == [False, True, True, False]
    assert workers(1).run(_refusal, SHARED) == [(None, [True] * 4)]


def _no_window(rank: int, world: int) -> tuple[str | None, list[bool]]:
    from nsa_cp.megatron import close_selected_branches, open_selected_branches

    with harness.megatron(Parallel()):
        _, chunks = harness.build(INDEPENDENT.with_nsa(window_size=0).with_extra(layer_pattern=("full", "nsa")), Parallel())
        close_selected_branches(chunks)
        message = harness.refusal(open_selected_branches, chunks, None)
        return message, [layer.self_attention.selected_is_open for layer in chunks[0].decoder.layers]


def test_without_a_window_there_is_nothing_to_open_with(workers: Workers) -> None:
    [(message, states)] = workers(1).run(_no_window)
    assert "window_size = 0 leaves those untrained" in message and states == [True, False, True, False]
