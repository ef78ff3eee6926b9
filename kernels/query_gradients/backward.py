"""dq of Native Sparse Attention: one pass over a query tile's window, compressed tokens and chosen blocks.

The three branches share q and do, which are loaded once, and their gradients add up in registers, in float32: no float32 dq is
written, unless the fused backward has made the compressed branch's already (``begun``). With very few heads a group the selected
branch goes block by block (``selected_attention/by_block.py``), pass by pass on top of a float32 dq of the other two. What each
branch adds is described in the backward of interval attention and of selected attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common import LOG2_E, channels_last, check_heads, copies_in_bulk, key_arguments, widths, zeros_wide
from ..hopper import fetchable, on_hopper
from ..interval_attention.backward import add_interval_dq, query_tile, store_dq
from ..selected_attention import by_block
from ..selected_attention.backward import add_selected_dq
from ..selected_attention.forward import block_steps
from ..selected_attention.unions import Selection, build_unions
from ..tuning import TileConfig, tile_config


class Branch(NamedTuple):
    """A branch's keys [M, G, Dk] and values [M, G, Dv], and its row shift and delta, float32 [T, N]."""

    k: torch.Tensor
    v: torch.Tensor
    shift: torch.Tensor
    delta: torch.Tensor


class _Task(NamedTuple):
    """The arguments of all implementations of dq, as in :func:`query_gradients`; they write to ``dq``.

    Args:
        branches: window, compressed tokens, selected.
        ranges: begin and end of the rows seen in the window, then begin and end of the compressed tokens seen.
        begun: only :func:`_on_hopper` takes it.
    """

    q: torch.Tensor
    do: torch.Tensor
    branches: tuple[Branch, Branch, Branch]
    ranges: tuple[torch.Tensor, ...]
    selection: Selection
    scale: float
    dq: torch.Tensor
    begun: torch.Tensor | None = None

    @property
    def heads(self) -> int:
        """Query heads of a group."""
        return self.q.shape[1] // self.branches[0].k.shape[1]

    @property
    def keys(self) -> list[torch.Tensor]:
        """k and v, branch by branch."""
        return [x for branch in self.branches for x in (branch.k, branch.v)]

    def without_blocks(self, groups: slice, rows: slice) -> _Task:
        """The same for some groups and query rows, without any chosen block, with a new float32 ``dq``."""
        heads, selection = by_block.heads_of(groups, self.heads), self.selection.of(groups, rows)
        q = self.q[rows, heads]
        return self._replace(
            q=q,
            do=self.do[rows, heads],
            branches=tuple(
                Branch(b.k[:, groups], b.v[:, groups], b.shift[rows, heads], b.delta[rows, heads]) for b in self.branches
            ),
            ranges=tuple(x[rows] for x in self.ranges),
            selection=selection._replace(blocks=selection.blocks[..., :0]),
            dq=torch.empty(q.shape, dtype=torch.float32, device=q.device),
        )


@triton.jit(do_not_specialize=["num_tokens", "num_keys"])
def query_gradients_kernel(
    q_ptr, do_ptr, dq_ptr,
    win_k_ptr, win_v_ptr, win_k_tiles, win_k_tail_tiles, win_v_tiles, win_v_tail_tiles, win_shift_ptr, win_delta_ptr,
    cmp_k_ptr, cmp_v_ptr, cmp_k_tiles, cmp_k_tail_tiles, cmp_v_tiles, cmp_v_tail_tiles, cmp_shift_ptr, cmp_delta_ptr,
    slc_k_ptr, slc_v_ptr, slc_k_tiles, slc_k_tail_tiles, slc_v_tiles, slc_v_tail_tiles, slc_shift_ptr, slc_delta_ptr,
    win_begin_ptr, win_end_ptr, cmp_begin_ptr, cmp_end_ptr, entries_ptr, counts_ptr, position_ptr, key_start_ptr,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h, dq_stride_t, dq_stride_h,
    win_k_stride_m, win_k_stride_g, win_v_stride_m, win_v_stride_g,
    cmp_k_stride_m, cmp_k_stride_g, cmp_v_stride_m, cmp_v_stride_g,
    slc_k_stride_m, slc_k_stride_g, slc_v_stride_m, slc_v_stride_g,
    num_tokens, num_keys, scale, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BULK: tl.constexpr, BLOCK_BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one group."""
    tile, group, token, head, valid, q, q_tail, do, do_tail = query_tile(
        q_ptr, do_ptr, q_stride_t, q_stride_h, do_stride_t, do_stride_h, num_tokens,
        GROUPS, HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, TOKENS, ROWS,
    )  # fmt: skip
    dq, dq_tail = zeros_wide(ROWS, DK_HEAD, DK_TAIL)
    dq, dq_tail = add_interval_dq(
        dq, dq_tail, q, q_tail, do, do_tail, token, head, valid, group, scale_log2,
        win_k_ptr, win_v_ptr, win_k_tiles, win_k_tail_tiles, win_v_tiles, win_v_tail_tiles,
        win_k_stride_m, win_k_stride_g, win_v_stride_m, win_v_stride_g,
        win_shift_ptr, win_delta_ptr, win_begin_ptr, win_end_ptr,
        GROUPS * HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, BULK, PRECISION,
    )  # fmt: skip
    dq, dq_tail = add_interval_dq(
        dq, dq_tail, q, q_tail, do, do_tail, token, head, valid, group, scale_log2,
        cmp_k_ptr, cmp_v_ptr, cmp_k_tiles, cmp_k_tail_tiles, cmp_v_tiles, cmp_v_tail_tiles,
        cmp_k_stride_m, cmp_k_stride_g, cmp_v_stride_m, cmp_v_stride_g,
        cmp_shift_ptr, cmp_delta_ptr, cmp_begin_ptr, cmp_end_ptr,
        GROUPS * HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, KEYS, BULK, PRECISION,
    )  # fmt: skip
    dq, dq_tail = add_selected_dq(
        dq, dq_tail, q, q_tail, do, do_tail, tile, token, head, valid, group, num_keys, scale_log2,
        slc_k_ptr, slc_v_ptr, slc_k_tiles, slc_k_tail_tiles, slc_v_tiles, slc_v_tail_tiles,
        slc_k_stride_m, slc_k_stride_g, slc_v_stride_m, slc_v_stride_g,
        slc_shift_ptr, slc_delta_ptr, entries_ptr, counts_ptr, position_ptr, key_start_ptr,
        GROUPS, HEADS, DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, ENTRIES, BLOCK, BLOCK_KEYS, PARTS, TOKENS,
        BLOCK_BULK, PRECISION,
    )  # fmt: skip
    store_dq(dq_ptr, dq, dq_tail, token, head, valid, dq_stride_t, dq_stride_h, scale, DK, DK_HEAD, DK_TAIL)


def query_gradients(
    q: torch.Tensor,
    do: torch.Tensor,
    window: Branch,
    compressed: Branch,
    selected: Branch,
    window_range: tuple[torch.Tensor, torch.Tensor],
    compressed_range: tuple[torch.Tensor, torch.Tensor],
    selection: Selection,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    config: TileConfig | None = None,
    bulk: bool | None = None,
    hopper: bool = True,
    begun: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the queries over all three branches.

    Args:
        q: [T, N, Dk]; query head h reads K/V group h // (N / G). float16, bfloat16 or float32; any strides.
        do: [T, N, Dv], upstream gradient of the gated sum.
        window, compressed, selected: keys, values and row statistics of the branches.
        window_range, compressed_range: int32 [T] each, begin and end of the rows that a query sees, half open.
        selection: the blocks that each query chose.
        scale: positive factor of the scores.
        out: [T, N, Dk] with contiguous channels, to write to instead of a new tensor.
        config: tile shape instead of the table's.
        bulk: whether to fetch keys and values by the copy engine; None: where it can.
        hopper: let ``hopper.py`` do it where it can, unless ``config`` or ``bulk`` is given.
        begun: dq of the compressed branch in the layout of ``interval_attention.hopper_fused_backward``; that branch then adds
            nothing more. Only if :func:`goes_to_hopper`; the selected branch's keys, which may have been unknown when that was
            asked, are copied if the copy engine cannot fetch them.

    Returns:
        [T, N, Dk] in the dtype of q or of ``out``, accumulated in float32.

    Raises:
        ValueError: the heads do not divide over the groups, the scale is not positive, or heads are wider than supported.
    """
    heads = check_heads(q.shape[1], selected.v.shape[1])
    if scale <= 0:
        raise ValueError(f"scale = {scale} must be positive")
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if dq.shape != q.shape or dq.stride(-1) != 1:
        raise ValueError(f"out {tuple(dq.shape)} must have the shape {tuple(q.shape)} of q and contiguous channels")
    if len(q) == 0:
        return dq
    if begun is not None:
        selected = selected._replace(k=_fetchable(selected.k), v=_fetchable(selected.v))
    branches, ranges = (window, compressed, selected), (*window_range, *compressed_range)
    task = _Task(channels_last(q), channels_last(do), branches, ranges, selection, scale, dq, begun)
    # ``config`` and ``bulk`` are settings of the kernel by unions, so they select it.
    any_way = config is None and bulk is None
    if any_way and _suits_blocks(heads, selection.block_size, selected.k, selected.v):
        _by_block(task)
    elif any_way and hopper and _suits_hopper(task.q, task.do, task.keys, selection.block_size):
        _on_hopper(task)
    else:
        _by_unions(task, config, bulk)
    return dq


def goes_to_hopper(q: torch.Tensor, do: torch.Tensor, keys: Sequence[torch.Tensor], block_size: int) -> bool:
    """Whether :func:`query_gradients` uses ``hopper.py`` for such tensors. ``keys``: k and v of the branches, or of some of them
    if the others have a similar memory layout."""
    k, v = keys[:2]
    by_blocks = _suits_blocks(q.shape[1] // k.shape[1], block_size, k, v)
    return not by_blocks and _suits_hopper(q, do, keys, block_size)


def _fetchable(x: torch.Tensor) -> torch.Tensor:
    return x if fetchable(x) else x.clone(memory_format=torch.contiguous_format)


def _suits_blocks(heads: int, block_size: int, k: torch.Tensor, v: torch.Tensor) -> bool:
    return heads <= by_block.MOST_HEADS_DQ and by_block.fits(block_size, k, v)


def _by_block(task: _Task) -> None:
    """The selected branch block by block, pass by pass, on top of the other two branches' dq (by the kernel of unions, without
    blocks)."""

    def base_of(groups: slice, rows: slice) -> torch.Tensor:
        base = task.without_blocks(groups, rows)
        _by_unions(base)
        return base.dq

    assert task.begun is None
    k, v, *statistics = task.branches[2]
    by_block.query_gradients(task.q, k, v, task.do, *statistics, task.selection, task.scale, task.dq, base_of=base_of)


def _suits_hopper(q: torch.Tensor, do: torch.Tensor, keys: Sequence[torch.Tensor], block_size: int) -> bool:
    if not on_hopper(q.device):
        return False
    from . import hopper

    return hopper.takes(q, do, keys, block_size)


def _on_hopper(task: _Task) -> None:
    """All branches by the kernel of ``hopper.py``, which goes by unions, too."""
    from . import hopper

    statistics = [x.contiguous() for branch in task.branches for x in (branch.shift, branch.delta)]
    hopper.query_gradients(task.q, task.do, task.keys, statistics, task.ranges, task.selection, task.scale, task.dq, task.begun)


def _by_unions(task: _Task, config: TileConfig | None = None, bulk: bool | None = None) -> None:
    """All branches by the Triton kernel; the selected one over the union of the blocks that a query tile's tokens chose."""
    q, do, branches, ranges, selection, scale, dq, begun = task
    assert begun is None, "only the kernel of hopper.py reads it"
    (tokens, _, dk), (num_keys, groups, dv), heads = q.shape, branches[2].v.shape, task.heads
    config = config or tile_config("query_gradients", q.dtype, q.device, heads, max(dk, dv))
    unions = build_unions(selection, config.tokens(heads))
    block_size = selection.block_size
    keys, parts = block_steps(block_size, config.keys)
    branches = [Branch(channels_last(k), channels_last(v), s.contiguous(), d.contiguous()) for k, v, s, d in branches]
    key_tensors = [x for branch in branches for x in branch[:2]]
    bulk = copies_in_bulk(*key_tensors) if bulk is None else bulk
    steps = (config.keys, config.keys, keys)
    arguments = [
        argument
        for (k, v, shift, delta), step in zip(branches, steps, strict=True)
        for argument in (*key_arguments(k, v, step, bulk), shift, delta)
    ]
    query_gradients_kernel[(unions.counts.shape[0] * groups,)](
        q, do, dq, *arguments, *ranges, unions.entries, unions.counts, selection.position, selection.key_start,
        *q.stride()[:2], *do.stride()[:2], *dq.stride()[:2], *(s for x in key_tensors for s in x.stride()[:2]),
        tokens, num_keys, scale, scale * LOG2_E.value,
        ENTRIES=unions.entries.shape[-1], BLOCK=block_size, BLOCK_KEYS=keys, PARTS=parts, KEYS=config.keys,
        TOKENS=unions.tile_tokens, ROWS=config.rows, BULK=bulk, BLOCK_BULK=bulk and keys * parts == block_size,
        **widths(groups, heads, dk, dv), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
