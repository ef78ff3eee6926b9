"""Makes Megatron's activation recompute, selective and full, reuse the blocks that the first run chose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core import tensor_parallel

from nsa_cp.ops.recompute import SelectionMemory

# Attribute of our wrapper around Megatron's checkpoint, holding (the wrapper itself, Megatron's function).
_WRAPPED = "_nsa_cp_wrapped"


def reuse_selections() -> None:
    """Patch ``megatron.core.tensor_parallel.checkpoint`` to remember the blocks chosen inside the call it checkpoints.

    Megatron does not tell a layer for which checkpointed call, of which microbatch, it is being recomputed. The checkpoint itself
    knows, so its function is wrapped with a ``SelectionMemory`` that lives exactly as long as it does. Calls without NSA layers
    are unaffected. Patching again does nothing; :func:`stop_reusing_selections` undoes it. Transformer Engine's checkpoint (fp8)
    is another function: under it layers choose again.
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
    """Undo :func:`reuse_selections`; without effect if Megatron's own ``checkpoint`` is in place.

    Calls in flight still reuse their blocks; calls checkpointed from now on choose again when recomputed. Building another layer
    with recompute on patches the function anew.

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
