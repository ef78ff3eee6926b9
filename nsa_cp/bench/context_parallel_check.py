"""Compares results under context parallelism with one GPU's, at benchmark sizes: ``nsa-cp bench context-parallel --check``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from nsa_cp.bench.context_parallel import Settings
from nsa_cp.bench.inputs import AttentionInputs, make_inputs
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops import initial_compressor_weights, native_sparse_attention

# Largest relative difference from one GPU's results that rounding explains, by bytes per element.
TOLERANCE = {2: 2e-2, 4: 1e-4, 8: 1e-10}


class Check(NamedTuple):
    """How far the ranks' results are from one GPU's.

    Attributes:
        differing, selections: how many selections (of a token and group) differ, of how many, over all ranks.
        out_error, gradient_error: largest relative difference (Frobenius norms) of the output and of the gradients of tensors
            with a row per token, over the ranks, each with its own rows.
        weight_error: the same of the gradients of the compressors' parameters, summed over ranks.
        tolerance: bound on all three errors.
    """

    differing: int
    selections: int
    out_error: float
    gradient_error: float
    weight_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """No selection differs, and all errors are within the tolerance (NaN never is)."""
        errors = (self.out_error, self.gradient_error, self.weight_error)
        return self.differing == 0 and all(error <= self.tolerance for error in errors)


class _Answers(NamedTuple):
    """Results of one solution: blocks [T, G, n], output [T, N, Dv], gradients of the inputs with a row per token ([T, ...] each),
    and gradients of all parameters of the compressors of k and of v, one float64 vector each (none without parameters)."""

    blocks: torch.Tensor
    out: torch.Tensor
    gradients: list[torch.Tensor]
    weight_gradients: list[torch.Tensor]


def check_against_one_gpu(seq_len: int, settings: Settings) -> Check | None:
    """Solve one random problem on every GPU alone and on all together; None if one GPU cannot hold it. Collective."""
    alone, fits = None, True
    try:
        alone = _solve(_whole(seq_len, settings), seq_len, settings, None)
    except torch.cuda.OutOfMemoryError:
        fits = False
    fit = torch.tensor(float(fits), device=settings.device)
    dist.all_reduce(fit, dist.ReduceOp.MIN, group=settings.world)
    if not bool(fit) or alone is None:
        return None
    group = settings.group
    layout = SequenceLayout.build(seq_len, cp_size=group.size(), cp_rank=group.rank(), kind=settings.config.layout)
    expected = _Answers(
        layout.shard(alone.blocks), layout.shard(alone.out), [layout.shard(x) for x in alone.gradients], alone.weight_gradients
    )
    del alone
    own = _solve(_shard(_whole(seq_len, settings), layout), seq_len, settings, layout)
    for partial in own.weight_gradients:
        # A rank's parameter gradients cover only the compressed tokens that it makes.
        dist.all_reduce(partial, group=group)
    differing = (own.blocks != expected.blocks).any(-1)
    errors = [
        _relative_error([own.out], [expected.out]),
        _relative_error(own.gradients, expected.gradients),
        _relative_error(own.weight_gradients, expected.weight_gradients),
    ]
    counts = torch.tensor([int(differing.sum()), differing.numel()], device=settings.device)
    worst = torch.tensor(errors, dtype=torch.float64, device=settings.device)
    dist.all_reduce(counts, group=settings.world)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=settings.world)
    return Check(*counts.tolist(), *worst.tolist(), TOLERANCE[settings.dtype.itemsize])


def _relative_error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest ‖actual - expected‖ / ‖expected‖ of the pairs, summed in float64 on their device; inf for NaN, 0 of none."""
    errors = [0.0]
    for x, y in zip(actual, expected, strict=True):
        wide = torch.promote_types(x.dtype, torch.float32)
        difference = torch.linalg.vector_norm(x.to(wide) - y.to(wide), dtype=torch.float64)
        error = float(difference / torch.linalg.vector_norm(y, dtype=torch.float64))
        errors.append(error if error == error else float("inf"))
    return max(errors)


def _whole(seq_len: int, settings: Settings) -> AttentionInputs:
    """Inputs of the whole sequence, equal on every rank."""
    config, heads, device, dtype = settings.config, settings.local_heads, settings.device, settings.dtype
    x = make_inputs(config, heads, seq_len, "random", seed=0, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    def weights(dim: int) -> tuple[torch.Tensor, ...]:
        # Not the initial ones: with those of ``mlp`` all gradients but the last layer's are 0.
        initial = initial_compressor_weights(config, heads.num_groups, dim, generator)
        noisy = [w + 0.25 * w.shape[-2] ** -0.5 * torch.randn(w.shape, generator=generator) for w in initial]
        return tuple(w.to(device, dtype).requires_grad_() for w in noisy)

    return replace(x, k_weights=weights(heads.qk_dim), v_weights=weights(heads.v_dim))


def _shard(x: AttentionInputs, layout: SequenceLayout) -> AttentionInputs:
    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return layout.shard(tensor.detach()).requires_grad_()

    return replace(
        x, q=rows(x.q), k=tuple(map(rows, x.k)), v=tuple(map(rows, x.v)), gates=rows(x.gates), grad=layout.shard(x.grad)
    )


def _solve(x: AttentionInputs, seq_len: int, settings: Settings, layout: SequenceLayout | None) -> _Answers:
    group = None if layout is None else settings.group
    layout = layout or SequenceLayout.build(seq_len, kind=settings.config.layout)
    result = native_sparse_attention(
        x.q, x.k, x.v, x.gates, x.k_weights, x.v_weights, settings.config, layout=layout, group=group
    )
    tokens = [x.q, *x.k, *x.v, x.gates]
    gradients = list(torch.autograd.grad(result.out, [*tokens, *x.k_weights, *x.v_weights], x.grad))
    first_k, first_v = len(tokens), len(tokens) + len(x.k_weights)
    # One vector per compressor, because some parameters alone have a gradient of nothing but rounding (a key's ``position`` under
    # ``linear``, which shifts all scores of a query alike).
    by_compressor = [part for part in (gradients[first_k:first_v], gradients[first_v:]) if part]
    weight_gradients = [torch.cat([g.flatten().double() for g in part]) for part in by_compressor]
    return _Answers(result.blocks, result.out.detach(), gradients[:first_k], weight_gradients)
