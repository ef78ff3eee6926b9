"""The trainer's main loop: a run from configuration to summary, and the evaluation of a checkpoint. See docs/training.md."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nsa_cp.megatron import close_selected_branches, copy_dense_weights, open_selected_branches
from nsa_cp.training.checkpoint import load_checkpoint, save_checkpoint
from nsa_cp.training.config import RunConfig
from nsa_cp.training.errors import UserError
from nsa_cp.training.evaluate import bits_per_byte, validation_loss
from nsa_cp.training.indexed import IndexedSource
from nsa_cp.training.manifest import changed_settings, check_compatible, find_latest, read_manifest, samples_in_all
from nsa_cp.training.metrics import Reporter
from nsa_cp.training.plan import Plan, prepare
from nsa_cp.training.setup import Trainer, build_trainer, close_processes, init_processes
from nsa_cp.training.shards import check_shards
from nsa_cp.training.signals import StopRequest
from nsa_cp.training.step import Progress, train_step
from nsa_cp.training.summary import finish


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Train a run under whatever launcher started this process. Every process calls it.

    Args:
        config: a resolved run (see ``load_config``).
        resume: go on from the run's newest checkpoint.
        overwrite: begin again even if a run of this name exists.

    Returns:
        The summary, as in summary.json, on the first process. None on the others, and on all if the run was stopped by SIGTERM
        or SIGINT (after saving a checkpoint).

    Raises:
        UserError: bad input, or a loss or gradient that is not finite. Input that a process can check by itself is refused
            before anything is created, changed or sent to another process.
    """
    plan = prepare(config, resume=resume, overwrite=overwrite)
    with processes(plan), contextlib.closing(plan.folder):
        return _run(plan, overwrite=overwrite)


@contextlib.contextmanager
def processes(plan: Plan) -> Iterator[None]:
    """Form the process groups for the ``with`` block, and leave them after it."""
    _quieten()
    init_processes(plan.config, plan.launch, plan.device)
    yield
    # Not after an error: leaving a group could wait for processes that in turn wait for this one.
    close_processes()


def _quieten() -> None:
    """Silence what Megatron and PyTorch say about optional packages and deprecations at every start."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _run(plan: Plan, *, overwrite: bool) -> dict[str, Any] | None:
    config, folder, first = plan.config, plan.folder, plan.launch.rank == 0
    _check_same_data(plan)
    if plan.checkpoint is not None:
        _check_checkpoint(*plan.checkpoint, f"in {folder.checkpoints}; begin again once all processes see the newest")
    if plan.initial is not None:
        _check_checkpoint(*plan.initial, f"in train.init_from = {config.train.init_from}; give one checkpoint's folder")
    trainer = build_trainer(config, plan.device)
    progress = Progress()
    if plan.checkpoint is not None:
        path, manifest = plan.checkpoint
        load_checkpoint(path, trainer.chunks, trainer.optimizer, manifest=manifest)
        progress = Progress(manifest["step"], manifest["consumed_samples"], saved_step=manifest["step"])
    _close_selected_until_due(trainer, progress.step)
    if plan.initial is not None:
        _take_weights(trainer, *plan.initial)
    # Every process has looked at the folder before it joined the groups, so the first one may change it now.
    changes: list[str] = []
    if first:
        folder.hold(checkpoint=plan.checkpoint and plan.checkpoint[0], overwrite=overwrite)
        changes = folder.begin(config, overwrite=overwrite)
        progress.wall_seconds = folder.keep_metrics_until(progress.step)
    dist.barrier()
    if isinstance(plan.source, IndexedSource):
        samples = samples_in_all(config, progress.step, progress.consumed_samples)
        plan.source.open_training(samples, folder.index_cache)
        if plan.checkpoint is not None and (before := plan.checkpoint[1].get("train_samples", samples)) != samples:
            changes.append(
                f"{samples} training sequences in all, {before} before: indexed data may be shuffled otherwise and come twice"
            )
    if plan.checkpoint is not None:
        changes += _changed_data(plan.checkpoint[1], plan, "text may come twice or be trained on though held out before")
    reporter = Reporter(
        folder, active=first, first_step=progress.step, num_steps=config.train.steps, log_interval=config.train.log_interval
    )
    reporter.say(_headline(trainer, plan, progress))
    if changes:
        reporter.say(f"settings that differ from those before: {'; '.join(changes)}")
    if (held_out := plan.source.num_validation_samples) < config.train.eval_sequences:
        reporter.say(f"train.eval_sequences = {config.train.eval_sequences}, but only {held_out} are held out: those are used")
    if plan.initial is not None and (changes := changed_settings(plan.initial[1], config)):
        reporter.say(f"settings that differ from the checkpoint's: {'; '.join(changes)}")
    with contextlib.closing(reporter), StopRequest() as stop:
        stopped = _train_steps(trainer, plan, progress, reporter, stop)
        if stopped:
            reporter.say(
                f"stopped by {stop.name or 'a signal to another process'} after step {progress.step}; go on with --resume"
            )
            return None
        return finish(trainer, plan, progress, reporter)


def _take_weights(trainer: Trainer, path: Path, manifest: dict[str, Any]) -> None:
    """Begin with a checkpoint's weights, converting its dense layers to this run's kinds of attention. Collective."""
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
    trainer.optimizer.reload_model_params()  # main weights, if the optimizer keeps any, follow the model's


def _check_all_found(what: str, mine: str, place_and_remedy: str) -> None:
    """Check that all processes have found the same: each looks for checkpoints and reads data for itself. Collective.

    Raises:
        UserError: naming all that were found.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if len(set(found)) > 1:
        raise UserError(f"processes found different {what}, {' and '.join(sorted(set(found)))}, {place_and_remedy}")


def _check_checkpoint(path: Path, manifest: dict[str, Any], place_and_remedy: str) -> None:
    """Check that all processes have found the same checkpoint, and what its large files hold. Collective.

    Raises:
        UserError: they have not (the run that writes checkpoints there may be going on), or it is damaged.
    """
    _check_all_found("newest checkpoints", path.name, place_and_remedy)
    check_shards(path, manifest)


def _check_same_data(plan: Plan) -> None:
    _check_all_found("data", plan.source.fingerprint, "under data.paths; let all see the same files")


def _changed_data(manifest: dict[str, Any], plan: Plan, consequence: str) -> list[str]:
    """A message if the data are not those that the checkpoint was trained on. Old checkpoints have no fingerprint to compare."""
    now = plan.source.fingerprint
    before = manifest.get("fingerprint", now)
    if before == now:
        return []
    return [f"content of the data: {before} -> {now}, so {consequence}"]


def _train_steps(trainer: Trainer, plan: Plan, progress: Progress, reporter: Reporter, stop: StopRequest) -> bool:
    """Take steps until the end of the run or a request to stop; returns whether it was stopped."""
    train, stopped = trainer.config.train, False
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
        if plan.initial is not None and progress.step == 1:
            row["init_from"] = str(plan.initial[0])
        reporter.write(row)
        if stopped or last or (train.checkpoint_interval and progress.step % train.checkpoint_interval == 0):
            _save(trainer, plan, progress)
    return stopped


def _close_selected_until_due(trainer: Trainer, step: int) -> None:
    """Close the selected branch of a model that is at step ``step``, if the branch is to open later."""
    if trainer.config.train.selected_is_closed(step):
        close_selected_branches(trainer.chunks)


def _open_selected_when_due(trainer: Trainer, step: int, reporter: Reporter) -> None:
    """Open the selected branch if the step about to begin, after ``step`` steps, is the first with it. Collective."""
    if step and step == trainer.config.train.selected_from_step:
        open_selected_branches(trainer.wrapped, trainer.optimizer)
        shared = trainer.config.nsa.shared_kv
        reporter.say(f"selected branch opened after step {step}" + ("" if shared else ", with the window's keys and values"))


def _save(trainer: Trainer, plan: Plan, progress: Progress) -> None:
    if progress.saved_step == progress.step:
        return
    save_checkpoint(
        plan.folder.checkpoints,
        trainer.chunks,
        trainer.optimizer,
        config=trainer.config,
        step=progress.step,
        consumed_samples=progress.consumed_samples,
        fingerprint=plan.source.fingerprint,
    )
    progress.saved_step = progress.step


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
    """Validate a checkpoint. Every process calls it; nothing is written.

    Args:
        config: the run's configuration; the parallel layout may differ from training's.
        checkpoint: a checkpoint folder; the run's newest when None.

    Returns:
        What ``nsa-cp eval`` prints: the checkpoint, its step, the validation loss (nats a token) and bits per byte, the entropy
        of single tokens to compare with, and settings and data that differ from the checkpoint's, if any do.

    Raises:
        UserError: no usable checkpoint, or bad settings.
    """
    plan = prepare(config, for_training=False)
    path = checkpoint or find_latest(plan.folder.checkpoints)
    manifest = read_manifest(path)
    check_compatible(manifest, plan.config, path, to_resume=False)
    with processes(plan):
        _check_same_data(plan)
        _check_checkpoint(path, manifest, f"in {path.parent}; name one")
        trainer = build_trainer(plan.config, plan.device, for_training=False)
        load_checkpoint(path, trainer.chunks, None, manifest=manifest)
        _close_selected_until_due(trainer, manifest["step"])
        loss = validation_loss(trainer, plan.source)
    whole, validation = plan.source.unigram_bits_per_byte()
    differing = changed_settings(manifest, plan.config) + _changed_data(manifest, plan, "held-out text may have been trained on")
    fraction = plan.config.data.validation_fraction
    if (before := manifest["data"].get("validation_fraction", fraction)) != fraction:
        differing.append(f"data.validation_fraction: {before} -> {fraction}, so text may be validated on that was trained on")
    return {
        "checkpoint": str(path),
        "step": manifest["step"],
        **({"settings_unlike_the_checkpoints": differing} if differing else {}),
        "val_sequences": min(plan.config.train.eval_sequences, plan.source.num_validation_samples),
        "val_loss": loss,
        "val_bits_per_byte": bits_per_byte(loss, plan.source.bytes_per_token),
        "unigram_bits_per_byte": whole,
        "unigram_bits_per_byte_validation": validation,
    }
