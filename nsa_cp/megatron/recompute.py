"""Megatron's activation recompute, selective and full, with the selection of the first run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core import tensor_parallel

from nsa_cp.ops.recompute import SelectionMemory

# Attribute of the wrapped checkpoint: itself and Megatron's own.
_WRAPPED = "_nsa_cp_wrapped"


def reuse_selections() -> None:
    """From now on ``megatron.core.tensor_parallel.checkpoint`` remembers the blocks chosen inside the call it checkpoints.

    Megatron gives a layer no sign of which checkpointed call, of which microbatch, it is being recomputed for. The checkpoint
    itself knows: its function is wrapped with a memory that lives and dies with it. Calls without NSA layers are as before;
    doing this again does nothing, and :func:`stop_reusing_selections` undoes it. Transformer Engine's own checkpoint (fp8) is
    another function: under it layers choose again.
    """
    original = tensor_parallel.checkpoint
    # Also true of a wrapper that somebody else has put around ours with functools.wraps.
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
        memory = SelectionMemory()

        def run(*inputs: Any) -> Any:
            with memory:
                return function(*inputs)

        return original(run, distribute_saved_activations, *args)

    setattr(checkpoint, _WRAPPED, (checkpoint, original))
    tensor_parallel.checkpoint = checkpoint


def stop_reusing_selections() -> None:
    """Give Megatron its own ``checkpoint`` back; nothing where it has it already.

    What is in flight still recomputes with its blocks; layers checkpointed from now on choose again in the recomputation. A
    layer built later with recompute on calls :func:`reuse_selections` anew.

    Raises:
        RuntimeError: somebody else has wrapped the function since.
    """
    current = tensor_parallel.checkpoint
    ours, original = getattr(current, _WRAPPED, (current, current))
    if current is not ours:
        raise RuntimeError(
            f"megatron.core.tensor_parallel.checkpoint is now {current!r} around nsa_cp's; take that off first, then stop again"
        )
    tensor_parallel.checkpoint = original
