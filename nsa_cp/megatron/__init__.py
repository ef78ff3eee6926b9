"""NSA inside Megatron-Core: configuration, layer specs, batches. See docs/megatron.md."""

import warnings

from nsa_cp.megatron.apex import check_apex, has_apex

try:
    with warnings.catch_warnings():
        # Megatron-Core warns about missing apex and Transformer Engine in each of its modules. Neither is needed here.
        warnings.filterwarnings("ignore", message=".*[Aa]pex (is|are) not installed.*")
        from nsa_cp.megatron.batch import shard_batch
        from nsa_cp.megatron.config import AttentionSettings, NSATransformerConfig
        from nsa_cp.megatron.conversion import copy_dense_weights
        from nsa_cp.megatron.cpu import check_cpu_config, cpu_compatibility, enable
        from nsa_cp.megatron.layer_specs import get_nsa_layer_spec, get_nsa_transformer_layer_spec
        from nsa_cp.megatron.layout import check_sequence_length, make_packed_seq_params, sequence_layout
        from nsa_cp.megatron.model import build_gpt_model
        from nsa_cp.megatron.norm import RMSNorm
        from nsa_cp.megatron.opening import close_selected_branches, open_selected_branches
        from nsa_cp.megatron.self_attention import NSASelfAttention
except Exception:
    # Megatron-Core imports whatever package is called apex; if the wrong one made the import fail, say so.
    check_apex()
    raise

__all__ = [
    "AttentionSettings",
    "NSASelfAttention",
    "NSATransformerConfig",
    "RMSNorm",
    "build_gpt_model",
    "check_apex",
    "check_cpu_config",
    "check_sequence_length",
    "close_selected_branches",
    "copy_dense_weights",
    "cpu_compatibility",
    "enable",
    "get_nsa_layer_spec",
    "get_nsa_transformer_layer_spec",
    "has_apex",
    "make_packed_seq_params",
    "open_selected_branches",
    "sequence_layout",
    "shard_batch",
]
