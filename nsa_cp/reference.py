"""The oracle that tests compare with: Native Sparse Attention (arXiv 2502.11089) in dense masks, to be read beside the paper.

Every function takes packed tensors ``[T, heads, D]`` of any floating dtype, computes in that dtype (float64 is the point) and
is differentiable by plain autograd. ``cu_seqlens`` lists the document bounds ``0, ..., T``; None is one document. Documents
are computed one after the other, so positions t, compressed indices i and block indices j restart at 0 in each of them.

Shapes: T tokens, C compressed tokens of all documents, N query heads, G KV groups, H = N/G heads a group (head h belongs to
group h // H), Dk and Dv widths of keys and values, n selected blocks, B blocks of the longest document.
Memory is quadratic in the document length: this is for checking, not for training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from nsa_cp.config import NSAConfig, RotaryConfig

CuSeqlens = Sequence[int] | None
Bounds = list[tuple[int, int]]
MaskOf = Callable[[Tensor, Tensor, slice], Tensor]


class ReferenceOutput(NamedTuple):
    """What ``reference_native_sparse_attention`` returns; lse is the natural log, -inf where a query sees no key."""

    out: Tensor  # [T, N, Dv]
    blocks: Tensor  # int32 [T, G, n], document-relative, ascending, -1 padded
    lse_compressed: Tensor  # [T, N]
    lse_selected: Tensor  # [T, N]
    lse_window: Tensor  # [T, N]


# ---- documents, and attention under a mask ---------------------------------------------------------------------------------


def _documents(cu_seqlens: CuSeqlens, num_tokens: int) -> Bounds:
    """``(start, end)`` of every document in tokens, end exclusive."""
    bounds = [0, num_tokens] if cu_seqlens is None else [int(bound) for bound in cu_seqlens]
    if not bounds or bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens = {bounds} must rise from 0 to the {num_tokens} tokens given")
    return list(zip(bounds, bounds[1:])) or [(0, 0)]


def _compressed_documents(k_cmp: Tensor, documents: Bounds, config: NSAConfig) -> Bounds:
    """``(start, end)`` of every document in rows of k_cmp [C, G, Dk], end exclusive."""
    ends = list(accumulate(config.num_compressed_tokens(end - start) for start, end in documents))
    if k_cmp.shape[0] != ends[-1]:
        raise ValueError(
            f"{k_cmp.shape[0]} compressed tokens given, but the documents have {ends[-1]}: compress them with this config"
        )
    return list(zip([0, *ends], ends))


def _positions(cu_seqlens: CuSeqlens, x: Tensor) -> Tensor:
    """Document-relative position of every token of x, int64 [T]."""
    return torch.cat([torch.arange(end - start, device=x.device) for start, end in _documents(cu_seqlens, x.shape[0])])


def _indices(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Positions t [L, 1, 1, 1] of one document's queries and indices s [S] of its keys: comparing them makes a mask."""
    return torch.arange(q.shape[0], device=q.device)[:, None, None, None], torch.arange(k.shape[0], device=k.device)


def _softmax(q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [L, G, H, S] and lse [L, G, H] of q [L, N, Dk] over k [S, G, Dk], under a mask that broadcasts to the former.

    A row that sees nothing has probabilities 0 and lse -inf. Its scores stay unmasked until the very end, so that no
    inf - inf arises: its gradients are 0, not NaN.
    """
    groups = k.shape[1]
    if groups < 1 or q.shape[1] % groups:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {groups} KV groups; change one of them")
    scores = torch.einsum("tghd,sgd->tghs", q.unflatten(1, (groups, -1)), k) * q.shape[-1] ** -0.5
    sees_any = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask & sees_any, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    probabilities = torch.where(sees_any, (scores - lse).exp(), 0.0)
    return probabilities, torch.where(sees_any, lse, float("-inf")).squeeze(-1)


def _attention(q: Tensor, k: Tensor, v: Tensor, queries: Bounds, keys: Bounds, mask_of: MaskOf) -> tuple[Tensor, Tensor]:
    """out [T, N, Dv] and lse [T, N] of each document's queries over its own keys, where ``mask_of(t, s, rows)`` allows it."""
    outs, lses = [], []
    for (start, end), (first, last) in zip(queries, keys):
        t, s = _indices(q[start:end], k[first:last])
        probabilities, lse = _softmax(q[start:end], k[first:last], mask_of(t, s, slice(start, end)))
        outs.append(torch.einsum("tghs,sgd->tghd", probabilities, v[first:last]).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs), torch.cat(lses)


# ---- rotary embedding and compression (section 3.3.1, eq. 7) ---------------------------------------------------------------


def reference_rope(x: Tensor, positions: Tensor, rotary: RotaryConfig) -> Tensor:
    """Rotate x [T, heads, D] at ``positions`` [T]: channels c and c + dim/2 by the angle position * base^(-2c/dim).

    Channels from dim = ``rotary.dim(D)`` on pass through. Angles are float64 whatever x is: they grow with the position.
    """
    dim = rotary.dim(x.shape[-1])
    half = torch.arange(dim // 2, device=x.device, dtype=torch.float64)
    angle = positions.to(x.device, torch.float64)[:, None, None] * rotary.base ** (-2 * half / max(dim, 1))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x.split([dim // 2, dim // 2, x.shape[-1] - dim], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def reference_compressor_weights(
    config: NSAConfig, num_groups: int, dim: int, dtype: torch.dtype, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """Initial weights of one phi for ``num_groups`` KV heads of width D = ``dim``: phi starts as the block mean.

    Returns:
        () for ``mean``; (position [G, l, D], weight [G, l*D, D]) for ``linear``;
        (position [G, l, D], w1 [G, l*D, D], w2 [G, D, D]) for ``mlp``.
    """
    l = config.compress_block_size
    position = torch.zeros(num_groups, l, dim, dtype=dtype)
    if config.compressor == "mean":
        return ()
    if config.compressor == "linear":
        return position, (torch.eye(dim, dtype=dtype) / l).repeat(num_groups, l, 1)
    w1 = torch.randn(num_groups, l * dim, dim, dtype=dtype, generator=generator) * (l * dim) ** -0.5
    return position, w1, torch.zeros(num_groups, dim, dim, dtype=dtype)


def _phi(blocks: Tensor, weights: tuple[Tensor, ...], config: NSAConfig) -> Tensor:
    """Summary [C, G, D] of blocks [C, G, l, D]; flattening is token-major."""
    if config.compressor == "mean":
        return blocks.mean(2)
    position, *matrices = weights
    flat = (blocks + position).flatten(2)
    if config.compressor == "linear":
        return torch.einsum("cgi,gio->cgo", flat, matrices[0])
    hidden = silu(torch.einsum("cgi,gif->cgf", flat, matrices[0]))
    return blocks.mean(2) + torch.einsum("cgf,gfo->cgo", hidden, matrices[1])


def reference_compress(
    x: Tensor,
    weights: tuple[Tensor, ...],
    config: NSAConfig,
    cu_seqlens: CuSeqlens = None,
    rotary: RotaryConfig | None = None,
) -> Tensor:
    """Compress x [T, G, D] into [C, G, D], documents in order: token i summarises tokens [i*d, i*d + l) (eq. 7).

    Args:
        weights: of phi, as ``reference_compressor_weights`` lays them out.
        rotary: rotate compressed token i at position i*d, that of its block's first token; None leaves it unrotated.
    """
    l, d = config.compress_block_size, config.compress_stride
    compressed = []
    for start, end in _documents(cu_seqlens, x.shape[0]):
        first = torch.arange(config.num_compressed_tokens(end - start), device=x.device) * d
        blocks = x[start:end][first[:, None] + torch.arange(l, device=x.device)]  # [C, l, G, D]
        row = _phi(blocks.transpose(1, 2), weights, config)
        compressed.append(row if rotary is None else reference_rope(row, first, rotary))
    return torch.cat(compressed)


# ---- the three branches ----------------------------------------------------------------------------------------------------


def _sees_compressed(t: Tensor, i: Tensor, config: NSAConfig) -> Tensor:
    """Compressed token i is visible to query t iff its block is complete."""
    return i * config.compress_stride + config.compress_block_size - 1 <= t


def reference_compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, config: NSAConfig, cu_seqlens: CuSeqlens = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [T, N, Dk] to the visible compressed tokens k_cmp [C, G, Dk], v_cmp [C, G, Dv] (section 3.3.1).

    Returns:
        out [T, N, Dv] and lse [T, N]; a query that sees no compressed token has out 0 and lse -inf.
    """
    documents = _documents(cu_seqlens, q.shape[0])
    compressed = _compressed_documents(k_cmp, documents, config)
    return _attention(q, k_cmp, v_cmp, documents, compressed, lambda t, i, rows: _sees_compressed(t, i, config))


@torch.no_grad()
def reference_block_scores(q: Tensor, k_cmp: Tensor, config: NSAConfig, cu_seqlens: CuSeqlens = None) -> Tensor:
    """Importance [T, G, B] of every block, summed over the heads of a group (eq. 8 to 10); takes no gradient.

    p_slc[j] = sum over m < l'/d and k < l/d of p_cmp[(l'/d)*j + m - k]. Blocks that start after the query, and the columns
    beyond a short document's last block, get -inf.
    """
    documents = _documents(cu_seqlens, q.shape[0])
    per_block = config.select_block_size // config.compress_stride
    pieces = config.compress_block_size // config.compress_stride
    columns = max(config.num_select_blocks(end - start) for start, end in documents)
    block_starts = torch.arange(columns, device=q.device) * config.select_block_size
    scores = []
    for (start, end), (first, last) in zip(documents, _compressed_documents(k_cmp, documents, config)):
        t, i = _indices(q[start:end], k_cmp[first:last])
        p_cmp, _ = _softmax(q[start:end], k_cmp[first:last], _sees_compressed(t, i, config))
        # Terms out of range are zeros: p_cmp[x] moves to column x + pieces - 1, and the smallest x is 1 - pieces.
        p_cmp = pad(p_cmp, (pieces - 1, per_block * columns - p_cmp.shape[-1]))
        p_slc = torch.zeros_like(p_cmp[..., :columns])
        for m in range(per_block):
            for k in range(pieces):
                p_slc = p_slc + p_cmp[..., m - k + pieces - 1 :: per_block][..., :columns]
        scores.append(p_slc.masked_fill(block_starts > t, float("-inf")).sum(2))
    return torch.cat(scores)


@torch.no_grad()
def reference_select_blocks(q: Tensor, k_cmp: Tensor, config: NSAConfig, cu_seqlens: CuSeqlens = None) -> Tensor:
    """Blocks each query attends to, int32 [T, G, n]: document-relative, ascending, padded with -1 (eq. 11 and 12).

    The forced blocks come first (the document's first ones and the query's own with those just before it), then the best
    scores among the rest that start at or before the query. Ties go to the lowest index.
    """
    n, scores = config.num_selected_blocks, reference_block_scores(q, k_cmp, config, cu_seqlens)
    own = _positions(cu_seqlens, q)[:, None, None] // config.select_block_size
    nothing = scores.shape[-1]  # a number past every block, so that it sorts last
    j = torch.arange(nothing, device=q.device)
    forced = (j <= own) & ((j < config.num_init_blocks) | (j > own - config.num_local_blocks))
    ranked, blocks = scores.masked_fill(forced, float("inf")).sort(dim=-1, descending=True, stable=True)
    blocks = blocks.masked_fill(ranked == float("-inf"), nothing)
    blocks = pad(blocks, (0, n), value=nothing)[..., :n].sort(dim=-1).values
    return blocks.masked_fill(blocks == nothing, -1).int()


def reference_selected_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, config: NSAConfig, cu_seqlens: CuSeqlens = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of q [T, N, Dk] to the tokens of the blocks [T, G, n] chosen for it (section 3.3.2): out and lse."""
    documents = _documents(cu_seqlens, q.shape[0])

    def mask_of(t: Tensor, s: Tensor, rows: slice) -> Tensor:
        j = torch.arange(config.num_select_blocks(s.shape[0]), device=s.device)
        chosen = (blocks[rows, :, :, None] == j).any(2)  # [L, G, blocks]
        return chosen[..., s // config.select_block_size][:, :, None] & (s <= t)

    return _attention(q, k, v, documents, documents, mask_of)


def reference_window_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, cu_seqlens: CuSeqlens = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of q [T, N, Dk] to tokens max(0, t - w + 1) .. t (section 3.3.3); w = 0 gives out 0 and lse -inf."""
    documents = _documents(cu_seqlens, q.shape[0])
    return _attention(q, k, v, documents, documents, lambda t, s, rows: (s <= t) & (s > t - config.window_size))


def reference_full_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: CuSeqlens = None) -> tuple[Tensor, Tensor]:
    """Causal attention of q [T, N, Dk] to all tokens 0 .. t of its document: out [T, N, Dv] and lse [T, N]."""
    documents = _documents(cu_seqlens, q.shape[0])
    return _attention(q, k, v, documents, documents, lambda t, s, rows: s <= t)


# ---- the whole -------------------------------------------------------------------------------------------------------------


def reference_combine(outs: tuple[Tensor, Tensor, Tensor], gates: Tensor) -> Tensor:
    """Gated sum [T, N, Dv] of the compressed, selected and window outputs; gates [T, N or 1, 3] in (0, 1) (eq. 5)."""
    return sum(gate.unsqueeze(-1) * out for gate, out in zip(gates.unbind(-1), outs))


def reference_native_sparse_attention(
    q: Tensor,
    k: tuple[Tensor, ...],
    v: tuple[Tensor, ...],
    gates: Tensor,
    k_weights: tuple[Tensor, ...],
    v_weights: tuple[Tensor, ...],
    config: NSAConfig,
    cu_seqlens: CuSeqlens = None,
    rotary: RotaryConfig | None = None,
    blocks: Tensor | None = None,
) -> ReferenceOutput:
    """Native Sparse Attention of unrotated queries, keys and values (section 3.2 and 3.3).

    Args:
        q: [T, N, Dk].
        k: [T, G, Dk] for each of (compressed, selected, window), or one for all when ``config.shared_kv``.
        v: [T, G, Dv], likewise.
        gates: [T, N or 1, 3] in (0, 1), in the same order.
        k_weights: of the keys' phi, as ``reference_compressor_weights`` lays them out.
        v_weights: of the values' phi.
        rotary: None attends without positions.
        blocks: a selection [T, G, n] to use in place of the computed one.

    Raises:
        ValueError: shapes or counts that do not fit together.
    """
    if not len(k) == len(v) == config.num_branch_kv:
        raise ValueError(
            f"{len(k)} keys and {len(v)} values given, but shared_kv = {config.shared_kv} needs {config.num_branch_kv} of each"
        )
    k_cmp, k_slc, k_win = k * 3 if config.shared_kv else k
    v_cmp, v_slc, v_win = v * 3 if config.shared_kv else v
    positions = _positions(cu_seqlens, q)

    def rotate(x: Tensor) -> Tensor:
        return x if rotary is None else reference_rope(x, positions, rotary)

    if config.compressed_rope == "after":
        k_cmp = reference_compress(k_cmp, k_weights, config, cu_seqlens, rotary)
    else:
        k_cmp = reference_compress(rotate(k_cmp), k_weights, config, cu_seqlens)
    v_cmp = reference_compress(v_cmp, v_weights, config, cu_seqlens)
    q = rotate(q)
    if blocks is None:
        blocks = reference_select_blocks(q, k_cmp, config, cu_seqlens)
    out_compressed, lse_compressed = reference_compressed_attention(q, k_cmp, v_cmp, config, cu_seqlens)
    out_selected, lse_selected = reference_selected_attention(q, rotate(k_slc), v_slc, blocks, config, cu_seqlens)
    out_window, lse_window = reference_window_attention(q, rotate(k_win), v_win, config, cu_seqlens)
    out = reference_combine((out_compressed, out_selected, out_window), gates)
    return ReferenceOutput(out, blocks, lse_compressed, lse_selected, lse_window)
