"""The whole of Native Sparse Attention as two autograd Functions, the same code on one process and under context parallelism.

``_Branches`` computes the three branches in one Function, so that communication is issued early and awaited late. It saves its
inputs, the chosen blocks and the received halo rows; everything else from other ranks is fetched again in the backward.
``_GatedSum`` adds the branches up (paper eq. 5). It saves the branch outputs, three times the size of q, and its backward reduces
them to row statistics (``ops/gating.py``), so autograd has freed them before the branches' backward allocates anything. Products
of a gate and a branch's gradient are never formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    check_group,
    group_size,
    start_agreement,
)
from nsa_cp.context_parallel.autograd import exact_backward, exact_forward
from nsa_cp.ops.branches_backward import Branch, BranchesBackward, ChosenBlocks, fused_backward_groups
from nsa_cp.ops.checks import check_blocks, check_heads, check_layout, check_rotary, check_rows
from nsa_cp.ops.compression import CompressorWeights, check_compressor_weights, compress
from nsa_cp.ops.dispatch import accumulator_dtype, resolve_backend
from nsa_cp.ops.gating import combine_forward, gate_gradients, row_statistics, split_statistics
from nsa_cp.ops.interval_attention import interval_attention_forward, merge_attention
from nsa_cp.ops.plan import NSAPlan, get_plan
from nsa_cp.ops.rope import rotation
from nsa_cp.ops.selected import selected_attention_forward
from nsa_cp.ops.selection import select_blocks_forward

# Groups travel together while their raw keys and values stay within this: two groups of 128 bfloat16 channels at 128k tokens.
_STEP_BYTES = 128 << 20


class NSAOutput(NamedTuple):
    """Result of :func:`native_sparse_attention` for this rank's rows; only ``out`` carries a gradient.

    out: [T, N, Dv] in the dtype of q. blocks: int32 [T, G, n], the chosen blocks' indices within the query's document, ascending,
    padded with -1. lse_*: [T, N], each branch's log-sum-exp (natural logarithm, float32 or, for float64 inputs, float64), -inf
    where the query sees nothing.
    """

    out: torch.Tensor
    blocks: torch.Tensor
    lse_compressed: torch.Tensor
    lse_selected: torch.Tensor
    lse_window: torch.Tensor


# Hidden from torch.compile, which would trace the plans' numpy code anew for every length and cannot cache it.
@torch.compiler.disable
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
    """Native Sparse Attention (arXiv 2502.11089, section 3) of this rank's rows of a packed sequence. Collective over ``group``.

    Differentiable once. Gradients of q, k, v and the gates are complete; those of the compressors' weights come from this rank's
    tokens only and have to be summed over ``group``.

    Args:
        q: [T, N, Dk], unrotated.
        k, v: tensors [T, G, Dk] (unrotated) and [T, G, Dv], one per branch in the order compressed, selected, window; with
            ``config.shared_kv`` a single one.
        gates: [T, N or 1, 3], branches in the same order, after the sigmoid (``config.gate_temperature`` is not read here); must
            not be negative (gradients would be NaN).
        k_weights, v_weights: the compressors' weights as ``nsa_cp.ops.compression.compress`` takes them.
        cu_seqlens: document borders as host integers 0, ..., T, for a single process; None is one document. Ignored when
            ``layout`` is given.
        rotary: rotate queries and keys at their positions in the document; None for no position embedding.
        layout: the sequence's documents, and which rows this rank holds; its cp_size must be the size of ``group``.
        group: context-parallel process group; None is a single process.
        blocks: int32 [T, G, n], a selection to use instead of scoring: indices within the query's document of blocks that start
            at or before the query, no block twice, padded with -1. Only shape, dtype and device are checked.

    Returns:
        The output, the chosen blocks and each branch's lse: :class:`NSAOutput`.

    Raises:
        ValueError: inputs that do not fit together or do not fit the layout, a backend that cannot run, or ranks that disagree.
    """
    if layout is None:
        layout = SequenceLayout.build(q.shape[0] if cu_seqlens is None else cu_seqlens)
    check_layout(layout)
    _check_inputs(q, k, v, gates, config, layout, group)
    check_compressor_weights("k_weights", k_weights, k[0], config)
    check_compressor_weights("v_weights", v_weights, v[0], config)
    if blocks is not None:
        check_blocks(blocks, q, k[0], config)
    check_rotary(rotary, q.shape[2])
    plan = get_plan(layout, config, q.device)
    facts = ("nsa", *q.shape[1:], *v[0].shape[1:], q.dtype, config, rotary)
    agreement = start_agreement(plan.agreed, layout, facts, group, q.device)
    slc, win = 1 % len(k), 2 % len(k)
    backend = resolve_backend(config.backend, q, v[0])
    rotate = rotation(rotary, plan.position, q, backend)
    needed = {slc, win} | ({0} if config.compressed_rope == "before" else set())
    q, rotated = rotate(q), [rotate(x) if index in needed else x for index, x in enumerate(k)]
    k_cmp = rotated[0] if config.compressed_rope == "before" else k[0]
    branches = (k_cmp, v[0], rotated[slc], v[slc], rotated[win], v[win])
    call = _Call(plan, group, backend, len(k_weights), rotary, q.shape[1] // v[0].shape[1])
    blocks, statistics, *outs = _Branches.apply(call, blocks, q, *branches, *k_weights, *v_weights)
    out = _GatedSum.apply(call.backend, gates, statistics, *outs)
    agreement.confirm()
    return NSAOutput(out, blocks, *(lse.detach() for lse in outs[3:]))


def groups_a_step(groups: int, group_bytes: int) -> int:
    """How many K/V groups of the selected branch travel, and are computed on, together under context parallelism.

    One, or more in short sequences, where a kernel on one group would be too brief to use the device well. The result divides
    the number of groups and is at most half of it, so that one transfer can overlap with computation.

    Args:
        group_bytes: bytes of the keys and values of one group over the whole sequence.
    """
    most = min(groups // 2, _STEP_BYTES // max(1, group_bytes))
    return max((n for n in range(1, most + 1) if groups % n == 0), default=1)


@dataclass(frozen=True)
class _Call:
    """What one call of :func:`native_sparse_attention` carries besides tensors."""

    plan: NSAPlan
    group: dist.ProcessGroup | None
    backend: str
    num_k_weights: int
    rotary: RotaryConfig | None
    heads_per_group: int

    @property
    def is_single_process(self) -> bool:
        """Whether this process holds the whole sequence."""
        return group_size(self.group) == 1

    def halo_exchange(self) -> HaloExchange:
        """A new exchange for (k_cmp, v_cmp, k_win, v_win)."""
        plan = self.plan
        # Shared values, and shared keys rotated before compression, are one tensor in both branches and travel once.
        same_keys = plan.config.shared_kv and (self.rotary is None or plan.config.compressed_rope == "before")
        same_as = (0, 1, 0 if same_keys else 2, 1 if plan.config.shared_kv else 3)
        halos = [plan.compression_halo, plan.compression_halo, plan.window_halo, plan.window_halo]
        return HaloExchange(halos, self.group, same_as)

    def groups_at_once(self, k: torch.Tensor, v: torch.Tensor) -> int:
        """How many K/V groups of the selected branch are computed on at a time; on one process all of them."""
        groups = k.shape[1]
        if self.is_single_process:
            return groups
        return groups_a_step(groups, self.plan.row_partition.num_rows * (k.shape[2] + v.shape[2]) * k.element_size())

    def heads_of(self, groups: slice) -> slice:
        """Query heads of a slice of groups."""
        return slice(groups.start * self.heads_per_group, groups.stop * self.heads_per_group)

    def compress(self, k: torch.Tensor, v: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's compressed keys (rotated here under ``compressed_rope="after"``) and values, from rows with halo."""
        plan = self.plan
        k_weights, v_weights = tuple(weights[: self.num_k_weights]), tuple(weights[self.num_k_weights :])
        backend = self.backend if plan.compression_is_gapless else "torch"
        k_cmp = compress(k, plan.compression_starts, k_weights, plan.config, backend)
        if plan.config.compressed_rope == "after":
            k_cmp = rotation(self.rotary, plan.own_compressed_position, k, self.backend)(k_cmp)
        return k_cmp, compress(v, plan.compression_starts, v_weights, plan.config, backend)


class _Branches(torch.autograd.Function):
    """Returns the chosen blocks, a placeholder, and the three branches' outputs [T, N, Dv] and lses [T, N].

    Its backward is fed by :class:`_GatedSum` alone, and not with the true gradients of these outputs: the gated sum's upstream
    gradient arrives as the "gradient" of the first branch's output, and the row statistics [2, 3, T, N], which contain the gates,
    as that of the placeholder, an output of this shape that is never filled.
    """

    @staticmethod
    @exact_forward
    def forward(ctx, call: _Call, blocks, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, *weights):  # noqa: ANN001, ANN205
        plan, backend = call.plan, call.backend
        halo = call.halo_exchange()
        halo.start([k_cmp, v_cmp, k_win, v_win])
        *buffers, k_window, v_window = halo.wait()
        compressed = call.compress(*buffers, weights)
        # Small messages first: the compressed tokens, then raw keys and values of the first slice of groups.
        whole = _CompressedTokens(call, compressed)
        raw = _GroupGather(call, k_slc, v_slc, call.groups_at_once(k_slc, v_slc))
        out_win, lse_win = interval_attention_forward(q, k_window, v_window, plan.window_intervals, backend)
        out_cmp, lse_cmp = whole.attend(q)
        if blocks is None:
            lse = lse_cmp if whole.in_one_pass else None
            blocks = select_blocks_forward(q, whole.keys, lse, plan, backend, v_cmp.shape[-1])
        out_slc, lse_slc = _selected_branch(call, q, blocks, raw, v_slc)
        ctx.save_for_backward(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, blocks, *halo.received, *weights)
        ctx.call, ctx.num_received = call, len(halo.received)
        ctx.mark_non_differentiable(blocks)
        ctx.set_materialize_grads(False)
        place = lse_win.new_empty(1).expand(2, 3, *q.shape[:2])
        return blocks, place, out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win

    @staticmethod
    @exact_backward
    def backward(ctx, _, statistics, grad, *__):  # noqa: ANN001, ANN205
        assert statistics is not None and grad is not None, "only the gated sum's backward leads here"
        call: _Call = ctx.call
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, blocks, *kept = ctx.saved_tensors
        received, weights = kept[: ctx.num_received], kept[ctx.num_received :]
        plan, accumulator = call.plan, accumulator_dtype(q)
        halo = call.halo_exchange()
        k_buffer, v_buffer, k_window, v_window = halo.merge([k_cmp, v_cmp, k_win, v_win], received)
        compression = _RecomputedCompression(call, k_buffer, v_buffer, weights)
        gathered = RowGather(compression.outputs, plan.compressed_partition, call.group)
        at_once = call.groups_at_once(k_slc, v_slc)
        window_kv = (k_window, v_window)
        # A slice of groups is a message, so all ranks must slice alike; only a process alone may take fewer groups.
        fused_groups = fused_backward_groups(q, grad, window_kv, plan, call.backend, at_once, fewer=call.is_single_process)
        raw = _GroupGather(call, k_slc, v_slc, fused_groups or at_once)
        chosen = ChosenBlocks(blocks, plan, call.backend)
        k_whole = v_whole = None
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        windows: list[Sequence[torch.Tensor]] = []
        cmp_sums: list[RowReduceScatter] = []
        slc_sums: list[RowReduceScatter] = []
        for groups, raw_part in raw:
            heads = call.heads_of(groups)
            # One contiguous copy of this slice of heads, which every kernel would otherwise make for itself.
            cmp, slc, win = split_statistics(statistics[..., heads].contiguous())
            backward = BranchesBackward(q[:, heads], grad[:, heads], chosen.of(groups), plan, call.backend, fused_groups > 0)
            # In the order in which keys arrive: the window's are here already, the selected branch's come last.
            windows.append(backward.window(Branch(k_window[:, groups], v_window[:, groups], win)))
            if k_whole is None:
                k_whole, v_whole = gathered.wait()
            d_cmp = backward.compressed(Branch(k_whole[:, groups], v_whole[:, groups], cmp))
            # Only now: programs of the fused kernel wait for each other, so a transfer beside some of them could delay all.
            raw.start_next()
            cmp_sums.append(RowReduceScatter(d_cmp, plan.compressed_partition, call.group))
            d_slc = backward.selected(Branch(*raw_part.wait(), slc))
            slc_sums.append(RowReduceScatter(d_slc, plan.row_partition, call.group))
            del raw_part, d_cmp, d_slc
            if groups == raw.slices[-1] and not call.is_single_process:
                # The halo's gradients and the last sums travel beside the last kernel; earlier sums have arrived by then.
                _wait_all(slc_sums[:-1])
                dweights = _finish_buffers(compression, halo, windows, cmp_sums, accumulator)
            backward.query_gradients(out=dq[:, heads])
            # At most one slice's sums travel while the next slice computes: each is as long as the whole sequence.
            _wait_all([*cmp_sums[:-1], *slc_sums[:-1]])
            del backward
        if call.is_single_process:
            # Nothing travels, so this can wait until after dq, when less memory is in use.
            dweights = _finish_buffers(compression, halo, windows, cmp_sums, accumulator)
        d_slc = _join_groups([sums.wait() for sums in slc_sums], q.dtype)
        dk_cmp, dv_cmp, dk_win, dv_win = halo.wait_return()
        gradients = (dk_cmp, dv_cmp, *d_slc, dk_win, dv_win)
        return None, None, dq, *(g.to(q.dtype) for g in gradients), *dweights


class _GatedSum(torch.autograd.Function):
    """The gated sum of what :class:`_Branches` returns; ``branches`` are three outputs, then three lses."""

    @staticmethod
    @exact_forward
    def forward(ctx, backend: str, gates, statistics, *branches):  # noqa: ANN001, ANN205
        ctx.save_for_backward(gates, *branches)
        ctx.backend = backend
        return combine_forward(branches[:3], gates, backend)

    @staticmethod
    @exact_backward
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        gates, *branches = ctx.saved_tensors
        statistics = row_statistics(grad, branches[:3], branches[3:], gates, ctx.backend)
        return None, gate_gradients(statistics, gates), statistics, grad, *[None] * 5


class _GroupGather:
    """Gathers K and V of the whole sequence for the selected branch, a slice of ``at_once`` groups at a time.

    The first slice is under way from construction on; in every round of the iteration the caller starts the next one by
    :meth:`start_next`, when its transfer disturbs least.
    """

    def __init__(self, call: _Call, k: torch.Tensor, v: torch.Tensor, at_once: int) -> None:
        self.call, self.k, self.v = call, k, v
        self.slices = [slice(g, min(g + at_once, k.shape[1])) for g in range(0, k.shape[1], at_once)]
        self.under_way: list[RowGather] = []
        self.start_next()

    def start_next(self) -> None:
        """Start gathering the next slice, if there is one."""
        started = len(self.under_way)
        if started < len(self.slices):
            groups = self.slices[started]
            gather = RowGather([self.k[:, groups], self.v[:, groups]], self.call.plan.row_partition, self.call.group)
            self.under_way.append(gather)

    def __iter__(self) -> Iterator[tuple[slice, RowGather]]:
        for number, groups in enumerate(self.slices):
            assert number < len(self.under_way), "start_next is called in every round"
            yield groups, self.under_way[number]


class _CompressedTokens:
    """Compressed keys and values of all ranks: under way from construction, complete after :meth:`attend`."""

    def __init__(self, call: _Call, own: Sequence[torch.Tensor]) -> None:
        self.call, self.own = call, own
        self.keys = own[0]
        # Whether the branch's lse comes from one pass over all keys. Merged from a ring's shards, its last bits depend on their
        # order, and with it the choice between nearly equal blocks; scoring then recomputes it, to choose as one process does.
        self.in_one_pass = call.is_single_process or call.plan.config.compressed_comm == "all_gather"
        transport = RowRing if call.plan.config.compressed_comm == "ring" else RowGather
        self.transport = transport(own, call.plan.compressed_partition, call.group)

    def attend(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The compressed branch's out [T, N, Dv] and lse [T, N]; afterwards ``keys`` holds the keys of all ranks, [C, G, Dk]."""
        plan, backend = self.call.plan, self.call.backend
        if isinstance(self.transport, RowGather):
            self.keys, values = self.transport.wait()
            return interval_attention_forward(q, self.keys, values, plan.compressed_intervals, backend)
        if self.call.is_single_process:
            return interval_attention_forward(q, *self.own, plan.compressed_intervals, backend)
        self.keys = q.new_empty(plan.compressed_partition.num_rows, *self.own[0].shape[1:])
        out = q.new_zeros(*q.shape[:2], self.own[1].shape[-1], dtype=accumulator_dtype(q))
        lse = q.new_full(q.shape[:2], float("-inf"), dtype=accumulator_dtype(q))
        for source, (keys, values) in self.transport:
            self.keys.index_copy_(0, plan.shard_rows[source], keys)
            part = interval_attention_forward(q, keys, values, plan.shard_intervals[source], backend)
            merge_attention(out, lse, *part)
        return out.to(q.dtype), lse


class _RecomputedCompression:
    """The compressors, run again in the backward so that their activations need not be kept from the forward."""

    def __init__(self, call: _Call, k: torch.Tensor, v: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        with torch.enable_grad():
            self.inputs = [x.detach().requires_grad_() for x in (k, v, *weights)]
            self._graph = call.compress(self.inputs[0], self.inputs[1], self.inputs[2:])
        self.outputs = [x.detach() for x in self._graph]

    def backward(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients of k and v (in the accumulator's dtype, as gradients from other ranks' halos are still to be added), then of
        the weights."""
        upstream = [g.to(x.dtype) for g, x in zip(gradients, self._graph, strict=True)]
        dk, dv, *dweights = torch.autograd.grad(self._graph, self.inputs, upstream)
        return [dk.to(accumulator_dtype(dk)), dv.to(accumulator_dtype(dv)), *dweights]


def _wait_all(sums: Sequence[RowReduceScatter]) -> None:
    """Wait for these sums, which frees the messages they sent."""
    for each in sums:
        each.wait()


def _finish_buffers(
    compression: _RecomputedCompression,
    halo: HaloExchange,
    windows: list[Sequence[torch.Tensor]],
    cmp_sums: list[RowReduceScatter],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Form the gradients of the buffers with halo rows, start sending halo rows back to their owners, and return the gradients of
    the compressors' weights.

    Args:
        windows, cmp_sums: gradients of the window's buffers and of the compressed tokens, one entry per slice of groups; both
            lists are emptied.
        dtype: of the gradients that are sent.
    """
    d_compressed = _join_groups([sums.wait() for sums in cmp_sums], dtype)
    dk, dv, *dweights = compression.backward(d_compressed)
    halo.start_return([dk, dv, *_join_groups(windows, dtype)])
    windows.clear()
    cmp_sums.clear()
    return dweights


def _selected_branch(
    call: _Call, q: torch.Tensor, blocks: torch.Tensor, raw: _GroupGather, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected attention, one slice of groups after the other as their keys and values arrive."""
    if len(raw.slices) == 1:
        ((_, under_way),) = raw
        return selected_attention_forward(q, *under_way.wait(), blocks, call.plan, call.backend)
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:2], dtype=accumulator_dtype(q))
    for groups, under_way in raw:
        raw.start_next()
        heads = call.heads_of(groups)
        _, lse[:, heads] = selected_attention_forward(
            q[:, heads], *under_way.wait(), blocks[:, groups], call.plan, call.backend, out=out[:, heads]
        )
    return out, lse


def _join_groups(parts: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors [rows, G, D] in ``dtype`` from the parts of each slice of groups."""
    return [_join(slices, dtype) for slices in zip(*parts, strict=True)]


def _join(slices: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    if len(slices) == 1:
        return slices[0].to(dtype)
    rows, _, width = slices[0].shape
    counts = [x.shape[1] for x in slices]
    joined = slices[0].new_empty(rows, sum(counts), width, dtype=dtype)
    # Concatenates and converts in one pass.
    for place, x in zip(joined.split(counts, 1), slices, strict=True):
        place.copy_(x)
    return joined


def _check_inputs(
    q: torch.Tensor,
    k: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    gates: torch.Tensor,
    config: NSAConfig,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None,
) -> None:
    wanted = f"shared_kv = {config.shared_kv} takes {config.num_branch_kv} key and value tensors"
    # Branches stacked in one tensor serve as a list; one branch's tensor does not.
    for x in (k, v):
        if isinstance(x, torch.Tensor) and x.dim() != 4:
            raise ValueError(f"{wanted}, got a tensor {tuple(x.shape)}; give a list with one for each branch")
    if len(k) != config.num_branch_kv or len(v) != config.num_branch_kv:
        raise ValueError(f"{wanted}, got {len(k)} and {len(v)}")
    check_group(layout, group)
    for branch_k, branch_v in zip(k, v, strict=True):
        check_heads(q, branch_k, branch_v)
        check_rows(k=branch_k, expected=layout.num_local_tokens)
        if branch_k.shape != k[0].shape or branch_v.shape != v[0].shape:
            raise ValueError(
                f"branches differ: k {tuple(branch_k.shape)}, v {tuple(branch_v.shape)} beside k {tuple(k[0].shape)}, "
                f"v {tuple(v[0].shape)}; all branches have the same groups and channels"
            )
    check_rows(q=q, gates=gates, expected=layout.num_local_tokens)
    if gates.dim() != 3 or gates.shape[1] not in (1, q.shape[1]) or gates.shape[2] != config.num_gates:
        raise ValueError(f"gates {tuple(gates.shape)} must be [tokens, {q.shape[1]} heads or 1, {config.num_gates} branches]")
