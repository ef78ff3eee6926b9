"""The cost model against cases worked out by hand, and the files it reads."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from nsa_cp.bench import cost_model
from nsa_cp.bench.cost_model import (
    GIB,
    NVLINK,
    UNIT,
    CostModel,
    KernelTimes,
    Link,
    fit_kernel_times,
    fit_line_and_square,
)
from nsa_cp.bench.inputs import HeadLayout
from nsa_cp.cli.main import main
from nsa_cp.config import NSAConfig

HEADS = HeadLayout(8, 2, 64, 64)
# Bytes of one token's key and value of one group, 16 bits.
TOKEN = (64 + 64) * 2
CONFIG = NSAConfig(
    compress_block_size=32, compress_stride=16, select_block_size=64, num_selected_blocks=16, window_size=512,
    compressed_comm="all_gather", layout="zigzag",
)  # fmt: skip
STAGES = {"compression": 1.0, "window": 8.0, "compressed": 6.0, "selection": 4.0, "selected": 20.0, "gating": 2.0}
BACKWARD = {**{s: ms for s, ms in STAGES.items() if s != "selection"}, "recompression": 1.0}
# Copies of no length: only kernels and transfers count.
KERNELS = KernelTimes(
    HEADS, {(pass_, s): ms for pass_, stages in (("forward", STAGES), ("backward", BACKWARD)) for s, ms in stages.items()},
    {"forward": 1e4, "backward": 2e4}, copy_bytes_per_ms=float("inf"),
)  # fmt: skip


def _link(all_gather: float, exchange: float = 0.0, reduce_scatter: float = 0.0) -> Link:
    """Transfers of so many ms, however large."""
    points = (((0.0, ms), (1.0, ms)) for ms in (all_gather, exchange, reduce_scatter))
    return Link(*points, step_ms=0.0)


def test_a_link_follows_its_points() -> None:
    link = Link(((10.0, 1.0), (20.0, 2.0), (40.0, 8.0)), ((0.0, 5.0), (1.0, 6.0)), ((0.0, 1.0), (2.0, 2.0)), step_ms=0.5)
    assert [link.time("all_gather", n, 2) for n in (1, 10, 15, 20, 30, 40, 50)] == [1.0, 1.0, 1.5, 2.0, 5.0, 8.0, 11.0]
    assert link.time("all_gather", 15, 4) == 2.5 and link.time("exchange", 1, 4) == 6.0
    assert NVLINK.time("all_gather", 67 * 2**20, 2) == pytest.approx(0.36)
    assert Link.of_rate(50, 0.1, 0.0).time("exchange", 50e6, 2) == pytest.approx(1.1)


def test_groups_that_travel_together_are_one_step() -> None:
    """Of 8 groups four at 128 MiB, then two, then one; of 2 always one."""
    model = CostModel(replace(KERNELS, heads=HeadLayout(8, 8, 64, 64)), _link(1.0), CONFIG)
    assert [model._steps(kib << 10) for kib in (128, 256, 512)] == [
        (2, 4 * TOKEN * (128 << 10)), (4, 2 * TOKEN * (256 << 10)), (8, TOKEN * (512 << 10)),
    ]  # fmt: skip
    assert CostModel(KERNELS, _link(1.0), CONFIG)._steps(1 << 10) == (2, TOKEN * (1 << 10))


def test_free_transfers_leave_the_kernels() -> None:
    model = CostModel(KERNELS, _link(0.0), CONFIG)
    forward = model.predict("forward", UNIT, 4)
    assert forward.ms == pytest.approx(41 / 4) and forward.exposed_ms == 0 and forward.efficiency == pytest.approx(1)
    # Twice the tokens: linear stages twice (31 -> 62), quadratic ones four times (10 -> 40).
    assert model.predict("forward", 2 * UNIT, 4).ms == pytest.approx(102 / 4)
    # The backward runs the compressor's forward once more: one GPU's does so too, so that it is in its time, and counted once.
    backward = model.predict("backward", UNIT, 4)
    assert backward.ms == pytest.approx(38 / 4) == KERNELS.total("backward", UNIT) / 4 and backward.efficiency == pytest.approx(1)


def test_forward_transfers_by_hand() -> None:
    """cp 2: window 4 ms; the all-gathers of compressed tokens and of the first group end at 2.5 + 3 and 2.5 + 6."""
    forward = CostModel(KERNELS, _link(all_gather=3.0, exchange=2.0), CONFIG).predict("forward", UNIT, 2)
    # Halo 0-2 exposed. Compression 2-2.5. Window 2.5-6.5, compressed tokens are there at 5.5. Compressed 6.5-9.5, selection
    # -11.5; first group there at 8.5, second at 14.5 after it was issued at 11.5; selected 11.5-16.5, -21.5; gating -22.5.
    assert forward.ms == pytest.approx(22.5) and forward.exposed_ms == pytest.approx(2.0)
    slow = CostModel(KERNELS, _link(all_gather=12.0, exchange=2.0), CONFIG).predict("forward", UNIT, 2)
    # Compressed tokens there at 14.5, 8 late; compressed and selection -19.5; first group there at 26.5, 7 late; the second
    # at 38.5: selected 26.5-31.5, 7 late, 38.5-43.5; gating -44.5.
    assert slow.ms == pytest.approx(44.5) and slow.exposed_ms == pytest.approx(2 + 8 + 7 + 7)


def test_backward_transfers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "QUERY_GRADIENT_SHARE", 0.5)
    backward = CostModel(KERNELS, _link(1.5, exchange=2.0, reduce_scatter=4.0), CONFIG).predict("backward", UNIT, 2)
    # Gating 0-1. Compressor again 1-1.5, halo rows being there. Then compressed tokens are there at 3, the first group at 4.5.
    # dk, dv of a group: window 1, compressed 0.75, selected 2.5; its dq 4.25.
    # Group 0: window 1.5-2.5 before the compressed tokens are waited for (0.5 exposed), compressed 3-3.75; then the second group
    # sets out behind the first, 4.5-6, and the sums behind it, 6-10. Rows waited for 3.75-4.5 (0.75), selected 4.5-7, sums 10-14
    # under dq 7-11.25 and beyond.
    # Group 1: window -12.25, compressed -13, sums 14-18; selected -15.5, sums 18-22. The compressed tokens' waited for (2.5),
    # compression 18-18.5; the halo's gradients, 22-24, go under dq 18.5-22.75 and beyond (1.25).
    assert backward.ms == pytest.approx(24) and backward.exposed_ms == pytest.approx(0.5 + 0.75 + 2.5 + 1.25)
    slow = CostModel(KERNELS, _link(1.5, exchange=2.0, reduce_scatter=12.0), CONFIG).predict("backward", UNIT, 2)
    # Sums 6-18, 18-30 | 30-42, 42-54, the halo's -56: group 1's are waited for at 15.5 and, after compression and dq, at 46.75.
    assert slow.ms == pytest.approx(56) and slow.exposed_ms == pytest.approx(0.5 + 0.75 + 26.5 + 9.25)


def test_ring_transfers_by_hand() -> None:
    model = CostModel(KERNELS, _link(0.0, exchange=8.0), replace(CONFIG, compressed_comm="ring"))
    # Halo 0-8. Compression -8.5, the shard sets out before the window, 8.5-16.5. Window -12.5, own shard -14, the other's waited
    # for until 16.5 (2.5 exposed), -18; normaliser -21, selection -23, selected -33, gating -34.
    forward = model.predict("forward", UNIT, 2)
    assert forward.ms == pytest.approx(34) and forward.exposed_ms == pytest.approx(8 + 2.5)


def test_copies_by_hand() -> None:
    """Transfers take no time, copies a millisecond for every MB read or written."""
    rate, raw, compressed = 1e6, UNIT * TOKEN, UNIT * TOKEN * 2 / 16
    model = CostModel(replace(KERNELS, copy_bytes_per_ms=rate), _link(0.0), CONFIG)
    # Own rows of two branches into the halo's buffers; packing a half and ordering the whole, of both gathers.
    fetched = 2 * (2 * raw * 2 / 2) + 2 * (compressed / 2 + compressed) + 2 * 2 * (raw / 2 + raw)
    forward = model.predict("forward", UNIT, 2)
    assert forward.ms - 41 / 2 == pytest.approx(fetched / rate) and forward.exposed_ms == 0
    # Float32: messages of whole gradients; the window's own rows and own compressed tokens joined; halo rows cut out.
    returned = 2 * 2 * (compressed + 2 * raw) + 2 * 2 * (raw * 2 + compressed) / 2 + 2 * 2 * (2 * raw * 2 / 2)
    backward = model.predict("backward", UNIT, 2)
    assert backward.ms - 38 / 2 == pytest.approx((fetched + returned) / rate) and backward.exposed_ms == 0


def test_compressed_tokens_travel_while_blocks_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    picks = UNIT / 2 * 2 * 16
    kernels = replace(KERNELS, copy_bytes_per_ms=cost_model.SORTED_BYTES * picks)
    model = CostModel(kernels, _link(all_gather=4.0), CONFIG)
    exposed = model.predict("backward", UNIT, 2).exposed_ms
    monkeypatch.setattr(cost_model, "SORTED_BYTES", 0)
    assert model.predict("backward", UNIT, 2).exposed_ms - exposed == pytest.approx(1), "sorting takes 1 ms of the 4"


def test_halo_rows_are_fewer_when_branches_share_them() -> None:
    # An exchange takes as many milliseconds as bytes.
    link = Link(((0.0, 0.0), (1.0, 0.0)), ((0.0, 0.0), (1.0, 1.0)), ((0.0, 0.0), (1.0, 0.0)), step_ms=0.0)
    for shared, layout, rows in ((False, "zigzag", 2 * (511 + 31)), (True, "zigzag", 2 * 511), (False, "contiguous", 511 + 31)):
        model = CostModel(KERNELS, link, replace(CONFIG, shared_kv=shared, layout=layout))
        assert model.predict("forward", UNIT, 2).exposed_ms == pytest.approx(rows * TOKEN * 2)


def test_the_hosts_agreement() -> None:
    """At 4 ranks three messages one after the other, beside 10.25 ms of kernels; before them when the layout is new."""
    model = CostModel(KERNELS, _link(0.0), CONFIG, agreement_step_ms=1.0)
    hidden, slow = model.predict("forward", UNIT, 4), replace(model, agreement_step_ms=5.0).predict("forward", UNIT, 4)
    assert (hidden.ms, hidden.exposed_ms) == pytest.approx((10.25, 0)) and (slow.ms, slow.exposed_ms) == pytest.approx((15, 4.75))
    first = replace(model, new_layout=True)
    assert first.predict("forward", UNIT, 4)[:2] == pytest.approx((13.25, 3))
    assert first.predict("backward", UNIT, 4) == model.predict("backward", UNIT, 4), "the backward has none"


def test_the_last_rank_of_a_contiguous_cut_does_more() -> None:
    model = CostModel(KERNELS, _link(0.0), replace(CONFIG, layout="contiguous"))
    assert model.predict("forward", UNIT, 4).ms == pytest.approx((31 + 10 * 1.75) / 4)


def test_the_ring_pays_for_its_second_normaliser() -> None:
    """In place of values 64 channels of the keys: heads of 128 have half of the second product left, heads of 64 all of it."""
    for width, normaliser in ((128, 6 * 3 / 4), (64, 6)):
        kernels = replace(KERNELS, heads=HeadLayout(8, 2, width, width))
        ring = CostModel(kernels, _link(0.0), replace(CONFIG, compressed_comm="ring")).predict("forward", UNIT, 2)
        assert ring.ms == pytest.approx((41 + normaliser) / 2)


def test_a_tensor_parallel_rank_has_its_part_of_the_heads() -> None:
    half = KERNELS.shard(2)
    assert (half.heads.num_heads, half.heads.num_groups) == (4, 1)
    for pass_ in ("forward", "backward"):
        assert half.total(pass_, 3 * UNIT) == pytest.approx(KERNELS.total(pass_, 3 * UNIT) / 2)
        assert half.bytes_per_token[pass_] == KERNELS.bytes_per_token[pass_] / 2
    with pytest.raises(ValueError, match="2 K/V groups do not divide over 4"):
        KERNELS.shard(4)


def test_memory_by_hand() -> None:
    raw, compressed, out = UNIT * TOKEN, UNIT * TOKEN * 2 / 16, UNIT * 8 * 64 * 2
    model = CostModel(KERNELS, _link(0.0), CONFIG)
    assert model.peak_gib("forward", UNIT, 1) == pytest.approx(1e4 * UNIT / GIB)
    # Gathered rows of all tokens are more than the gated sum of half of them.
    gathered = compressed + 3 * raw
    assert model.peak_gib("forward", UNIT, 2) == pytest.approx(((1e4 * UNIT - out) / 2 + gathered) / GIB)
    with_gradients = gathered + 6 * (raw + compressed / 2)
    assert model.peak_gib("backward", UNIT, 2) == pytest.approx(((2e4 * UNIT - out) / 2 + with_gradients) / GIB)
    # Outputs of eight times the heads outweigh what is gathered.
    heads = replace(KERNELS, heads=HeadLayout(64, 2, 64, 64))
    assert replace(model, kernels=heads).peak_gib("backward", UNIT, 2) == pytest.approx(2e4 * UNIT / 2 / GIB)


def test_coefficients_are_found_again() -> None:
    assert fit_line_and_square([(x, 3 * x + 2 * x * x) for x in (0.5, 1, 2, 8)]) == pytest.approx((3, 2))
    a, b = fit_line_and_square([(1, 2.0), (2, 3.9), (4, 7.5)])
    assert b == 0 and a == pytest.approx(1.93, abs=0.03), "a square would have to be negative"
    assert fit_line_and_square([(1, 1.0), (2, 4.2)])[0] == 0


def test_kernel_times_split_totals_by_stage() -> None:
    stages = {("forward", "window"): 1.0, ("forward", "selected"): 3.0, ("forward", "compressed"): 2.0}
    totals = {"forward": {UNIT // 8: 99.0, UNIT: 10.0, 2 * UNIT: 28.0}}
    kernels = fit_kernel_times(totals, stages, {"forward": {UNIT: 1.0, 2 * UNIT: 2.0}}, HEADS)
    assert kernels.at("forward", "window", UNIT) == pytest.approx(1.5)
    assert kernels.at("forward", "selected", 2 * UNIT) == pytest.approx(9.0)
    assert kernels.at("forward", "compressed", 2 * UNIT) == pytest.approx(16.0)
    assert kernels.total("forward", 2 * UNIT) == pytest.approx(28.0)
    assert kernels.bytes_per_token["forward"] == pytest.approx(GIB / UNIT)
    one = fit_kernel_times({"forward": {UNIT: 12.0}}, stages, {}, HEADS)
    assert one.at("forward", "compressed", UNIT) == pytest.approx(4.0) and one.total("forward", UNIT) == pytest.approx(12)
    with pytest.raises(ValueError, match="no kernel times for the forward"):
        fit_kernel_times({"forward": {}}, stages, {}, HEADS)


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def _files(folder: Path) -> tuple[Path, Path]:
    heads = {"num_heads": 8, "num_groups": 2, "qk_dim": 64, "v_dim": 64}
    attention = [
        {"seq_len": UNIT, **heads, "inputs": "random", "impl": "nsa", "stage": stage, "pass": pass_, "p50_ms": ms, "peak_gib": 1}
        for pass_ in ("forward", "backward")
        for stage, ms in {"all": 50.0, **STAGES}.items()
    ]
    parallel = [
        {
            "seq_len": n * UNIT, **heads, "cp": cp, "tp": 1, "layout": "zigzag", "comm": "none" if cp == 1 else "all_gather",
            "pass": pass_, "p50_ms": (31 * n + 10 * n * n) / cp * (1 if cp == 1 else 1.25), "exposed_ms": 0.5, "peak_gib": n / cp,
        }
        for n in (1, 4) for cp in (1, 2) for pass_ in ("forward", "backward")
    ]  # fmt: skip
    return _write(folder / "attention.csv", attention), _write(folder / "context_parallel.csv", parallel)


def test_check_compares_every_measured_point(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    attention, parallel = _files(tmp_path)
    files = ["--attention-csv", str(attention), "--csv", str(parallel), "--heads", "8/2x64"]
    assert main(["bench", "cost-model", "--check", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 2 and all("measured" in line for line in lines[:4])
    # The kernels alone are 20% below what was "measured"; communication adds a little.
    assert "of 2 points" in lines[4] and 10 < float(lines[4].split("mean error ")[1].split("%")[0]) < 20
    assert main(["bench", "cost-model", *files, "--cp", "2", "512", "--seq-lens", "65536", "4194304"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in table[2:]] == [[" 64k ", " 2 "], [" 4M ", " 2 "], [" 4M ", " 512 "]]


def test_only_the_default_file_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    attention, _ = _files(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["bench", "cost-model", "--attention-csv", str(attention), "--heads", "8/2x64", "--seq-lens", "65536", "--cp", "2"]
    assert main(command) == 0
    assert "context_parallel.csv does not exist; one GPU's totals are from" in capsys.readouterr().err
    assert main([*command, "--check"]) == 2
    assert "docs/benchmarks/context_parallel.csv does not exist" in capsys.readouterr().err


def test_the_agreement_can_be_given_as_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    attention, parallel = _files(tmp_path)
    command = ["bench", "cost-model", "--attention-csv", str(attention), "--csv", str(parallel), "--heads", "8/2x64"]
    command += ["--seq-lens", "65536", "--cp", "2"]
    times = []
    for more in ([], ["--agreement-step-ms", "1000"], ["--new-layouts", "--agreement-step-ms", "1000"]):
        assert main([*command, *more]) == 0
        times.append(float(capsys.readouterr().out.splitlines()[2].split("|")[4].split("+")[0]))
    assert times[0] < 50 and times[1] == 1000 and 1000 < times[2] < 1050


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "--csv", "nothing.csv"], "nothing.csv does not exist"),
        (["--csv", "nothing.csv"], "nothing.csv does not exist; make it with nsa-cp bench, or name another file"),
        (["--attention-csv", "nothing.csv"], "nothing.csv does not exist"),
        (
            ["--network-gb-per-s", "0"],
            "--network-gb-per-s: 0 is not above 0, so nothing would ever arrive; give a rate, for exam",
        ),
        (["--network-gb-per-s", "-50"], "-50 is not above 0"),
        (["--network-gb-per-s", "nan"], "nan is not a finite number; give one"),
        (["--network-gb-per-s", "fast"], "fast is not a finite number"),
        (["--agreement-step-ms", "-1"], "-1 is less than 0; give milliseconds"),
        (["--cp", "1"], "--cp 1 has nothing to communicate"),
        (["--heads", "16/2x64"], "no stages of"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    attention, parallel = _files(tmp_path)
    assert main(["bench", "cost-model", "--attention-csv", str(attention), "--csv", str(parallel), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert main(["bench", "cost-model", "--attention-csv", str(parallel), "--csv", str(parallel)]) == 2
    assert f"{parallel} lacks the columns inputs, impl, stage; is it the CSV file of another" in capsys.readouterr().err
