"""The gate projection for ``gate="branch"``: one logit per token and branch, shared by all heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from nsa_cp.megatron.config import parameter_device


class BranchGate(torch.nn.Module):
    """Linear map from h channels to one logit per branch, replicated over tensor-parallel ranks.

    Each rank applies the same logits to different heads, so the gradient that reaches the logits is a partial sum. Without
    sequence parallelism it is summed over ranks right there, after which weight and input get the same full gradient on every
    rank. Under sequence parallelism each rank projects its own tokens, the logits are gathered (three channels a token) and
    their gradient is reduce-scattered; the weight's gradient then covers this rank's tokens only, and its attribute
    ``sequence_parallel`` makes Megatron's ``finalize_model_grads`` sum it.
    """

    def __init__(self, config: TransformerConfig, num_gates: int, tp_group: ProcessGroup) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel and tp_group.size() > 1
        weight = torch.empty(num_gates, config.hidden_size, dtype=torch.float32)
        config.init_method(weight)  # on the CPU generator, which all tensor-parallel ranks share
        self.weight = torch.nn.Parameter(weight.to(parameter_device(config), config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits [s, b, num_gates] from [s, b, h], or from this rank's share of s under sequence parallelism."""
        logits = torch.nn.functional.linear(hidden_states, self.weight)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(logits, tensor_parallel_output_grad=True, group=self.tp_group)
        return _SummedGradient.apply(logits, self.tp_group)


class _SummedGradient(torch.autograd.Function):
    """Identity whose gradient is summed over a group.

    Megatron-Core's ``copy_to_tensor_model_parallel_region`` is meant for this, but version 0.16.1 sums a gradient that is not
    contiguous into a temporary copy and returns the unsummed one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """x as it is."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The sum of all ranks' gradients, in a tensor of its own."""
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        if ctx.group.size() > 1:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
