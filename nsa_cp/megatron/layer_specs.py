"""Layer specs: how Megatron-Core's GPTModel is told to build NSA layers."""

from __future__ import annotations

import copy

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from nsa_cp.megatron.apex import check_apex
from nsa_cp.megatron.config import AttentionSettings, settings_of
from nsa_cp.megatron.cpu import check_cpu_config
from nsa_cp.megatron.norm import RMSNorm
from nsa_cp.megatron.self_attention import NSASelfAttention


def get_nsa_layer_spec(
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    settings: AttentionSettings | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm, to pass to ``GPTModel`` as ``transformer_layer_spec``.

    Each layer looks up its kind (nsa, full, window) by its global number when it is built, so a stage's spec need only have
    the right number of layers. MLPs are Megatron's own.

    Args:
        config: an :class:`NSATransformerConfig`, or any ``TransformerConfig`` together with ``settings``.
        vp_stage: the virtual pipeline stage under an interleaved schedule, else None.
        pp_rank: the pipeline stage; this process's when None.
        settings: needed with a plain ``TransformerConfig``.

    Raises:
        ValueError: settings that NSA layers cannot follow, settings that need CUDA where there is none, or an installed package
            called apex that is not NVIDIA's.
    """
    check_apex()
    settings_of(config, settings)
    check_cpu_config(config)
    if pp_rank is None:
        staged = config.pipeline_model_parallel_size > 1
        pp_rank = parallel_state.get_pipeline_model_parallel_rank() if staged else 0
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage, pp_rank=pp_rank
    )
    layers = [_with_nsa(spec, settings) for spec in block.layer_specs]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def get_nsa_transformer_layer_spec(settings: AttentionSettings | None = None) -> ModuleSpec:
    """The spec of one transformer layer, for code that builds the list of layers itself.

    Megatron-LM's ``--spec MODULE NAME`` takes such an object (not a function) as a module's attribute; see docs/megatron.md.
    The final norm is then Megatron's choice, which without Transformer Engine refuses sequence parallelism.

    Args:
        settings: needed with a plain ``TransformerConfig``, which is what Megatron-LM makes from its arguments.

    Raises:
        ValueError: an installed package called apex that is not NVIDIA's.
    """
    check_apex()
    return _with_nsa(get_gpt_layer_local_spec(normalization="RMSNorm"), settings)


def _with_nsa(layer: ModuleSpec, settings: AttentionSettings | None) -> ModuleSpec:
    """A copy of Megatron's local layer spec with NSA's attention and norms; a copy, because layers may share one spec object."""
    layer = copy.deepcopy(layer)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention
    attention.module = NSASelfAttention
    if settings is not None:
        attention.params = {**attention.params, "settings": settings}
    return layer
