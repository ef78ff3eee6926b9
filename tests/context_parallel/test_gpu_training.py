"""The 100M model of ``configs/h100_100m.yaml`` on two GPUs beside one, from one checkpoint: the same loss curve.

    pytest -m gpu tests/context_parallel/test_gpu_training.py -s

prints the curves. What bf16 rounding does to a curve is measured: by the one-GPU run with two sequences in a microbatch in
place of one, which is the same computation in another order of sums.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]

CONFIG = Path(__file__).parents[2] / "configs" / "h100_100m.yaml"
BEFORE, STEPS = 10, 40
CORPUS_BYTES = 8_000_000
# The learning rate is constant after the warm-up, so that it does not depend on where a run ends.
SETTINGS = [
    "data.sequence_length=32768", "train.global_batch_size=2", f"train.warmup_steps={BEFORE}", "train.lr=3e-4",
    "train.min_lr=3e-4", "train.eval_interval=0", "train.eval_sequences=2", "train.checkpoint_interval=0",
    "train.log_interval=10", "sample.tokens=0", "model.equal_start=false",
]  # fmt: skip


def train(folder: Path, config: Path, settings: Sequence[str], processes: int, *options: str) -> list[float]:
    """Run ``nsa-cp train`` under torchrun; the loss of every step so far."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*launcher, "--nproc-per-node", str(processes), "-m", "nsa_cp.cli.main", "train", str(config), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    place = [f"runs_dir={folder.parent}", f"name={folder.name}", f"parallel.context={processes}"]
    done = subprocess.run([*command, *settings, *place], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows]


def curves(folder: Path, config: Path, settings: Sequence[str]) -> dict[str, list[float]]:
    """Losses after a common checkpoint: on one GPU, on one in another order of sums, and on two."""
    first = folder / "first"
    train(first, config, [*settings, f"train.steps={BEFORE}"], 1)
    found = {}
    for name, processes, extra in (("one", 1, []), ("reordered", 1, ["train.micro_batch_size=2"]), ("two", 2, [])):
        shutil.copytree(first, folder / name)
        losses = train(folder / name, config, [*settings, *extra, f"train.steps={STEPS}"], processes, "--resume")
        assert len(losses) == STEPS
        found[name] = losses[BEFORE:]
    return found


def corpus(path: Path) -> str:
    """Python's standard library as one file."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    path.write_text(text[:CORPUS_BYTES], encoding="utf-8")
    return f"data.paths=[{path}]"


def differences(found: dict[str, list[float]], name: str) -> list[float]:
    return [abs(x - y) for x, y in zip(found[name], found["one"], strict=True)]


def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    found = curves(tmp_path, CONFIG, [*SETTINGS, corpus(tmp_path / "corpus.txt")])
    noise, parallel = differences(found, "reordered"), differences(found, "two")
    for step, losses in enumerate(zip(*found.values(), strict=True), BEFORE + 1):
        print(f"step {step:>3}: " + "  ".join(f"{name} {loss:.5f}" for name, loss in zip(found, losses, strict=True)))
    print(
        f"largest difference from one GPU: two GPUs {max(parallel):.5f}, other order of sums {max(noise):.5f}; "
        f"mean {sum(parallel) / len(parallel):.5f}, {sum(noise) / len(noise):.5f}"
    )
    assert found["one"][-1] < found["one"][0] - 0.1, "nothing was learnt"
    # The first step differs by one forward's rounding alone; later ones by what training makes of it.
    assert parallel[0] <= 3 * noise[0] + 1e-3
    assert max(parallel) <= 3 * max(noise) + 1e-3
