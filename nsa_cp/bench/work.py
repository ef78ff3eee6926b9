"""The least work of each stage, floating-point operations and bytes of memory traffic, and the floor it sets on time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nsa_cp.bench.inputs import HeadLayout
from nsa_cp.config import NSAConfig

# What good kernels sustain on one H100 SXM: matrix products in 16 bits, and memory. (A plain matrix product reaches 798 TFLOP/s.)
FLOOR_TFLOPS, FLOOR_TB_PER_S = 650.0, 3.0


class Work(NamedTuple):
    """Floating-point operations (a multiply-add is two), and bytes: every input and output tensor is read or written once."""

    flops: float
    bytes: float

    @property
    def floor_ms(self) -> float:
        """Milliseconds that an H100 needs at least: the longer of the times for operations and for bytes."""
        return max(self.flops / FLOOR_TFLOPS, self.bytes / FLOOR_TB_PER_S) * 1e-9

    def tflops(self, ms: float) -> float:
        """The rate in TFLOP/s of a stage that took ``ms``."""
        return self.flops / ms * 1e-9


def visible_pairs(config: NSAConfig, seq_len: int) -> dict[str, int]:
    """Number of visible (query, key) pairs of one head in one sequence, by branch; ``dense`` is full causal attention."""
    token = np.arange(seq_len, dtype=np.int64)
    block, first = config.select_block_size, config.compress_block_size - 1
    blocks = np.minimum(config.num_selected_blocks, token // block + 1)
    return {
        "compressed": int(np.maximum(0, (token - first) // config.compress_stride + 1).sum()),
        "selected": int(((blocks - 1) * block + token % block + 1).sum()),
        "window": int(np.minimum(config.window_size, token + 1).sum()),
        "dense": seq_len * (seq_len + 1) // 2,
    }


def stage_work(config: NSAConfig, heads: HeadLayout, seq_len: int, itemsize: int = 2) -> dict[tuple[str, str], Work]:
    """Work of each (stage, pass), and of ``dense`` attention.

    Attention takes 2 (Dk + Dv) operations a pair and query head forward (q k^T, p v), and 2 (3 Dk + 2 Dv) backward (q k^T again,
    do v^T, then dv, dk, dq). Selection takes 2 Dk a compressed pair. Compression is the products of the flattened blocks with
    their weights, and backward those with respect to the rows and to the weights. Gating is a multiply-add a branch and element.
    Exponentials are not counted, nor what the backward computes again beyond q k^T.

    Args:
        itemsize: bytes of an element of q, k, v and their gradients; log-sum-exps and row sums have 4.
    """
    dk, dv, groups = heads.qk_dim, heads.v_dim, heads.num_groups
    rows, compressed = seq_len * heads.num_heads, config.num_compressed_tokens(seq_len)
    q, out, stats = rows * dk * itemsize, rows * dv * itemsize, 4 * rows
    keys, values = (n * groups * (dk + dv) * itemsize for n in (compressed, seq_len))
    chosen = 4 * seq_len * groups * config.num_selected_blocks
    work = {}
    for stage, pairs in visible_pairs(config, seq_len).items():
        held = keys if stage == "compressed" else values
        extra = chosen if stage == "selected" else 0
        pairs *= heads.num_heads
        work[stage, "forward"] = Work(2.0 * (dk + dv) * pairs, q + held + extra + out + stats)
        work[stage, "backward"] = Work(2.0 * (3 * dk + 2 * dv) * pairs, 2 * q + out + 2 * held + extra + 2 * stats)
        if stage == "compressed":
            work["selection", "forward"] = Work(2.0 * dk * pairs, q + keys * dk // (dk + dv) + stats + chosen)
    products = sum(_compression_flops(config, width) for width in (dk, dv)) * compressed * groups
    work["compression", "forward"] = Work(products, values + keys)
    work["compression", "backward"] = Work(2 * products, 2 * values + keys)
    work["gating", "forward"] = Work(6.0 * rows * dv, 4 * out + 3 * rows * itemsize)
    work["gating", "backward"] = Work(6.0 * rows * dv, 4 * out + 6 * rows * itemsize + 3 * stats)
    return work


def _compression_flops(config: NSAConfig, width: int) -> float:
    """Operations for one compressed token of one group; the hidden layer of ``mlp`` is as wide as the head."""
    length = config.compress_block_size
    first = 2.0 * length * width * width
    return {"mean": 1.0 * length * width, "linear": first, "mlp": first + 2.0 * width * width}[config.compressor]
