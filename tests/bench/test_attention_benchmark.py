"""``nsa-cp bench attention`` on a CPU, small: its rows, its header, and inputs whose neighbours agree as they say."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from nsa_cp.bench.inputs import HeadLayout, make_inputs, neighbour_agreement
from nsa_cp.cli.main import main
from nsa_cp.config import NSAConfig
from nsa_cp.ops import compress_kv, select_blocks

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


def test_drifting_neighbours_agree_and_random_ones_do_not() -> None:
    agreement = {}
    for kind in ("random", "drifting"):
        x = make_inputs(
            CONFIG, HeadLayout(4, 2, 16, 16), 2048, kind, seed=0, device=torch.device("cpu"), dtype=torch.float32
        )
        with torch.no_grad():
            k_cmp, _ = compress_kv(x.k[0], x.v[0], x.k_weights, x.v_weights, CONFIG, backend="torch")
            agreement[kind] = neighbour_agreement(select_blocks(x.q, k_cmp, CONFIG, backend="torch"), CONFIG)
    assert agreement["random"] < 0.2 and 0.6 < agreement["drifting"] < 0.95
