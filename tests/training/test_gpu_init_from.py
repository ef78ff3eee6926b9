"""On a GPU: full attention of short sequences goes on as NSA of longer ones, with either backend and on two GPUs alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
COMMON = (
    "train.device=cuda", "train.dtype=bf16", "model.kv_channels=64", "nsa.compress_block_size=16", "nsa.compress_stride=8",
    "nsa.select_block_size=16", "train.eval_interval=0", "sample.tokens=0", "train.log_interval=50",
)  # fmt: skip
# What is validated after one step that moves nothing are the weights that the run began with.
STANDING = ("train.steps=1", "train.lr=1e-12", "train.min_lr=0", "train.weight_decay=0", "train.warmup_steps=0")


def train(folder: Path, name: str, *overrides: str, processes: int = 1) -> float:
    """Run ``nsa-cp train`` under torchrun; the validation loss at the end, nats a byte."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*launcher, "--nproc-per-node", str(processes), "-m", "nsa_cp.cli.main", "train", str(CONFIG), *COMMON, *overrides]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    place = [f"runs_dir={folder}", f"name={name}", f"parallel.context={processes}"]
    done = subprocess.run([*command, *place], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows[-1]["val_loss"]


def test_full_attention_goes_on_as_nsa(tmp_path: Path) -> None:
    short = ("model.layer_pattern=[full]", "data.sequence_length=256", "train.global_batch_size=4", "train.steps=200")
    train(tmp_path, "short", *short)
    begin = (f"train.init_from={tmp_path / 'short'}", *STANDING)
    dense = train(tmp_path, "dense", "model.layer_pattern=[full]", *begin)
    sparse = {backend: train(tmp_path, backend, f"nsa.backend={backend}", *begin) for backend in ("triton", "torch")}
    if torch.cuda.device_count() > 1:
        sparse["two GPUs"] = train(tmp_path, "two", "nsa.backend=triton", *begin, processes=2)
    untrained = train(tmp_path, "untrained", *STANDING)
    trained = train(tmp_path, "trained", *begin[:1], "train.steps=100")
    print(f"dense {dense:.4f}, as NSA {sparse}, after 100 steps {trained:.4f}, untrained {untrained:.4f}")
    assert max(sparse.values()) - min(sparse.values()) < 2e-3, sparse
    assert dense < sparse["triton"] < dense + 0.25 * (untrained - dense)
    assert trained < dense - 0.02
