"""What a run leaves at its end: a text sample, pictures and summary.json."""

from __future__ import annotations

import json
from typing import Any

import torch

from nsa_cp.training import plots
from nsa_cp.training.evaluate import bits_per_byte, validation_loss
from nsa_cp.training.files import write_atomically
from nsa_cp.training.metrics import Reporter
from nsa_cp.training.plan import Plan
from nsa_cp.training.run_folder import read_metrics
from nsa_cp.training.sample import sample_text
from nsa_cp.training.setup import Trainer
from nsa_cp.training.step import Progress


def finish(trainer: Trainer, plan: Plan, progress: Progress, reporter: Reporter) -> dict[str, Any] | None:
    """Write the sample, pictures and summary of a complete run. Collective; the first process returns the summary."""
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
        rows: metrics.jsonl, one mapping a step. ``tokens_per_second`` leaves out the first step, which is slower.
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
        "init_from": rows[0].get("init_from") if rows else None,
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
