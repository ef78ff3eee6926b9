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
    dgates, delta = combine_backward(do, outs, gates)
    assert_close(dgates, expected_dgates, max_relative_error=1e-5, name="dgates")
    for b in range(branches):
        row_sum = (do.double() * outs[b].double()).sum(-1)
        assert_close(delta[b], gates[..., b].double() * row_sum, max_relative_error=1e-5, name=f"delta[{b}]")


def test_strided_inputs(device: str) -> None:
    outs = [torch.randn(24, 3, 11, device=device).permute(2, 1, 0) for _ in range(3)]
    outs[1] = torch.randn(11, 6, 24, device=device)[:, ::2]
    gates = torch.rand(3, 3, 11, device=device).permute(2, 1, 0)
    assert not any(x.is_contiguous() for x in (*outs, gates))
    expected = sum(out * gates[..., b, None] for b, out in enumerate(outs))
    assert_close(combine_forward(outs, gates), expected, max_relative_error=1e-6, name="out")
    dgates, _ = combine_backward(outs[0], outs, gates)
    assert_close(dgates, torch.stack([(outs[0] * out).sum(-1) for out in outs], -1), max_relative_error=1e-5, name="dgates")


def test_bad_shapes_are_refused(device: str) -> None:
    out = torch.zeros(4, 2, 16, device=device)
    with pytest.raises(ValueError, match="do not fit gates"):
        combine_forward([out, out], torch.zeros(4, 2, 3, device=device))
    with pytest.raises(ValueError, match="do not fit gates"):
        combine_backward(out, [out, out[:3]], torch.zeros(4, 2, 2, device=device))
