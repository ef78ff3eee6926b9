"""Selected attention, forward: tiles of adjacent queries over the union of their blocks (paper section 3.3.2).

Adjacent tokens agree on most of their blocks, so a tile loads each block of the union once and masks out the rows whose token
did not choose it. That mask is one bit a row: it goes into the row's softmax reference, not into every score. Only blocks
that reach past the tile's first query need the causal mask; they are the last of the ascending union. Groups of few heads, whose
tiles would hold many tokens, are handled by ``by_block.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import (
    LOG2_E,
    channels_last,
    check_heads,
    copies_in_bulk,
    dot_wide,
    key_arguments,
    load_bulk,
    load_wide,
    this_query_tile,
    tile_rows,
    widths,
    zeros_wide,
)
from ..interval_attention.forward import add_values, finish_rows
from ..tuning import TileConfig, tile_config
from . import by_block
from .unions import Selection, build_unions


@triton.jit
def load_entry(entries_ptr, step, steps, PARTS: tl.constexpr):
    """The union's entry of a step, or of the last of ``steps`` past the end. A block is walked in PARTS steps."""
    return tl.load(entries_ptr + tl.maximum(tl.minimum(step, steps - 1), 0) // PARTS)


@triton.jit
def entry_row(entry, step, KEYS: tl.constexpr, PARTS: tl.constexpr):
    """First key row of a step."""
    return (entry >> 32).to(tl.int32) + step % PARTS * KEYS


@triton.jit
def entry_keys(row, step, num_keys, BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr):
    """Key rows of a step, and which of them to load: those of the block and, if MASKED, of the sequence."""
    key = row + tl.arange(0, KEYS)
    keep = step % PARTS * KEYS + tl.arange(0, KEYS) < BLOCK
    if MASKED:
        keep = keep & (key < num_keys)
    return key, keep


@triton.jit
def _attend(
    first, last, steps, acc, acc_tail, top, total, q, q_tail, bit, limit, group, num_keys, scale_log2,
    entries_ptr, k_ptr, v_ptr, k_stride_s, v_stride_s, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    MASKED: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over steps ``first .. last`` of the union. MASKED steps reach past some query; BULK only if not."""
    CUT: tl.constexpr = MASKED or PARTS * KEYS > BLOCK
    # One step ahead, so that the addresses of a step's keys are known when their copies are to start.
    entry = load_entry(entries_ptr, first, steps, PARTS)
    for step in tl.range(first, last):
        following = load_entry(entries_ptr, step + 1, steps, PARTS)
        row = entry_row(entry, step, KEYS, PARTS)
        picked = ((entry >> bit) & 1) != 0
        key, keep = entry_keys(row, step, num_keys, BLOCK, KEYS, PARTS, MASKED)
        if BULK:
            k, k_tail = load_bulk(k_tiles, k_tail_tiles, row, group, KEYS, DK_HEAD, DK_TAIL)
            v, v_tail = load_bulk(v_tiles, v_tail_tiles, row, group, KEYS, DV_HEAD, DV_TAIL)
        else:
            k, k_tail = load_wide(k_ptr, key.to(tl.int64) * k_stride_s, keep, DK_HEAD, DK_TAIL, DK, CUT)
            v, v_tail = load_wide(v_ptr, key.to(tl.int64) * v_stride_s, keep, DV_HEAD, DV_TAIL, DV, CUT)
        scores = dot_wide(q, q_tail, k, k_tail, DK_TAIL, PRECISION)
        if MASKED:
            scores = tl.where((key[None, :] <= limit[:, None]) & keep[None, :], scores, float("-inf"))
        elif CUT:
            scores = tl.where(keep[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.where(picked, tl.max(scores, 1) * scale_log2, float("-inf")))
        # Rows that did not choose the block measure from +inf: exp2(-inf) = 0. So do rows that see nothing of it yet.
        reference = tl.where(picked & (new_top > float("-inf")), new_top, float("inf"))
        p = tl.exp2(scores * scale_log2 - reference[:, None])
        shrink = tl.where(picked, tl.exp2(top - reference), 1.0)
        total = total * shrink + tl.sum(p, 1)
        acc, acc_tail = add_values(acc, acc_tail, shrink, p.to(v.dtype), v, v_tail, DV_TAIL, PRECISION)
        top = new_top
        entry = following
    return acc, acc_tail, top, total


@triton.jit
def union_steps(entries_ptr, counts_ptr, tile, group, GROUPS: tl.constexpr, ENTRIES: tl.constexpr, PARTS: tl.constexpr):
    """A query tile's entries, its steps, and how many of them end before every query of the tile."""
    union = tile.to(tl.int64) * GROUPS + group
    steps = tl.load(counts_ptr + union * 2) * PARTS
    return entries_ptr + union * ENTRIES, steps, tl.load(counts_ptr + union * 2 + 1) * PARTS


@triton.jit(do_not_specialize=["num_tokens", "num_keys"])
def selected_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles, out_ptr, lse_ptr,
    entries_ptr, counts_ptr, position_ptr, key_start_ptr,
    q_stride_t, q_stride_h, k_stride_s, k_stride_g, v_stride_s, v_stride_g, out_stride_t, out_stride_h,
    num_tokens, num_keys, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one group."""
    tile, group = this_query_tile(num_tokens, TOKENS)
    token, head, valid = tile_rows(tile, group, num_tokens, HEADS, TOKENS, ROWS)
    row = token.to(tl.int64)
    q, q_tail = load_wide(q_ptr, row * q_stride_t + head * q_stride_h, valid, DK_HEAD, DK_TAIL, DK, False)
    limit = tl.load(key_start_ptr + token) + tl.load(position_ptr + token)
    entries_ptr, steps, full_steps = union_steps(entries_ptr, counts_ptr, tile, group, GROUPS, ENTRIES, PARTS)
    bit = token - tile * TOKENS

    acc, acc_tail = zeros_wide(ROWS, DV_HEAD, DV_TAIL)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    k_ptr += group.to(tl.int64) * k_stride_g
    v_ptr += group.to(tl.int64) * v_stride_g
    acc, acc_tail, top, total = _attend(
        0, full_steps, steps, acc, acc_tail, top, total, q, q_tail, bit, limit, group, num_keys, scale_log2,
        entries_ptr, k_ptr, v_ptr, k_stride_s, v_stride_s, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles,
        DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, BLOCK, KEYS, PARTS, False, BULK, PRECISION,
    )  # fmt: skip
    acc, acc_tail, top, total = _attend(
        full_steps, steps, steps, acc, acc_tail, top, total, q, q_tail, bit, limit, group, num_keys, scale_log2,
        entries_ptr, k_ptr, v_ptr, k_stride_s, v_stride_s, k_tiles, k_tail_tiles, v_tiles, v_tail_tiles,
        DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, BLOCK, KEYS, PARTS, True, False, PRECISION,
    )  # fmt: skip

    finish_rows(
        acc, acc_tail, top, total, row, head, valid, out_ptr, lse_ptr, out_stride_t, out_stride_h,
        GROUPS * HEADS, DV, DV_HEAD, DV_TAIL,
    )  # fmt: skip


def block_steps(block_size: int, keys: int) -> tuple[int, int]:
    """Keys of one step (a power of two of at least 16, at most ``keys``) and the steps that cover a block."""
    step = max(16, min(keys, triton.next_power_of_2(block_size)))
    return step, triton.cdiv(block_size, step)


def selected_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    config: TileConfig | None = None,
    bulk: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention over the tokens of each query's chosen blocks.

    Args:
        q: [T, N, Dk]; query head h reads K/V group h // (N / G). float16, bfloat16 or float32; any strides.
        k: [S, G, Dk]. v: [S, G, Dv]. Token p of a query's document is row ``key_start[t] + p``.
        selection: the blocks that each query chose.
        scale: positive factor of the scores.
        out: [T, N, Dv] with contiguous channels, to write to instead of a new tensor.
        config: tile shape instead of the table's.
        bulk: whether to fetch keys and values by the copy engine; None: where it can. If neither ``config`` nor ``bulk`` is
            given, ``by_block.py`` handles groups of few heads.

    Returns:
        ``out`` [T, N, Dv] in the dtype of q and ``lse`` float32 [T, N], natural logarithm; 0 and -inf where nothing is seen.

    Raises:
        ValueError: the heads do not divide over the groups, the scale is not positive, or heads are wider than supported.
    """
    tokens, num_heads, dk = q.shape
    num_keys, groups, dv = v.shape
    heads = check_heads(num_heads, groups)
    if scale <= 0:
        raise ValueError(f"scale = {scale} must be positive")
    out = torch.empty(tokens, num_heads, dv, dtype=q.dtype, device=q.device) if out is None else out
    if tuple(out.shape) != (tokens, num_heads, dv) or out.stride(-1) != 1:
        raise ValueError(f"out {tuple(out.shape)} must have the shape {(tokens, num_heads, dv)} and contiguous channels")
    lse = torch.empty(tokens, num_heads, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    block_size = selection.block_size
    if config is None and bulk is None and heads <= by_block.MOST_HEADS and by_block.fits(block_size, k, v):
        by_block.selected_attention_forward(q, k, v, selection, scale, out, lse)
        return out, lse
    config = config or tile_config("selected_forward", q.dtype, q.device, heads, max(dk, dv))
    tile_tokens = config.tokens(heads)
    unions = build_unions(selection, tile_tokens)
    q, k, v = channels_last(q), channels_last(k), channels_last(v)
    keys, parts = block_steps(block_size, config.keys)
    bulk = copies_in_bulk(k, v) if bulk is None else bulk
    # The copy engine cannot mask: steps must not reach past their block's end.
    bulk = bulk and keys * parts == block_size
    selected_attention_forward_kernel[(triton.cdiv(tokens, tile_tokens) * groups,)](
        q, *key_arguments(k, v, keys, bulk), out, lse,
        unions.entries, unions.counts, selection.position, selection.key_start,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], tokens, num_keys, scale * LOG2_E.value,
        ENTRIES=unions.entries.shape[-1], BLOCK=block_size, KEYS=keys, PARTS=parts, TOKENS=tile_tokens, ROWS=config.rows,
        BULK=bulk, **widths(groups, heads, dk, dv), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse
