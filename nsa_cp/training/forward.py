"""Runs micro-batches through Megatron's pipeline schedule; training, validation, sampling and pictures all go through here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nsa_cp.megatron import shard_batch
from nsa_cp.training.setup import Trainer

BatchFactory = Callable[[], Iterable[dict[str, Tensor]]]


def run_schedule(
    trainer: Trainer, batches: BatchFactory, num_microbatches: int, *, sequence_length: int, rows: int, train: bool
) -> Tensor:
    """Forward passes over micro-batches, and backward passes when training. Collective.

    Args:
        trainer: model and settings.
        batches: starts an iterator over this data-parallel rank's micro-batches of whole sequences; called once for each model
            chunk.
        num_microbatches: number of micro-batches.
        sequence_length: tokens of a whole sequence.
        rows: sequences in a micro-batch.
        train: whether to accumulate gradients and reduce them; otherwise no gradient is computed.

    Returns:
        [2] float64 on this device: the sum of this process's token losses in nats and their number; zeros except on the
        last pipeline stage.
    """
    results = _schedule(trainer, batches, num_microbatches, sequence_length, rows, _loss_step, train=train)
    total = torch.zeros(2, dtype=torch.float64, device=trainer.device)
    for result in results:
        total += result["loss"].double()
    return total


def run_logits(trainer: Trainer, batch: dict[str, Tensor]) -> Tensor | None:
    """Logits [b, s/cp, vocabulary/tp] of one micro-batch on the last pipeline stage, None elsewhere. Collective, no gradient."""
    rows, length = batch["tokens"].shape
    # The interleaved schedule needs a multiple of the stages, so the micro-batch is repeated; only the first result is used.
    count = trainer.config.parallel.pipeline if trainer.config.parallel.virtual_pipeline > 1 else 1
    results = _schedule(trainer, lambda: [batch] * count, count, length, rows, _logits_step, train=False, collect=True)
    return results[0] if results else None


def _schedule(
    trainer: Trainer,
    batches: BatchFactory,
    num_microbatches: int,
    sequence_length: int,
    rows: int,
    step: Callable[..., Any],
    *,
    train: bool,
    collect: bool = False,
) -> list[Any]:
    iterators = [_local_batches(trainer, batches()) for _ in trainer.wrapped]
    for chunk in trainer.wrapped:
        chunk.train(train)
    with torch.set_grad_enabled(train):
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=trainer.wrapped if len(trainer.wrapped) > 1 else trainer.wrapped[0],
            num_microbatches=num_microbatches,
            seq_length=sequence_length,
            micro_batch_size=rows,
            forward_only=not train,
            collect_non_loss_data=collect,
        )


def _local_batches(trainer: Trainer, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    rank = parallel_state.get_context_parallel_rank()
    for batch in batches:
        local, _ = shard_batch(batch, trainer.model_config, cp_rank=rank)
        yield {name: tensor.to(trainer.device, non_blocking=True) for name, tensor in local.items()}


def _loss_step(iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_sum_losses, batch["loss_mask"])


def _logits_step(iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    batch = next(iterator)
    return model(batch["tokens"], batch["position_ids"], None), _keep_output


def _sum_losses(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss sum and count of this process's tokens; Megatron divides the gradient by the count over all processes."""
    total, count = (losses.float() * mask).sum(), mask.sum()
    return total, count.to(torch.int32), {"loss": torch.stack([total.detach(), count])}


def _keep_output(output: Tensor, non_loss_data: bool = False) -> Tensor:
    return output
