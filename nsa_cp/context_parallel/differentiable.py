"""Gather and halo exchange as autograd Functions, for attentions that are composed of differentiable parts."""

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
    """Whole tensors [M, ...] in global row order from every rank's rows; gradients are reduce-scattered in float32."""
    return tuple(tensors) if group is None else _GatherRows.apply(partition, group, *tensors)


def exchange_halo(tensors: Sequence[torch.Tensor], halo: HaloRows, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, ...]:
    """Local rows [T, ...] with the halo merged in, [M, ...]; gradients of halo rows go back to their owners in float32."""
    return tuple(tensors) if group is None else _ExchangeHalo.apply(halo, group, *tensors)


def _widened(gradient: torch.Tensor) -> torch.Tensor:
    """Sums over ranks are made in float32 (or float64)."""
    return gradient if gradient.dtype == torch.float64 else gradient.float()
