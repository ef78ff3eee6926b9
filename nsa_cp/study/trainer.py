"""One run: trains a small model on a task, stage by stage, and tests it.

On CUDA the step is captured as a CUDA graph once per stage and replayed, because at this size launching its kernels takes longer
than running them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nsa_cp.ops.plan import get_layout_plan, get_plan, get_window_plan
from nsa_cp.study.evaluate import evaluate, mixed_precision
from nsa_cp.study.model import Decoder
from nsa_cp.study.probe import gate_means, probe
from nsa_cp.study.settings import RunSettings
from nsa_cp.study.task import Batch, Stage

# Eager steps before a stage's graph is captured, in which all that happens lazily (compiling, planning, allocating) happens.
_STEPS_BEFORE_CAPTURE = 3
# Steps between looks at the clock, each of which waits for the device.
_STEPS_AT_ONCE = 10


class OutOfTime(Exception):
    """The deadline came before the run's end."""


class CaptureFailed(RuntimeError):
    """A step could not be captured as a CUDA graph; afterwards the process's CUDA state is not to be trusted."""


@dataclass
class TrainedRun:
    """What a run leaves: the model, its figures, and a point of the curve for each validation (the latter two as JSON values)."""

    model: Decoder
    figures: dict[str, Any]
    curve: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains the model of ``settings``.

    Args:
        device: of model and batches.
        use_graph: replay steps as CUDA graphs; without effect on a CPU.
        deadline: when to give up, by ``time.monotonic``; None for never.
        on_warm: called in each stage once all that its training step needs is compiled.
        on_point: called with each point of the curve.
    """

    def __init__(
        self,
        settings: RunSettings,
        device: torch.device,
        *,
        use_graph: bool = True,
        deadline: float | None = None,
        on_warm: Callable[[], None] = lambda: None,
        on_point: Callable[[dict[str, Any]], None] = lambda point: None,
    ) -> None:
        self.settings, self.device, self.deadline = settings, device, deadline
        self.use_graph = use_graph and device.type == "cuda"
        self._on_warm, self._on_point = on_warm, on_point
        self.model = Decoder(settings.model, settings.seed).to(device)
        self.optimizer = self._make_optimizer()
        self.dtype = getattr(torch, settings.train.precision)
        self.total_steps = sum(stage.steps for stage in settings.task.stages)
        self.curve: list[dict[str, Any]] = []
        self.steps_taken = 0

    def run(self) -> TrainedRun:
        """Train, with validations on the way, and test.

        Raises:
            OutOfTime: the deadline came first.
            CaptureFailed: CUDA graphs do not work here for this model; run again without, in a new process.
        """
        started, first_step = time.perf_counter(), 0
        for number, stage in enumerate(self.settings.task.stages):
            self._train_stage(number, stage, first_step)
            first_step += stage.steps
        trained = time.perf_counter() - started
        task, last = self.settings.task, len(self.settings.task.stages) - 1
        figures = {
            "valid": self._evaluate(task.valid(last)),
            "test": self._evaluate(task.tests()),
            "attention": probe(self.model, next(iter(task.valid(last))), self.dtype),
            "steps": self.steps_taken,
            "train_seconds": round(trained, 2),
            "seconds": round(time.perf_counter() - started, 2),
            "graph": self.use_graph,
        }
        return TrainedRun(self.model, figures, self.curve)

    def _train_stage(self, number: int, stage: Stage, first_step: int) -> None:
        self.model.enter_stage(number)
        step = _Step(self, stage)
        losses = torch.zeros(stage.steps, device=self.device)
        logged, train = 0, self.settings.train
        for index, batch in enumerate(self._batches(number, stage)):
            self._set_learning_rate(first_step + index)
            losses[index] = step(batch)
            self.steps_taken += 1
            done = index + 1
            if done == _STEPS_BEFORE_CAPTURE + 2:
                self._on_warm()
            if done % _STEPS_AT_ONCE == 0:
                losses[index].item()
                self._check_time()
            if done % train.eval_every == 0 or done == stage.steps:
                figures = self._log(number, float(losses[logged:done].mean()))
                logged = done
                if stage.enough is not None and figures["accuracy"] >= stage.enough:
                    break

    def _batches(self, number: int, stage: Stage) -> Iterator[Batch]:
        """The stage's training batches, each drawn (on the host) while the device computes the step before."""
        for index in range(stage.steps):
            yield self.settings.task.draw(number, np.random.default_rng([self.settings.seed, number, index]))

    def _log(self, number: int, loss: float) -> dict[str, Any]:
        figures = self._evaluate(self.settings.task.valid(number))
        point = {"step": self.steps_taken, "stage": number, "train_loss": loss, **figures}
        self.curve.append({**point, "gates": gate_means(self.model)})
        self._on_point(self.curve[-1])
        return figures

    def _evaluate(self, groups: Iterator[Any]) -> dict[str, Any]:
        return self.settings.task.figures(evaluate(self.model, groups, self.dtype, self._check_time))

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime

    def _make_optimizer(self) -> torch.optim.AdamW:
        train = self.settings.train
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
        # A graph replays with the addresses it saw, so the rate must be a tensor whose value is overwritten.
        lr = torch.tensor(self.settings.lr, device=self.device) if self.use_graph else self.settings.lr
        return torch.optim.AdamW(groups, lr=lr, betas=train.betas, fused=True, capturable=self.use_graph)

    def _set_learning_rate(self, step: int) -> None:
        rate = learning_rate(step, self.total_steps, self.settings)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


class _Step:
    """One optimizer step on a batch of a stage: eager at first, then a replayed graph."""

    def __init__(self, trainer: Trainer, stage: Stage) -> None:
        self.trainer, self.layout = trainer, stage.layout
        self.buffers: list[torch.Tensor] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss: torch.Tensor | None = None
        self.calls = 0
        # Kept alive, because a graph reads their tensors at fixed addresses and the caches of plans drop old ones.
        nsa, device = trainer.settings.model.nsa, trainer.device
        self.plans = [
            get_layout_plan(self.layout, device), get_plan(self.layout, nsa, device),
            get_window_plan(self.layout, nsa.window_size, device),
        ]  # fmt: skip

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Take a step; returns the loss of ``batch`` before it, on the device."""
        self._fill(batch)
        self.calls += 1
        if not self.trainer.use_graph:
            return self._compute()
        if self.graph is None and self.calls > _STEPS_BEFORE_CAPTURE:
            self._capture()
        if self.graph is None:
            return self._on_side_stream()
        self.graph.replay()
        return self.loss

    def _fill(self, batch: Batch) -> None:
        new = [torch.from_numpy(x) for x in batch]
        if not self.buffers:
            self.buffers = [x.to(self.trainer.device) for x in new]
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer.copy_(x)

    def _compute(self) -> torch.Tensor:
        tokens, rows, answers = self.buffers
        trainer = self.trainer
        trainer.optimizer.zero_grad(set_to_none=True)
        with mixed_precision(trainer.device, trainer.dtype):
            logits = trainer.model(tokens, self.layout, rows)
        loss = F.cross_entropy(logits.float(), answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.settings.train.clip_norm)
        trainer.optimizer.step()
        return loss.detach()

    def _on_side_stream(self) -> torch.Tensor:
        """Compute on a side stream, as PyTorch requires of steps before a capture."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            loss = self._compute()
        current.wait_stream(side)
        return loss

    def _capture(self) -> None:
        self.trainer.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local, because another thread may use CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.loss = self._compute()
        except RuntimeError as error:
            raise CaptureFailed(str(error)) from error
        self.graph = graph


def learning_rate(step: int, total_steps: int, settings: RunSettings) -> float:
    """Learning rate of step ``step`` (0-based): linear warm-up, then cosine decay from the peak to a tenth of it."""
    warmup = settings.train.warmup_steps
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
