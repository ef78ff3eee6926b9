"""The whole of Native Sparse Attention as one autograd Function, on one process and under context parallelism alike.

One Function, so that communication is issued early and awaited late, gates are never materialised against the branches, and
only what the backward needs is kept: inputs, the three branch outputs and log-sum-exps, and the chosen blocks. What came
from other ranks is fetched again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import (
    HaloExchange,
    RowGather,
    RowReduceScatter,
    RowRing,
    SequenceLayout,
    check_agreement,
    group_size,
)
from nsa_cp.ops.checks import check_heads, check_rows
from nsa_cp.ops.compression import CompressorWeights, compress
from nsa_cp.ops.dispatch import accumulator_dtype, resolve_backend
from nsa_cp.ops.gating import combine_backward, combine_forward
from nsa_cp.ops.interval_attention import interval_attention_backward, interval_attention_forward, merge_attention
from nsa_cp.ops.plan import NSAPlan, get_plan
from nsa_cp.ops.rope import apply_rope, rotary_tables
from nsa_cp.ops.selected import selected_attention_backward, selected_attention_forward
from nsa_cp.ops.selection import select_blocks_forward


class NSAOutput(NamedTuple):
    """Result of :func:`native_sparse_attention` for the local rows; all but ``out`` carry no gradient.

    out [T, N, Dv]; blocks int32 [T, G, n]; the lse of each branch [T, N].
    """

    out: torch.Tensor
    blocks: torch.Tensor
    lse_compressed: torch.Tensor
    lse_selected: torch.Tensor
    lse_window: torch.Tensor


def native_sparse_attention(
    q: torch.Tensor,
    k: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    gates: torch.Tensor,
    k_weights: CompressorWeights,
    v_weights: CompressorWeights,
    config: NSAConfig,
    cu_seqlens: Sequence[int] | None = None,
    rotary: RotaryConfig | None = None,
    *,
    layout: SequenceLayout | None = None,
    group: dist.ProcessGroup | None = None,
    blocks: torch.Tensor | None = None,
) -> NSAOutput:
    """Native Sparse Attention (arXiv 2502.11089, section 3) over this rank's rows of a packed sequence.

    Args:
        q: [T, N, Dk], unrotated.
        k, v: [T, G, Dk] and [T, G, Dv], unrotated, for the branches (compressed, selected, window), or one for all three.
        gates: [T, N or 1, 3] in (0, 1), in the same branch order.
        k_weights, v_weights: of the compressors, see ``compress``.
        cu_seqlens: document borders on one process; None is one document. Leave it out when ``layout`` is given.
        rotary: rotate queries and keys at their document positions; None leaves them as they are.
        layout: which rows this rank holds; its cp_size must be the size of ``group``.
        group: context-parallel process group; None is a single process.
        blocks: int32 [T, G, n], a selection to use in place of the scored one.

    Returns:
        The output and what was chosen, :class:`NSAOutput`.

    Raises:
        ValueError: inputs that do not fit together or to the layout, a backend that cannot run, or ranks that disagree.
    """
    if layout is None:
        layout = SequenceLayout.build(q.shape[0] if cu_seqlens is None else cu_seqlens)
    _check_inputs(q, k, v, gates, config, layout, group)
    plan = get_plan(layout, config, q.device)
    _agree(plan, q, v[0], group)
    if rotary is not None:
        tables = rotary_tables(plan.position, rotary, q.shape[-1], accumulator_dtype(q))
        q, rotated = apply_rope(q, *tables), [apply_rope(x, *tables) for x in k]
    else:
        rotated = list(k)
    k_cmp = rotated[0] if config.compressed_rope == "before" else k[0]
    slc, win = 1 % len(k), 2 % len(k)
    branches = (k_cmp, v[0], rotated[slc], v[slc], rotated[win], v[win])
    call = _Call(plan, group, resolve_backend(config.backend, q), len(k_weights), rotary)
    return NSAOutput(*_NativeSparseAttention.apply(call, blocks, q, *branches, gates, *k_weights, *v_weights))


@dataclass(frozen=True)
class _Call:
    """What one call of the Function carries besides tensors."""

    plan: NSAPlan
    group: dist.ProcessGroup | None
    backend: str
    num_k_weights: int
    rotary: RotaryConfig | None

    def halo_exchange(self) -> HaloExchange:
        """For (k_cmp, v_cmp, k_win, v_win)."""
        compression, window = self.plan.compression_halo, self.plan.window_halo
        return HaloExchange([compression, compression, window, window], self.group)

    def group_slices(self, groups: int) -> list[slice]:
        """K/V groups whose raw rows are resident at a time: all on one process, one after the other under CP."""
        return [slice(0, groups)] if group_size(self.group) == 1 else [slice(g, g + 1) for g in range(groups)]

    def compress(
        self, k: torch.Tensor, v: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's compressed keys, rotated where that comes after compression, and values."""
        plan = self.plan
        k_weights, v_weights = tuple(weights[: self.num_k_weights]), tuple(weights[self.num_k_weights :])
        k_cmp = compress(k, plan.compression_starts, k_weights, plan.config)
        if self.rotary is not None and plan.config.compressed_rope == "after":
            tables = rotary_tables(plan.own_compressed_position, self.rotary, k.shape[-1], accumulator_dtype(k))
            k_cmp = apply_rope(k_cmp, *tables)
        return k_cmp, compress(v, plan.compression_starts, v_weights, plan.config)


class _NativeSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, blocks, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, *weights):  # noqa: ANN001, ANN205
        plan, backend = call.plan, call.backend
        halo = call.halo_exchange()
        halo.start([k_cmp, v_cmp, k_win, v_win])
        *buffers, k_window, v_window = halo.wait()
        compressed = call.compress(*buffers, weights)
        # Small messages first: the compressed tokens, then the first group's raw keys and values.
        whole = _CompressedTokens(call, compressed)
        raw = _GroupGather(call, k_slc, v_slc)
        out_win, lse_win = interval_attention_forward(q, k_window, v_window, plan.window_intervals, backend)
        out_cmp, lse_cmp = whole.attend(q)
        if blocks is None:
            blocks = select_blocks_forward(q, whole.keys, lse_cmp, plan, backend)
        out_slc, lse_slc = _selected_branch(call, q, blocks, raw, v_slc)
        outs, lses = (out_cmp, out_slc, out_win), (lse_cmp, lse_slc, lse_win)
        ctx.save_for_backward(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, blocks, *outs, *lses, *weights)
        ctx.call = call
        ctx.mark_non_differentiable(blocks, *lses)
        return combine_forward(outs, gates, backend), blocks, *lses

    @staticmethod
    def backward(ctx, grad, *_):  # noqa: ANN001, ANN205
        call: _Call = ctx.call
        saved = ctx.saved_tensors
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, blocks = saved[:9]
        outs, lses, weights = saved[9:12], saved[12:15], saved[15:]
        plan, backend = call.plan, call.backend
        halo = call.halo_exchange()
        halo.start([k_cmp, v_cmp, k_win, v_win])
        gate_gradients = combine_backward(grad, outs, gates, backend)
        upstream = [(grad, lse, delta, gate) for lse, delta, gate in zip(lses, gate_gradients.delta, gate_gradients.gate, strict=True)]
        k_buffer, v_buffer, k_window, v_window = halo.wait()
        compression = _RecomputedCompression(call, k_buffer, v_buffer, weights)
        gathered = RowGather(compression.outputs, plan.compressed_partition, call.group)
        raw = _GroupGather(call, k_slc, v_slc)

        window = interval_attention_backward(q, k_window, v_window, *upstream[2], plan.window_intervals, backend)
        intervals = plan.compressed_intervals
        dq, *d_cmp = interval_attention_backward(q, *gathered.wait(), *upstream[0], intervals, backend, dq=window.dq)
        returned = RowReduceScatter(d_cmp, plan.compressed_partition, call.group)
        dk_slc, dv_slc = _selected_branch_backward(call, q, blocks, raw, upstream[1], dq)
        dk_buffer, dv_buffer, *dweights = compression.backward(returned.wait())
        halo.start_return([dk_buffer, dv_buffer, window.dk, window.dv])
        dk_cmp, dv_cmp, dk_win, dv_win = halo.wait_return()
        gradients = (dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win)
        return None, None, *(g.to(q.dtype) for g in gradients), gate_gradients.dgates, *dweights


class _GroupGather:
    """Whole K and V of the selected branch, a slice of groups at a time: the first is on its way from construction."""

    def __init__(self, call: _Call, k: torch.Tensor, v: torch.Tensor) -> None:
        self.call, self.k, self.v = call, k, v
        self.slices = call.group_slices(k.shape[1])
        self.pending = self._start(self.slices[0])

    def _start(self, groups: slice) -> RowGather:
        return RowGather([self.k[:, groups], self.v[:, groups]], self.call.plan.row_partition, self.call.group)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        for groups, following in zip_longest(self.slices, self.slices[1:]):
            ready = self.pending
            if following is not None:
                self.pending = self._start(following)
            yield groups, *ready.wait()


class _CompressedTokens:
    """Compressed keys and values of all ranks: on their way from the start, resident once attended to."""

    def __init__(self, call: _Call, own: Sequence[torch.Tensor]) -> None:
        self.call, self.own = call, own
        self.keys = own[0]
        transport = RowRing if call.plan.config.compressed_comm == "ring" else RowGather
        self.transport = transport(own, call.plan.compressed_partition, call.group)

    def attend(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The compressed branch; afterwards ``keys`` holds the complete keys [C, G, Dk]."""
        plan, backend = self.call.plan, self.call.backend
        if isinstance(self.transport, RowGather):
            self.keys, values = self.transport.wait()
            return interval_attention_forward(q, self.keys, values, plan.compressed_intervals, backend)
        if group_size(self.call.group) == 1:
            return interval_attention_forward(q, *self.own, plan.compressed_intervals, backend)
        self.keys = q.new_empty(plan.compressed_partition.num_rows, *self.own[0].shape[1:])
        out = q.new_zeros(*q.shape[:2], self.own[1].shape[-1], dtype=accumulator_dtype(q))
        lse = q.new_full(q.shape[:2], float("-inf"), dtype=accumulator_dtype(q))
        for source, (keys, values) in self.transport:
            self.keys.index_copy_(0, plan.shard_rows[source], keys)
            part = interval_attention_forward(q, keys, values, plan.shard_intervals[source], backend)
            out, lse = merge_attention(out, lse, *part)
        return out.to(q.dtype), lse


class _RecomputedCompression:
    """The compressor run again in the backward, so that its activations are not kept from the forward."""

    def __init__(self, call: _Call, k: torch.Tensor, v: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        with torch.enable_grad():
            self.inputs = [x.detach().requires_grad_() for x in (k, v, *weights)]
            self._graph = call.compress(self.inputs[0], self.inputs[1], self.inputs[2:])
        self.outputs = [x.detach() for x in self._graph]

    def backward(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients of k, v (in the accumulator's dtype: halo rows are still to be added) and of the weights."""
        upstream = [g.to(x.dtype) for g, x in zip(gradients, self._graph, strict=True)]
        dk, dv, *dweights = torch.autograd.grad(self._graph, self.inputs, upstream)
        return [dk.to(accumulator_dtype(dk)), dv.to(accumulator_dtype(dv)), *dweights]


def _selected_branch(
    call: _Call, q: torch.Tensor, blocks: torch.Tensor, raw: _GroupGather, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected attention, one group slice after the other as its keys and values arrive."""
    heads = q.shape[1] // v.shape[1]
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:2], dtype=accumulator_dtype(q))
    for groups, k_whole, v_whole in raw:
        part = slice(groups.start * heads, groups.stop * heads)
        out[:, part], lse[:, part] = selected_attention_forward(
            q[:, part], k_whole, v_whole, blocks[:, groups], call.plan, call.backend
        )
    return out, lse


def _selected_branch_backward(
    call: _Call, q: torch.Tensor, blocks: torch.Tensor, raw: _GroupGather, upstream: tuple[torch.Tensor, ...], dq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk, dv of the local rows, and dq added into ``dq``; a slice's reduce-scatter runs while the next one computes."""
    heads = q.shape[1] // blocks.shape[1]
    pending: list[RowReduceScatter] = []
    done: list[list[torch.Tensor]] = []
    for groups, k_whole, v_whole in raw:
        part = slice(groups.start * heads, groups.stop * heads)
        gradients = selected_attention_backward(
            q[:, part], k_whole, v_whole, *(x[:, part] for x in upstream), blocks[:, groups], call.plan, call.backend,
            dq=dq[:, part],
        )  # fmt: skip
        if pending:
            done.append(pending.pop().wait())
        pending.append(RowReduceScatter([gradients.dk, gradients.dv], call.plan.row_partition, call.group))
    done.append(pending.pop().wait())
    return torch.cat([dk for dk, _ in done], 1), torch.cat([dv for _, dv in done], 1)


def _check_inputs(
    q: torch.Tensor,
    k: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    gates: torch.Tensor,
    config: NSAConfig,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None,
) -> None:
    if len(k) != config.num_branch_kv or len(v) != config.num_branch_kv:
        raise ValueError(
            f"shared_kv = {config.shared_kv} takes {config.num_branch_kv} key and value tensors, got {len(k)} and {len(v)}"
        )
    if layout.cp_size != group_size(group):
        raise ValueError(f"the layout is cut for {layout.cp_size} ranks, the process group has {group_size(group)}; build it anew")
    for branch_k, branch_v in zip(k, v, strict=True):
        check_heads(q, branch_k, branch_v)
        check_rows(k=branch_k, expected=layout.num_local_tokens)
    check_rows(q=q, gates=gates, expected=layout.num_local_tokens)
    if gates.dim() != 3 or gates.shape[1] not in (1, q.shape[1]) or gates.shape[2] != config.num_gates:
        raise ValueError(f"gates {tuple(gates.shape)} must be [tokens, {q.shape[1]} heads or 1, {config.num_gates} branches]")


def _agree(plan: NSAPlan, q: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Once for each plan and shape, let the ranks compare what they are about to do."""
    shape = (*q.shape[1:], *v.shape[1:], q.dtype)
    if group_size(group) > 1 and (group.group_name, shape) not in plan.agreed_shapes:
        description = f"documents {plan.layout.cu_seqlens}, chunks {plan.layout.chunks}, heads and channels {shape}, {plan.config}"
        check_agreement(description, group, q.device)
        plan.agreed_shapes.add((group.group_name, shape))
