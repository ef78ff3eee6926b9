"""Evaluates a model on a task's groups of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from nsa_cp.study.model import Decoder
from nsa_cp.study.task import Group, Scores


@torch.no_grad()
def evaluate(
    model: Decoder, groups: Iterable[Group], dtype: torch.dtype, between: Callable[[], None] = lambda: None
) -> dict[str, list[Scores]]:
    """Scores of every batch, by group.

    Args:
        dtype: of matrix products and attention.
        between: called after each batch; an exception from it ends the evaluation.
    """
    device = model.embedding.weight.device
    scores: dict[str, list[Scores]] = {}
    for group in groups:
        for batch in group.batches:
            tokens, rows, answers = (torch.from_numpy(x).to(device) for x in batch)
            with mixed_precision(device, dtype):
                logits = model(tokens, group.layout, rows)
            losses = F.cross_entropy(logits.float(), answers, reduction="none")
            correct = logits.argmax(-1) == answers
            scores.setdefault(group.name, []).append(Scores(batch, losses.cpu().numpy(), correct.cpu().numpy()))
            between()
    return scores


def mixed_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """An autocast context with matrix products and attention in ``dtype``; without effect for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)
