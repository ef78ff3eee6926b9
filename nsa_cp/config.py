"""Settings of Native Sparse Attention, validated on construction. Imports the standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

Compressor = Literal["mlp", "linear", "mean"]
CompressedRope = Literal["after", "before"]
GateGranularity = Literal["head", "branch"]
LayoutKind = Literal["zigzag", "contiguous"]
CompressedComm = Literal["ring", "all_gather"]
Backend = Literal["auto", "torch", "triton"]

LARGEST_SIZE = 2**31 - 1  # kernels hold token offsets as int32
_TEMPERATURES = (1e-3, 1e3)  # beyond, quotients of logits overflow or vanish in 16 bits
# Smallest value allowed for each size.
_LEAST = {
    "compress_block_size": 1,
    "compress_stride": 1,
    "select_block_size": 1,
    "num_selected_blocks": 1,
    "num_local_blocks": 1,
    "num_init_blocks": 0,
    "window_size": 0,
}


@dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """Settings of Native Sparse Attention (arXiv 2502.11089) for one layer; lengths are in tokens unless said otherwise.

    Args:
        compress_block_size: l, tokens summarised by one compressed token.
        compress_stride: d, tokens between the starts of compressed blocks; divides l and l'.
        select_block_size: l', tokens in one selectable block; at least l.
        num_selected_blocks: n, blocks each query attends to, including the forced ones.
        num_init_blocks: blocks at the start of the document that every query attends to (forced).
        num_local_blocks: blocks up to and including the query's own that it always attends to (forced).
        window_size: w, keys seen by the window branch, including the query's own; 0 switches the branch off.
        compressor: phi of paper eq. 7: ``mlp`` (one hidden layer), ``linear``, or ``mean`` (no parameters).
        shared_kv: one K/V for all three branches instead of three independent ones (paper section 3.3.3).
        compressed_rope: ``after``: compress unrotated keys, then rotate each compressed key at its first token's position;
            ``before``: compress keys that are already rotated.
        gate: ``head``: one gate per token, query head and branch; ``branch``: one per token and branch, shared by all heads.
        gate_temperature: the gates are ``sigmoid(logits / gate_temperature)``; 1 is the paper's. Above 1 they learn more slowly
            (what is known of that: docs/training.md, Gates that learn slowly). A float; integers are converted.
        layout: how the Megatron layers and the trainer split a sequence over context-parallel ranks, see
            ``SequenceLayout.build``; ``NativeSparseAttention`` follows the SequenceLayout that it is given.
        compressed_comm: how compressed keys and values reach every rank: in one ``all_gather``, hidden behind the window
            branch, or around a ``ring``, the compressed branch attending to each shard as it arrives.
        backend: ``triton`` (CUDA), ``torch`` (anywhere), or ``auto``: Triton where it runs.

    Raises:
        ValueError: a size that is not an integer or is out of range, a temperature that is not a number or is out of range, an
            unknown choice, or a combination that the method does not define; the message gives the numbers and the remedy.
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
    gate_temperature: float = 1.0
    layout: LayoutKind = "zigzag"
    compressed_comm: CompressedComm = "all_gather"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        for name, fault in number_faults(self):
            raise ValueError(f"{name} = {fault}")
        # Equal settings must have equal texts, which ranks and studies compare.
        object.__setattr__(self, "gate_temperature", float(self.gate_temperature))
        _check_choice("compressor", self.compressor, Compressor)
        _check_choice("compressed_rope", self.compressed_rope, CompressedRope)
        _check_choice("gate", self.gate, GateGranularity)
        _check_choice("layout", self.layout, LayoutKind)
        _check_choice("compressed_comm", self.compressed_comm, CompressedComm)
        _check_choice("backend", self.backend, Backend)

    @property
    def num_branch_kv(self) -> int:
        """Key/value pairs a layer needs: 1 when shared, else 3 (compressed, selected, window)."""
        return 1 if self.shared_kv else 3

    @property
    def num_gates(self) -> int:
        """Gates per token (and head): one per branch, in the order compressed, selected, window."""
        return 3

    def num_compressed_tokens(self, length: int) -> int:
        """Number of compressed tokens of a document of ``length`` tokens: only complete compression blocks count."""
        return max(0, (length - self.compress_block_size) // self.compress_stride + 1)

    def num_select_blocks(self, length: int) -> int:
        """Number of selectable blocks of a document of ``length`` tokens; the last may be partial."""
        return -(-length // self.select_block_size)

    def overlap_weights(self) -> tuple[int, ...]:
        """Weight of compressed tokens ``r*j - (l/d - 1) ... r*j + r - 1`` in the score of block j, with r = l'/d (paper eq. 9).

        A compressed token counts once for each of its l/d pieces of d tokens that lies in the block: for (l, d, l') = (32, 16,
        64) the weights are 1, 2, 2, 2, 1.
        """
        pieces, per_block = self.compress_block_size // self.compress_stride, self.select_block_size // self.compress_stride
        return tuple(sum(0 <= offset + k < per_block for k in range(pieces)) for offset in range(1 - pieces, per_block))


def number_faults(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield ``(field name, message)`` for every invalid number; a message gives the value and the remedy.

    Args:
        settings: any object with the fields of :class:`NSAConfig`.
        prefix: put before field names, for example ``"nsa."``.
    """
    alone = {name: fault for name, least in _LEAST.items() if (fault := _size_fault(getattr(settings, name), least))}
    yield from ((prefix + name, fault) for name, fault in alone.items())
    if fault := _temperature_fault(settings.gate_temperature):
        yield f"{prefix}gate_temperature", fault
    l, d, l_sel = settings.compress_block_size, settings.compress_stride, settings.select_block_size
    n, init, local = settings.num_selected_blocks, settings.num_init_blocks, settings.num_local_blocks

    def sound(*names: str) -> bool:
        return alone.keys().isdisjoint(names)

    length, stride, block = (f"{prefix}{name}" for name in ("compress_block_size", "compress_stride", "select_block_size"))
    if sound("compress_block_size", "compress_stride") and l % d:
        yield length, f"{l} is not a multiple of {stride} = {d}; use {_round_up(l, d)}"
    if sound("select_block_size", "compress_stride") and l_sel % d:
        yield block, f"{l_sel} is not a multiple of {stride} = {d}; use {_round_up(l_sel, d)}"
    if sound("select_block_size", "compress_block_size") and l_sel < l:
        yield block, f"{l_sel} is smaller than {length} = {l}; use at least {l}"
    if sound("num_selected_blocks", "num_init_blocks", "num_local_blocks") and n < init + local:
        forced = f"{prefix}num_init_blocks + {prefix}num_local_blocks = {init} + {local}"
        yield f"{prefix}num_selected_blocks", f"{n} is smaller than {forced}; use at least {init + local}"


def _size_fault(value: Any, least: int) -> str | None:
    """Message about a size that is invalid by itself, whatever the other sizes are, or None."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return f"{value!r} is not a whole number; use an int of at least {least}"
    if value < least:
        return f"{value} must be at least {least}"
    return f"{value} must be at most {LARGEST_SIZE}" if value > LARGEST_SIZE else None


def _temperature_fault(value: Any) -> str | None:
    low, high = _TEMPERATURES
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        return f"{value!r} is not a number from {low} to {high}; use 1.0 for the paper's gates"
    return None


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary position embedding of queries and keys, in the half-split form (GPT-NeoX, Megatron's default).

    Args:
        base: theta; channel pair c of ``dim`` rotated channels turns by ``position * base^(-2c/dim)`` radians.
        percent: fraction of each head's channels that rotate, counted from the first; the rest pass through.

    Raises:
        ValueError: base not a positive number, or percent outside (0, 1].
    """

    base: float = 10000.0
    percent: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.base < float("inf"):
            raise ValueError(f"rotary base = {self.base} must be positive and finite")
        if not 0 < self.percent <= 1:
            raise ValueError(f"rotary percent = {self.percent} must lie in (0, 1]")
        # Equal settings must have equal texts, which ranks and studies compare.
        object.__setattr__(self, "base", float(self.base))
        object.__setattr__(self, "percent", float(self.percent))

    def dim(self, qk_dim: int) -> int:
        """Number of rotated channels in a head of width ``qk_dim``: ``percent`` of it, rounded down to an even number."""
        return int(qk_dim * self.percent) // 2 * 2


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check_choice(name: str, value: str, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is unknown; use one of {', '.join(map(repr, allowed))}")
