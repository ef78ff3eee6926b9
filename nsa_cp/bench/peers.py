"""Other implementations to measure beside ours: PyTorch's dense attention, and public NSA packages if they are installed.

Each takes our inputs as far as it can; ``differs`` says what it computes differently. The packages are optional.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_cp.bench.inputs import AttentionInputs, HeadLayout
from nsa_cp.config import NSAConfig

Leaves = list[torch.Tensor]
Forward = Callable[[AttentionInputs], tuple[torch.Tensor, Leaves]]


@dataclass(frozen=True)
class Peer:
    """An implementation to compare with.

    Args:
        make: from settings and heads makes a function from inputs to (out [S, N, Dv], leaves to differentiate by). Raises
            ImportError if the package is missing, ValueError for what the package cannot do.
        differs: what it computes differently from ours, for readers of the table; empty if nothing.
    """

    make: Callable[[NSAConfig, HeadLayout], Forward]
    differs: str = ""


def _dense(backend: SDPBackend) -> Callable[[NSAConfig, HeadLayout], Forward]:
    def forward(x: AttentionInputs) -> tuple[torch.Tensor, Leaves]:
        q, k, v = (y.transpose(0, 1)[None] for y in (x.q, x.k[0], x.v[0]))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1), [x.q, x.k[0], x.v[0]]

    return lambda config, heads: forward


def _make_fla(config: NSAConfig, heads: HeadLayout) -> Forward:
    """flash-linear-attention's ``parallel_nsa``: [B, T, heads, D], blocks of one size for compression and selection."""
    from fla.ops.nsa import parallel_nsa

    per_group = heads.num_heads // heads.num_groups
    if per_group < 16 or per_group & (per_group - 1):
        raise ValueError(f"it takes 16, 32, ... query heads a group, not {per_group}")
    if config.window_size:
        import flash_attn  # noqa: F401 - its window branch is flash-attn's, and fails without it only when called

    def forward(x: AttentionInputs) -> tuple[torch.Tensor, Leaves]:
        gates = (g.contiguous()[None] for g in x.gates.expand(-1, heads.num_heads, -1).unbind(-1))
        g_cmp, g_slc, g_swa = gates
        out = parallel_nsa(
            x.q[None], x.k[0][None], x.v[0][None], g_cmp=g_cmp, g_slc=g_slc, g_swa=g_swa,
            block_counts=config.num_selected_blocks, block_size=config.select_block_size, window_size=config.window_size,
        )  # fmt: skip
        return out[0], [x.q, x.k[0], x.v[0], x.gates]

    return forward


def _make_flash_nsa(config: NSAConfig, heads: HeadLayout) -> Forward:
    """Scalable-Flash-Native-Sparse-Attention's ``NSACore``: [T, heads, D], gates as logits, settings in module globals."""
    import flash_nsa

    settings = flash_nsa.NSAConfig(
        qk_head_dim=heads.qk_dim, v_head_dim=heads.v_dim, num_heads=heads.num_heads, num_kv_heads=heads.num_groups,
        kernel_size=config.compress_block_size, stride=config.compress_stride, block_size=config.select_block_size,
        top_n=config.num_selected_blocks, num_init_blocks=config.num_init_blocks, num_local_blocks=config.num_local_blocks,
        window_size=config.window_size, cmp_k_method="mean", cmp_v_method="mean",
    )  # fmt: skip
    core = flash_nsa.NSACore(settings)
    prepared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(x: AttentionInputs) -> tuple[torch.Tensor, Leaves]:
        # It takes the gates before their sigmoid; made once, so that the conversion is not timed.
        if id(x) not in prepared:
            gates = x.gates.detach().float().expand(-1, heads.num_heads, -1).clamp(1e-3, 1 - 1e-3)
            borders = torch.tensor([0, x.q.shape[0]], dtype=torch.int32, device=x.q.device)
            prepared[id(x)] = gates.logit().to(x.gates.dtype).contiguous().requires_grad_(), borders
        logits, borders = prepared[id(x)]
        return core(x.q, x.k[0], x.v[0], logits, borders), [x.q, x.k[0], x.v[0], logits]

    return forward


PEERS = {
    "dense_cudnn": Peer(_dense(SDPBackend.CUDNN_ATTENTION)),
    "dense_flash": Peer(_dense(SDPBackend.FLASH_ATTENTION)),
    "fla": Peer(
        _make_fla,
        "one K/V for all branches; compresses by block means without overlap (l = d = l'), so a quarter as many compressed tokens"
        " at the paper's settings",
    ),
    "flash_nsa": Peer(_make_flash_nsa, "one K/V for all branches; compresses by block means"),
}


def make_peer(name: str, config: NSAConfig, heads: HeadLayout) -> Forward | str:
    """The peer's function, or one line on why it cannot be measured here."""
    try:
        return PEERS[name].make(config, heads)
    except Exception as error:  # whatever a foreign package does when it is imported
        return reason(error)


def reason(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
