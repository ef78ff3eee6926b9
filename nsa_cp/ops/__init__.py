"""Native Sparse Attention as differentiable functions, stage by stage and as a whole, each in plain torch and in Triton."""

from nsa_cp.ops.compression import initial_compressor_weights
from nsa_cp.ops.pipeline import NSAOutput, native_sparse_attention
from nsa_cp.ops.remote_blocks import RemoteBlocks, remote_blocks
from nsa_cp.ops.stages import (
    combine_branches,
    compress_kv,
    compressed_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

__all__ = [
    "NSAOutput",
    "RemoteBlocks",
    "combine_branches",
    "compress_kv",
    "compressed_attention",
    "initial_compressor_weights",
    "native_sparse_attention",
    "remote_blocks",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
