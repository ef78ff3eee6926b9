"""Shape checks of the public functions, made before anything runs. Errors are one sentence with both numbers."""

from __future__ import annotations

import torch

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout


def check_layout(layout: SequenceLayout) -> None:
    """Check that it is one: document borders, for example, are not.

    Raises:
        ValueError: with how to make one.
    """
    if not isinstance(layout, SequenceLayout):
        raise ValueError(
            f"layout is {type(layout).__name__}, not SequenceLayout; for one process make it with SequenceLayout.build(S), S the "
            "number of tokens, or SequenceLayout.build([0, ..., S]), the documents' borders"
        )


def check_rows(expected: int | None = None, **tensors: torch.Tensor) -> None:
    """Check that all tensors have ``expected`` rows, or if that is None as many as the first.

    Raises:
        ValueError: naming the tensor that differs and both numbers.
    """
    first = next(iter(tensors))
    for name, x in tensors.items():
        if expected is not None and x.shape[0] != expected:
            raise ValueError(f"{name} has {x.shape[0]} rows, but the layout (cu_seqlens and settings) gives {expected}")
        if x.shape[0] != tensors[first].shape[0]:
            raise ValueError(f"{name} has {x.shape[0]} rows and {first} {tensors[first].shape[0]}; they must be equal")


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
    """Check that q [T, N, Dk], k [M, G, Dk] and v [M, G, Dv] belong together.

    Raises:
        ValueError: dimensions, dtypes or head counts that do not fit.
    """
    if not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}; q, k and v must be floating-point tensors")
    for name, x in (("q", q), ("k", k), *((("v", v),) if v is not None else ())):
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; packed tensors are [tokens, heads, channels]")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q {q.dtype} on {q.device}; give all the same")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} channels and k {k.shape[2]}; they must be equal")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} groups; use a multiple of at least 1")
    if v is not None and v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v {tuple(v.shape)} and k {tuple(k.shape)} must agree in rows and groups")


def check_rotary(rotary: RotaryConfig | None, qk_dim: int) -> None:
    """Check that a position embedding, if there is one, rotates something in heads of ``qk_dim`` channels.

    Raises:
        ValueError: with both numbers and the remedy.
    """
    if rotary is not None and rotary.dim(qk_dim) == 0:
        raise ValueError(
            f"rotary percent = {rotary.percent} of {qk_dim} channels rotates none, since they turn in pairs; raise it, or use "
            "rotary=None for no position embedding"
        )


def check_blocks(blocks: torch.Tensor, q: torch.Tensor, k: torch.Tensor, config: NSAConfig) -> None:
    """Check that ``blocks`` is a choice of blocks, int32 [T, G, n], for the queries q [T, N, Dk] and the groups of k [M, G, Dk].

    Raises:
        ValueError: with what was given and what fits.
    """
    wanted = (q.shape[0], k.shape[1], config.num_selected_blocks)
    if tuple(blocks.shape) != wanted or blocks.dtype != torch.int32 or blocks.device != q.device:
        raise ValueError(
            f"blocks are {blocks.dtype} {tuple(blocks.shape)} on {blocks.device}; give torch.int32 {wanted} on {q.device}"
        )
