"""Settings of Native Sparse Attention, checked when they are made. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Compressor = Literal["mlp", "linear", "mean"]
CompressedRope = Literal["after", "before"]
GateGranularity = Literal["head", "branch"]
LayoutKind = Literal["zigzag", "contiguous"]
CompressedComm = Literal["ring", "all_gather"]
Backend = Literal["auto", "torch", "triton"]


@dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """One layer's Native Sparse Attention (arXiv 2502.11089); lengths are in tokens unless said otherwise.

    Args:
        compress_block_size: l, tokens summarised by one compressed token.
        compress_stride: d, tokens between the starts of compressed blocks; divides l and l'.
        select_block_size: l', tokens of one selectable block; at least l.
        num_selected_blocks: n, blocks a query attends to, the forced ones included.
        num_init_blocks: forced blocks at the start of the document.
        num_local_blocks: forced blocks that end with the query's own.
        window_size: w, keys seen by the window branch, the query's own included; 0 switches the branch off.
        compressor: phi of paper eq. 7: ``mlp`` (one hidden layer), ``linear``, or ``mean`` (no parameters).
        shared_kv: one K/V for all three branches instead of three independent ones (paper section 3.3.3).
        compressed_rope: rotate the compressed key at its first token's position (``after`` compression), or compress
            rotated keys (``before``).
        gate: one gate for each query ``head`` and branch, or one for each token and ``branch``.
        layout: how a sequence is cut over context-parallel ranks.
        compressed_comm: how compressed keys and values travel: one ``all_gather`` behind the window branch, or a ``ring``
            that the compressed branch follows shard by shard.
        backend: ``triton`` (CUDA), ``torch`` (anywhere), or ``auto``: Triton where it runs.

    Raises:
        ValueError: a combination that the method does not define; the message names the numbers and the remedy.
    """

    compress_block_size: int = 32
    compress_stride: int = 16
    select_block_size: int = 64
    num_selected_blocks: int = 16
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    compressor: Compressor = "mlp"
    shared_kv: bool = False
    compressed_rope: CompressedRope = "after"
    gate: GateGranularity = "head"
    layout: LayoutKind = "zigzag"
    compressed_comm: CompressedComm = "all_gather"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        l, d, l_sel, n = self.compress_block_size, self.compress_stride, self.select_block_size, self.num_selected_blocks
        for name in ("compress_block_size", "compress_stride", "select_block_size", "num_selected_blocks", "num_local_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("num_init_blocks", "window_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
        if l % d:
            raise ValueError(f"compress_block_size = {l} is not a multiple of compress_stride = {d}; use {_round_up(l, d)}")
        if l_sel % d:
            raise ValueError(f"select_block_size = {l_sel} is not a multiple of compress_stride = {d}; use {_round_up(l_sel, d)}")
        if l_sel < l:
            raise ValueError(f"select_block_size = {l_sel} is smaller than compress_block_size = {l}; use at least {l}")
        if n < self.num_init_blocks + self.num_local_blocks:
            raise ValueError(
                f"num_selected_blocks = {n} is smaller than num_init_blocks + num_local_blocks = "
                f"{self.num_init_blocks} + {self.num_local_blocks}; use at least {self.num_init_blocks + self.num_local_blocks}"
            )
        _check_choice("compressor", self.compressor, Compressor)
        _check_choice("compressed_rope", self.compressed_rope, CompressedRope)
        _check_choice("gate", self.gate, GateGranularity)
        _check_choice("layout", self.layout, LayoutKind)
        _check_choice("compressed_comm", self.compressed_comm, CompressedComm)
        _check_choice("backend", self.backend, Backend)

    @property
    def num_branch_kv(self) -> int:
        """K/V projections a layer needs: one when shared, else one for each of cmp, slc, win."""
        return 1 if self.shared_kv else 3

    @property
    def num_gates(self) -> int:
        """Branches, in the order compressed, selected, window."""
        return 3

    def num_compressed_tokens(self, length: int) -> int:
        """Complete compression blocks of a document of ``length`` tokens."""
        return max(0, (length - self.compress_block_size) // self.compress_stride + 1)

    def num_select_blocks(self, length: int) -> int:
        """Selectable blocks of a document of ``length`` tokens; the last may be partial."""
        return -(-length // self.select_block_size)

    def overlap_weights(self) -> tuple[int, ...]:
        """Weight of compressed tokens ``r*j - (l/d - 1) ... r*j + r - 1`` in the score of block j, with r = l'/d (paper eq. 9).

        A compressed token counts once for each stride-d piece of it that lies in the block: 1, 2, 2, 2, 1 for 32/16/64.
        """
        pieces, per_block = self.compress_block_size // self.compress_stride, self.select_block_size // self.compress_stride
        return tuple(sum(0 <= offset + k < per_block for k in range(pieces)) for offset in range(1 - pieces, per_block))


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary position embedding of queries and keys, in the half-split form (GPT-NeoX, Megatron's default).

    Args:
        base: wavelength base, theta.
        percent: fraction of the channels that rotate, the first ones; the rest pass through.

    Raises:
        ValueError: base not positive, or percent outside (0, 1].
    """

    base: float = 10000.0
    percent: float = 1.0

    def __post_init__(self) -> None:
        if self.base <= 0:
            raise ValueError(f"rotary base = {self.base} must be positive")
        if not 0 < self.percent <= 1:
            raise ValueError(f"rotary percent = {self.percent} must lie in (0, 1]")

    def dim(self, qk_dim: int) -> int:
        """Rotated channels of a head of ``qk_dim``: the largest even number within ``percent`` of them."""
        return int(qk_dim * self.percent) // 2 * 2


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check_choice(name: str, value: str, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is unknown; use one of {', '.join(map(repr, allowed))}")
