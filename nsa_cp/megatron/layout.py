"""Derives the SequenceLayout from what Megatron-Core passes to a layer: a batch of sequences, or a pack of documents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import lcm

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.distributed import ProcessGroup

from nsa_cp.config import LayoutKind
from nsa_cp.context_parallel import SequenceLayout, group_rank, group_size

# Attribute that caches a PackedSeqParams' borders on the host, with what they were read from, so that they are copied from the
# device once a microbatch and not once a layer.
_BORDERS = "_nsa_cp_borders"
_BORDER_FIELDS = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


def sequence_layout(
    kind: LayoutKind,
    cp_group: ProcessGroup | None,
    *,
    local_length: int,
    batch_size: int = 1,
    packed_seq_params: PackedSeqParams | None = None,
) -> SequenceLayout:
    """The layout of this rank's hidden states [local_length, batch_size, h], flattened with the batch outermost.

    Without ``packed_seq_params`` the batch is treated as a pack of ``batch_size`` documents of ``local_length * cp_size`` tokens.
    With them the documents are those they describe (by padded borders, if there are any). Every document is cut over the ranks.

    Args:
        kind: how documents are cut, ``NSAConfig.layout``.
        local_length: tokens of this rank, per sequence.

    Raises:
        ValueError: a length that does not fit the cut or the pack, a packed batch larger than 1, or a pack that brings a
            context-parallel group of its own.
    """
    cp_size, cp_rank = group_size(cp_group), group_rank(cp_group)
    if packed_seq_params is None:
        length = local_length * cp_size
        check_sequence_length(length, kind, cp_size)
        return _build(tuple(range(0, length * batch_size + 1, max(length, 1))), cp_size, cp_rank, kind)
    if batch_size != 1:
        raise ValueError(f"packed input has batch size {batch_size}; lay the documents end to end in a batch of 1")
    own_group = getattr(packed_seq_params, "cp_group", None)
    if own_group is not None and own_group is not cp_group:
        raise ValueError("packed_seq_params.cp_group differs from the model's context-parallel group; leave it out")
    layout = _build(packed_borders(packed_seq_params), cp_size, cp_rank, kind)
    if layout.num_local_tokens != local_length:
        raise ValueError(
            f"this rank got {local_length} tokens, but rank {cp_rank} of {cp_size} holds {layout.num_local_tokens} of the "
            f"pack's {layout.num_tokens} in the {kind} layout; slice the batch with nsa_cp.megatron.shard_batch"
        )
    return layout


def packed_borders(packed_seq_params: PackedSeqParams) -> tuple[int, ...]:
    """Document borders of a pack as host integers, the padded ones if given. Copied from the device once per object, and again
    if its tensors have been replaced or overwritten since.

    Raises:
        ValueError: a format other than thd, no borders, or different borders of queries and keys.
    """
    tensors, remembered = _border_tensors(packed_seq_params), getattr(packed_seq_params, _BORDERS, None)
    if remembered is not None and _are_same(remembered[0], tensors):
        return remembered[1]
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(f"packed_seq_params.qkv_format = {packed_seq_params.qkv_format!r} is not supported; use 'thd'")
    queries, keys = (_host_borders(packed_seq_params, side) for side in ("q", "kv"))
    if queries is None:
        raise ValueError("packed_seq_params has no cu_seqlens_q; give the documents' borders")
    if keys is not None and keys != queries:
        raise ValueError("packed_seq_params has different borders for queries and keys; self-attention needs the same")
    setattr(packed_seq_params, _BORDERS, (tensors, queries))
    return queries


def make_packed_seq_params(cu_seqlens: Sequence[int], device: torch.device | str) -> PackedSeqParams:
    """Megatron's description of a pack of documents with these borders, in the thd format."""
    borders = tuple(int(border) for border in cu_seqlens)
    longest = max((end - start for start, end in zip(borders[:-1], borders[1:])), default=0)
    on_device = torch.tensor(borders, dtype=torch.int32, device=device)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=on_device, cu_seqlens_kv=on_device, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    setattr(params, _BORDERS, (_border_tensors(params), borders))
    return params


def check_sequence_length(length: int, kind: LayoutKind, cp_size: int, sequence_parallel_size: int = 1) -> None:
    """Refuse a sequence that ranks cannot share equally, as Megatron's pipeline and sequence parallelism need.

    Args:
        length: tokens of one sequence, over all ranks.
        kind: how it is cut, ``NSAConfig.layout``.
        sequence_parallel_size: tensor-parallel ranks that share each rank's tokens; 1 without sequence parallelism.

    Raises:
        ValueError: with the length to pad to.
    """
    pieces = 2 * cp_size if kind == "zigzag" and cp_size > 1 else cp_size
    share = cp_size * sequence_parallel_size
    multiple = lcm(pieces, share)
    if length < 1 or length % multiple:
        parts = f"{'2 * ' if pieces == 2 * cp_size else ''}context_parallel_size = {pieces}"
        if sequence_parallel_size > 1:
            parts += f" and context_parallel_size * tensor_model_parallel_size = {share} (sequence parallelism)"
        raise ValueError(
            f"sequence length {length} is not a multiple of {parts} for the {kind} layout; pad to "
            f"{max(-(-length // multiple), 1) * multiple}"
        )


def _border_tensors(packed_seq_params: PackedSeqParams) -> list[tuple[torch.Tensor | None, int]]:
    """The tensors that describe a pack, each with its version: PyTorch counts a tensor's changes in place, but not those
    made through ``.data`` or numpy, nor those of inference tensors."""
    tensors = [getattr(packed_seq_params, name, None) for name in _BORDER_FIELDS]
    return [(x, 0 if x is None or x.is_inference() else x._version) for x in tensors]


def _are_same(ours: list[tuple[torch.Tensor | None, int]], theirs: list[tuple[torch.Tensor | None, int]]) -> bool:
    return all(x is y and version == other for (x, version), (y, other) in zip(ours, theirs, strict=True))


def _host_borders(packed_seq_params: PackedSeqParams, side: str) -> tuple[int, ...] | None:
    for name in (f"cu_seqlens_{side}_padded", f"cu_seqlens_{side}"):
        borders = getattr(packed_seq_params, name, None)
        if borders is not None:
            return tuple(int(border) for border in borders.tolist())
    return None


@lru_cache(maxsize=32)
def _build(borders: tuple[int, ...], cp_size: int, cp_rank: int, kind: LayoutKind) -> SequenceLayout:
    return SequenceLayout.build(borders, cp_size=cp_size, cp_rank=cp_rank, kind=kind, per_document=True)
