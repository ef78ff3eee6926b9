"""The main job, shortened, end to end: `nsa-cp train` under torchrun with two processes, then `nsa-cp eval`; and SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from matplotlib import image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa_cp.training.config_load import load_config
from nsa_cp.training.manifest import find_latest, read_manifest
from nsa_cp.training.run_folder import read_metrics

pytestmark = pytest.mark.distributed

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STEPS = 8
SHORT = [
    "data.sequence_length=512",
    f"train.steps={STEPS}",
    "train.warmup_steps=2",
    "train.eval_interval=4",
    "train.eval_sequences=3",
    "train.checkpoint_interval=5",
    "train.log_interval=2",
    "sample.tokens=12",
]


def environment(**changes: str) -> dict[str, str]:
    base = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return {**base, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **changes}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("quickstart")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "2",
    ]
    command += ["-m", "nsa_cp.cli.main", "train", str(QUICKSTART), *SHORT]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "quickstart", done


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_file_of_the_run_is_there(run: tuple[Path, object]) -> None:
    names = {item.name for item in run[0].iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "loss.png",
        "blocks.png",
        "sample.txt",
        "tensorboard",
        "checkpoints",
    }


def test_the_resolved_configuration_is_beside_the_run(run: tuple[Path, object]) -> None:
    config = load_config(run[0] / "config.yaml")
    assert config == load_config(QUICKSTART, SHORT)
    assert config.model.kv_channels is not None and config.parallel.context == 2


def test_metrics_have_one_object_a_step(run: tuple[Path, object]) -> None:
    rows = rows_of(run[0])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["tokens"] == 512 and row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 2**20
        assert 0.2 < row["remote_block_fraction"] < 0.8, "with two processes about half of the old blocks are the other's"
        assert row["remote_block_fraction"] < row["remote_blocks_needed"] <= 1, "most remote blocks are somebody's choice"
        assert row["attention_bytes_received"] == row["attention_bytes_sent"] == rows[0]["attention_bytes_sent"] > 2**16
        assert 0 < row["grad_norm"] < 100
        for gate in ("gate_compressed", "gate_selected", "gate_window"):
            assert 0 < row[gate] < 1
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert [row["step"] for row in rows if "val_bits_per_byte" in row] == [4, 8]
    assert rows[1]["lr"] == 3e-3 and rows[-1]["lr"] == pytest.approx(3e-4)


def test_the_summary_agrees_with_the_metrics(run: tuple[Path, object]) -> None:
    summary, rows = json.loads((run[0] / "summary.json").read_text()), rows_of(run[0])
    assert summary["val_bits_per_byte"] == rows[-1]["val_bits_per_byte"]
    assert 4.0 < summary["unigram_bits_per_byte_validation"] < summary["unigram_bits_per_byte"] < 5.0
    assert summary["wall_seconds"] == rows[-1]["wall_seconds"] >= sum(row["step_seconds"] for row in rows)
    assert summary["tokens"] == 512 * STEPS and summary["steps"] == STEPS and summary["world_size"] == 2
    assert 0.8e6 < summary["num_parameters"] < 1.3e6
    assert summary["tokens_per_second"] > 0


def test_the_terminal_saw_a_line_a_step_and_both_entropies(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    printed = run[1].stdout
    assert sum(line.startswith("step ") for line in printed.splitlines()) == STEPS // 2
    for word in ("loss", "grad norm", "lr", "tokens/s", "peak", "remote blocks", "validation", "unigram entropy"):
        assert word in printed
    assert "Traceback" not in run[1].stderr and "Warning" not in run[1].stderr, run[1].stderr


def test_pictures_and_sample(run: tuple[Path, object]) -> None:
    for name in ("loss.png", "blocks.png"):
        assert image.imread(run[0] / name).std() > 0.02
    text = (run[0] / "sample.txt").read_bytes().decode()
    assert text.startswith("The ") and len(text) > 8


def test_tensorboard_holds_the_same_curve(run: tuple[Path, object]) -> None:
    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    assert written == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows_of(run[0])]


def test_checkpoints(run: tuple[Path, object]) -> None:
    path = find_latest(run[0] / "checkpoints")
    assert read_manifest(path)["step"] == STEPS
    assert sorted(item.name for item in (run[0] / "checkpoints").iterdir()) == ["latest", "step_00000005", "step_00000008"]


def test_eval_of_the_run_on_one_process_gives_the_same_loss(run: tuple[Path, object]) -> None:
    command = [sys.executable, "-m", "nsa_cp.cli.main", "eval", str(run[0]), "parallel.context=1"]
    done = subprocess.run(command, cwd=run[0], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((run[0] / "summary.json").read_text())
    result = json.loads(done.stdout)
    assert result["val_bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-5)
    assert result["step"] == STEPS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_sigterm_to_one_process_saves_and_all_exit_with_0(tmp_path: Path) -> None:
    """Without torchrun, which would itself answer the signal. The run is long enough never to end by itself."""
    endless = [
        "data.sequence_length=256",
        "train.steps=100000",
        "train.eval_interval=0",
        "train.checkpoint_interval=0",
        "name=endless",
    ]
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "nsa_cp.cli.main", "train", str(QUICKSTART), *endless],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
        )
        for rank in range(2)
    ]
    folder = tmp_path / "runs" / "endless"
    try:
        deadline = time.monotonic() + 200
        while not ((folder / "metrics.jsonl").is_file() and len(read_metrics(folder / "metrics.jsonl")) >= 3):
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes), "no third step"
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    steps = len(rows_of(folder))
    assert read_manifest(find_latest(folder / "checkpoints"))["step"] == steps >= 3
    assert f"after step {steps}; go on with --resume" in outputs[0][0]
    assert not (folder / "summary.json").exists()
