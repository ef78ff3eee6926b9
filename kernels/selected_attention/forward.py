"""Selected attention, forward: tiles of adjacent queries over the union of their blocks (paper section 3.3.2).

Adjacent tokens agree on most of their blocks, so a tile loads each block of the union once and masks out the rows whose token
did not choose it. That mask is one bit a row: it goes into the row's softmax reference, not into every score. Only blocks
that reach past the tile's first query need the causal mask; they are the last of the ascending union.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import (
    FLOAT32_PRODUCTS,
    LOG2_E,
    channels_last,
    check_heads,
    dot_wide,
    load_wide,
    split_width,
    tile_rows,
    zeros_wide,
)
from ..interval_attention.forward import finish_rows
from ..tuning import TileConfig, tile_config
from .unions import Unions, build_unions


@triton.jit
def union_entry(
    step, starts_ptr, chosen_ptr, bit, limit, num_keys,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys of one step through a union, those to load, rows that chose the block, and which keys each row sees in it.

    A block is walked in PARTS steps of KEYS keys. ``visible`` does not repeat ``picked``, and is exact only where needed.
    """
    start = tl.load(starts_ptr + step // PARTS)
    picked = ((tl.load(chosen_ptr + step // PARTS) >> bit) & 1) != 0
    within = step % PARTS * KEYS + tl.arange(0, KEYS)
    key = start + within
    if MASKED:
        keep = (key < num_keys) & (within < BLOCK)
        visible = (key[None, :] <= limit[:, None]) & (within < BLOCK)[None, :]
    else:
        keep = within < BLOCK
        visible = keep[None, :]
    return key.to(tl.int64), keep, picked, visible


@triton.jit
def _attend(
    first, last, acc, acc_tail, top, total, q, q_tail, bit, limit, num_keys, scale_log2,
    starts_ptr, chosen_ptr, k_ptr, v_ptr, k_stride_s, v_stride_s,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over steps ``first .. last`` of the union."""
    CUT: tl.constexpr = MASKED or PARTS * KEYS > BLOCK
    for step in tl.range(first, last):
        key, keep, picked, visible = union_entry(
            step, starts_ptr, chosen_ptr, bit, limit, num_keys, BLOCK, KEYS, PARTS, MASKED
        )
        k, k_tail = load_wide(k_ptr, key * k_stride_s, keep, DK_HEAD, DK_TAIL, DK, CUT)
        v, v_tail = load_wide(v_ptr, key * v_stride_s, keep, DV_HEAD, DV_TAIL, DV, CUT)
        scores = dot_wide(q, q_tail, k, k_tail, DK_TAIL, PRECISION)
        if CUT:
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.where(picked, tl.max(scores, 1) * scale_log2, float("-inf")))
        # Rows that did not choose the block measure from +inf: exp2(-inf) = 0. So do rows that see nothing of it yet.
        reference = tl.where(picked & (new_top > float("-inf")), new_top, float("inf"))
        p = tl.exp2(scores * scale_log2 - reference[:, None])
        shrink = tl.where(picked, tl.exp2(top - reference), 1.0)
        total = total * shrink + tl.sum(p, 1)
        p = p.to(v.dtype)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
        if DV_TAIL > 0:
            acc_tail = tl.dot(p, v_tail, acc_tail * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, acc_tail, top, total


@triton.jit(do_not_specialize=["num_tokens", "num_keys"])
def selected_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, starts_ptr, chosen_ptr, counts_ptr, position_ptr, key_start_ptr,
    q_stride_t, q_stride_h, k_stride_s, k_stride_g, v_stride_s, v_stride_g, out_stride_t, out_stride_h,
    num_tokens, num_keys, scale_log2,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
    DK: tl.constexpr, DK_HEAD: tl.constexpr, DK_TAIL: tl.constexpr,
    DV: tl.constexpr, DV_HEAD: tl.constexpr, DV_TAIL: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one group."""
    group = tl.program_id(0) % GROUPS
    tile = tl.cdiv(num_tokens, TOKENS) - 1 - tl.program_id(0) // GROUPS
    token, head, valid = tile_rows(tile, group, num_tokens, HEADS, TOKENS, ROWS)
    row = token.to(tl.int64)
    q, q_tail = load_wide(q_ptr, row * q_stride_t + head * q_stride_h, valid, DK_HEAD, DK_TAIL, DK, False)
    limit = tl.load(key_start_ptr + token) + tl.load(position_ptr + token)
    union = tile.to(tl.int64) * GROUPS + group
    steps = tl.load(counts_ptr + union * 2) * PARTS
    full_steps = tl.load(counts_ptr + union * 2 + 1) * PARTS
    starts_ptr += union * ENTRIES
    chosen_ptr += union * ENTRIES
    bit = token - tile * TOKENS

    acc, acc_tail = zeros_wide(ROWS, DV_HEAD, DV_TAIL)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    k_ptr += group.to(tl.int64) * k_stride_g
    v_ptr += group.to(tl.int64) * v_stride_g
    acc, acc_tail, top, total = _attend(
        0, full_steps, acc, acc_tail, top, total, q, q_tail, bit, limit, num_keys, scale_log2,
        starts_ptr, chosen_ptr, k_ptr, v_ptr, k_stride_s, v_stride_s,
        DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, BLOCK, KEYS, PARTS, False, PRECISION,
    )  # fmt: skip
    acc, acc_tail, top, total = _attend(
        full_steps, steps, acc, acc_tail, top, total, q, q_tail, bit, limit, num_keys, scale_log2,
        starts_ptr, chosen_ptr, k_ptr, v_ptr, k_stride_s, v_stride_s,
        DK, DK_HEAD, DK_TAIL, DV, DV_HEAD, DV_TAIL, BLOCK, KEYS, PARTS, True, PRECISION,
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
    blocks: torch.Tensor,
    position: torch.Tensor,
    key_start: torch.Tensor,
    block_size: int,
    scale: float,
    *,
    unions: Unions | None = None,
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention over the tokens of each query's chosen blocks.

    Args:
        q: [T, N, Dk]; query head h reads K/V group h // (N / G). float16, bfloat16 or float32; any strides.
        k: [S, G, Dk]. v: [S, G, Dv]. Token p of a query's document is row ``key_start[t] + p``.
        blocks: int32 [T, G, n], block numbers within the query's document, each at most once, padded with -1.
        position: int32 [T], position of each query in its document: it sees tokens up to and including this one.
        key_start: int32 [T], key row at which the query's document starts.
        block_size: l', tokens of a block.
        scale: positive factor of the scores.
        unions: :func:`build_unions` of these blocks for this tile shape, if at hand.
        config: tile shape instead of the table's.

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
    out = torch.empty(tokens, num_heads, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, num_heads, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    config = config or tile_config("selected_forward", q.dtype, q.device, heads, max(dk, dv))
    tile_tokens = config.tokens(heads)
    if unions is None or unions.tile_tokens != tile_tokens:
        unions = build_unions(blocks, position, key_start, block_size, tile_tokens)
    q, k, v = channels_last(q), channels_last(k), channels_last(v)
    (dk_head, dk_tail), (dv_head, dv_tail) = split_width(dk), split_width(dv)
    keys, parts = block_steps(block_size, config.keys)
    selected_attention_forward_kernel[(triton.cdiv(tokens, tile_tokens) * groups,)](
        q, k, v, out, lse, unions.starts, unions.chosen, unions.counts, position, key_start,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
        tokens, num_keys, scale * LOG2_E.value,
        GROUPS=groups, HEADS=heads, DK=dk, DK_HEAD=dk_head, DK_TAIL=dk_tail, DV=dv, DV_HEAD=dv_head, DV_TAIL=dv_tail,
        ENTRIES=unions.starts.shape[-1], BLOCK=block_size, KEYS=keys, PARTS=parts,
        TOKENS=tile_tokens, ROWS=config.rows, PRECISION=FLOAT32_PRODUCTS,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse
