"""A small Megatron GPT on one GPU in bf16: the loss curve of the Triton kernels is the torch path's but for rounding.

Training amplifies rounding, so two right runs drift apart too. How far is measured, not assumed: the torch path runs twice, the
second time from weights moved by less than bf16 resolves. The kernels may be no further from the torch path than some times
that; a run that loses one branch's gradient is much further.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_cp import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS, LAST = 200, 50
# A higher learning rate makes the runs chaotic: rounding's drift then hides a lost gradient.
SETTINGS: dict[str, Any] = {
    "model": dict(
        num_layers=2, hidden_size=256, num_attention_heads=8, num_query_groups=2, kv_channels=64, rotary_base=1e4,
        equal_start=False,
    ),
    "nsa": dict(compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=4, window_size=64),
    "data": dict(sequence_length=512),
    "train": dict(
        steps=STEPS, global_batch_size=1, micro_batch_size=1, lr=2e-4, min_lr=2e-5, warmup_steps=20, dtype="bf16", device="cuda"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Gap:
    """Absolute differences of two loss curves, nats a token: over all steps, and over the last ones."""

    mean: float
    last_mean: float
    last_max: float

    @classmethod
    def between(cls, ours: list[float], theirs: list[float]) -> Gap:
        gaps = (torch.tensor(ours) - torch.tensor(theirs)).abs()
        return cls(float(gaps.mean()), float(gaps[-LAST:].mean()), float(gaps[-LAST:].max()))


@pytest.fixture(scope="module")
def train() -> Iterator[Callable[..., list[float]]]:
    """``train(backend, *overrides, nudge=False, steps=STEPS)``: the losses of a run, in process groups of this process alone."""
    from nsa_cp.training.config_load import build_config
    from nsa_cp.training.plan import open_source
    from nsa_cp.training.setup import Launch, build_trainer, close_processes, init_processes
    from nsa_cp.training.step import Progress, train_step

    device = torch.device("cuda", 0)

    def run(backend: str, *overrides: str, nudge: bool = False, steps: int = STEPS) -> list[float]:
        config = build_config(copy.deepcopy(SETTINGS), [f"nsa.backend={backend}", *overrides])
        trainer = build_trainer(config, device)
        if nudge:
            _nudge(trainer.optimizer)
        source, progress, going_on = open_source(config), Progress(), SimpleNamespace(name=None)
        return [train_step(trainer, source, progress, going_on)["loss"] for _ in range(steps)]

    init_processes(build_config(copy.deepcopy(SETTINGS), []), Launch(), device)
    yield run
    close_processes()


@torch.no_grad()
def _nudge(optimizer: Any) -> None:
    """Move every float32 main weight by up to a quarter of bf16's spacing."""
    generator = torch.Generator("cuda").manual_seed(1)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    assert weights and all(p.dtype == torch.float32 for p in weights), "bf16 weights could not be moved by so little"
    for weight in weights:
        noise = torch.rand(weight.shape, generator=generator, device=weight.device) - 0.5
        weight.mul_(1 + 2**-9 * noise)


@pytest.fixture(scope="module")
def torch_losses(train: Callable[..., list[float]]) -> list[float]:
    return train("torch")


@pytest.fixture(scope="module")
def rounding(train: Callable[..., list[float]], torch_losses: list[float]) -> Gap:
    """How far two right runs are apart."""
    return Gap.between(train("torch", nudge=True), torch_losses)


@pytest.fixture(scope="module")
def bound(rounding: Gap) -> Gap:
    """What the kernels may differ by: four times rounding's own drift, and no less than rounding could be by good luck."""
    return Gap(4 * rounding.mean + 5e-4, 4 * rounding.last_mean + 5e-4, 4 * rounding.last_max + 2e-3)


def test_loss_curve_is_the_torch_paths(train: Callable[..., list[float]], torch_losses: list[float], bound: Gap) -> None:
    losses = train("triton")
    assert losses[-1] < 0.7 * losses[0], f"it learns nothing: {losses[0]} to {losses[-1]}"
    gap = Gap.between(losses, torch_losses)
    print(f"triton against torch: {gap}; bound {bound}")
    assert gap.mean <= bound.mean and gap.last_mean <= bound.last_mean and gap.last_max <= bound.last_max, (gap, bound)


@pytest.mark.parametrize("branch", [0, 1], ids=["compressed", "selected"])
def test_a_branch_without_gradient_is_noticed(
    train: Callable[..., list[float]], torch_losses: list[float], bound: Gap, monkeypatch: pytest.MonkeyPatch, branch: int
) -> None:
    """Keys and values of one branch get no gradient, everything else is right: the curves must not match."""
    whole = attention.native_sparse_attention

    def lossy(q: torch.Tensor, k: Any, v: Any, *others: Any, **named: Any) -> Any:
        k, v = (tuple(x.detach() if i == branch else x for i, x in enumerate(xs)) for xs in (k, v))
        return whole(q, k, v, *others, **named)

    monkeypatch.setattr(attention, "native_sparse_attention", lossy)
    gap = Gap.between(train("triton"), torch_losses)
    print(f"without a gradient: {gap}; bound {bound}")
    assert gap.mean > bound.mean and gap.last_mean > bound.last_mean, (gap, bound)
