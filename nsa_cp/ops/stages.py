"""The stages of the method as public functions on whole packed sequences, differentiable, for one process.

The complete pipeline, context parallelism included, is ``native_sparse_attention``; these are its parts, for those who study
or recombine them. Shapes: T tokens, N query heads, G groups (K/V heads), C compressed tokens, n selected blocks. ``cu_seqlens``
lists document borders as host integers: 0, then the end of each document; None is one document. q and k come already rotated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nsa_cp.config import Backend, NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.context_parallel.autograd import exact_backward, exact_forward
from nsa_cp.ops.checks import check_blocks, check_heads, check_rows
from nsa_cp.ops.compression import CompressorWeights, check_compressor_weights, compress
from nsa_cp.ops.dispatch import accumulator_dtype, resolve_backend
from nsa_cp.ops.gating import combine_forward, gate_gradients, row_statistics, softmax_statistics
from nsa_cp.ops.interval_attention import interval_attention_backward, interval_attention_forward
from nsa_cp.ops.intervals import Intervals
from nsa_cp.ops.plan import NSAPlan, get_plan
from nsa_cp.ops.rope import rotation
from nsa_cp.ops.selected import selected_attention_backward, selected_attention_forward
from nsa_cp.ops.selection import select_blocks_forward


class IntervalAttention(torch.autograd.Function):
    """Differentiable interval attention: q, k, v, the intervals and the resolved backend in, (out, lse) out."""

    @staticmethod
    @exact_forward
    def forward(ctx, q, k, v, intervals: Intervals, backend: str):  # noqa: ANN001, ANN205
        out, lse = interval_attention_forward(q, k, v, intervals, backend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.intervals, ctx.backend = intervals, backend
        return out, lse

    @staticmethod
    @exact_backward
    def backward(ctx, grad, grad_lse):  # noqa: ANN001, ANN205
        q, k, v, out, lse = ctx.saved_tensors
        statistics = softmax_statistics(grad, out, lse, grad_lse, ctx.backend)
        gradients = interval_attention_backward(q, k, v, grad, statistics, ctx.intervals, ctx.backend)
        return *(g.to(q.dtype) for g in gradients), None, None


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx, q, k, v, blocks, plan: NSAPlan, backend: str):  # noqa: ANN001, ANN205
        out, lse = selected_attention_forward(q, k, v, blocks, plan, backend)
        ctx.save_for_backward(q, k, v, blocks, out, lse)
        ctx.plan, ctx.backend = plan, backend
        return out, lse

    @staticmethod
    @exact_backward
    def backward(ctx, grad, grad_lse):  # noqa: ANN001, ANN205
        q, k, v, blocks, out, lse = ctx.saved_tensors
        statistics = softmax_statistics(grad, out, lse, grad_lse, ctx.backend)
        gradients = selected_attention_backward(q, k, v, grad, statistics, blocks, ctx.plan, ctx.backend)
        return *(g.to(q.dtype) for g in gradients), None, None, None


class _CombineBranches(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx, gates, backend: str, *outs):  # noqa: ANN001, ANN205
        ctx.save_for_backward(gates, *outs)
        ctx.backend = backend
        return combine_forward(outs, gates, backend)

    @staticmethod
    @exact_backward
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        gates, *outs = ctx.saved_tensors
        no_shift = grad.new_zeros(grad.shape[:2], dtype=accumulator_dtype(grad))
        statistics = row_statistics(grad, outs, [no_shift] * len(outs), gates, ctx.backend)
        weights = gates.to(accumulator_dtype(grad)).unbind(-1)
        return gate_gradients(statistics, gates), None, *((g[..., None] * grad).to(grad.dtype) for g in weights)


# These stages are hidden from torch.compile: it would trace their plans' numpy code anew for every length, and they launch their
# kernels by hand.
@torch.compiler.disable
def compress_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_weights: CompressorWeights,
    v_weights: CompressorWeights,
    config: NSAConfig,
    cu_seqlens: Sequence[int] | None = None,
    rotary: RotaryConfig | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compressed keys and values of every document (paper section 3.3.1, eq. 7).

    Args:
        k: [T, G, Dk], unrotated if ``rotary`` is given. v: [T, G, Dv].
        k_weights, v_weights: the compressors' weights as ``nsa_cp.ops.compression.compress`` takes them.
        rotary: if given, compressed key i is rotated at position i * d of its document.

    Returns:
        [C, G, Dk] and [C, G, Dv], documents in order, in the dtypes of k and v.

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    check_rows(k=k, v=v)
    if k.dim() != 3 or v.dim() != 3 or k.shape[1] != v.shape[1]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [tokens, groups, channels] with equal groups")
    check_compressor_weights("k_weights", k_weights, k, config)
    check_compressor_weights("v_weights", v_weights, v, config)
    plan = _plan(k, config, cu_seqlens)
    resolved = resolve_backend(backend, k, v)
    k_cmp = compress(k, plan.compression_starts, k_weights, config, resolved)
    v_cmp = compress(v, plan.compression_starts, v_weights, config, resolved)
    return rotation(rotary, plan.own_compressed_position, k, resolved)(k_cmp), v_cmp


@torch.compiler.disable
def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    config: NSAConfig,
    cu_seqlens: Sequence[int] | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the compressed tokens whose block is complete: token i iff i*d + l - 1 <= t (paper section 3.3.1).

    Args:
        q: [T, N, Dk]. k_cmp: [C, G, Dk]. v_cmp: [C, G, Dv].

    Returns:
        ``out`` [T, N, Dv] in the dtype of q, and ``lse`` [T, N], the log-sum-exp of the scaled scores (natural logarithm;
        float32, or float64 for float64 inputs). Where a query sees nothing they are 0 and -inf.

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    check_heads(q, k_cmp, v_cmp)
    plan = _plan(q, config, cu_seqlens)
    check_rows(k_cmp=k_cmp, v_cmp=v_cmp, expected=plan.compressed_intervals.num_keys)
    return IntervalAttention.apply(q, k_cmp, v_cmp, plan.compressed_intervals, resolve_backend(backend, q, v_cmp))


@torch.compiler.disable
def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    config: NSAConfig,
    cu_seqlens: Sequence[int] | None = None,
    lse: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The n blocks each query attends to, shared by the heads of a group (paper section 3.3.2, eq. 8 to 12); no gradient.

    Args:
        q: [T, N, Dk]. k_cmp: [C, G, Dk].
        lse: [T, N] from :func:`compressed_attention`, which spares computing it again. When left out the result is the same to
            the bit if the values' width Dv is min(Dk, 128); for another Dv two blocks of nearly equal score may change places.

    Returns:
        int32 [T, G, n], block indices within the query's document, ascending, padded with -1; ties go to the lowest index.

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    check_heads(q, k_cmp)
    plan = _plan(q, config, cu_seqlens)
    check_rows(k_cmp=k_cmp, expected=plan.compressed_intervals.num_keys)
    if lse is not None and lse.shape != q.shape[:2]:
        raise ValueError(f"lse {tuple(lse.shape)} does not fit {q.shape[0]} tokens of {q.shape[1]} heads; give that of q")
    # There are no values here, and the kernel that forms a missing lse picks its tiles by their width.
    v_dim = min(k_cmp.shape[-1], 128)
    return select_blocks_forward(q, k_cmp, lse, plan, resolve_backend(backend, q), v_dim)


@torch.compiler.disable
def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    config: NSAConfig,
    cu_seqlens: Sequence[int] | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention over the tokens of the chosen blocks (paper section 3.3.2).

    Args:
        q: [T, N, Dk]. k: [T, G, Dk]. v: [T, G, Dv].
        blocks: int32 [T, G, n] as :func:`select_blocks` returns them.

    Returns:
        ``out`` [T, N, Dv] and ``lse`` [T, N] as of :func:`compressed_attention`.

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    check_heads(q, k, v)
    check_rows(q=q, k=k, v=v)
    check_blocks(blocks, q, k, config)
    return _SelectedAttention.apply(q, k, v, blocks, _plan(q, config, cu_seqlens), resolve_backend(backend, q, v))


@torch.compiler.disable
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: NSAConfig,
    cu_seqlens: Sequence[int] | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention over the last w tokens, the query's own included (paper section 3.3.3).

    Args:
        q: [T, N, Dk]. k: [T, G, Dk]. v: [T, G, Dv].

    Returns:
        ``out`` [T, N, Dv] and ``lse`` [T, N] as of :func:`compressed_attention`; 0 and -inf when w is 0.

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    check_heads(q, k, v)
    check_rows(q=q, k=k, v=v)
    return IntervalAttention.apply(q, k, v, _plan(q, config, cu_seqlens).window_intervals, resolve_backend(backend, q, v))


@torch.compiler.disable
def combine_branches(outs: Sequence[torch.Tensor], gates: torch.Tensor, backend: Backend = "auto") -> torch.Tensor:
    """The gated sum of the branches (paper eq. 5).

    Args:
        outs: [T, N, Dv] each, in the order compressed, selected, window.
        gates: [T, N or 1, 3] in (0, 1).

    Returns:
        [T, N, Dv] in the dtype of ``outs``.

    Raises:
        ValueError: gates that do not match the branches, or a backend that cannot run here.
    """
    check_rows(gates=gates, **{f"outs[{b}]": out for b, out in enumerate(outs)})
    for b, out in enumerate(outs):
        if out.dim() != 3 or out.shape != outs[0].shape:
            raise ValueError(
                f"outs[{b}] is {tuple(out.shape)}, outs[0] {tuple(outs[0].shape)}; give [tokens, heads, channels] alike"
            )
    if gates.shape[1:] not in ((outs[0].shape[1], len(outs)), (1, len(outs))):
        raise ValueError(f"gates {tuple(gates.shape)} do not match {len(outs)} branches of {outs[0].shape[1]} heads")
    return _CombineBranches.apply(gates, resolve_backend(backend, outs[0]), *outs)


def _plan(x: torch.Tensor, config: NSAConfig, cu_seqlens: Sequence[int] | None) -> NSAPlan:
    layout = SequenceLayout.build(x.shape[0] if cu_seqlens is None else cu_seqlens)
    check_rows(x=x, expected=layout.num_tokens)
    return get_plan(layout, config, x.device)
