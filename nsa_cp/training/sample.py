"""Continues a prompt with the trained model, by recomputing the whole sequence for every token. Every process takes part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.training.data import Sample, SampleSource, collate
from nsa_cp.training.forward import run_logits
from nsa_cp.training.setup import Trainer


def generate(trainer: Trainer, prompt: Sequence[int], num_tokens: int, *, temperature: float, seed: int = 0) -> list[int]:
    """Continue ``prompt``. Collective; every process returns the same tokens.

    The sequence is padded at its end, where causal attention never looks, to a length that can be cut over the processes. Tokens
    that no longer fit in ``data.sequence_length`` are dropped from the front of the context.

    Args:
        trainer: model and settings.
        prompt: token ids; if empty, the context begins with token 0.
        num_tokens: number of tokens to add.
        temperature: of the softmax; 0 takes the likeliest token.
        seed: of the random draws.

    Returns:
        The added token ids.
    """
    tokens, start = list(prompt) or [0], max(1, len(prompt))
    longest = trainer.config.data.sequence_length
    length = min(longest, _padded_length(trainer, start + num_tokens))
    draws = torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        context = tokens[-length:]
        logits = _next_logits(trainer, context, length)
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            weights = torch.softmax(logits.double() / temperature, dim=-1)
            tokens.append(int(torch.multinomial(weights, 1, generator=draws)))
    return tokens[start:]


def _padded_length(trainer: Trainer, length: int) -> int:
    """The smallest length, at least ``length``, of which every process can hold an equal part."""
    parallel = trainer.config.parallel
    multiple = math.lcm(2 * parallel.context, parallel.context * parallel.tensor)
    return -(-length // multiple) * multiple


def _next_logits(trainer: Trainer, context: Sequence[int], length: int) -> torch.Tensor:
    """Logits after the last token of ``context``: [vocabulary] float32 on the CPU, equal on all processes. Collective."""
    tokens = np.zeros(length, dtype=np.int64)
    tokens[: len(context)] = context
    batch = collate([Sample(tokens, tokens, np.ones(length, dtype=np.float32))])
    output = run_logits(trainer, batch)
    vocabulary = trainer.config.data.vocab_size
    assert vocabulary is not None, "the data source has set it"
    # For each shard of the vocabulary exactly one process fills in its part; all others add zeros, so the sum is exact.
    logits = torch.zeros(vocabulary, dtype=torch.float32, device=trainer.device)
    row = _local_row(trainer, len(context) - 1, length)
    if output is not None and row is not None and parallel_state.get_data_parallel_rank() == 0:
        shard = output[0, row].float()
        first = parallel_state.get_tensor_model_parallel_rank() * len(shard)
        logits[first : first + len(shard)] = shard
    dist.all_reduce(logits)
    return logits.cpu()


def _local_row(trainer: Trainer, position: int, length: int) -> int | None:
    """This context-parallel process's row for ``position``, or None if another one holds it."""
    layout = SequenceLayout.build(
        length,
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        kind=trainer.config.nsa.layout,
    )
    found = np.flatnonzero(layout.local_rows == position)
    return int(found[0]) if len(found) else None


def sample_text(trainer: Trainer, source: SampleSource) -> str:
    """The configured prompt and its continuation as text. Collective."""
    settings = trainer.config.sample
    prompt = source.encode(settings.prompt)
    added = generate(trainer, prompt, settings.tokens, temperature=settings.temperature, seed=trainer.config.seed)
    return source.decode([*prompt, *added])
