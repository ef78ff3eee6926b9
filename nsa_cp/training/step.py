"""One optimizer step, and the record of how far a run has come."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from nsa_cp.context_parallel import count_traffic
from nsa_cp.training.data import SampleSource, train_batches
from nsa_cp.training.errors import UserError
from nsa_cp.training.forward import run_schedule
from nsa_cp.training.metrics import agree
from nsa_cp.training.schedule import learning_rate, set_learning_rate
from nsa_cp.training.setup import Trainer
from nsa_cp.training.signals import StopRequest


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        consumed_samples: training sequences used so far, which is the position in the data.
        wall_seconds: time spent training and validating, over all parts of a resumed run.
        saved_step: step of the newest checkpoint, or None.
        val_loss: validation loss in nats a token after the run's last step; None before that.
    """

    step: int = 0
    consumed_samples: int = 0
    wall_seconds: float = 0.0
    saved_step: int | None = None
    val_loss: float | None = None


def train_step(trainer: Trainer, source: SampleSource, progress: Progress, stop: StopRequest) -> dict[str, Any]:
    """One optimizer step. Collective.

    Returns:
        The step's figures, equal on all processes but for times.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    train = trainer.config.train
    lr = learning_rate(progress.step, train)
    set_learning_rate(trainer.optimizer, lr, train.weight_decay)
    for chunk in trainer.wrapped:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        return train_batches(
            source,
            progress.consumed_samples,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )

    count = train.global_batch_size // (train.micro_batch_size * dp_size)
    length = trainer.config.data.sequence_length
    with count_traffic() as traffic:
        losses = run_schedule(trainer, batches, count, sequence_length=length, rows=train.micro_batch_size, train=True)
    _, grad_norm, _ = trainer.optimizer.step()
    progress.step += 1
    progress.consumed_samples += train.global_batch_size
    row = agree(trainer, losses, traffic, stop=stop.name is not None)
    norm = float(grad_norm)
    if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
        resume = "" if progress.saved_step is None else "resume from the last checkpoint, or "
        raise UserError(
            f"loss {row['loss']} and gradient norm {norm} at step {progress.step} are not finite; "
            f"lower train.lr = {train.lr} and {resume}begin again with --overwrite"
        )
    return {
        "step": progress.step,
        "loss": row.pop("loss"),
        "grad_norm": norm,
        "lr": lr,
        "consumed_samples": progress.consumed_samples,
        **row,
    }
