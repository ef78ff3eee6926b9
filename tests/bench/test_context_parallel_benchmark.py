"""``nsa-cp bench context-parallel`` over gloo, small: rows, header, plots, the check, and transfers answered from memory."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nsa_cp.bench import context_parallel, context_parallel_check
from nsa_cp.bench.inputs import HeadLayout
from nsa_cp.bench.replay import RecordedTransfers
from nsa_cp.cli.main import main
from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import SequenceLayout, count_traffic
from nsa_cp.ops import NSAOutput, native_sparse_attention, pipeline
from nsa_cp.testing.cases import make_problem, solve

HEADER = (
    "seq_len,num_heads,num_groups,qk_dim,v_dim,cp,tp,layout,comm,pass,p50_ms,one_gpu_p50_ms,efficiency,exposed_ms,peak_gib,gpu,"
    "commit"
)
SIZES = [
    "--seq-lens", "128", "192", "--heads", "4/2x16/8", "--compress-block-size=8", "--compress-stride=4",
    "--select-block-size=16", "--num-selected-blocks=4", "--window-size=32", "--layouts", "zigzag", "contiguous",
]  # fmt: skip
CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=4, window_size=32, backend="torch"
)


def _bench(rank: int, world_size: int, *arguments: str) -> int:
    return main(["bench", "context-parallel", *SIZES, *arguments])


def _bench_without_memory(rank: int, world_size: int, file: str) -> int:
    """The whole sequence does not fit on rank 1."""
    measure = context_parallel._local_figures

    def limited(seq_len: int, settings: context_parallel.Settings, group: object) -> object:
        if group is None and rank == 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return measure(seq_len, settings, group)

    with mock.patch.object(context_parallel, "_local_figures", limited):
        return _bench(rank, world_size, "--repetitions=3", "--seconds=0.01", "--comms", "all_gather", "--csv", file)


@pytest.mark.distributed
def test_rows_of_every_combination_and_plots(workers, tmp_path: Path) -> None:
    file = tmp_path / "context_parallel.csv"
    assert workers(2).run(_bench, "--repetitions=3", "--seconds=0.01", "--csv", str(file)) == [0, 0]
    assert file.read_text(encoding="utf-8").splitlines()[0] == HEADER
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    measured = {(row["seq_len"], row["cp"], row["layout"], row["comm"], row["pass"]) for row in rows}
    assert measured == {
        (length, *case, pass_)
        for length in ("128", "192")
        for pass_ in ("forward", "backward")
        for case in [
            ("1", "zigzag", "none"),
            *(("2", kind, comm) for kind in ("zigzag", "contiguous") for comm in ("ring", "all_gather")),
        ]
    }
    for row in rows:
        one, time, exposed = float(row["one_gpu_p50_ms"]), float(row["p50_ms"]), float(row["exposed_ms"])
        assert one > 0 and time > 0 and exposed < time
        if row["cp"] == "2":
            assert float(row["efficiency"]) == pytest.approx(one / 2 / time, abs=1e-3)
    names = {f"context_parallel_{what}.png" for what in ("efficiency", "exposed", "memory")}
    assert {path.name for path in tmp_path.glob("*.png")} == names


@pytest.mark.distributed
def test_tensor_parallel_ranks_divide_the_heads(workers, tmp_path: Path) -> None:
    """Four ranks: two pairs, each with half of the heads and the whole sequence; one GPU has all heads."""
    file = tmp_path / "scaling.csv"
    arguments = ["--tp=2", "--repetitions=3", "--seconds=0.01", "--comms", "all_gather", "--csv", str(file)]
    assert workers(4).run(_bench, *arguments) == [0] * 4
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    together = [row for row in rows if row["comm"] != "none"]
    assert {(row["cp"], row["tp"], row["num_heads"], row["num_groups"]) for row in together} == {("2", "2", "4", "2")}
    assert {(row["cp"], row["tp"]) for row in rows if row["comm"] == "none"} == {("1", "1")}
    for row in together:
        quarter = float(row["one_gpu_p50_ms"]) / 4
        assert float(row["efficiency"]) == pytest.approx(quarter / float(row["p50_ms"]), abs=1e-3)
    assert {path.name for path in tmp_path.glob("*.png")} == {f"scaling_{x}.png" for x in ("efficiency", "exposed", "memory")}
    assert workers(4).run(_bench, "--tp=2", "--check", "--comms", "all_gather") == [0] * 4


def test_tensor_parallel_ranks_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["bench", "context-parallel", "--tp", "3"]) == 2
    assert "4 K/V groups do not divide over 3 tensor-parallel ranks; use a divisor of 4" in capsys.readouterr().err
    assert main(["bench", "context-parallel", "--tp", "3", "--heads", "12/3x16"]) == 2
    assert "--tp 3 does not divide 4 processes; use a divisor of 4" in capsys.readouterr().err
    assert main(["bench", "context-parallel", "--tp", "4"]) == 2
    assert "--tp 4 leaves no context parallelism among 4 processes; start more" in capsys.readouterr().err


@pytest.mark.distributed
def test_a_sequence_that_one_gpu_cannot_hold_is_still_measured(workers, tmp_path: Path) -> None:
    file = tmp_path / "context_parallel.csv"
    assert workers(2).run(_bench_without_memory, str(file)) == [0, 0]
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert rows and all(row["cp"] == "2" and row["one_gpu_p50_ms"] == row["efficiency"] == "nan" for row in rows)


def _check_without(rank: int, world_size: int, lost: str) -> int:
    """The check when rank 1's part of a parameter's gradient, for example of k_weights[0], is lost; of none if that is ""."""

    def losing(*arguments: object, **settings: object) -> NSAOutput:
        weights = {"k_weights": list(arguments[4]), "v_weights": list(arguments[5])}
        if lost and settings["layout"].cp_size > 1 and rank == 1:
            name, index = lost[:-1].split("[")
            view = weights[name][int(index)].view_as(weights[name][int(index)])
            view.register_hook(torch.zeros_like)
            weights[name][int(index)] = view
        return native_sparse_attention(
            *arguments[:4], tuple(weights["k_weights"]), tuple(weights["v_weights"]), *arguments[6:], **settings
        )

    with mock.patch.object(context_parallel_check, "native_sparse_attention", losing):
        return _bench(rank, world_size, "--check", "--comms", "all_gather")


@pytest.mark.distributed
@pytest.mark.parametrize("lost", ["", *(f"{x}_weights[{i}]" for x in "kv" for i in range(3))])
def test_the_check_compares_the_compressors_parameters(workers, lost: str) -> None:
    assert workers(2).run(_check_without, lost) == [int(bool(lost))] * 2


def _check(rank: int, world_size: int, broken: bool) -> int:
    select = pipeline.select_blocks_forward

    def other(*arguments: object) -> torch.Tensor:
        blocks = select(*arguments).clone()
        if arguments[3].layout.cp_size > 1:
            blocks[-1, 0, -1] = 1
        return blocks

    with mock.patch.object(pipeline, "select_blocks_forward", other if broken else select):
        return _bench(rank, world_size, "--check", "--comms", "all_gather")


@pytest.mark.distributed
@pytest.mark.parametrize("broken", [False, True])
def test_the_check_compares_selections(workers, broken: bool) -> None:
    assert workers(2).run(_check, broken) == [int(broken)] * 2


def _replay(rank: int, world_size: int, comm: str) -> None:
    config = NSAConfig(**{**CONFIG.__dict__, "compressed_comm": comm})
    layout = SequenceLayout.build(192, cp_size=world_size, cp_rank=rank)
    problem = make_problem(config, (0, 192), dtype=torch.float32).shard(layout)

    def run(x: object) -> dict[str, torch.Tensor]:
        return solve(x, layout=layout, group=dist.group.WORLD)

    recorded = RecordedTransfers()
    with recorded.record():
        expected = run(problem)
    for _ in range(2):
        with recorded.replay(), count_traffic() as traffic:
            answers = run(problem)
        assert traffic.transfers == 0, "something was sent"
        assert all(torch.equal(answers[name], expected[name]) for name in expected)
    shorter = SequenceLayout.build(128, cp_size=world_size, cp_rank=rank)
    with recorded.replay(), pytest.raises(ValueError, match="recorded run had no such"):
        solve(make_problem(config, (0, 128), dtype=torch.float32).shard(shorter), layout=shorter, group=dist.group.WORLD)


@pytest.mark.distributed
@pytest.mark.parametrize("comm", ["all_gather", "ring"])
def test_replayed_transfers_give_the_same_answers_and_send_nothing(workers, comm: str) -> None:
    workers(2).run(_replay, comm)


def test_transfers_have_streams_of_high_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NCCL, both of all processes and of the context-parallel groups among tensor-parallel ranks."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    joined = dict.fromkeys(("init_process_group", "new_group", "destroy_process_group"), mock.DEFAULT)
    answers = {"is_initialized": False, "get_world_size": 4, "get_rank": 1, "get_backend": "nccl"}
    answering = {name: mock.Mock(return_value=value) for name, value in answers.items()}
    # Without CUDA PyTorch has no ProcessGroupNCCL.
    classes = {"group": mock.Mock(), "ProcessGroupNCCL": SimpleNamespace(Options=dict)}
    with (
        mock.patch.multiple(dist, create=True, **joined, **answering, **classes) as calls,
        mock.patch.multiple(torch.cuda, is_available=mock.Mock(return_value=True), set_device=mock.DEFAULT),
        mock.patch.object(context_parallel, "run_context_parallel_benchmark", return_value=[]) as measure,
    ):
        assert main(["bench", "context-parallel", "--tp=2"]) == 0
    assert measure.called
    (world,), groups = calls["init_process_group"].call_args_list, calls["new_group"].call_args_list
    assert [call.args[0] for call in groups] == [[0, 2], [1, 3]]
    assert all(call.kwargs["pg_options"] == {"is_high_priority_stream": True} for call in (world, *groups))


def test_outside_torchrun_it_says_how_to_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["bench", "context-parallel"]) == 2
    assert "torchrun --nproc-per-node 2 -m nsa_cp.cli.main bench context-parallel" in capsys.readouterr().err


def test_settings_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["bench", "timeline", "--heads", "64:4"]) == 2
    assert "has the form HEADS/GROUPSxDIM" in capsys.readouterr().err
    assert HeadLayout.parse("64/4x128").v_dim == 128
