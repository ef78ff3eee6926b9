"""The learning rate by hand-computed values, and that it reaches the optimizer's groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nsa_cp.training.config import TrainSection
from nsa_cp.training.schedule import learning_rate, set_learning_rate


def test_warm_up_then_cosine() -> None:
    train = TrainSection(steps=14, warmup_steps=4, lr=1.0, min_lr=0.1)
    assert [learning_rate(step, train) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(4, train) == 1.0
    # 9 steps of cosine: a third of the way the cosine is cos(pi/3) = 1/2.
    assert learning_rate(7, train) == pytest.approx(0.1 + 0.9 * 0.75, rel=1e-12)
    assert learning_rate(10, train) == pytest.approx(0.1 + 0.9 * 0.25, rel=1e-12)
    assert learning_rate(13, train) == pytest.approx(0.1, rel=1e-12)
    assert learning_rate(99, train) == pytest.approx(0.1, rel=1e-12)


def test_edges() -> None:
    assert learning_rate(0, TrainSection(steps=1, warmup_steps=0, lr=1.0, min_lr=0.5)) == 0.5
    assert learning_rate(2, TrainSection(steps=3, warmup_steps=3, lr=1.0, min_lr=0.5)) == 1.0
    assert learning_rate(0, TrainSection(steps=3, warmup_steps=0, lr=1.0, min_lr=0.5)) == 1.0


def test_groups_keep_their_multipliers() -> None:
    groups = [{"wd_mult": 1.0, "lr_mult": 1.0}, {"wd_mult": 0.0, "lr_mult": 2.0}]
    set_learning_rate(SimpleNamespace(param_groups=groups), 0.25, 0.5)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.25, 0.5), (0.5, 0.0)]
