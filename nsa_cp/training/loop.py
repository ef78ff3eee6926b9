"""A run from its configuration to its summary. See docs/training.md."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nsa_cp.context_parallel import count_traffic
from nsa_cp.megatron import (
    check_apex,
    close_selected_branches,
    copy_dense_weights,
    open_selected_branches,
    set_selected_dropout,
)
from nsa_cp.training import plots
from nsa_cp.training.checkpoint import load_checkpoint, save_checkpoint
from nsa_cp.training.config import RunConfig
from nsa_cp.training.config_checks import check_world
from nsa_cp.training.data import SampleSource, load_text, train_batches
from nsa_cp.training.device import choose_device
from nsa_cp.training.errors import UserError, as_user_error
from nsa_cp.training.evaluate import bits_per_byte, validation_loss
from nsa_cp.training.files import write_atomically
from nsa_cp.training.forward import run_schedule
from nsa_cp.training.indexed import IndexedSource
from nsa_cp.training.manifest import (
    changed_settings,
    check_compatible,
    check_initial,
    find_initial,
    find_latest,
    read_manifest,
)
from nsa_cp.training.metrics import Reporter, agree
from nsa_cp.training.run_folder import RunFolder, read_metrics
from nsa_cp.training.sample import sample_text
from nsa_cp.training.schedule import learning_rate, set_learning_rate
from nsa_cp.training.setup import Launch, Trainer, build_trainer, close_processes, init_processes, seed_generators
from nsa_cp.training.signals import StopRequest


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        consumed_samples: training sequences used: the position in the data.
        wall_seconds: time spent training and validating, over all parts of a resumed run.
        saved_step: step of the newest checkpoint, or None.
        val_loss: validation loss after the last step, nats a token; None before.
    """

    step: int = 0
    consumed_samples: int = 0
    wall_seconds: float = 0.0
    saved_step: int | None = None
    val_loss: float | None = None


@dataclass
class Plan:
    """What is known of a run before any process waits for another.

    Attributes:
        config: the run, its vocabulary size included.
        launch: this process among the others.
        device: this process's device.
        source: the data.
        folder: the run's folder.
        checkpoint: checkpoint to go on from, with its manifest, or None.
        initial: checkpoint with whose weights a new run begins, with its manifest, or None.
    """

    config: RunConfig
    launch: Launch
    device: torch.device
    source: SampleSource
    folder: RunFolder
    checkpoint: tuple[Path, dict[str, Any]] | None = None
    initial: tuple[Path, dict[str, Any]] | None = None


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Train a run under whatever launcher started this process. Every process calls it.

    Args:
        config: a resolved run (see ``load_config``).
        resume: go on from the run's newest checkpoint.
        overwrite: begin again where a run of this name exists.

    Returns:
        The summary, as in summary.json, on the first process; None on the others, and on all when the run was stopped by
        SIGTERM or SIGINT after saving a checkpoint.

    Raises:
        UserError: bad input; nothing has been created, changed or sent to another process then.
    """
    plan = prepare(config, resume=resume, overwrite=overwrite)
    with processes(plan):
        return _run(plan, overwrite=overwrite)


def prepare(config: RunConfig, *, resume: bool = False, overwrite: bool = False, for_training: bool = True) -> Plan:
    """Check everything that can be wrong with the input. Local: no process group, no model, nothing on disk.

    Args:
        config: a resolved run.
        resume: a checkpoint of the run is wanted.
        overwrite: the run may replace one of the same name.
        for_training: False for evaluation, which needs a checkpoint and starts no run.

    Raises:
        UserError: what is wrong, in one sentence.
    """
    launch = Launch.from_environment()
    with as_user_error():
        check_apex()
    check_world(config, launch.world_size)
    device = choose_device(config.train.device, launch.local_rank)
    source = open_source(config)
    if config.data.vocab_size is None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"vocab_size": source.vocab_size})})
    folder = RunFolder(config.run_dir)
    plan = Plan(config, launch, device, source, folder)
    if for_training:
        folder.check_start(resume=resume, overwrite=overwrite)
    if resume:
        path = find_latest(folder.checkpoints)
        manifest = read_manifest(path)
        check_compatible(manifest, config, path, same_data=True)
        plan.checkpoint = (path, manifest)
    elif for_training and config.train.init_from is not None:
        path = find_initial(config.train.init_from, folder.path)
        manifest = read_manifest(path)
        check_initial(manifest, config, path)
        plan.initial = (path, manifest)
    return plan


def open_source(config: RunConfig) -> SampleSource:
    """The run's data, checked but not yet indexed.

    Raises:
        UserError: missing, unreadable or insufficient data.
    """
    if config.data.kind == "indexed":
        source = IndexedSource(config.data, config.seed)
        if source.vocab_size % config.parallel.tensor:
            raise UserError(
                f"the vocabulary of {source.vocab_size} tokens is not divisible by parallel.tensor = {config.parallel.tensor}; "
                f"pad data.vocab_file or give data.vocab_size instead"
            )
        return source
    return load_text(config.data, config.seed)


@contextlib.contextmanager
def processes(plan: Plan) -> Iterator[None]:
    """Form the process groups for the block and leave them after it."""
    _quieten()
    init_processes(plan.config, plan.launch, plan.device)
    yield
    # After an error this is left to the exit: leaving a group could wait for processes that wait for this one.
    close_processes()


def _quieten() -> None:
    """Megatron and PyTorch say the same things about optional packages and deprecations at every start."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _run(plan: Plan, *, overwrite: bool) -> dict[str, Any] | None:
    config, folder, first = plan.config, plan.folder, plan.launch.rank == 0
    trainer = build_trainer(config, plan.device)
    progress = Progress()
    if plan.checkpoint is not None:
        path, manifest = plan.checkpoint
        load_checkpoint(path, trainer.chunks, trainer.optimizer, manifest=manifest)
        progress = Progress(manifest["step"], manifest["consumed_samples"], saved_step=manifest["step"])
    _close_selected_until_due(trainer, progress.step)
    if plan.initial is not None:
        _take_weights(trainer, *plan.initial)
    # Forming the groups was a collective, so every process has looked at the folder before the first one changes it.
    changes: list[str] = []
    if first:
        changes = folder.begin(config, overwrite=overwrite)
        progress.wall_seconds = folder.keep_metrics_until(progress.step)
    dist.barrier()
    if isinstance(plan.source, IndexedSource):
        remaining = (config.train.steps - progress.step) * config.train.global_batch_size
        plan.source.open_training(progress.consumed_samples + remaining, folder.index_cache)
    reporter = Reporter(
        folder, active=first, first_step=progress.step, num_steps=config.train.steps, log_interval=config.train.log_interval
    )
    reporter.say(_headline(trainer, plan, progress))
    if changes:
        reporter.say(f"settings that differ from those before: {'; '.join(changes)}")
    if plan.initial is not None and (changes := changed_settings(plan.initial[1], config)):
        reporter.say(f"settings that differ from the checkpoint's: {'; '.join(changes)}")
    with contextlib.closing(reporter), StopRequest() as stop:
        stopped = _train_steps(trainer, plan, progress, reporter, stop)
        if stopped:
            reporter.say(
                f"stopped by {stop.name or 'a signal to another process'} after step {progress.step}; go on with --resume"
            )
            return None
        return _finish(trainer, plan, progress, reporter)


def _take_weights(trainer: Trainer, path: Path, manifest: dict[str, Any]) -> None:
    """Begin with a checkpoint's weights, other kinds of attention turned into this run's. Collective.

    Raises:
        UserError: processes have found different checkpoints, since the run that writes them has gone on meanwhile.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, path.name)
    if len(set(found)) > 1:
        raise UserError(
            f"processes found different newest checkpoints, {' and '.join(sorted(set(found)))}, in train.init_from = "
            f"{trainer.config.train.init_from}; give one checkpoint's folder"
        )
    config, kinds = trainer.config, manifest["model"]["layer_pattern"]
    if kinds == list(config.layer_kinds):
        load_checkpoint(path, trainer.chunks, None, manifest=manifest)
    else:
        model = config.model.model_copy(update={"layer_pattern": kinds})
        # Window layers want a window of at least 1; no weight depends on it.
        nsa = config.nsa.model_copy(update={"window_size": max(1, config.nsa.window_size)})
        dense = build_trainer(config.model_copy(update={"model": model, "nsa": nsa}), trainer.device, for_training=False)
        load_checkpoint(path, dense.chunks, None, manifest=manifest)
        copy_dense_weights(trainer.chunks, dense.chunks)
    trainer.optimizer.reload_model_params()  # main weights of their own, where it has them, follow the model's


def _train_steps(trainer: Trainer, plan: Plan, progress: Progress, reporter: Reporter, stop: StopRequest) -> bool:
    """Steps until the end of the run or a request to stop; returns whether it was stopped."""
    train, folder = trainer.config.train, plan.folder
    stopped = False
    while progress.step < train.steps and not stopped:
        _open_selected_when_due(trainer, progress.step, reporter)
        began = time.monotonic()
        row = train_step(trainer, plan.source, progress, stop)
        last = progress.step == train.steps
        stopped = row.pop("stop") > 0 and not last
        seconds = time.monotonic() - began
        row["step_seconds"], row["tokens_per_second"] = seconds, row["tokens"] / seconds
        if not stopped and (last or (train.eval_interval and progress.step % train.eval_interval == 0)):
            loss = validation_loss(trainer, plan.source)
            row["val_loss"], row["val_bits_per_byte"] = loss, bits_per_byte(loss, plan.source.bytes_per_token)
            progress.val_loss = loss if last else None
        progress.wall_seconds += time.monotonic() - began
        row["wall_seconds"] = progress.wall_seconds
        reporter.write(row)
        if stopped or last or (train.checkpoint_interval and progress.step % train.checkpoint_interval == 0):
            _save(trainer, folder, progress)
    return stopped


def _close_selected_until_due(trainer: Trainer, step: int) -> None:
    """Close the selected branch of a model after ``step`` steps if it is to open later."""
    if trainer.config.train.selected_is_closed(step):
        close_selected_branches(trainer.chunks)


def _open_selected_when_due(trainer: Trainer, step: int, reporter: Reporter) -> None:
    """Open the selected branch if the step that begins after ``step`` steps is its first. Collective."""
    if step and step == trainer.config.train.selected_from_step:
        open_selected_branches(trainer.wrapped, trainer.optimizer)
        shared = trainer.config.nsa.shared_kv
        reporter.say(f"selected branch opened after step {step}" + ("" if shared else ", with the window's keys and values"))


def train_step(trainer: Trainer, source: SampleSource, progress: Progress, stop: StopRequest) -> dict[str, Any]:
    """One optimizer step. Collective.

    Returns:
        The step's figures, equal on all processes but for times.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    train = trainer.config.train
    if train.selected_opening_steps:
        set_selected_dropout(trainer.chunks, train.selected_dropout(progress.step))
        _seed_draws(trainer.config.seed, progress.step)
    lr = learning_rate(progress.step, train)
    set_learning_rate(trainer.optimizer, lr, train.weight_decay)
    for chunk in trainer.wrapped:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        return train_batches(
            source,
            progress.consumed_samples,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )

    count = train.global_batch_size // (train.micro_batch_size * dp_size)
    length = trainer.config.data.sequence_length
    with count_traffic() as traffic:
        losses = run_schedule(trainer, batches, count, sequence_length=length, rows=train.micro_batch_size, train=True)
    _, grad_norm, _ = trainer.optimizer.step()
    progress.step += 1
    progress.consumed_samples += train.global_batch_size
    row = agree(trainer, losses, traffic, stop=stop.name is not None)
    norm = float(grad_norm)
    if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
        raise UserError(
            f"loss {row['loss']} and gradient norm {norm} at step {progress.step} are not finite; "
            f"lower train.lr = {train.lr} and resume from the last checkpoint, or begin again with --overwrite"
        )
    return {
        "step": progress.step,
        "loss": row.pop("loss"),
        "grad_norm": norm,
        "lr": lr,
        "consumed_samples": progress.consumed_samples,
        **row,
    }


def _seed_draws(seed: int, step: int) -> None:
    """What a step draws (``train.selected_opening_steps``) follows from seed, step, pipeline stage and data-parallel rank
    alone: a resumed run draws as the uncut one, and tensor- and context-parallel ranks draw alike."""
    stage, dp_rank = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    seed_generators(int(np.random.SeedSequence([seed, step, stage, dp_rank]).generate_state(1)[0]))


def _save(trainer: Trainer, folder: RunFolder, progress: Progress) -> None:
    if progress.saved_step == progress.step:
        return
    save_checkpoint(
        folder.checkpoints,
        trainer.chunks,
        trainer.optimizer,
        config=trainer.config,
        step=progress.step,
        consumed_samples=progress.consumed_samples,
    )
    progress.saved_step = progress.step


def _finish(trainer: Trainer, plan: Plan, progress: Progress, reporter: Reporter) -> dict[str, Any] | None:
    """Sample, pictures and summary of a complete run. Collective."""
    config, folder, source = trainer.config, plan.folder, plan.source
    # A run that is resumed after its last step has nothing left to train and validates here.
    val_loss = validation_loss(trainer, source) if progress.val_loss is None else progress.val_loss
    text = sample_text(trainer, source) if config.sample.tokens else None
    choices = plots.collect_choices(trainer, source)
    if not reporter.active:
        return None
    rows = read_metrics(folder.metrics)
    summary = summarise(rows, val_loss, trainer, plan)
    if text is not None:
        folder.sample.write_text(text + "\n", encoding="utf-8")
    plots.plot_loss(rows, summary["unigram_bits_per_byte"], source.bytes_per_token, folder.loss_plot)
    if choices is not None:
        plots.plot_choices(choices, folder.blocks_plot)
    write_atomically(folder.summary, json.dumps(summary, indent=2) + "\n")
    reporter.say(
        f"done: validation {summary['val_bits_per_byte']:.4f} bits/byte, unigram entropy {summary['unigram_bits_per_byte']:.4f} "
        f"(validation part {summary['unigram_bits_per_byte_validation']:.4f}), {summary['tokens_per_second']:,.0f} tokens/s, "
        f"{summary['wall_seconds']:.0f} s; everything is in {folder.path}"
    )
    return summary


def summarise(rows: list[dict[str, Any]], val_loss: float, trainer: Trainer, plan: Plan) -> dict[str, Any]:
    """The figures of summary.json.

    Args:
        rows: metrics.jsonl, one mapping a step. The rate leaves out the first step, which warms up.
        val_loss: final validation loss, nats a token.
        trainer: the model.
        plan: the run.
    """
    config, source = trainer.config, plan.source
    whole, validation = source.unigram_bits_per_byte()
    timed = rows[1:] or rows
    seconds = sum(row["step_seconds"] for row in timed)
    remote = [row["remote_block_fraction"] for row in rows if "remote_block_fraction" in row]
    return {
        "name": config.name,
        "steps": config.train.steps,
        "tokens": sum(row["tokens"] for row in rows),
        "val_bits_per_byte": bits_per_byte(val_loss, source.bytes_per_token),
        "val_loss": val_loss,
        "train_loss": _mean([row["loss"] for row in rows[-20:]]),
        "unigram_bits_per_byte": whole,
        "unigram_bits_per_byte_validation": validation,
        "wall_seconds": rows[-1]["wall_seconds"] if rows else 0.0,
        "tokens_per_second": sum(row["tokens"] for row in timed) / seconds if seconds else 0.0,
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows), default=0.0),
        "remote_block_fraction": _mean(remote),
        "num_parameters": trainer.num_parameters,
        "world_size": plan.launch.world_size,
        "device": torch.cuda.get_device_name() if plan.device.type == "cuda" else "cpu",
        "torch_version": torch.__version__,
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _headline(trainer: Trainer, plan: Plan, progress: Progress) -> str:
    config, parallel = trainer.config, trainer.config.parallel
    dp = config.data_parallel_size(plan.launch.world_size)
    where = f"from step {progress.step}" if progress.step else "from the start"
    if plan.initial is not None:
        where += f", with the weights of {plan.initial[0]}"
    return (
        f"run {plan.folder.path}: {trainer.num_parameters:,} parameters, layers {'+'.join(sorted(set(config.layer_kinds)))}, "
        f"{plan.launch.world_size} processes (tensor {parallel.tensor}, pipeline {parallel.pipeline}, "
        f"context {parallel.context}, data {dp}) on {plan.device.type}, {config.data.sequence_length} tokens a sequence, {where}"
    )


def evaluate(config: RunConfig, checkpoint: Path | None = None) -> dict[str, Any]:
    """Validation loss of a checkpoint. Every process calls it; nothing is written.

    Args:
        config: the run's configuration; the parallel layout may differ from training's.
        checkpoint: a checkpoint folder; the run's newest when None.

    Raises:
        UserError: no usable checkpoint, or bad settings.
    """
    plan = prepare(config, for_training=False)
    path = checkpoint or find_latest(plan.folder.checkpoints)
    manifest = read_manifest(path)
    check_compatible(manifest, plan.config, path, same_data=False)
    with processes(plan):
        trainer = build_trainer(plan.config, plan.device, for_training=False)
        load_checkpoint(path, trainer.chunks, None, manifest=manifest)
        _close_selected_until_due(trainer, manifest["step"])
        loss = validation_loss(trainer, plan.source)
    whole, validation = plan.source.unigram_bits_per_byte()
    return {
        "checkpoint": str(path),
        "step": manifest["step"],
        "val_loss": loss,
        "val_bits_per_byte": bits_per_byte(loss, plan.source.bytes_per_token),
        "unigram_bits_per_byte": whole,
        "unigram_bits_per_byte_validation": validation,
    }
