"""Megatron's activation recompute, selective and full, with the selection of the first run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core import tensor_parallel

from nsa_cp.ops.recompute import SelectionMemory


def reuse_selections() -> None:
    """From now on ``megatron.core.tensor_parallel.checkpoint`` remembers the blocks chosen inside the call it checkpoints.

    Megatron gives a layer no sign of which checkpointed call, of which microbatch, it is being recomputed for. The checkpoint
    itself knows: its function is wrapped with a memory that lives and dies with it. Calls without NSA layers are as before;
    doing this again does nothing. Transformer Engine's own checkpoint (fp8) is another function: under it layers choose again.
    """
    original = tensor_parallel.checkpoint
    if getattr(original, "reuses_selections", False):
        return

    @functools.wraps(original)
    def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
        memory = SelectionMemory()

        def run(*inputs: Any) -> Any:
            with memory:
                return function(*inputs)

        return original(run, distribute_saved_activations, *args)

    checkpoint.reuses_selections = True  # type: ignore[attr-defined]
    tensor_parallel.checkpoint = checkpoint
