"""The learning rate over a run: linear warm-up, then cosine decay."""

from __future__ import annotations

import math
from typing import Any

from nsa_cp.training.config import TrainSection


def learning_rate(step: int, train: TrainSection) -> float:
    """Learning rate of optimizer step ``step`` (0-based), which depends on the step and the settings alone.

    Warm-up reaches ``lr`` at step ``warmup_steps - 1`` and is never 0; the cosine ends at ``min_lr`` on the last step.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    decay_steps = train.steps - 1 - train.warmup_steps
    progress = 1.0 if decay_steps <= 0 else min(1.0, (step - train.warmup_steps) / decay_steps)
    return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Write the step's rate and decay into a Megatron optimizer's parameter groups, each times the group's own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
