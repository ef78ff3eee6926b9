"""Builds Megatron-Core's GPTModel with NSA layers."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel

from nsa_cp.megatron.config import NSATransformerConfig
from nsa_cp.megatron.layer_specs import get_nsa_layer_spec


def build_gpt_model(
    config: NSATransformerConfig,
    vocab_size: int,
    max_sequence_length: int,
    pre_process: bool = True,
    post_process: bool = True,
    *,
    vp_stage: int | None = None,
    **kwargs: Any,
) -> GPTModel:
    """Megatron-Core's ``GPTModel`` of one pipeline stage, with NSA's layers and without a position embedding of its own.

    Megatron's model parallelism must be initialised. Weights are on the device that ``config`` says; without CUDA, call this
    inside :func:`nsa_cp.megatron.cpu_compatibility`.

    Args:
        vocab_size: rows of the embedding, a multiple of the tensor-parallel size.
        max_sequence_length: tokens of the longest sequence, over all context-parallel ranks.
        pre_process: whether this stage holds the embedding.
        post_process: whether this stage holds the output layer.
        vp_stage: virtual pipeline stage under an interleaved schedule, else None.
        **kwargs: further arguments of ``GPTModel``, for example ``share_embeddings_and_output_weights``.

    Raises:
        ValueError: a vocabulary that does not divide over tensor-parallel ranks, a position embedding, or settings that
            need CUDA where there is none.
    """
    tp = config.tensor_model_parallel_size
    if vocab_size < 1 or vocab_size % tp:
        raise ValueError(
            f"vocab_size = {vocab_size} is not a multiple of tensor_model_parallel_size = {tp}; "
            f"pad it to {max(-(-vocab_size // tp), 1) * tp}"
        )
    if kwargs.pop("position_embedding_type", "none") != "none":
        raise ValueError('NSA layers rotate queries and keys by config.rotary; leave position_embedding_type at "none"')
    pg_collection = kwargs.get("pg_collection")
    return GPTModel(
        config,
        get_nsa_layer_spec(config, vp_stage=vp_stage, pp_rank=None if pg_collection is None else pg_collection.pp.rank()),
        vocab_size,
        max_sequence_length,
        pre_process,
        post_process,
        position_embedding_type="none",
        vp_stage=vp_stage,
        **kwargs,
    )
