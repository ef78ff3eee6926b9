"""Gated sum and its row sums against float64."""

from __future__ import annotations

import pytest
import torch

from nsa_cp.kernels.gating.backward import combine_backward
from nsa_cp.kernels.gating.forward import combine_forward
from nsa_cp.testing import assert_close

SHAPES = {"odd": (37, 5, 24), "wide": (9, 2, 192), "one-row": (1, 1, 16), "none": (0, 4, 32)}


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("per_head", [True, False], ids=["head-gates", "branch-gates"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_gradients(shape: str, per_head: bool, branches: int, dtype: torch.dtype, tolerance: float, device: str) -> None:
    tokens, heads, width = SHAPES[shape]
    outs = [torch.randn(tokens, heads, width, device=device).to(dtype) for _ in range(branches)]
    gates = torch.rand(tokens, heads if per_head else 1, branches, device=device)
    do = torch.randn(tokens, heads, width, device=device).to(dtype)

    leaf = gates.double().requires_grad_()
    expected = sum(out.double() * leaf[..., b, None] for b, out in enumerate(outs))
    (expected_dgates,) = torch.autograd.grad((expected * do.double()).sum(), leaf)
    out = combine_forward(outs, gates)
    assert out.dtype == dtype
    assert_close(out, expected.detach(), max_relative_error=tolerance, name="out")
    lses = [torch.randn(tokens, heads, device=device) for _ in range(branches)]
    lses[0][1:] = float("-inf")
    gates[:1] = 0.0
    shift, delta = combine_backward(do, outs, lses, gates)
    dgates = delta if per_head else delta.sum(2, keepdim=True)
    assert_close(dgates.permute(1, 2, 0), expected_dgates, max_relative_error=1e-5, name="dgates")
    for b in range(branches):
        expected_shift = (lses[b].double() - gates[..., b].double().log()).masked_fill(lses[b].isinf(), float("inf"))
        assert_close(shift[b].exp().reciprocal(), expected_shift.exp().reciprocal(), max_relative_error=1e-5, name=f"shift[{b}]")


def test_strided_inputs(device: str) -> None:
    outs = [torch.randn(24, 3, 11, device=device).permute(2, 1, 0) for _ in range(3)]
    outs[1] = torch.randn(11, 6, 24, device=device)[:, ::2]
    gates = torch.rand(3, 3, 11, device=device).permute(2, 1, 0)
    assert not any(x.is_contiguous() for x in (*outs, gates))
    expected = sum(out * gates[..., b, None] for b, out in enumerate(outs))
    assert_close(combine_forward(outs, gates), expected, max_relative_error=1e-6, name="out")
    lses = [torch.randn(3, 11, device=device).T for _ in outs]
    shift, delta = combine_backward(outs[0], outs, lses, gates)
    assert_close(delta, torch.stack([(outs[0] * out).sum(-1) for out in outs]), max_relative_error=1e-5, name="delta")
    assert_close(shift, torch.stack(lses) - gates.permute(2, 0, 1).log(), max_relative_error=1e-5, name="shift")


def test_bad_shapes_are_refused(device: str) -> None:
    out = torch.zeros(4, 2, 16, device=device)
    with pytest.raises(ValueError, match="do not fit gates"):
        combine_forward([out, out], torch.zeros(4, 2, 3, device=device))
    with pytest.raises(ValueError, match="do not fit gates"):
        combine_backward(out, [out, out[:3]], [out[..., 0]] * 2, torch.zeros(4, 2, 2, device=device))
