"""Validation: the mean loss over a fixed set of held-out sequences."""

from __future__ import annotations

import math

import torch.distributed as dist
from megatron.core import parallel_state

from nsa_cp.training.data import SampleSource, validation_batches
from nsa_cp.training.forward import run_schedule
from nsa_cp.training.setup import Trainer


def validation_loss(trainer: Trainer, source: SampleSource) -> float:
    """Mean loss in nats a token over the first ``train.eval_sequences`` validation sequences. Collective.

    The result does not depend on the parallel layout, up to rounding.
    """
    train, parallel = trainer.config.train, trainer.config.parallel
    rounds, start = validation_batches(
        source,
        num_sequences=train.eval_sequences,
        micro_batch_size=train.micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        rounds_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
    )
    totals = run_schedule(
        trainer, start, rounds, sequence_length=trainer.config.data.sequence_length, rows=train.micro_batch_size, train=False
    )
    dist.all_reduce(totals)  # tensor-parallel processes count the same tokens, but in both entries, so the ratio is right
    total, tokens = totals.tolist()
    return total / max(tokens, 1.0)


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Convert a loss in nats a token to bits a byte of text."""
    return loss / math.log(2) / bytes_per_token
