"""All-gather and halo exchange as autograd Functions, for attentions composed of differentiable parts.

NSA's pipeline does not use these: it issues and awaits its transfers by hand, to overlap them with computation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from nsa_cp.context_parallel.autograd import exact_backward, exact_forward
from nsa_cp.context_parallel.gather import RowGather, RowPartition, RowReduceScatter
from nsa_cp.context_parallel.halo import HaloExchange, HaloRows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx, partition, group, *tensors):  # noqa: ANN001, ANN205
        ctx.partition, ctx.group = partition, group
        return tuple(RowGather(tensors, partition, group).wait())

    @staticmethod
    @exact_backward
    def backward(ctx, *gradients):  # noqa: ANN001, ANN205
        summed = RowReduceScatter([_widened(g) for g in gradients], ctx.partition, ctx.group).wait()
        return None, None, *(s.to(g.dtype) for s, g in zip(summed, gradients, strict=True))


class _ExchangeHalo(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx, halo, group, *tensors):  # noqa: ANN001, ANN205
        ctx.halo, ctx.group = halo, group
        exchange = HaloExchange([halo] * len(tensors), group)
        exchange.start(tensors)
        return tuple(exchange.wait())

    @staticmethod
    @exact_backward
    def backward(ctx, *gradients):  # noqa: ANN001, ANN205
        exchange = HaloExchange([ctx.halo] * len(gradients), ctx.group)
        exchange.start_return([_widened(g) for g in gradients])
        return None, None, *(s.to(g.dtype) for s, g in zip(exchange.wait_return(), gradients, strict=True))


def gather_rows(
    tensors: Sequence[torch.Tensor], partition: RowPartition, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, ...]:
    """Whole tensors [M, ...] in global row order, from every rank's rows of each. Collective.

    Gradients are summed over ranks by a reduce-scatter in float32 (float64 for float64). Without a group: ``tensors`` unchanged.
    """
    return tuple(tensors) if group is None else _GatherRows.apply(partition, group, *tensors)


def exchange_halo(tensors: Sequence[torch.Tensor], halo: HaloRows, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, ...]:
    """Local rows [T, ...] with the halo merged in, [M, ...]: the buffers that ``halo`` describes. Collective.

    Gradients of halo rows go back to their owners and are added there in float32 (float64 for float64). Without a group:
    ``tensors`` unchanged.
    """
    return tuple(tensors) if group is None else _ExchangeHalo.apply(halo, group, *tensors)


def _widened(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient in the dtype in which ranks add theirs: float64 if it is that already, else float32."""
    return gradient if gradient.dtype == torch.float64 else gradient.float()
