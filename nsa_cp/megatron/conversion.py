"""NSA that begins with the weights of full attention: a pretrained dense model goes on as a sparse one. See docs/megatron.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Module

from nsa_cp.megatron.self_attention import NSASelfAttention

# Gates start at about one half: three branches that agree would add up to one and a half times what dense attention gives.
_SUM_OF_GATES = 1.5


@torch.no_grad()
def copy_dense_weights(chunks: Sequence[Module], dense: Sequence[Module]) -> None:
    """Give a model with NSA layers the weights of one with dense attention; local to each process.

    An ``nsa`` layer takes the queries' weights, the keys' and values' for each of its branches, and the output projection's,
    divided by 1.5 for the sum of its gates. Its gates and compressors, which dense attention does not have, stay as they are:
    gates of about one half, compressors that take means. ``window`` and ``full`` layers take over everything, as does what
    is not attention.

    Where the optimizer keeps main weights of its own, call ``optimizer.reload_model_params()`` afterwards, or build it then.

    Args:
        chunks: this process's model chunks, wrapped in Megatron's DDP or not.
        dense: those of the dense model, spread alike; its attention is Megatron's ``SelfAttention`` or this library's layer.
            Where it has an ``nsa`` layer in the place of one, all of that is taken over.

    Raises:
        ValueError: models that do not fit; nothing has been copied then.
    """
    if len(chunks) != len(dense):
        raise ValueError(f"the model has {len(chunks)} chunks on this process and the dense one {len(dense)}; spread both alike")
    models = zip(unwrap_model(list(chunks)), unwrap_model(list(dense)), strict=True)
    for target, source, scale in [pair for both in models for pair in _pairs(*both)]:
        target.copy_(source * scale)


def _pairs(chunk: Module, dense: Module) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Tensors to be overwritten, each with the one that it takes and by what it is multiplied."""
    given = dict(dense.named_parameters())
    layers = _nsa_layers(chunk)
    converted = layers.keys() - _nsa_layers(dense).keys()
    used = set()
    for name, parameter in chunk.named_parameters():
        layer = next((layer for layer in converted if name.startswith(f"{layer}.")), None)
        own = name[len(layer) + 1 :] if layer is not None else ""
        if own.startswith(("core_attention.", "linear_gate.")):
            continue
        if name not in given:
            raise ValueError(f"the dense model has no {name}; it must be the same model but for its attention")
        used.add(name)
        if own.startswith("linear_qkv."):
            yield from _projection_pairs(name, layers[layer], parameter, given[name])
            continue
        if parameter.shape != given[name].shape:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, and {tuple(given[name].shape)} in the dense model")
        yield parameter, given[name], 1 / _SUM_OF_GATES if own == "linear_proj.weight" else 1.0
    if left := sorted(given.keys() - used):
        raise ValueError(f"the dense model has {left[0]}, for which this one has no place; train without it")


def _nsa_layers(chunk: Module) -> dict[str, NSASelfAttention]:
    attentions = ((name, module) for name, module in chunk.named_modules() if isinstance(module, NSASelfAttention))
    return {name: module for name, module in attentions if module.layer_type == "nsa"}


def _projection_pairs(name: str, layer: NSASelfAttention, fused: Tensor, dense: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Of the fused projection: both are laid out group by group, queries first, the dense one with a single key and value."""
    queries, *pairs, _ = fused.unflatten(0, (layer.num_groups, -1)).split(layer.group_widths, dim=1)
    widths = layer.group_widths[:3]
    fitting = (layer.num_groups * sum(widths), *fused.shape[1:])
    if dense.shape != fitting:
        raise ValueError(f"{name} of the dense model has shape {tuple(dense.shape)}; this size takes {fitting}")
    dense_queries, *pair = dense.unflatten(0, (layer.num_groups, -1)).split(widths, dim=1)
    yield queries, dense_queries, 1.0
    for index, target in enumerate(pairs):
        yield target, pair[index % 2], 1.0
