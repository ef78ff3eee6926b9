"""The backward of the branches: groups in slices, and what goes on from the compressed branch's dq."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from nsa_cp.config import NSAConfig
from nsa_cp.ops import branches, pipeline
from nsa_cp.testing import assert_close
from nsa_cp.testing.cases import make_problem, solve

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=16, backend="torch"
)
TOKENS, HEADS, GROUPS = 1000, 64, 4


@pytest.mark.parametrize("most", [1, 2])
def test_slices_of_groups_change_nothing(most: int) -> None:
    problem = make_problem(CONFIG, (0, 37, 100), num_heads=6, num_groups=3)
    expected = solve(problem)
    with mock.patch.object(pipeline, "most_groups", return_value=most) as asked:
        answers = solve(problem)
    assert asked.call_count == 1
    for key, value in expected.items():
        assert_close(answers[key], value, atol=1e-12, rtol=1e-12, name=key)


def _plan(block_size: int = 64, compressed: int = branches.LEAST_PAIRS // TOKENS) -> SimpleNamespace:
    config = NSAConfig(select_block_size=block_size)
    return SimpleNamespace(config=config, compressed_intervals=SimpleNamespace(num_keys=compressed))


def _inputs() -> tuple:
    q, k = torch.zeros(TOKENS, HEADS, 128, dtype=torch.bfloat16), torch.zeros(90, GROUPS, 128, dtype=torch.bfloat16)
    return q, q, (k, k), _plan()


@pytest.mark.parametrize("fitting, expected", [(0, 1), (1, 1), (3, 3), (9, GROUPS)])
def test_groups_within_the_buffer(fitting: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with Triton from 3.6 on, for Linux")
    monkeypatch.setattr(branches, "makes_five_products", lambda *_: True)
    monkeypatch.setattr(branches, "_BUFFER_BYTES", TOKENS * HEADS // GROUPS * 128 * 4 * fitting)
    assert branches.most_groups(*_inputs(), "triton") == expected


@pytest.mark.parametrize("backend, hopper, expected", [("triton", True, True), ("torch", True, False), ("triton", False, False)])
def test_who_makes_five_products(backend: str, hopper: bool, expected: bool) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with Triton from 3.6 on, for Linux")
    with mock.patch("nsa_cp.kernels.query_gradients.backward.on_hopper", return_value=hopper):
        q, grad, (k, v), plan = _inputs()
        ask = branches.makes_five_products
        assert ask(q, grad, (k, v), plan, backend) == expected
        # Tokens of 2 heads are no task for the kernel that reads the buffer, odd blocks neither.
        assert not ask(q[:, :8], grad[:, :8], (k, v), plan, backend)
        assert not ask(q, grad, (k, v), _plan(block_size=32), backend)
        assert not ask(q, grad, (k, v), _plan(compressed=branches.LEAST_PAIRS // TOKENS - 1), backend)
        # A value narrower than the keys.
        assert not ask(q, grad[..., :64], (k, v[..., :64]), plan, backend)
