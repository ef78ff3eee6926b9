"""Compression: every d tokens, phi summarises a block of l tokens as one compressed token (paper section 3.3.1, eq. 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel.autograd import exact_backward, exact_forward
from nsa_cp.ops.dispatch import accumulator_dtype

# Weights of one phi: () for mean, (position, weight) for linear, (position, w1, w2) for mlp; see `compress`.
CompressorWeights = tuple[torch.Tensor, ...]


def compress(
    x: torch.Tensor, starts: torch.Tensor, weights: CompressorWeights, config: NSAConfig, backend: str = "torch"
) -> torch.Tensor:
    """phi of the blocks ``x[starts[c] : starts[c] + l]``, each K/V head with weights of its own; differentiable.

    ``mean``: the block mean. ``linear``: ``flatten(x + position) @ weight``. ``mlp``: block mean plus
    ``silu(flatten(x + position) @ w1) @ w2``. Flattening is token-major.

    Args:
        x: [M, G, D], keys or values.
        starts: int32 [C], the row of x at which each block starts.
        weights: () for ``mean``, (``position`` [G, l, D], ``weight`` [G, l*D, D]) for ``linear``, (``position``,
            ``w1`` [G, l*D, F], ``w2`` [G, F, D]) for ``mlp`` with a hidden layer of any width F.
        backend: ``torch``, or ``triton``, which needs overlapping blocks to start exactly d apart (see
            ``NSAPlan.compression_is_gapless``).

    Returns:
        [C, G, D] in the dtype of x.
    """
    if backend == "triton":
        return _KernelCompress.apply(x, starts, config, *weights)
    return _compress(x, starts, config, weights).transpose(0, 1).to(x.dtype)


def _compress(x: torch.Tensor, starts: torch.Tensor, config: NSAConfig, weights: CompressorWeights) -> torch.Tensor:
    """:func:`compress` in torch: [G, C, D] in the accumulator's dtype. Matrices are first rounded to the dtype of x, as in the
    kernels."""
    accumulator = accumulator_dtype(x)
    block = torch.arange(config.compress_block_size, device=x.device)
    blocks = x[starts.to(torch.int64)[:, None] + block].permute(2, 0, 1, 3).to(accumulator)
    if config.compressor == "mean":
        return blocks.mean(2)
    products = [w.to(x.dtype).to(accumulator) for w in weights[1:]]
    flat = (blocks + weights[0].to(accumulator)[:, None]).flatten(2)
    if config.compressor == "linear":
        return flat @ products[0]
    return blocks.mean(2) + F.silu(flat @ products[0]) @ products[1]


def check_compressor_weights(name: str, weights: CompressorWeights, x: torch.Tensor, config: NSAConfig) -> None:
    """Check that ``weights`` have the shapes that ``config.compressor`` needs for the groups and channels of ``x`` [T, G, D].

    Raises:
        ValueError: with the shapes given and those that fit; ``name`` is what it calls the weights.
    """
    groups, dim, length = x.shape[1], x.shape[2], config.compress_block_size
    hidden = weights[1].shape[-1] if config.compressor == "mlp" and len(weights) == 3 else dim
    position, product = (groups, length, dim), (groups, length * dim, hidden)
    fitting = {"mean": [], "linear": [position, product], "mlp": [position, product, (groups, hidden, dim)]}[config.compressor]
    shapes = [tuple(w.shape) for w in weights]
    if shapes != fitting:
        raise ValueError(f"{name} of shapes {shapes} do not fit compressor = {config.compressor!r}; it takes {fitting}")


class _KernelCompress(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx, x, starts, config: NSAConfig, *weights):  # noqa: ANN001, ANN205
        from nsa_cp.kernels.compression.forward import compress_forward

        out, hidden = compress_forward(x, starts, weights, config.compress_block_size)
        ctx.save_for_backward(x, starts, hidden, *weights)
        ctx.config = config
        return out

    @staticmethod
    @exact_backward
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        from nsa_cp.kernels.compression.backward import compress_backward

        x, starts, hidden, *weights = ctx.saved_tensors
        length, stride = ctx.config.compress_block_size, ctx.config.compress_stride
        dx, dweights = compress_backward(x, starts, weights, length, stride, hidden, grad)
        return dx, None, None, *dweights


def initial_compressor_weights(
    config: NSAConfig, num_groups: int, dim: int, generator: torch.Generator | None = None
) -> CompressorWeights:
    """Initial weights of one phi, with which it is the block mean: float32 on the CPU, laid out as :func:`compress` takes them.

    Args:
        num_groups: G, K/V heads. dim: D, channels of each.
        generator: draws ``w1`` of ``mlp``, the only weight that is random.
    """
    length = config.compress_block_size
    if config.compressor == "mean":
        return ()
    position = torch.zeros(num_groups, length, dim)
    if config.compressor == "linear":
        mean = torch.eye(dim).repeat(length, 1) / length
        return position, mean.expand(num_groups, -1, -1).clone()
    hidden = torch.randn(num_groups, length * dim, dim, generator=generator) * (length * dim) ** -0.5
    return position, hidden, torch.zeros(num_groups, dim, dim)
