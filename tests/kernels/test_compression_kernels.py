"""Compression kernels against float64: means, one matrix, and one hidden layer; values and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_cp.kernels.compression.backward import compress_backward
from nsa_cp.kernels.compression.forward import compress_forward, position_bias
from nsa_cp.testing import assert_close

# name: document lengths, groups, channels, hidden channels, l, d
SHAPES = {
    "overlapping": ((45, 8, 0, 7, 250), 2, 24, 40, 8, 4),
    "three-deep": ((61,), 1, 72, 40, 12, 4),
    "apart": ((33, 40), 2, 16, 40, 8, 8),
    "odd": ((29, 50), 3, 21, 83, 9, 3),
    "many blocks": ((1100,), 1, 5, 7, 2, 1),
}


def make_starts(lengths: tuple[int, ...], block: int, stride: int, device: str) -> Tensor:
    """Rows at which the complete blocks of packed documents start, and three unused rows before the second document."""
    starts, first = [], 0
    for number, length in enumerate(lengths):
        first += 3 if number == 1 else 0
        starts += list(range(first, first + length - block + 1, stride))
        first += length
    return torch.tensor(starts, dtype=torch.int32, device=device)


def make_weights(
    kind: str, groups: int, block: int, width: int, dtype: torch.dtype, device: str, hidden: int = 40
) -> list[Tensor]:
    total = block * width
    shapes = {"mean": [], "linear": [(total, width)], "mlp": [(total, hidden), (hidden, width)]}[kind]
    matrices = [torch.randn(groups, *shape, device=device) * shape[0] ** -0.5 for shape in shapes]
    position = [torch.randn(groups, block, width, device=device)] if matrices else []
    return [w.to(dtype) for w in position + matrices]


def compress(x: Tensor, starts: Tensor, weights: list[Tensor], block: int) -> Tensor:
    """phi from its definition, block by block."""
    blocks = torch.stack([x[s : s + block] for s in starts.tolist()])
    mean = blocks.mean(1)
    if not weights:
        return mean
    flat = (blocks.transpose(1, 2) + weights[0]).flatten(2)
    product = torch.einsum("cgk,gkf->cgf", flat, weights[1])
    if len(weights) == 2:
        return product
    return mean + torch.einsum("cgf,gfd->cgd", torch.nn.functional.silu(product), weights[2])


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: str, kind: str, dtype: torch.dtype, tolerance: float, device: str) -> None:
    lengths, groups, width, hidden_width, block, stride = SHAPES[shape]
    starts = make_starts(lengths, block, stride, device)
    rows = sum(lengths) + 5
    x = torch.randn(rows, groups, width, device=device).to(dtype)
    weights = make_weights(kind, groups, block, width, dtype, device, hidden_width)
    dy = torch.randn(len(starts), groups, width, device=device).to(dtype)

    leaves = [t.double().requires_grad_() for t in (x, *weights)]
    expected = compress(leaves[0], starts, leaves[1:], block)
    gradients = torch.autograd.grad((expected * dy.double()).sum(), leaves)
    out, hidden = compress_forward(x, starts, weights, block)
    assert out.dtype == dtype and (hidden is not None) == (kind == "mlp")
    assert_close(out, expected.detach(), max_relative_error=2 * tolerance, name="out")
    dx, dweights = compress_backward(x, starts, weights, block, stride, hidden, dy)
    assert dx.dtype == dtype and all(d.dtype == dtype for d in dweights)
    assert_close([dx, *dweights], list(gradients), max_relative_error=3 * tolerance, name="gradient")


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_strided_inputs_and_weights_of_another_dtype(kind: str, device: str) -> None:
    starts = make_starts((40,), 8, 4, device)
    x = torch.randn(2, 80, 24, device=device, dtype=torch.float16).transpose(0, 1)[::2]
    weights = make_weights(kind, 2, 8, 24, torch.float32, device)
    halves = [w.half() for w in weights]
    strided = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights]
    out, hidden = compress_forward(x, starts, strided, 8)
    expected, expected_hidden = compress_forward(x.contiguous(), starts, halves, 8)
    assert out.dtype == torch.float16
    assert_close(out, expected, max_relative_error=2e-3, name="out")
    dy = torch.randn(24, len(out), 2, device=device).permute(1, 2, 0)
    dx, dweights = compress_backward(x, starts, strided, 8, 4, hidden, dy)
    assert dx.shape == x.shape and all(
        d.shape == w.shape and d.dtype == torch.float32 for d, w in zip(dweights, weights, strict=True)
    )
    expected_dx, expected_dweights = compress_backward(x.contiguous(), starts, halves, 8, 4, expected_hidden, dy.half())
    assert_close([dx, *dweights], [expected_dx, *expected_dweights], max_relative_error=3e-3, name="gradient")
    dx, dweights = compress_backward(x, starts, weights, 8, 4, hidden, torch.zeros_like(out))
    assert (dx == 0).all() and all((d == 0).all() for d in dweights)


@pytest.mark.parametrize(
    "groups, block, width, hidden", [(1, 32, 16, 16), (1, 1, 1, 1), (3, 43, 13, 19)], ids=["one tile", "one channel", "odd"]
)
def test_what_the_position_adds_is_summed_in_float32(groups: int, block: int, width: int, hidden: int, device: str) -> None:
    """Whatever the weights' dtype: it goes into every block."""
    position = torch.randn(groups, block, width, device=device).half()
    weight = torch.randn(groups, block * width, hidden, device=device).half()
    expected = torch.bmm(position.double().view(groups, 1, -1), weight.double())[:, 0]
    bias = position_bias(position, weight)
    assert bias.dtype == torch.float32
    assert_close(bias, expected, max_relative_error=1e-6, name="bias")


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_a_block_has_the_same_bits_among_any_others(kind: str, dtype: torch.dtype, device: str) -> None:
    """Other ranks see a block among others, in other tiles; the choice of blocks must not depend on it."""
    x = torch.randn(8 * 150, 1, 32, device=device).to(dtype)
    starts = make_starts((len(x),), 16, 8, device)
    weights = make_weights(kind, 1, 16, 32, dtype, device)
    whole, hidden = compress_forward(x, starts, weights, 16)
    for part in (slice(0, 1), slice(3, 80), slice(77, None)):
        alone, alone_hidden = compress_forward(x, starts[part].contiguous(), weights, 16)
        assert torch.equal(alone, whole[part])
        assert hidden is None or torch.equal(alone_hidden, hidden[part])


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_no_complete_block(kind: str, device: str) -> None:
    weights = make_weights(kind, 2, 8, 24, torch.float32, device)
    x = torch.randn(7, 2, 24, device=device)
    starts = torch.empty(0, dtype=torch.int32, device=device)
    out, hidden = compress_forward(x, starts, weights, 8)
    assert out.shape == (0, 2, 24)
    dx, dweights = compress_backward(x, starts, weights, 8, 4, hidden, out)
    assert (dx == 0).all() and all((d == 0).all() for d in dweights) and len(dweights) == len(weights)


def test_bad_arguments_are_refused(device: str) -> None:
    x, starts = torch.zeros(20, 2, 24, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    weights = make_weights("linear", 2, 8, 24, torch.float32, device)
    with pytest.raises(ValueError, match="do not fit blocks of 4 tokens"):
        compress_forward(x, starts, weights, 4)
    with pytest.raises(ValueError, match="must divide"):
        compress_backward(x, starts, weights, 8, 3, None, torch.zeros(1, 2, 24, device=device))
