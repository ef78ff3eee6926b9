"""The whole method on the kernels, as the ops call them, beside the torch path in float64."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from nsa_cp import NativeSparseAttention, SequenceLayout
from nsa_cp.attention import full_attention, sliding_window_attention
from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.kernels.selected_attention import by_block
from nsa_cp.ops.plan import get_layout_plan, get_plan, get_window_plan
from nsa_cp.testing import relative_error
from nsa_cp.testing.cases import make_problem, solve

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=3, num_local_blocks=1, window_size=20
)


LAUNCHERS = [
    "block_selection.forward",
    "interval_attention.forward",
    "interval_attention.backward",
    "query_gradients.backward",
    "selected_attention.forward",
]


@pytest.mark.parametrize("compressor, bulk", [("mlp", False), ("linear", True)], ids=["plain", "bulk"])
def test_whole_method(compressor: str, bulk: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU tiles come in bulk where they can; the interpreter plays both. Selected attention goes both its ways, block by
    block in several passes."""
    monkeypatch.setattr(by_block, "WORKSPACE_BYTES", 1)
    passes = mock.Mock(side_effect=by_block.passes)
    monkeypatch.setattr(by_block, "passes", passes)
    if bulk:
        monkeypatch.setattr(by_block, "MOST_HEADS", 0)
        monkeypatch.setattr(by_block, "MOST_HEADS_DQ", 0)
    if device == "cpu":
        for name in LAUNCHERS:
            monkeypatch.setattr(f"nsa_cp.kernels.{name}.copies_in_bulk", lambda *tensors: bulk)
    config = replace(CONFIG, compressor=compressor, shared_kv=compressor == "linear", backend="triton")
    exact = make_problem(config, (0, 3, 43), rotary=RotaryConfig(), dtype=torch.float32).to(device, torch.float64)
    exact = replace(exact, config=replace(config, backend="torch"))
    expected = solve(exact)
    actual = solve(replace(exact.to(torch.float32), config=config))
    assert torch.equal(actual["blocks"], expected["blocks"])
    for name, value in expected.items():
        if name != "blocks":
            assert relative_error(actual[name], value) < 5e-6, name
    assert passes.call_count == (0 if bulk else 2)


@pytest.mark.parametrize("kind", ["nsa", "window", "full"])
def test_training_goes_on_after_evaluation_in_inference_mode(kind: str, device: str) -> None:
    """What the first call with a layout keeps for later ones must serve a backward, too."""
    for plans in (get_plan, get_layout_plan, get_window_plan):
        plans.cache_clear()
    layout, rotary = SequenceLayout.build((0, 3, 32)), RotaryConfig()
    module = NativeSparseAttention(
        replace(CONFIG, backend="triton"), num_attention_heads=2, num_query_groups=1, qk_dim=16, rotary=rotary, device=device
    )
    q, k, logits = (torch.randn(32, *shape, device=device) for shape in ((2, 16), (1, 16), (2, 3)))

    def attend() -> torch.Tensor:
        if kind == "nsa":
            return module(q, [k] * 3, [k] * 3, logits, layout)
        if kind == "window":
            return sliding_window_attention(q, k, k, layout, window_size=5, rotary=rotary, backend="triton")
        return full_attention(q, k, k, layout, rotary=rotary)

    with torch.inference_mode():
        expected = attend()
    q.requires_grad_(), k.requires_grad_()
    out = attend()
    out.sum().backward()
    assert torch.equal(out, expected) and q.grad.isfinite().all() and k.grad.abs().sum() > 0
