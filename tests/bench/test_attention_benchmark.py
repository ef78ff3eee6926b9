"""``nsa-cp bench attention`` on a CPU, small: its rows, its header, and inputs whose neighbours agree as they say."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch
from torch import Tensor

from nsa_cp.bench.attention import Case, run_attention_benchmark
from nsa_cp.bench.inputs import (
    AttentionInputs,
    HeadLayout,
    make_inputs,
    memory_for_agreement,
    neighbour_agreement,
    smooth,
    trained_config,
)
from nsa_cp.bench.peers import PEERS, Peer
from nsa_cp.bench.work import stage_work, visible_pairs
from nsa_cp.cli.main import main
from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.ops import compress_kv, select_blocks

PASSES = ("forward", "backward")

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=6, window_size=32, backend="torch"
)
HEADER = (
    "seq_len,num_heads,num_groups,qk_dim,v_dim,dtype,inputs,agreement,impl,stage,pass,p20_ms,p50_ms,p80_ms,peak_gib,gpu,"
    "torch,triton,commit"
)


def test_rows_of_every_stage_and_plots(tmp_path: Path) -> None:
    file = tmp_path / "attention.csv"
    settings = ["--compress-block-size=8", "--compress-stride=4", "--select-block-size=16", "--num-selected-blocks=4"]
    sizes = ["--seq-lens", "128", "192", "--heads", "4/2x16/8", "--dtype", "float32", "--device", "cpu", "--repetitions", "1"]
    assert main(["bench", "attention", *sizes, *settings, "--impls", "nsa", "--stages", "--csv", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert text.splitlines()[0] == HEADER
    rows = list(csv.DictReader(text.splitlines()))
    measured = {(int(row["seq_len"]), row["stage"], row["pass"]) for row in rows}
    stages = ("all", "compression", "compressed", "selected", "window", "gating")
    for length in (128, 192):
        assert {(length, stage, pass_) for stage in stages for pass_ in ("forward", "backward")} <= measured
        assert (length, "selection", "forward") in measured
    assert all(float(row["p20_ms"]) > 0 and row["v_dim"] == "8" for row in rows)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "attention_time.png", "attention_speedup.png", "attention_stages.png",
    }  # fmt: skip


def agreement_of(queries: torch.Tensor, k_cmp: torch.Tensor) -> float:
    return neighbour_agreement(select_blocks(queries, k_cmp, CONFIG, backend="torch"), CONFIG)


@torch.no_grad()
def test_drifting_neighbours_agree_at_the_measured_length_and_random_ones_do_not() -> None:
    """Queries as slow as a shorter sequence needs would agree too little: the calibration is of this length."""
    cpu, heads = torch.device("cpu"), HeadLayout(4, 2, 16, 16)
    agreement = {}
    for kind in ("random", "drifting"):
        x = make_inputs(CONFIG, heads, 4096, kind, seed=0, device=cpu, dtype=torch.float32)
        k_cmp, _ = compress_kv(x.k[0], x.v[0], x.k_weights, x.v_weights, CONFIG, backend="torch")
        agreement[kind] = agreement_of(x.q, k_cmp)
    assert agreement["random"] < 0.2 and abs(agreement["drifting"] - 0.8) < 0.02
    memory = memory_for_agreement(CONFIG, heads, 512, 0.8, cpu, torch.float32)
    assert agreement_of(smooth(torch.randn_like(x.q), memory), k_cmp) < 0.75
    with pytest.raises(ValueError, match="measure at least 384 tokens"):
        make_inputs(CONFIG, heads, 100, "drifting", seed=0, device=cpu, dtype=torch.float32)


@pytest.fixture
def trained_file(tmp_path: Path) -> Path:
    """40 tokens of a model with heads 4/2x16/8, shared K/V and a linear compressor."""
    config = replace(CONFIG, compressor="linear", shared_kv=True, gate="branch", compress_block_size=8)
    saved = {
        "q": torch.randn(40, 4, 16), "k": (torch.randn(40, 2, 16),), "v": (torch.randn(40, 2, 8),),
        "gates": torch.rand(40, 1, 3), "config": asdict(config), "rotary": asdict(RotaryConfig(base=100.0)),
        "k_weights": (torch.randn(2, 8, 16), torch.randn(2, 128, 16)), "v_weights": (torch.randn(2, 8, 8), torch.randn(2, 64, 8)),
    }  # fmt: skip
    torch.save(saved, tmp_path / "trained.pt")
    return tmp_path / "trained.pt"


def test_trained_inputs_are_tiled_and_measured_with_their_compressor(trained_file: Path, capsys: CaptureFixture[str]) -> None:
    saved = torch.load(trained_file, weights_only=True)
    config = trained_config(trained_file, CONFIG)
    assert config == NSAConfig(**saved["config"]) != CONFIG
    cpu, heads = torch.device("cpu"), HeadLayout(4, 2, 16, 8)
    x = make_inputs(config, heads, 100, "trained", seed=0, device=cpu, dtype=torch.float32, trained_file=trained_file)
    assert torch.equal(x.v[0][80:], saved["v"][0][:20]) and torch.equal(x.gates[40:80], saved["gates"])
    assert torch.equal(x.q[0], saved["q"][0]) and not torch.equal(x.q[1], saved["q"][1]), "position 1 is rotated"
    assert torch.allclose(x.q[1].norm(dim=-1), saved["q"][1].norm(dim=-1)) and all(leaf.requires_grad for leaf in x.leaves)

    sizes = ["--compress-block-size=8", "--compress-stride=4", "--select-block-size=16", "--num-selected-blocks=6"]
    command = ["bench", "attention", "--seq-lens=96", "--dtype=float32", "--device=cpu", "--repetitions=1", "--impls", "nsa",
               "--inputs", "trained", *sizes]  # fmt: skip
    given = [*command, "--window-size=32", "--trained-file", str(trained_file)]
    assert main([*given, "--heads", "4/2x16/8"]) == 0
    assert "trained" in capsys.readouterr().out
    for arguments, message in (
        ([*given, "--heads", "4/4x16/8"], "holds heads 4/2x16/8, not 4/4x16/8; measure with --heads 4/2x16/8"),
        ([*given, "--heads", "4/2x16/8", "--window-size=8"], "measure with --window-size 32"),
        ([*command, "--heads", "4/2x16/8"], "--trained-file FILE"),
        ([*command, "--heads", "4/2x16/8", "--trained-file", "absent.pt"], "absent.pt is no file of trained inputs"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_peers_that_cannot_run_are_named_in_a_line(monkeypatch: MonkeyPatch) -> None:
    """Missing packages, heads that a package refuses, and one that answers: measured like the rest."""

    def make_double(config: NSAConfig, heads: HeadLayout) -> Callable[[AttentionInputs], tuple[Tensor, list[Tensor]]]:
        return lambda x: (x.grad * x.v[0].mean(), [x.v[0]])

    def make_refusing(config: NSAConfig, heads: HeadLayout) -> Callable[[AttentionInputs], tuple[Tensor, list[Tensor]]]:
        def refuse(x: AttentionInputs) -> tuple[Tensor, list[Tensor]]:
            raise AssertionError("groups of 16\nand more")

        return refuse

    peers = {"double": Peer(make_double, "it does nothing"), "refusing": Peer(make_refusing), "fla": PEERS["fla"]}
    for name, peer in peers.items():
        monkeypatch.setitem(PEERS, name, peer)
    case = Case(64, HeadLayout(4, 2, 16, 16), "random", CONFIG, torch.float32, torch.device("cpu"))
    told: list[str] = []
    rows = list(run_attention_benchmark([case], implementations=list(peers), repetitions=1, notice=told.append))
    assert [(row.impl, row.pass_) for row in rows] == [("double", "forward"), ("double", "backward")]
    assert told == [
        "double differs: it does nothing",
        "refusing is not measured at 64 tokens, heads 4/2x16: AssertionError: groups of 16",
        "fla is not measured here: ValueError: it takes 16, 32, ... query heads a group, not 2"
        if importlib.util.find_spec("fla") else "fla is not measured here: ModuleNotFoundError: No module named 'fla'",
    ]  # fmt: skip


def test_work_is_what_the_visible_pairs_take() -> None:
    """Counted from the oracle's own selection; and the floors at 64k that docs/kernels.md works with."""
    heads, length = HeadLayout(4, 2, 16, 8), 200
    q, k = torch.randn(length, 4, 16), torch.randn(length, 2, 16)
    k_cmp = k[: CONFIG.num_compressed_tokens(length)]
    blocks = select_blocks(q, k_cmp, CONFIG, backend="torch")[:, 0]
    token = torch.arange(length)
    block_of = torch.arange(length) // CONFIG.select_block_size
    seen = ((blocks[..., None] == block_of).any(1) & (torch.arange(length) <= token[:, None])).sum()
    last = torch.arange(len(k_cmp)) * CONFIG.compress_stride + CONFIG.compress_block_size - 1
    expected = {"selected": int(seen), "compressed": int((last <= token[:, None]).sum())}
    pairs = visible_pairs(CONFIG, length)
    assert {name: pairs[name] for name in expected} == expected
    work = stage_work(CONFIG, heads, length)
    assert work["selected", "forward"].flops == 2 * (16 + 8) * 4 * expected["selected"]
    paper = stage_work(NSAConfig(), HeadLayout(64, 4, 128, 128), 65536)
    floors = {pass_: sum(w.floor_ms for (stage, p), w in paper.items() if p == pass_ and stage != "dense") for pass_ in PASSES}
    assert floors["forward"] == pytest.approx(17, abs=0.5) and floors["backward"] == pytest.approx(31, abs=0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [("tpu", "--device 'tpu' is unknown; use cuda or cpu"), ("cuda", "finds no GPU .0 devices.; use --device cpu")],
)
def test_a_device_that_is_not_there(name: str, message: str, capsys: CaptureFixture[str], monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "attention", "--device", name]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_benchmark_that_measures_nothing_fails() -> None:
    small = ("bench", "attention", "--device", "cpu", "--seq-lens", "64", "--heads", "4/2x16", "--repetitions", "1")
    assert main([*small, "--impls", "dense_cudnn"]) == 1
    assert main([*small, "--impls", "nsa"]) == 0
