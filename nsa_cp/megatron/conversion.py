"""Gives NSA layers the weights of full attention, so that a pretrained dense model can go on as a sparse one. See
docs/megatron.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Module

from nsa_cp.config import RotaryConfig
from nsa_cp.megatron.config import FIXED_FIELDS
from nsa_cp.megatron.self_attention import NSASelfAttention

# Settings on which the meaning of the weights depends: _EQUAL must be equal in both models, _EQUAL_IN_NSA in layers that are nsa
# in both; those in _ACCEPTED must have, in the dense model, the only value that NSA layers accept (FIXED_FIELDS).
_EQUAL = (
    "num_attention_heads", "num_query_groups", "kv_channels", "layernorm_epsilon", "activation_func", "gated_linear_unit",
    "activation_func_clamp_value", "glu_linear_offset", "num_moe_experts",
)  # fmt: skip
# With experts also these, on which their router's choice depends.
_EQUAL_WITH_EXPERTS = (
    "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor",
    "moe_router_num_groups", "moe_router_group_topk", "moe_router_load_balancing_type",
)  # fmt: skip
_EQUAL_IN_NSA = ("compressed_rope", "gate_temperature")
_ACCEPTED = {
    "multi_latent_attention", "attention_output_gate", "qk_layernorm", "qk_l2_norm", "softmax_scale", "softmax_type",
    "window_size", "no_rope_freq", "rotary_interleaved", "layernorm_zero_centered_gamma", "normalization",
    "apply_query_key_layer_scaling",
}  # fmt: skip
_BUILD_ALIKE = "build both with the same settings but for the attention"


@torch.no_grad()
def copy_dense_weights(chunks: Sequence[Module], dense: Sequence[Module]) -> None:
    """Give a model with NSA layers the weights of one with dense attention; local to each process.

    An ``nsa`` layer takes the dense layer's query weights, its key and value weights for every branch, and its output projection
    divided by the sum of the gates of the open branches: gates are reset so that each is exactly one half. Compressors, which
    dense attention does not have, stay as they are. ``window`` and ``full`` layers take over everything, as does all that is not
    attention.

    If the optimizer keeps main weights of its own, call ``optimizer.reload_model_params()`` afterwards, or build it afterwards.

    Args:
        chunks: this process's model chunks, wrapped in Megatron's DDP or not; overwritten in place.
        dense: the dense model's chunks, split over processes in the same way; its attention is Megatron's ``SelfAttention`` or
            this library's layer. An ``nsa`` layer that it has in the place of one is copied unchanged. Its rotary base may
            differ.

    Raises:
        ValueError: models that do not match; nothing has been copied then.
    """
    if len(chunks) != len(dense):
        raise ValueError(f"the model has {len(chunks)} chunks on this process and the dense one {len(dense)}; spread both alike")
    models = zip(unwrap_model(list(chunks)), unwrap_model(list(dense)), strict=True)
    for target, source, factor in [step for both in models for step in _steps(*both)]:
        target.copy_(source * factor)


def _steps(chunk: Module, dense: Module) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield ``(target, source, factor)`` for every ``target = source * factor`` to be done; a factor of 0 resets the target."""
    _check_settings(chunk, dense)
    sources, used = dict(dense.named_parameters()), set()
    trained = _nsa_layers(dense)
    converted = {path: layer for path, layer in _nsa_layers(chunk).items() if path not in trained}
    for name, parameter in chunk.named_parameters():
        path = next((path for path in converted if name.startswith(f"{path}.")), None)
        in_layer = "" if path is None else name[len(path) + 1 :]
        if in_layer.startswith("core_attention."):
            continue
        if in_layer.startswith("linear_gate."):
            yield parameter, parameter, 0.0
            continue
        if name not in sources:
            raise ValueError(f"the dense model has no {name}; {_BUILD_ALIKE}")
        used.add(name)
        source, factor = sources[name], 1.0
        if in_layer.startswith("linear_qkv."):
            yield from _projection_steps(name, converted[path], parameter, source)
            continue
        if parameter.shape != source.shape:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}, and {tuple(source.shape)} in the dense model; {_BUILD_ALIKE}"
            )
        if in_layer == "linear_proj.weight":
            factor = 1 / _sum_of_gates(converted[path])
        yield parameter, source, factor
    if left := sorted(sources.keys() - used):
        raise ValueError(f"the dense model has {left[0]}, for which this one has no place; {_BUILD_ALIKE}")


def _projection_steps(name: str, layer: NSASelfAttention, fused: Tensor, dense: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The steps for the fused projection: both are laid out group by group, queries first; the dense one has one K/V pair."""
    queries, *pairs, gates = fused.unflatten(0, (layer.num_groups, -1)).split(layer.group_widths, dim=1)
    widths = layer.group_widths[:3]
    fitting = (layer.num_groups * sum(widths), *fused.shape[1:])
    if dense.shape != fitting:
        raise ValueError(f"{name} of the dense model has shape {tuple(dense.shape)}; this size takes {fitting}")
    dense_queries, *pair = dense.unflatten(0, (layer.num_groups, -1)).split(widths, dim=1)
    yield queries, dense_queries, 1.0
    for index, target in enumerate(pairs):
        yield target, pair[index % 2], 1.0
    yield gates, gates, 0.0


def _sum_of_gates(layer: NSASelfAttention) -> float:
    """Sum of the gates when each open branch's is one half; the compressed branch is always open."""
    return (1 + layer.selected_is_open + (layer.settings.nsa.window_size > 0)) / 2


def _nsa_layers(model: Module) -> dict[str, NSASelfAttention]:
    attentions = ((name, module) for name, module in model.named_modules() if isinstance(module, NSASelfAttention))
    return {name: module for name, module in attentions if module.layer_type == "nsa"}


def _first_attention(model: Module) -> NSASelfAttention | None:
    return next((module for module in model.modules() if isinstance(module, NSASelfAttention)), None)


def _check_settings(chunk: Module, dense: Module) -> None:
    ours, theirs = chunk.config, dense.config
    for name in (*_EQUAL, *(_EQUAL_WITH_EXPERTS if ours.num_moe_experts else ())):
        own, other = getattr(ours, name), getattr(theirs, name)
        if own != other:
            raise ValueError(f"{name} = {own}, and {other} in the dense model; {_BUILD_ALIKE}")
    for name, accepted, why in FIXED_FIELDS:
        other = getattr(theirs, name, accepted)
        if name in _ACCEPTED and other != accepted:
            raise ValueError(f"the dense model has {name} = {other!r}, which NSA layers do not carry out: {why}")
    attention = _first_attention(chunk)
    if attention is None:
        return
    sparse = _nsa_layers(chunk)
    for path in sparse.keys() & (trained := _nsa_layers(dense)).keys():
        for name in _EQUAL_IN_NSA:
            own, other = getattr(sparse[path].settings.nsa, name), getattr(trained[path].settings.nsa, name)
            if own != other:
                raise ValueError(f"{name} = {own!r} in {path}, and {other!r} in the dense model; {_BUILD_ALIKE}")
    own, other = (None if rotary is None else rotary.percent for rotary in (attention.settings.rotary, _rotary(dense)))
    if own != other:
        raise ValueError(f"rotary percent = {own}, and {other} in the dense model (None: no rotation); {_BUILD_ALIKE}")


def _rotary(dense: Module) -> RotaryConfig | None:
    """The rotary embedding of a model with this library's layers or with Megatron's own; None if it has none.

    Raises:
        ValueError: one that RotaryConfig cannot describe.
    """
    if (attention := _first_attention(dense)) is not None:
        return attention.settings.rotary
    kind = getattr(dense, "position_embedding_type", "none")
    if kind in ("none", "learned_absolute"):
        return None
    if kind != "rope":
        raise ValueError(f"the dense model has position_embedding_type = {kind!r}; NSA layers rotate as 'rope' does")
    rotary = RotaryConfig(base=dense.rotary_base, percent=dense.rotary_percent)
    embedding = dense.rotary_pos_emb
    if (factor := embedding.seq_len_interpolation_factor) not in (None, 1):
        raise ValueError(f"the dense model divides positions by seq_len_interpolation_factor = {factor}, which NSA layers do not")
    frequencies = embedding.inv_freq.double()
    plain = rotary.base ** (-torch.arange(len(frequencies), dtype=torch.float64, device=frequencies.device) / len(frequencies))
    if not torch.allclose(frequencies, plain, rtol=1e-4, atol=0):
        raise ValueError(
            f"the dense model's rotary frequencies are not those of rotary_base = {rotary.base} (rope_scaling?); NSA layers "
            "rotate by unscaled ones"
        )
    return rotary
