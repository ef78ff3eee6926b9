"""The backward of the branches: groups in slices, and what goes on from the compressed branch's dq."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from nsa_cp.config import NSAConfig
from nsa_cp.ops import branches_backward, pipeline
from nsa_cp.testing import assert_close
from nsa_cp.testing.cases import make_problem, solve

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=16, backend="torch"
)
TOKENS, HEADS, GROUPS = 1000, 64, 4


@pytest.mark.parametrize("at_once, slices", [(1, 3), (2, 2)])
def test_slices_of_groups_change_nothing(at_once: int, slices: int) -> None:
    problem = make_problem(CONFIG, (0, 37, 100), num_heads=6, num_groups=3)
    expected = solve(problem)
    with mock.patch.object(pipeline, "fused_backward_groups", return_value=at_once):
        with mock.patch.object(pipeline, "BranchesBackward", wraps=branches_backward.BranchesBackward) as made:
            answers = solve(problem)
    assert made.call_count == slices
    for key, value in expected.items():
        assert_close(answers[key], value, atol=1e-12, rtol=1e-12, name=key)


@pytest.mark.parametrize(
    "groups, mib, expected",
    [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 64, 2), (4, 65, 1), (8, 32, 4), (8, 1, 4), (8, 43, 2), (6, 1, 3), (4, 4096, 1)],
)
def test_groups_that_travel_together(groups: int, mib: int, expected: int) -> None:
    """Half of them at most, 128 MiB at most, and never less than one."""
    assert pipeline.groups_a_step(groups, mib << 20) == expected


VISIBLE = branches_backward.LEAST_PAIRS // (HEADS // GROUPS)


def _asked(
    visible: int,
    most: int = GROUPS,
    block_size: int = 64,
    backend: str = "triton",
    heads: int = HEADS,
    v_dim: int = 128,
    fewer: bool = True,
) -> int:
    plan = SimpleNamespace(
        config=NSAConfig(select_block_size=block_size), compressed_intervals=SimpleNamespace(num_visible=visible)
    )
    q, grad = (torch.zeros(TOKENS, heads, width, dtype=torch.bfloat16) for width in (128, v_dim))
    k, v = (torch.zeros(90, GROUPS, width, dtype=torch.bfloat16) for width in (128, v_dim))
    return branches_backward.fused_backward_groups(q, grad, (k, v), plan, backend, most, fewer=fewer)


@pytest.fixture
def on_hopper() -> Iterator[mock.Mock]:
    pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with Triton from 3.6 on, for Linux")
    with mock.patch("nsa_cp.kernels.query_gradients.backward.on_hopper", return_value=True) as asked:
        yield asked


@pytest.mark.parametrize("fitting, most, expected", [(0, 4, 1), (1, 4, 1), (3, 4, 2), (9, 4, 4), (9, 1, 1), (9, 3, 2)])
def test_groups_within_the_buffer(
    fitting: int, most: int, expected: int, on_hopper: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branches_backward, "_BUFFER_BYTES", TOKENS * HEADS // GROUPS * 128 * 4 * fitting)
    assert _asked(VISIBLE, most) == expected


@pytest.mark.parametrize("fitting, visible, expected", [(1, VISIBLE, 2), (4, VISIBLE, 2), (1, VISIBLE // 2 - 1, 0)])
def test_ranks_take_all_groups_of_a_slice_or_none(
    fitting: int, visible: int, expected: int, on_hopper: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank whose buffer would hold one group only must not cut slices that are messages to others."""
    buffer = TOKENS * HEADS // GROUPS * 128 * 4
    monkeypatch.setattr(branches_backward, "_BUFFER_BYTES", buffer * fitting)
    assert _asked(visible, most=2, fewer=False) == expected
    monkeypatch.setattr(branches_backward, "_MOST_BUFFER_BYTES", 2 * buffer - 1)
    assert _asked(visible, most=2, fewer=False) == 0


def test_who_takes_the_fused_backward(on_hopper: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _asked(VISIBLE) == GROUPS
    # What counts is what one launch computes: fewer pairs if all groups go at once, or packed documents that hide them.
    assert _asked(VISIBLE // GROUPS) == GROUPS and _asked(VISIBLE // GROUPS, most=1) == 0
    assert _asked(VISIBLE // GROUPS - 1) == 0
    # Tokens of 2 heads are no task for the kernel that reads the buffer, odd blocks and a value narrower than the keys neither.
    assert _asked(100 * VISIBLE, heads=8) == _asked(VISIBLE, block_size=32) == _asked(VISIBLE, v_dim=64) == 0
    assert _asked(VISIBLE, backend="torch") == 0
    monkeypatch.setattr(branches_backward, "_MOST_BUFFER_BYTES", TOKENS * HEADS // GROUPS * 128 * 4 - 1)
    assert _asked(VISIBLE) == 0
    on_hopper.return_value = False
    monkeypatch.undo()
    assert _asked(VISIBLE) == 0
