"""Attention for a model's layers: NSA as a module, dense and sliding-window attention as functions.

Each takes and returns this rank's rows (tokens) of a sequence, at any context-parallel size. Projections belong to the caller.
Queries and keys must come unrotated, because compression may need unrotated keys; every attention here applies the rotary
embedding itself, at positions within the document.

Shapes: T rows of this rank, N query heads, G K/V heads (groups), Dk and Dv widths of a query/key and of a value head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from nsa_cp.config import Backend, NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout, check_group, exchange_halo, gather_rows, start_agreement
from nsa_cp.context_parallel.agreement import Agreement, NoAgreement
from nsa_cp.ops import initial_compressor_weights, native_sparse_attention
from nsa_cp.ops.checks import check_heads, check_layout, check_rotary, check_rows
from nsa_cp.ops.dispatch import resolve_backend
from nsa_cp.ops.plan import get_layout_plan, get_window_plan
from nsa_cp.ops.recompute import recall_selection, remember_selection
from nsa_cp.ops.remote_blocks import remote_blocks
from nsa_cp.ops.rope import rotation
from nsa_cp.ops.stages import IntervalAttention


class Compressor(nn.Module):
    """The weights of one compressor phi (paper eq. 7): its own for each of ``num_groups`` K/V heads of D = ``dim`` channels.

    Initially phi is the mean over the block. Parameters by ``config.compressor``: none for ``mean``; ``position`` [G, l, D] and
    ``weight`` [G, l*D, D] for ``linear``; ``position``, ``w1`` [G, l*D, D] and ``w2`` [G, D, D] for ``mlp``.
    """

    def __init__(
        self,
        config: NSAConfig,
        num_groups: int,
        dim: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        names = {"mean": (), "linear": ("position", "weight"), "mlp": ("position", "w1", "w2")}[config.compressor]
        initial = initial_compressor_weights(config, num_groups, dim, generator)
        self._names = names
        for name, value in zip(names, initial, strict=True):
            self.register_parameter(name, nn.Parameter(value.to(device=device, dtype=dtype)))

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """The parameters, in the order in which ``nsa_cp.ops`` expects them."""
        return tuple(getattr(self, name) for name in self._names)


class NativeSparseAttention(nn.Module):
    """Native Sparse Attention (arXiv 2502.11089) without projections: its only parameters are the compressors'.

    ::

        attention = NativeSparseAttention(
            NSAConfig(), num_attention_heads=64, num_query_groups=4, qk_dim=128, rotary=RotaryConfig()
        ).cuda()
        layout = SequenceLayout.build(8192)  # one sequence on one process
        out = attention(q, (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win), gate_logits, layout)

    Under context parallelism all ranks of ``cp_group`` must hold equal parameters (seed their generators alike), and each rank's
    parameter gradients cover its own tokens only: sum them over the group before the optimizer step, as Megatron's DDP does
    (``dist.all_reduce(parameter.grad, group=cp_group)``; with a DDP that averages, multiply by the group's size).

    Args:
        config: the method's settings.
        num_attention_heads: N, query heads on this process (under tensor parallelism: of its rank).
        num_query_groups: G, key/value heads on this process; divides N.
        qk_dim: Dk. v_dim: Dv, None for Dk.
        rotary: position embedding, or None for none.
        cp_group: context-parallel process group; None is a single process.
        generator: draws the compressors' initial weights, on the CPU; None is torch's default generator.
        device, dtype: of the parameters; by default float32 on the CPU.

    Attributes:
        last_metrics: scalars of the last forward, detached, on the device: ``remote_block_fraction`` and ``remote_blocks_needed``
            (``chosen`` and ``needed`` of ``nsa_cp.ops.RemoteBlocks``), and the mean gates ``gate_compressed``,
            ``gate_selected`` and ``gate_window``.
        record_selection: set to True to keep ``last_selection`` (int32 [T, G, n]) and ``last_gates`` [T, N or 1, 3] of each
            forward.

    Raises:
        ValueError: heads not a multiple of groups, heads without channels, or a position embedding that rotates none.
    """

    def __init__(
        self,
        config: NSAConfig,
        *,
        num_attention_heads: int,
        num_query_groups: int,
        qk_dim: int,
        v_dim: int | None = None,
        rotary: RotaryConfig | None = None,
        cp_group: dist.ProcessGroup | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_query_groups < 1 or num_attention_heads < 1 or num_attention_heads % num_query_groups:
            raise ValueError(
                f"num_attention_heads = {num_attention_heads} is not a positive multiple of num_query_groups = {num_query_groups}"
            )
        if qk_dim < 1 or (v_dim is not None and v_dim < 1):
            raise ValueError(f"qk_dim = {qk_dim}, v_dim = {v_dim}: a head needs at least 1 channel of each")
        check_rotary(rotary, qk_dim)
        self.num_attention_heads, self.num_query_groups = num_attention_heads, num_query_groups
        self.qk_dim, self.v_dim = qk_dim, qk_dim if v_dim is None else v_dim
        self.config, self.rotary, self.cp_group = config, rotary, cp_group
        factory = {"generator": generator, "device": device, "dtype": dtype}
        self.k_compressor = Compressor(config, num_query_groups, qk_dim, **factory)
        self.v_compressor = Compressor(config, num_query_groups, self.v_dim, **factory)
        self.record_selection = False
        self.last_metrics: dict[str, torch.Tensor] = {}
        self.last_selection: torch.Tensor | None = None
        self.last_gates: torch.Tensor | None = None

    # Hidden from torch.compile, which would trace the plans' numpy code anew for every length and cannot cache it.
    @torch.compiler.disable
    def forward(
        self,
        q: torch.Tensor,
        k: Sequence[torch.Tensor],
        v: Sequence[torch.Tensor],
        gate_logits: torch.Tensor,
        layout: SequenceLayout,
    ) -> torch.Tensor:
        """Attention of this rank's queries to the whole sequence. Collective over ``cp_group``.

        Args:
            q: [T, N, Dk], unrotated; any floating-point dtype.
            k, v: tensors [T, G, Dk] (unrotated) and [T, G, Dv] of the same dtype, one per branch in the order compressed,
                selected, window; with ``shared_kv`` a single one.
            gate_logits: [T, N or 1, 3], branches in the same order; the gates are ``sigmoid(gate_logits / gate_temperature)``.
                Their dtype, and the parameters', may differ from that of q.
            layout: the sequence's documents, and which rows this rank holds.

        Returns:
            [T, N, Dv] in the dtype of q.

        Raises:
            ValueError: inputs that do not fit together or do not fit the layout, or ranks that disagree.
        """
        check_layout(layout)
        if q.dim() == 3 and q.shape[1] != self.num_attention_heads:
            raise ValueError(
                f"q has {q.shape[1]} heads; this module was made for num_attention_heads = {self.num_attention_heads}"
            )
        for name, branches, width in (("k", k, self.qk_dim), ("v", v, self.v_dim)):
            for x in branches:
                if x.dim() == 3 and x.shape[1:] != (self.num_query_groups, width):
                    raise ValueError(
                        f"{name} has {x.shape[1]} groups of {x.shape[2]} channels; this module was made for "
                        f"num_query_groups = {self.num_query_groups} of {width}"
                    )
        temperature = self.config.gate_temperature
        gates = (gate_logits if temperature == 1 else gate_logits / temperature).sigmoid()
        result = native_sparse_attention(
            q, k, v, gates, self.k_compressor.weights, self.v_compressor.weights, self.config,
            rotary=self.rotary, layout=layout, group=self.cp_group, blocks=self._given_blocks(q, k, layout),
        )  # fmt: skip
        remember_selection(result.blocks)
        self._record(result.blocks, gates.detach(), layout)
        return result.out

    def _given_blocks(self, q: torch.Tensor, k: Sequence[torch.Tensor], layout: SequenceLayout) -> torch.Tensor | None:
        """Blocks int32 [T, G, n] to attend to instead of scoring any, or None. Here: during activation recompute, those that the
        first run chose. A hook for subclasses that choose in other ways."""
        return recall_selection()

    @torch.no_grad()
    def _record(self, blocks: torch.Tensor, gates: torch.Tensor, layout: SequenceLayout) -> None:
        remote = remote_blocks(blocks, layout, self.config)
        # On a rank without rows the means are 0, not NaN, because they are averaged over ranks later.
        means = gates.float().sum((0, 1)) / max(1, gates.shape[0] * gates.shape[1])
        self.last_metrics = {
            "remote_block_fraction": remote.chosen,
            "remote_blocks_needed": remote.needed,
            "gate_compressed": means[0],
            "gate_selected": means[1],
            "gate_window": means[2],
        }
        if self.record_selection:
            self.last_selection, self.last_gates = blocks, gates


def without_selected(gate_logits: torch.Tensor) -> torch.Tensor:
    """Gate logits [T, N or 1, 3] with -inf for the selected branch: its gate is then exactly 0 and gets no gradient."""
    compressed, selected, window = gate_logits.unbind(-1)
    return torch.stack([compressed, torch.full_like(selected, float("-inf")), window], -1)


@torch.compiler.disable
def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout,
    *,
    rotary: RotaryConfig | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Causal dense attention within each document: K/V gathered from all ranks, PyTorch's SDPA chunk by chunk. Collective.

    Args:
        q: [T, N, Dk], unrotated. k: [T, G, Dk], unrotated. v: [T, G, Dv].
        layout: the sequence's documents, and which rows this rank holds.
        rotary: position embedding, or None for none.
        cp_group: context-parallel process group; None is a single process.

    Returns:
        [T, N, Dv] in the dtype of q.

    Raises:
        ValueError: inputs that do not fit together or do not fit the layout, or ranks that disagree.
    """
    agreement = _check(("full",), rotary, q, k, v, layout, cp_group)
    plan = get_layout_plan(layout, q.device)
    rotate = rotation(rotary, plan.position, q, resolve_backend("auto", q))
    q, k = rotate(q), rotate(k)
    k, v = gather_rows([k, v], plan.row_partition, cp_group)
    # One split for all documents: in the backward of separate slices each would add a gradient as long as the whole sequence.
    lengths = np.diff(layout.cu_seqlens).tolist()
    k_documents, v_documents = k.split(lengths), v.split(lengths)
    runs = plan.consecutive_runs
    outs = [
        _causal_sdpa(rows, k_documents[document][:seen], v_documents[document][:seen])
        for rows, (_, document, seen) in zip(q.split([count for count, _, _ in runs]), runs, strict=True)
    ]
    agreement.confirm()
    if not outs:
        # A rank without rows stays in the graph: it must take part in the backward's reduce-scatter, and in those of the caller's
        # weights.
        return v[:0].repeat_interleave(q.shape[1] // k.shape[1], 1) + q.sum(-1, keepdim=True)
    return torch.cat(outs)


@torch.compiler.disable
def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout,
    *,
    window_size: int,
    rotary: RotaryConfig | None = None,
    cp_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Causal attention to the ``window_size`` tokens of the document that end with the query's own. Collective.

    Only the rows just before each of this rank's chunks travel (halo exchange).

    Args:
        q: [T, N, Dk], unrotated. k: [T, G, Dk], unrotated. v: [T, G, Dv].
        layout: the sequence's documents, and which rows this rank holds.
        window_size: in tokens, at least 1.
        rotary: position embedding, or None for none.
        cp_group: context-parallel process group; None is a single process.
        backend: as in ``NSAConfig``.

    Returns:
        [T, N, Dv] in the dtype of q.

    Raises:
        ValueError: inputs that do not fit together or do not fit the layout, an empty window, a backend that cannot run here,
            or ranks that disagree.
    """
    if window_size < 1:
        raise ValueError(f"window_size = {window_size} leaves nothing to attend to; use at least 1")
    agreement = _check(("window", window_size), rotary, q, k, v, layout, cp_group)
    backend = resolve_backend(backend, q, v)
    rotate = rotation(rotary, get_layout_plan(layout, q.device).position, q, backend)
    q, k = rotate(q), rotate(k)
    halo, intervals = get_window_plan(layout, window_size, q.device)
    k, v = exchange_halo([k, v], halo, cp_group)
    out = IntervalAttention.apply(q, k, v, intervals, backend)[0]
    agreement.confirm()
    return out


def _check(
    kind: tuple,
    rotary: RotaryConfig | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None,
) -> Agreement | NoAgreement:
    check_layout(layout)
    check_heads(q, k, v)
    check_rows(q=q, k=k, v=v, expected=layout.num_local_tokens)
    check_group(layout, group)
    check_rotary(rotary, q.shape[2])
    facts = (*kind, rotary, *q.shape[1:], *v.shape[1:], q.dtype)
    return start_agreement(get_layout_plan(layout, q.device).agreed, layout, facts, group, q.device)


def _causal_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention [rows, N, Dv] of q [rows, N, Dk], whose tokens are the last of those of k [L, G, Dk] and v [L, G, Dv]."""
    repeats = q.shape[1] // k.shape[1]
    # Heads first and a batch of one, as SDPA wants them; K/V heads repeated, which every SDPA backend accepts.
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)))
    if q.shape[2] == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))
    return out[0].transpose(0, 1)
