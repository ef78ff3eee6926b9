"""The rotation kernel against the torch path in float64: values, gradients, far positions, strides and empty inputs."""

from __future__ import annotations

import pytest
import torch

from nsa_cp.config import RotaryConfig
from nsa_cp.ops.rope import apply_rope, rotary_tables, rotation
from nsa_cp.testing import assert_close

CASES = [
    (RotaryConfig(), 1, 64),
    (RotaryConfig(base=500000.0), 5, 192),
    (RotaryConfig(percent=0.25), 3, 96),
    (RotaryConfig(base=100.0, percent=0.3), 2, 33),
    (RotaryConfig(percent=0.05), 2, 64),
]


@pytest.mark.parametrize(("rotary", "heads", "width"), CASES)
def test_values_and_gradients(rotary: RotaryConfig, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of rows that lie in a wider tensor, as those of a fused projection do, or head by head, at positions up to four million."""
    torch.manual_seed(0)
    rows = 301
    position = torch.randint(0, 1 << 22, (rows,), dtype=torch.int32, device=device)
    x = torch.randn(rows, heads, width + 7, device=device).to(dtype)[..., 3 : 3 + width]
    if heads == 3:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    x.requires_grad_()
    grad = torch.randn(rows, heads, width, device=device).to(dtype)
    out = rotation(rotary, position, x, "triton")(x)
    (dx,) = torch.autograd.grad(out, x, grad)
    exact = x.detach().double().requires_grad_()
    expected = apply_rope(exact, *rotary_tables(position, rotary, width, torch.float64))
    (exact_dx,) = torch.autograd.grad(expected, exact, grad.double())
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert out.dtype == dx.dtype == dtype
    assert_close(out.double(), expected, max_relative_error=bound)
    assert_close(dx.double(), exact_dx, max_relative_error=bound)
    assert torch.equal(out[..., rotary.dim(width) :], x[..., rotary.dim(width) :])


def test_a_position_that_is_off_by_one_differs(device: torch.device) -> None:
    """The bound above tells neighbours apart, also far out."""
    position = torch.full((4,), 1 << 22, dtype=torch.int32, device=device)
    x = torch.ones(4, 1, 64, device=device)
    rotate = lambda at: rotation(RotaryConfig(), at, x, "triton")(x)  # noqa: E731
    assert float((rotate(position) - rotate(position + 1)).norm() / x.norm()) > 1e-2


def test_nothing_and_no_rotation(device: torch.device) -> None:
    position = torch.zeros(0, dtype=torch.int32, device=device)
    x = torch.zeros(0, 2, 64, device=device, requires_grad=True)
    out = rotation(RotaryConfig(), position, x, "triton")(x)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape
    assert rotation(None, position, x, "triton")(x) is x
    assert rotation(RotaryConfig(percent=0.01), position, x, "triton")(x) is x
