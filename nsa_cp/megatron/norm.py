"""RMSNorm that works under sequence parallelism without Transformer Engine or apex."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from nsa_cp.megatron.config import parameter_device


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; the reduction of half-precision input is in float32.

    Under sequence parallelism each tensor-parallel rank normalises different tokens, so its gradient of the weight is a partial
    sum. The weight's attribute ``sequence_parallel`` makes Megatron's ``finalize_model_grads`` add them up; PyTorch's own norm
    lacks it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device(config))
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] to the same shape. With a half-precision weight the result has its dtype, also where the residual
        stream is float32 (Megatron's ``fp32_residual_connection``)."""
        if x.dtype != self.weight.dtype and self.weight.dtype in (torch.bfloat16, torch.float16):
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
