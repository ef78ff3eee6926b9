"""Is what context parallelism answers one GPU's answer? For ``nsa-cp bench context-parallel --check``, at benchmark sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from nsa_cp.bench.context_parallel import Settings
from nsa_cp.bench.inputs import AttentionInputs, make_inputs
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops import native_sparse_attention

# Largest relative difference from one GPU's answer that rounding explains, by the bytes of an element.
TOLERANCE = {2: 2e-2, 4: 1e-4, 8: 1e-10}


class Check(NamedTuple):
    """Over all ranks: selections (token and group) that differ from one GPU's, of how many, and the largest relative
    difference of the outputs and of the gradients from one GPU's (Frobenius norms a rank's rows)."""

    differing: int
    selections: int
    out_error: float
    gradient_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """No selection differs, and both errors are within the tolerance (NaN never is)."""
        return self.differing == 0 and self.out_error <= self.tolerance and self.gradient_error <= self.tolerance


def check_against_one_gpu(seq_len: int, settings: Settings) -> Check | None:
    """Solve one random problem on every GPU alone and on all together; None where one GPU cannot hold it. Collective."""
    alone, fits = None, True
    try:
        alone = _solve(_whole(seq_len, settings), seq_len, settings, None)
    except torch.cuda.OutOfMemoryError:
        fits = False
    fit = torch.tensor(float(fits), device=settings.device)
    dist.all_reduce(fit, dist.ReduceOp.MIN, group=settings.group)
    if not bool(fit) or alone is None:
        return None
    group = settings.group
    layout = SequenceLayout.build(seq_len, cp_size=group.size(), cp_rank=group.rank(), kind=settings.config.layout)
    blocks, *expected = (layout.shard(x) for x in alone)
    del alone
    own_blocks, *own = _solve(_shard(_whole(seq_len, settings), layout), seq_len, settings, layout)
    differing = (own_blocks != blocks).any(-1)
    errors = [_relative_error(x, y) for x, y in zip(own, expected, strict=True)]
    counts = torch.tensor([int(differing.sum()), differing.numel()], device=settings.device)
    finite = [error if error == error else float("inf") for error in errors]
    worst = torch.tensor([finite[0], max(finite[1:])], dtype=torch.float64, device=settings.device)
    dist.all_reduce(counts, group=group)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    return Check(*counts.tolist(), *worst.tolist(), TOLERANCE[settings.dtype.itemsize])


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, summed in float64 where the tensors lie."""
    difference = torch.linalg.vector_norm(actual.float() - expected.float(), dtype=torch.float64)
    return float(difference / torch.linalg.vector_norm(expected, dtype=torch.float64))


def _whole(seq_len: int, settings: Settings) -> AttentionInputs:
    """The same on every rank."""
    return make_inputs(settings.config, settings.heads, seq_len, "random", seed=0, device=settings.device, dtype=settings.dtype)


def _shard(x: AttentionInputs, layout: SequenceLayout) -> AttentionInputs:
    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return layout.shard(tensor.detach()).requires_grad_()

    return replace(
        x, q=rows(x.q), k=tuple(map(rows, x.k)), v=tuple(map(rows, x.v)), gates=rows(x.gates), grad=layout.shard(x.grad)
    )


def _solve(x: AttentionInputs, seq_len: int, settings: Settings, layout: SequenceLayout | None) -> list[torch.Tensor]:
    """Blocks, output, and the gradients that belong to tokens."""
    group = None if layout is None else settings.group
    layout = layout or SequenceLayout.build(seq_len, kind=settings.config.layout)
    result = native_sparse_attention(
        x.q, x.k, x.v, x.gates, x.k_weights, x.v_weights, settings.config, layout=layout, group=group
    )
    gradients = torch.autograd.grad(result.out, [x.q, *x.k, *x.v, x.gates], x.grad)
    return [result.blocks, result.out.detach(), *gradients]
