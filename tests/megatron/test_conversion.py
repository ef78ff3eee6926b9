"""A dense model's weights in a model with NSA layers: where NSA sees everything, it is the dense model; and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import megatron_harness as harness
import pytest
import torch
from megatron_harness import BATCH, LENGTH, VOCAB, Model, Parallel

from nsa_cp.config import NSAConfig
from nsa_cp.testing import DistributedPool, relative_error

pytestmark = pytest.mark.distributed

Workers = Callable[[int], DistributedPool]

# Every query sees all keys, in the selected branch and in the window.
ALL = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=LENGTH // 8, window_size=LENGTH
)
PATTERN = ("nsa", "full", "window", "nsa")
COMMON = {"v_channels": 8, "add_qkv_bias": True}
DENSE = Model(layer_pattern=("full",)).with_extra(**COMMON)
SPARSE = Model(nsa=ALL, layer_pattern=PATTERN).with_extra(equal_start=False, **COMMON)


def _logits(rank: int, world: int, sparse: Model, dense: Model, from_megatron: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the dense model and of the NSA model that took its weights, on this rank's part of the vocabulary."""
    from nsa_cp.megatron import copy_dense_weights

    parallel = Parallel(tp=world)
    with harness.megatron(parallel):
        source = _megatron_model(dense, parallel) if from_megatron else harness.build(dense, parallel)[1][0]
        for name, parameter in source.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        _, (model,) = harness.build(sparse, parallel)
        copy_dense_weights([model], [source])
        _silence_all_but_what_dense_attention_has(model)
        tokens = harness.make_batch("plain", 5)[0]["tokens"]
        positions = torch.arange(LENGTH).expand(BATCH, -1)
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1) if from_megatron else None
        with torch.no_grad():
            return source(tokens, positions, mask), model(tokens, positions, None)


def _megatron_model(dense: Model, parallel: Parallel) -> Any:
    """Megatron's GPTModel with its own attention and rotary embedding; its weights are drawn anew, norms included."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    ours = harness.make_config(dense, parallel)
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    names += ("gated_linear_unit", "activation_func", "hidden_dropout", "init_method_std", "tensor_model_parallel_size")
    names += ("use_cpu_initialization", "params_dtype", "add_bias_linear", "add_qkv_bias", "layernorm_epsilon", "normalization")
    config = TransformerConfig(attention_dropout=0.0, **{name: getattr(ours, name) for name in names})
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, VOCAB, 2 * LENGTH, position_embedding_type="rope").double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@torch.no_grad()
def _silence_all_but_what_dense_attention_has(model: Any) -> None:
    """Compressed values of exactly 0: what is left is selected and window branch, each half of what dense attention gives, times
    2/3 for a third branch."""
    for layer in model.decoder.layers:
        attention = layer.self_attention
        if attention.layer_type != "nsa":
            continue
        for rows in (attention.linear_qkv.weight, attention.linear_qkv.bias):
            _, _, compressed_values, *_ = rows.unflatten(0, (attention.num_groups, -1)).split(attention.group_widths, dim=1)
            compressed_values.zero_()
        attention.linear_proj.weight.mul_(1.5)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("from_megatron", [False, True], ids=["our-full-layers", "megatrons-attention"])
def test_where_nsa_sees_everything_it_is_the_dense_model(workers: Workers, world: int, from_megatron: bool) -> None:
    tolerance = 1e-5 if from_megatron else 1e-12  # Megatron rotates in float32
    for dense, sparse in workers(world).run(_logits, SPARSE, DENSE, from_megatron):
        assert dense.std() > 0.1 and relative_error(sparse, dense) < tolerance


def test_a_query_that_does_not_see_everything_differs(workers: Workers) -> None:
    """The test above can fail: a window and a selection that end before the first key."""
    near = SPARSE.with_nsa(num_selected_blocks=4, window_size=16)
    ((dense, sparse),) = workers(1).run(_logits, near, DENSE, False)
    assert relative_error(sparse, dense) > 1e-2


class Change(NamedTuple):
    """A parameter before and after, and the dense model's of that name."""

    before: torch.Tensor
    after: torch.Tensor
    dense: torch.Tensor | None


def _converted(rank: int, world: int, sparse: Model, dense: Model, closed: bool = False) -> tuple[dict[str, Change], str | None]:
    """All parameters, and the refusal."""
    from nsa_cp.megatron import close_selected_branches, copy_dense_weights

    parallel, message = Parallel(tp=world), None
    with harness.megatron(parallel):
        source, model = (harness.build(each, parallel)[1] for each in (dense, sparse))
        if closed:
            close_selected_branches(model)
        before = {name: parameter.detach().clone() for name, parameter in model[0].named_parameters()}
        given = {name: parameter.detach() for name, parameter in source[0].named_parameters()}
        try:
            copy_dense_weights(model, source)
        except ValueError as error:
            message = str(error)
        after = ((name, parameter.detach()) for name, parameter in model[0].named_parameters())
        return {name: Change(before[name], parameter, given.get(name)) for name, parameter in after}, message


@pytest.mark.parametrize("sparse", [SPARSE, SPARSE.with_nsa(shared_kv=True, gate="branch")], ids=["independent", "shared"])
def test_compressors_stay_gates_become_one_half_and_all_else_is_taken(workers: Workers, sparse: Model) -> None:
    ((found, message),) = workers(1).run(_converted, sparse, DENSE)
    assert message is None
    drawn = {name for name, change in found.items() if change.before.std() > 0}
    assert {name for name in drawn if torch.equal(*found[name][:2])} == {name for name in drawn if "core_attention" in name}
    pairs = 1 if sparse.nsa.shared_kv else 3
    for layer, kind in enumerate(PATTERN):
        prefix = f"decoder.layers.{layer}.self_attention."
        _, after, dense = found[f"{prefix}linear_proj.weight"]
        torch.testing.assert_close(after, dense / 1.5 if kind == "nsa" else dense)
        if kind != "nsa":
            continue
        _, after, dense = found[f"{prefix}linear_qkv.weight"]
        queries, *branches = after.unflatten(0, (4, -1)).split([16, *[16] * pairs, *([6] if pairs == 3 else [])], dim=1)
        assert all(torch.equal(torch.cat([queries, branch], 1).flatten(0, 1), dense) for branch in branches[:pairs])
        assert not (branches[3] if pairs == 3 else found[f"{prefix}linear_gate.weight"].after).any()


def test_layers_that_are_nsa_already_are_taken_as_they_are(workers: Workers) -> None:
    half_way = SPARSE.with_extra(layer_pattern=("full", "full", "full", "nsa"))
    ((found, message),) = workers(1).run(_converted, SPARSE, half_way)
    assert message is None
    trained = [name for name in found if name.startswith("decoder.layers.3.")]
    assert any("core_attention" in name for name in trained) and all(
        torch.equal(found[name].after, found[name].dense) for name in trained
    )
    assert not torch.equal(*found["decoder.layers.0.self_attention.linear_proj.weight"][1:])


@pytest.mark.parametrize(("sparse", "gates"), [(SPARSE.with_nsa(window_size=0), 1.0), (SPARSE, 1.5)])
def test_only_branches_that_are_open_count(workers: Workers, sparse: Model, gates: float) -> None:
    sparse = sparse.with_extra(layer_pattern=("nsa",))
    for closed, total in ((False, gates), (True, gates - 0.5)):
        ((found, _),) = workers(1).run(_converted, sparse, DENSE, closed)
        _, after, dense = found["decoder.layers.0.self_attention.linear_proj.weight"]
        torch.testing.assert_close(after, dense / total)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (DENSE.with_extra(hidden_size=64), r"shape \(.*32\), and \(.*64\) in the dense model; build both with the same settings"),
        (
            DENSE.with_extra(num_attention_heads=4, num_query_groups=2, kv_channels=16, v_channels=16),
            "num_attention_heads = 8, and 4 in the dense model",
        ),
        (DENSE.with_extra(rotary=None), "rotary percent = 1.0, and None in the dense model"),
        (
            DENSE.with_extra(v_channels=4),
            r"linear_qkv.weight of the dense .* shape \(112, 32\); this size takes \(128, 32\)",
        ),
        (DENSE.with_extra(add_qkv_bias=False), "the dense model has no .*linear_qkv.bias; build both"),
        (DENSE.with_extra(add_bias_linear=True), "the dense model has .*bias, for which this one has no place"),
        (replace(DENSE, num_layers=3), "the dense model has no decoder.layers.3"),
        (SPARSE.with_nsa(gate_temperature=2), r"gate_temperature = 1.0 in decoder.layers.\d.*, and 2.0 in the dense"),
        (SPARSE.with_nsa(compressed_rope="before"), r"compressed_rope = 'after' in decoder.layers.\d.*, and 'before' in"),
    ],
    ids=["width", "heads", "rotation", "value-width", "bias", "more-biases", "layers", "gates", "rope"],
)
def test_models_that_do_not_fit_are_refused_and_left_alone(workers: Workers, dense: Model, message: str) -> None:
    ((found, told),) = workers(1).run(_converted, SPARSE, dense)
    assert re.search(message, str(told)), told
    assert all(torch.equal(change.before, change.after) for change in found.values())


def _megatrons_refusals(rank: int, world: int) -> list[str]:
    from nsa_cp.megatron import copy_dense_weights

    told = []
    with harness.megatron(Parallel()):
        for name, value in (("rotary_interleaved", True), ("qk_l2_norm", True), ("softmax_scale", 0.5)):
            source = _megatron_model(DENSE, Parallel())
            setattr(source.config, name, value)
            _, model = harness.build(SPARSE, Parallel())
            with pytest.raises(ValueError) as caught:
                copy_dense_weights(model, [source])
            told.append(str(caught.value))
    return told


def test_what_megatron_can_and_nsa_does_not_is_refused(workers: Workers) -> None:
    (told,) = workers(1).run(_megatrons_refusals)
    names = ("rotary_interleaved = True", "qk_l2_norm = True", "softmax_scale = 0.5")
    assert all(message.startswith(f"the dense model has {name}, which NSA") for message, name in zip(told, names, strict=True))


def _other_meanings(rank: int, world: int) -> list[str]:
    """What the weights of a dense model are refused for whose positions or MLP mean something else."""
    from nsa_cp.megatron import copy_dense_weights

    def scaled(model: Any) -> None:
        model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.clone()
        model.rotary_pos_emb.inv_freq[-1] /= 8  # as rope_scaling does with slow rotations

    changes: list[Callable[[Any], None]] = [
        scaled,
        lambda model: setattr(model.rotary_pos_emb, "seq_len_interpolation_factor", 4.0),
        lambda model: setattr(model, "position_embedding_type", "yarn"),
        lambda model: setattr(model.config, "activation_func_clamp_value", 1.0),
        lambda model: setattr(model.config, "glu_linear_offset", 1.0),
    ]
    told = []
    with harness.megatron(Parallel()):
        for change in changes:
            source = _megatron_model(DENSE, Parallel())
            _, model = harness.build(SPARSE, Parallel())
            before = [parameter.clone() for parameter in model[0].parameters()]
            change(source)
            with pytest.raises(ValueError) as caught:
                copy_dense_weights(model, [source])
            assert all(torch.equal(old, new) for old, new in zip(before, model[0].parameters(), strict=True))
            told.append(str(caught.value))
    return told


def test_dense_weights_that_mean_something_else_are_refused(workers: Workers) -> None:
    (told,) = workers(1).run(_other_meanings)
    messages = ("rotary frequencies are not those of", "seq_len_interpolation_factor = 4.0", "position_embedding_type = 'yarn'")
    messages += ("activation_func_clamp_value = None, and 1.0", "glu_linear_offset = 0.0, and 1.0")
    assert all(message in text for text, message in zip(told, messages, strict=True)), told
