"""Context parallelism over NCCL with the Triton kernels: one GPU's answers in bf16, border rows apart, choices bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops import branches_backward
from nsa_cp.testing import DistributedPool, relative_error
from nsa_cp.testing.cases import AttentionProblem, join_shards, make_problem, solve

WORLD = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason=f"needs {WORLD} CUDA devices"),
]

CONFIG = NSAConfig(compressor="linear", backend="triton")
# name: (settings, documents, cut each document or the pack)
CASES = {
    "plain": (CONFIG, (0, 8192), True),
    "packed": (replace(CONFIG, shared_kv=True), (0, 1, 700, 3001, 3002, 8190), True),
    "packed_whole": (replace(CONFIG, compressed_rope="before"), (0, 100, 5000, 8191), False),
}


@pytest.fixture(scope="module")
def gpus() -> Iterator[DistributedPool]:
    """One process a GPU."""
    with DistributedPool(WORLD, backend="nccl") as pool:
        yield pool


def _problem(name: str, kind: str, comm: str) -> AttentionProblem:
    config, documents, _ = CASES[name]
    config = replace(config, layout=kind, compressed_comm=comm)
    return make_problem(
        config, documents, num_heads=32, num_groups=2, qk_dim=128, v_dim=128, rotary=RotaryConfig(), dtype=torch.bfloat16
    )


def _layout(name: str, kind: str, rank: int) -> SequenceLayout:
    _, documents, per_document = CASES[name]
    return SequenceLayout.build(documents, cp_size=WORLD, cp_rank=rank, kind=kind, per_document=per_document)


def _as_if_long(really: bool) -> AbstractContextManager:
    """The backward takes the kernels of long sequences."""
    return mock.patch.object(branches_backward, "LEAST_PAIRS", 0) if really else nullcontext()


def _solve(rank: int, world_size: int, name: str, kind: str, comm: str, long: bool) -> dict[str, torch.Tensor]:
    torch.cuda.set_device(rank)
    layout = _layout(name, kind, rank)
    shard = _problem(name, kind, comm).shard(layout).to(f"cuda:{rank}")
    with _as_if_long(long):
        answers = [solve(shard, layout=layout, group=dist.group.WORLD) for _ in range(2)]
    assert all(torch.equal(answers[0][key], answers[1][key]) for key in answers[0]), "two runs differ"
    return {key: value.cpu() for key, value in answers[0].items()}


@pytest.mark.parametrize("comm", ["all_gather", "ring"])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("name", CASES)
def test_two_gpus_equal_one(gpus: DistributedPool, name: str, kind: str, comm: str) -> None:
    _compare(gpus, name, kind, comm)


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("name", CASES)
def test_two_gpus_equal_one_with_the_kernels_of_long_sequences(gpus: DistributedPool, name: str, kind: str) -> None:
    _compare(gpus, name, kind, "all_gather", long=True)


def _compare(gpus: DistributedPool, name: str, kind: str, comm: str, long: bool = False) -> None:
    joined = join_shards(gpus.run(_solve, name, kind, comm, long), _layout(name, kind, 0))
    problem = _problem(name, kind, comm).to("cuda")
    with _as_if_long(long):
        alone = {key: value.cpu() for key, value in solve(problem).items()}
    double = replace(problem.to(torch.float64), config=replace(problem.config, backend="torch"))
    exact = {key: value.cpu() for key, value in solve(double, blocks=alone["blocks"].cuda()).items()}

    same = (joined["blocks"] == alone["blocks"]).all(-1)
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} selections differ from one GPU's"
    # The rows around every chunk's start, where halos and other ranks' keys meet.
    starts = [chunk[0] for rank in range(WORLD) for chunk in _layout(name, kind, rank).chunks[rank]]
    border = np.unique(np.clip(np.concatenate([np.arange(s - 40, s + 40) for s in starts]), 0, problem.q.shape[0] - 1))
    for key, value in exact.items():
        if key == "blocks":
            continue
        pairs = [(joined[key], alone[key], value, key)]
        if value.shape[0] == problem.q.shape[0]:
            pairs.append((joined[key][border], alone[key][border], value[border], f"{key} at borders"))
        for ours, one_gpu, reference, what in pairs:
            bound = 2 * relative_error(one_gpu, reference) + 1e-6
            error = relative_error(ours, reference)
            assert error <= bound, f"{name} {kind} {comm} {what}: error {error:.2e}, bound {bound:.2e}"
