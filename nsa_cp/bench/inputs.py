"""Benchmark inputs: random queries, whose neighbours choose independently, and drifting ones, whose neighbours agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from nsa_cp.config import NSAConfig
from nsa_cp.ops import compress_kv, initial_compressor_weights, select_blocks


@dataclass(frozen=True)
class HeadLayout:
    """N query heads over G groups, Dk query/key and Dv value channels."""

    num_heads: int
    num_groups: int
    qk_dim: int
    v_dim: int

    @classmethod
    def parse(cls, text: str) -> HeadLayout:
        """``64/4x128`` or, with Dk and Dv, ``64/4x192/128``.

        Raises:
            ValueError: any other form.
        """
        try:
            heads, dims = text.split("x")
            num_heads, num_groups = (int(x) for x in heads.split("/"))
            qk_dim, v_dim = (int(x) for x in (dims if "/" in dims else f"{dims}/{dims}").split("/"))
        except ValueError:
            raise ValueError(
                f"head layout {text!r} has the form HEADS/GROUPSxDIM or HEADS/GROUPSxDK/DV, as in 64/4x128"
            ) from None
        return cls(num_heads, num_groups, qk_dim, v_dim)


@dataclass
class AttentionInputs:
    """q, per-branch k and v, gates, compressor weights and the upstream gradient; all leaves require gradients but ``grad``."""

    q: torch.Tensor
    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    gates: torch.Tensor
    k_weights: tuple[torch.Tensor, ...]
    v_weights: tuple[torch.Tensor, ...]
    grad: torch.Tensor

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Everything a backward pass gives a gradient."""
        return [self.q, *self.k, *self.v, self.gates, *self.k_weights, *self.v_weights]


def make_inputs(
    config: NSAConfig, heads: HeadLayout, seq_len: int, kind: str, *, seed: int, device: torch.device, dtype: torch.dtype
) -> AttentionInputs:
    """Inputs of one sequence.

    Args:
        kind: ``random``: queries of neighbouring tokens are independent; ``drifting``: they change so slowly that a query
            keeps about 80% of the blocks its predecessor chose freely.

    Raises:
        ValueError: an unknown kind.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def weights(dim: int) -> tuple[torch.Tensor, ...]:
        initial = initial_compressor_weights(config, heads.num_groups, dim)
        return tuple(w.to(device, dtype).requires_grad_() for w in initial)

    if kind not in ("random", "drifting"):
        raise ValueError(f"inputs {kind!r} are unknown; use 'random' or 'drifting'")
    q = normal(seq_len, heads.num_heads, heads.qk_dim)
    if kind == "drifting":
        q = _smooth(q, _memory_for_agreement(config, heads, 0.8, device, dtype))
    branches, groups = config.num_branch_kv, heads.num_groups
    return AttentionInputs(
        q=q.requires_grad_(),
        k=tuple(normal(seq_len, groups, heads.qk_dim).requires_grad_() for _ in range(branches)),
        v=tuple(normal(seq_len, groups, heads.v_dim).requires_grad_() for _ in range(branches)),
        gates=torch.rand(seq_len, heads.num_heads, 3, generator=generator, device=device).to(dtype).requires_grad_(),
        k_weights=weights(heads.qk_dim),
        v_weights=weights(heads.v_dim),
        grad=normal(seq_len, heads.num_heads, heads.v_dim),
    )


def neighbour_agreement(blocks: torch.Tensor, config: NSAConfig) -> float:
    """Fraction of freely chosen blocks that the token before chose freely too, over tokens that had a choice.

    Args:
        blocks: int32 [T, G, n] of one document.
    """
    own = torch.arange(blocks.shape[0], device=blocks.device)[:, None, None] // config.select_block_size
    free = (blocks >= config.num_init_blocks) & (blocks <= own - config.num_local_blocks)
    # A young document leaves no choice: there every visible block is taken.
    free &= own >= 2 * config.num_selected_blocks
    kept = total = 0
    for rows in torch.arange(1, blocks.shape[0], device=blocks.device).split(4096):
        same = (blocks[rows][..., :, None] == blocks[rows - 1][..., None, :]) & free[rows - 1][..., None, :]
        kept += int((same.any(-1) & free[rows]).sum())
        total += int(free[rows].sum())
    return kept / max(1, total)


def _smooth(q: torch.Tensor, memory: float) -> torch.Tensor:
    """A stationary first-order process of unit variance along the tokens: correlation ``memory`` between neighbours."""
    length = min(256, q.shape[0])
    step = torch.arange(length, device=q.device)
    decay = (memory ** (step[:, None] - step).clamp(min=0).float()).tril()
    out = torch.empty_like(q)
    state = q[0].float()
    for start in range(0, q.shape[0], length):
        noise = q[start : start + length].float() * (1 - memory**2) ** 0.5
        rows = len(noise)
        chunk = torch.einsum("st,thd->shd", decay[:rows, :rows], noise) + decay[:rows, 0, None, None] * memory * state
        out[start : start + rows] = chunk
        state = chunk[-1]
    return out


@lru_cache(maxsize=64)
def _memory_for_agreement(config: NSAConfig, heads: HeadLayout, target: float, device: torch.device, dtype: torch.dtype) -> float:
    """The correlation of neighbouring queries at which they agree to ``target``, by bisection on a short sequence."""
    low, high = 0.5, 0.9999
    one_group = HeadLayout(heads.num_heads // heads.num_groups, 1, heads.qk_dim, heads.v_dim)
    length = 8 * config.num_selected_blocks * config.select_block_size
    inputs = make_inputs(config, one_group, length, "random", seed=1, device=device, dtype=dtype)
    with torch.no_grad():
        k_cmp, _ = compress_kv(inputs.k[0], inputs.v[0], inputs.k_weights, inputs.v_weights, config)
        for _ in range(12):
            memory = 1 - ((1 - low) * (1 - high)) ** 0.5
            blocks = select_blocks(_smooth(inputs.q, memory), k_cmp, config, backend=config.backend)
            low, high = (memory, high) if neighbour_agreement(blocks, config) < target else (low, memory)
    return memory
