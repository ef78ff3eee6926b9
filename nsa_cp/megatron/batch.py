"""Cuts this context-parallel rank's part out of a batch, in the layout that the attention expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.megatron.config import AttentionSettings, NSATransformerConfig
from nsa_cp.megatron.layout import check_sequence_length, make_packed_seq_params


def shard_batch(
    batch: Mapping[str, Tensor | None],
    config: NSATransformerConfig,
    *,
    cp_rank: int,
    cu_seqlens: Sequence[int] | None = None,
    settings: AttentionSettings | None = None,
) -> tuple[dict[str, Tensor | None], PackedSeqParams | None]:
    """Slice a global batch for one context-parallel rank; the same on all tensor-parallel ranks. No communication.

    For the zigzag layout and a plain batch this does what Megatron's ``get_batch_on_this_cp_rank`` does; the contiguous layout
    and packed documents work, too.

    Args:
        batch: tensors [b, s] or [b, s, ...] by name (tokens, labels, loss_mask, ...), whole sequences on every rank; None
            (Megatron's batches often have no attention mask) stays None.
        config: the model's settings; ``context_parallel_size`` is the number of ranks.
        cp_rank: the context-parallel rank to slice for.
        cu_seqlens: borders 0, ..., s of packed documents as host integers (b must be 1); None for b sequences of s tokens.
        settings: needed with a plain ``TransformerConfig``.

    Returns:
        The tensors [b, s/cp, ...] (of a pack: [1, this rank's tokens, ...]), with ``position_ids`` (int64, within the document)
        added if missing, and the ``packed_seq_params`` for ``GPTModel.forward``, None for a plain batch.

    Raises:
        ValueError: tensors of different lengths, a length that does not divide over the ranks, a pack with b > 1 or with
            borders that do not end at s.
    """
    nsa = (config.attention_settings if settings is None else settings).nsa
    cp_size = config.context_parallel_size
    tensors = {name: tensor for name, tensor in batch.items() if tensor is not None}
    shapes = {name: tuple(tensor.shape[:2]) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"the tensors of a batch must share [batch, sequence], got {shapes}")
    size, length = next(iter(shapes.values()))
    device = next(iter(tensors.values())).device
    if cu_seqlens is None:
        shared = config.tensor_model_parallel_size if config.sequence_parallel else 1
        check_sequence_length(length, nsa.layout, cp_size, shared)
        layout = SequenceLayout.build(length, cp_size=cp_size, cp_rank=cp_rank, kind=nsa.layout)
        packed = None
    else:
        layout = SequenceLayout.build(cu_seqlens, cp_size=cp_size, cp_rank=cp_rank, kind=nsa.layout)
        check_pack(layout, size, length, config)
        packed = make_packed_seq_params(layout.cu_seqlens, device)
    rows = torch.from_numpy(layout.local_rows).to(device)
    local = {name: None if tensor is None else tensor.index_select(1, rows) for name, tensor in batch.items()}
    if local.get("position_ids") is None:
        local["position_ids"] = torch.from_numpy(layout.local_positions).to(device).expand(size, -1)
    return local, packed


def check_pack(layout: SequenceLayout, batch_size: int, length: int, config: NSATransformerConfig) -> None:
    """Refuse a pack of the wrong shape, or one that ranks share unequally where Megatron needs equal shares.

    Documents of any length can be cut, but ranks may then hold different numbers of tokens. Pipeline stages cannot handle that
    (their messages have one shape), and sequence parallelism needs each rank's number to be a multiple of its size.

    Args:
        layout: the pack's cut over context-parallel ranks.
        batch_size, length: b and s of the batch.

    Raises:
        ValueError: with the numbers and the remedy.
    """
    if batch_size != 1:
        raise ValueError(f"packed documents come in a batch of 1, not {batch_size}; lay them end to end in one row")
    if layout.num_tokens != length:
        raise ValueError(f"cu_seqlens ends at {layout.num_tokens}, but the batch has {length} tokens; end it at {length}")
    counts = [len(layout.rows_of(rank)) for rank in range(layout.cp_size)]
    pieces = 2 * layout.cp_size if layout.kind == "zigzag" else layout.cp_size
    if config.pipeline_model_parallel_size > 1 and len(set(counts)) > 1:
        raise ValueError(
            f"context-parallel ranks hold {counts} tokens of this pack, but pipeline stages exchange equal shapes; "
            f"pad every document to a multiple of {pieces}"
        )
    tp = config.tensor_model_parallel_size if config.sequence_parallel else 1
    if any(count % tp for count in counts):
        raise ValueError(
            f"context-parallel ranks hold {counts} tokens of this pack, which sequence parallelism cannot share over "
            f"tensor_model_parallel_size = {tp}; pad every document to a multiple of {pieces * tp}"
        )
