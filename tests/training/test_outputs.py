"""What a run shows: sampled text, the picture of chosen blocks, validation, lines and files of metrics."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from training_harness import printed_here, tiny_config

from nsa_cp.config import NSAConfig
from nsa_cp.megatron import cpu_compatibility
from nsa_cp.testing import DistributedPool
from nsa_cp.training.config import RunConfig
from nsa_cp.training.data import Sample, collate, load_text
from nsa_cp.training.evaluate import bits_per_byte, validation_loss
from nsa_cp.training.forward import run_logits
from nsa_cp.training.metrics import Reporter, attention_modules, format_row
from nsa_cp.training.plots import LayerChoices, choice_raster, collect_choices, plot_choices, plot_loss
from nsa_cp.training.run_folder import RunFolder, read_metrics
from nsa_cp.training.sample import generate
from nsa_cp.training.setup import Launch, build_trainer, close_processes, init_processes

Workers = Callable[[int], DistributedPool]
PROMPT = [84, 104, 101, 32, 113]


def outputs(rank: int, world_size: int, config: RunConfig) -> dict[str, object]:
    """Everything that is computed from an untrained model, which is the same on every layout without a pipeline."""
    with cpu_compatibility():
        init_processes(config, Launch(rank, world_size, rank), torch.device("cpu"))
        trainer = build_trainer(config, torch.device("cpu"), for_training=False)
        source = load_text(config.data, config.seed)
        result: dict[str, object] = {
            "validation": validation_loss(trainer, source),
            "greedy": generate(trainer, PROMPT, 9, temperature=0),
            "drawn": generate(trainer, PROMPT, 9, temperature=1.0, seed=4),
            "long": generate(trainer, list(range(60)), 8, temperature=0),
            "unprompted": generate(trainer, [], 2, temperature=0),
            "choices": collect_choices(trainer, source),
            "recording": [module.record_selection or module.last_selection is not None for module in attention_modules(trainer)],
            "parameters": trainer.num_parameters,
        }
        if world_size == 1:
            result["naive"] = naive_greedy(trainer, PROMPT, 9)
            result["held"] = sum(parameter.numel() for parameter in trainer.chunks[0].parameters())
        close_processes()
    return result


def naive_greedy(trainer: object, prompt: list[int], count: int) -> list[int]:
    """One forward pass a token over exactly the tokens so far, without padding."""
    tokens = np.array(prompt)
    for _ in range(count):
        batch = collate([Sample(tokens, tokens, np.ones(len(tokens), dtype=np.float32))])
        tokens = np.append(tokens, int(run_logits(trainer, batch)[0, -1].argmax()))
    return tokens[len(prompt) :].tolist()


@pytest.mark.distributed
def test_outputs_do_not_depend_on_the_layout(tmp_path: Path, workers: Workers) -> None:
    # Large initial weights, so that greedy choices are not decided by rounding; and branches that do not start alike, which would
    # hide that one took another's keys.
    fixed = ["model.init_std=0.3", "model.equal_start=false", "sample.prompt=x", "train.eval_sequences=3"]
    [alone] = workers(1).run(outputs, tiny_config(tmp_path, *fixed))
    assert alone["greedy"] == alone["naive"]
    assert len(set(alone["greedy"])) > 1 and alone["greedy"] != alone["drawn"]
    assert len(alone["long"]) == 8 and len(alone["unprompted"]) == 2
    assert alone["parameters"] == alone["held"]
    choices = alone["choices"]
    assert choices.layer == 2 and choices.selection.shape == (64, 4) and choices.gates.shape == (64, 3)
    assert (choices.selection[:8] == [0, -1, -1, -1]).all() and (choices.selection[-1] >= 0).all()
    for world, overrides in [
        (2, ["parallel.context=2"]),
        (4, ["parallel.context=2", "parallel.tensor=2"]),
        (2, ["parallel.context=2", "nsa.layout=contiguous"]),
    ]:
        ranks = workers(world).run(outputs, tiny_config(tmp_path, *fixed, *overrides))
        for rank, result in enumerate(ranks):
            for name in ("greedy", "drawn", "long", "unprompted", "recording", "parameters"):
                assert result[name] == alone[name], (name, rank, overrides)
            assert result["validation"] == pytest.approx(alone["validation"], rel=1e-6)
            assert (result["choices"] is None) == (rank > 0)
        assert np.array_equal(ranks[0]["choices"].selection, choices.selection)
        # Under tensor parallelism the picture shows the heads of the first process.
        if "parallel.tensor=2" not in overrides:
            assert np.abs(ranks[0]["choices"].gates - choices.gates).max() < 1e-5


@pytest.mark.distributed
def test_stages_sample_together(tmp_path: Path, workers: Workers) -> None:
    fixed = ["model.init_std=0.3", "model.num_layers=4", "parallel.pipeline=2"]
    plain = workers(2).run(outputs, tiny_config(tmp_path, *fixed))
    assert plain[0]["greedy"] == plain[1]["greedy"] and plain[0]["validation"] == plain[1]["validation"]
    assert plain[0]["choices"].layer == 3, "a layer of the second stage, brought to the first process"
    interleaved = workers(2).run(outputs, tiny_config(tmp_path, *fixed, "parallel.virtual_pipeline=2"))
    assert len(interleaved[0]["greedy"]) == 9 and interleaved[0]["greedy"] == interleaved[1]["greedy"]


def test_raster_by_hand() -> None:
    config = NSAConfig(
        compress_block_size=2,
        compress_stride=1,
        select_block_size=2,
        num_selected_blocks=4,
        num_init_blocks=1,
        num_local_blocks=2,
        window_size=1,
    )
    selection = np.array([[0, -1, -1, -1]] * 2 + [[0, 1, -1, -1]] * 2 + [[0, 1, 2, -1]] * 2 + [[0, 1, 2, 3]] * 2 + [[0, 2, 3, 4]])
    expected = np.array(
        [[1, 0, 0, 0, 0]] * 2 + [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 0, 0]] * 2 + [[1, 2, 1, 1, 0]] * 2 + [[1, 0, 2, 1, 1]]
    )
    assert np.array_equal(choice_raster(selection, config), expected)


def test_pictures_are_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    config = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=8)
    selection = np.sort(rng.integers(-1, 40, (320, 4)), axis=1).astype(np.int32)
    plot_choices(LayerChoices(1, selection, rng.random((320, 3)), config), tmp_path / "blocks.png")
    rows = [{"step": step, "loss": 5.0 - 0.01 * step} for step in range(1, 101)]
    rows[49]["val_bits_per_byte"] = 6.0
    plot_loss(rows, 4.7, 1.0, tmp_path / "loss.png")
    plot_loss(rows[:1], 4.7, 1.0, tmp_path / "one.png")
    for name in ("blocks.png", "loss.png", "one.png"):
        pixels = image.imread(tmp_path / name)
        assert pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10


ROW = {
    "step": 5,
    "loss": 2.5,
    "grad_norm": 1.25,
    "lr": 3e-4,
    "tokens_per_second": 12345.6,
    "peak_memory_bytes": 2**31,
    "wall_seconds": 1.0,
}


def test_a_line_says_what_was_measured() -> None:
    line = format_row({**ROW, "remote_block_fraction": 0.375, "val_bits_per_byte": 3.5}, 100)
    for part in (
        "step   5/100",
        "loss 2.5000",
        "grad norm 1.250",
        "lr 3.00e-04",
        "12,346 tokens/s",
        "peak 2.00 GiB",
        "remote blocks 37.5%",
        "validation 3.5000",
    ):
        assert part in line
    assert "remote" not in format_row(ROW, 100) and "validation" not in format_row(ROW, 100)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_reporter_writes_one_object_a_step_and_a_bar_only_on_a_terminal(tmp_path: Path, stream: io.StringIO) -> None:
    folder = RunFolder(tmp_path)
    reporter = Reporter(folder, active=True, first_step=0, num_steps=20, log_interval=10, stream=stream)
    for step in range(1, 21):
        reporter.write({**ROW, "step": step})
    reporter.close()
    rows = read_metrics(folder.metrics)
    assert [row["step"] for row in rows] == list(range(1, 21)) and rows[0]["loss"] == 2.5
    text = stream.getvalue()
    assert text.count("loss 2.5000") == 2
    assert ("step/s" in text or "s/step" in text) == stream.isatty()
    assert list(folder.tensorboard.glob("events*"))


def test_other_processes_report_nothing(tmp_path: Path) -> None:
    reporter = Reporter(RunFolder(tmp_path), active=False, first_step=0, num_steps=2, log_interval=1)
    reporter.say("x")
    reporter.write(ROW)
    reporter.close()
    assert not list(tmp_path.iterdir())


def test_resuming_drops_later_metrics_and_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({**ROW, "step": step, "wall_seconds": 10.0 * step}) for step in (1, 2, 3)]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert len(read_metrics(folder.metrics)) == 3
    assert folder.keep_metrics_until(2) == 20.0
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2]
    assert RunFolder(tmp_path / "new").exists() is False


def test_overwriting_removes_only_what_a_run_wrote(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config = tiny_config(tmp_path)
    folder.begin(config, overwrite=False)
    (folder.path / "notes.txt").write_text("mine")
    folder.summary.write_text("{}")
    folder.checkpoints.mkdir()
    folder.begin(config, overwrite=True)
    assert sorted(item.name for item in folder.path.iterdir()) == ["config.yaml", "notes.txt"]


@pytest.mark.distributed
def test_fewer_validation_sequences_than_asked_for_are_said(tmp_path: Path, workers: Workers) -> None:
    fixed = ("data.validation_fraction=0.001", "train.steps=1", "train.eval_interval=0")
    held_out = load_text(tiny_config(tmp_path, *fixed).data, 1).num_validation_samples
    for name, count in (("enough", held_out), ("more", held_out + 1)):
        config = tiny_config(tmp_path, *fixed, f"name={name}", f"train.eval_sequences={count}")
        told = [f"train.eval_sequences = {count}, but only {held_out} are held out: those are used"] if count > held_out else []
        assert workers(1).run(printed_here, config, "eval_sequences") == [told]


def test_a_run_that_goes_on_has_nothing_of_its_earlier_end(tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path / "run"), tiny_config(tmp_path)
    folder.begin(config, overwrite=False)
    for item in (folder.metrics, folder.summary, folder.loss_plot, folder.blocks_plot, folder.sample, folder.path / "notes.txt"):
        item.write_text("")
    folder.begin(config, overwrite=False)
    assert sorted(item.name for item in folder.path.iterdir()) == ["config.yaml", "metrics.jsonl", "notes.txt"]


def test_bits() -> None:
    assert bits_per_byte(math.log(2), 1.0) == pytest.approx(1.0)
    assert bits_per_byte(2 * math.log(2), 4.0) == pytest.approx(0.5)
