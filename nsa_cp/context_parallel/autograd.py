"""Decorators for this project's autograd Functions: unaffected by autocast, and differentiable once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def exact_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a Function's forward as if ``torch.autocast`` were off: sums in float32 stay so, and match the backward's."""

    @functools.wraps(forward)
    def run(ctx: Any, *arguments: Any) -> Any:
        with _autocast_off(arguments):
            return forward(ctx, *arguments)

    return run


def exact_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a backward. Differentiating it again raises an error, because only first derivatives are implemented."""

    @once_differentiable
    def run_once(ctx: Any, *gradients: Any) -> Any:
        with _autocast_off(gradients):
            return backward(ctx, *gradients)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        # Under create_graph. PyTorch's check looks at the incoming gradients only; where none of them requires a gradient, a
        # penalty on ours would be dropped without a word.
        if torch.is_grad_enabled():
            gradients = tuple(x if x is None else x.detach().requires_grad_() for x in gradients)
        return run_once(ctx, *gradients)

    return run


def _autocast_off(arguments: tuple[Any, ...]) -> torch.autocast:
    device = next((x.device.type for x in arguments if isinstance(x, torch.Tensor)), "cpu")
    return torch.autocast(device, enabled=False)


# Decorates what makes index tensors that are kept for later calls. Made under torch.inference_mode (evaluation before or between
# steps of training) they would otherwise be tensors that no backward may save.
makes_kept_tensors = torch.inference_mode(False)
