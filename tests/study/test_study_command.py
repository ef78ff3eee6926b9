"""``nsa-cp study`` end to end on a CPU, tiny, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from nsa_cp.cli.main import main
from nsa_cp.study import arms

ARMS = ("full", "nsa", "window", "random_blocks", "gate_branch")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def packages(folder: Path, count: int = 14) -> Path:
    """A folder of packages with sources; a copy of another package inside one must not be read."""
    for index in range(count):
        package = folder / f"package{index}"
        (package / "_vendor").mkdir(parents=True)
        lines = [f"def function_{index}_{i}(argument_{i}: int) -> int:\n    return argument_{i} * {i}\n" for i in range(1200)]
        (package / "module.py").write_text("".join(lines))
        (package / "_vendor" / "copied.py").write_text("COPIED = 1\n" * 50)
    return folder


def study(name: str, *options: str) -> int:
    return main(["study", name, "--scale", "tiny", "--device", "cpu", "--workers", "0", *options])


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"runs/study/{name}.jsonl").read_text().splitlines()]


def sign_is_right(line: str, made: list[dict]) -> bool:
    """Whether a row "a minus b" has a's mean minus b's over the two seeds, in its first column."""
    names, cell = line.split("|")[1].strip().split(" minus "), line.split("|")[2].split()[0]
    metric = {"mqar": "accuracy", "passkey": "accuracy_128", "language": "trailing_loss"}[made[0]["study"]]
    a, b = (sum(r["test"][metric] for r in made if r["arm"] == name) / 2 for name in names)
    shown = float(cell.removesuffix("%")) / (100 if cell.endswith("%") else 1)
    return abs(shown - (a - b)) < 1e-4


@pytest.mark.parametrize("name", ["mqar", "passkey", "language"])
def test_a_study_from_the_first_run_to_the_page(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", str(packages(tmp_path / "site"))] if name == "language" else []
    names = (*ARMS, "dense_blocks", "held_gates") if name == "language" else ARMS
    options = ["--lrs", "0.004", "--seeds", "2", *text, "--only", f"arm={','.join(names)}"]
    assert study(name, *options) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("complete: ")
    made = records(name)
    assert len(made) == 2 * len(names) and {record["status"] for record in made} == {"done"}
    assert study(name, *options) == 0 and len(records(name)) == len(made)
    nsa = next(record for record in made if record["arm"] == "nsa")
    assert len(nsa["attention"]["gates"]) == (1 if name == "mqar" else 2) and nsa["curve"][-1]["step"] == nsa["steps"]
    for held in (record for record in made if record["arm"] == "held_gates"):
        # In all stages but the last.
        for point in held["curve"]:
            halves = {gate == 0.5 for layer in point["gates"] for gate in layer}
            assert halves == {True} if point["stage"] == 0 else halves != {True}, point
        assert {point["stage"] for point in held["curve"]} == {0, 1}
    saved = torch.load(f"runs/study/{name}_selections.pt", weights_only=True)
    assert saved["origin"]["run"] == nsa["run"]

    assert study(name, "--report", "--docs", "pages") == 0
    page = Path(f"pages/{name}.md").read_text()
    assert all(f"| {arm} |" in page for arm in names) and "## Claims" in page
    assert all(sign_is_right(line, made) for line in page.splitlines() if line.startswith("| ") and " minus " in line)
    assert "| nsa minus window |" in page
    assert page.count("against `full`: difference") == (1 if name == "mqar" else 2)
    rows = list(csv.DictReader(Path(f"pages/{name}.csv").open()))
    assert len(rows) == len(made) and {row["arm"] for row in rows} == set(names) and rows[0]["test.loss"]
    plots = {path.name for path in Path("pages").glob("*.png")}
    extra = {"mqar": set(), "passkey": {"passkey_depth_length.png"}, "language": {"language_positions.png"}}[name]
    assert plots == {f"{name}_arms.png", f"{name}_curves.png"} | extra
    assert all(plot in page for plot in plots) and "Left out" not in page


def test_runs_of_an_arm_that_was_something_else_are_left_out() -> None:
    """Of the same table, under the same name; and with none left there is nothing to write."""
    assert study("mqar", "--lrs", "0.004", "--seeds", "1", "--only", "arm=full,nsa") == 0
    path = Path("runs/study/mqar.jsonl")
    full, nsa = records("mqar")
    nsa["settings"]["model"]["equal_start"] = False
    path.write_text(f"{json.dumps(full)}\n{json.dumps(nsa)}\n")
    assert study("mqar", "--report", "--docs", "pages") == 0
    page = Path("pages/mqar.md").read_text()
    assert "| full |" in page and "| nsa |" not in page and "Left out: 1 runs" in page
    path.write_text(f"{json.dumps(nsa)}\n")
    assert study("mqar", "--report", "--docs", "pages") == 2


def test_settings_changed_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """They reach the model and the training, but for what an arm sets itself; the runs are others, with a page of their own."""
    common = ["--lrs", "0.004", "--seeds", "1", "--only", "arm=nsa,slow_gates"]
    sizes = ["--set", "nsa.compress_block_size=4", "nsa.compress_stride=2", "--set", "model.num_layers=2"]
    changes = ["--set", "nsa.gate_temperature=3", *sizes, "--set", "train.weight_decay=0.5"]
    assert study("mqar", *common, *changes) == 0
    nsa, slow = (record["settings"] for record in records("mqar"))
    assert (nsa["model"]["nsa"]["gate_temperature"], slow["model"]["nsa"]["gate_temperature"]) == (3.0, 10.0)
    for settings in (nsa, slow):
        sizes = settings["model"]["nsa"]
        assert (sizes["compress_block_size"], sizes["compress_stride"], settings["model"]["num_layers"]) == (4, 2, 2)
        assert settings["train"]["weight_decay"] == 0.5
    assert len(records("mqar")[0]["attention"]["gates"]) == 2

    assert study("mqar", "--list", *common) == 0 and "2 runs can be made now" in capsys.readouterr().out
    assert study("mqar", "--report", "--docs", "pages") == 2
    assert "no finished run of scale tiny with these training settings" in capsys.readouterr().err
    assert study("mqar", "--report", "--docs", "pages", "--set", "train.weight_decay=0.5") == 2
    assert "none of an arm as it is defined now" in capsys.readouterr().err
    assert study("mqar", "--report", "--docs", "pages", *changes) == 0
    page = Path("pages/mqar.md").read_text()
    assert "`nsa-cp study mqar --scale tiny --set nsa.gate_temperature=3 " in page and "| nsa |" in page

    # Other training settings make another table, which the page of the newest one mentions.
    assert study("mqar", *common) == 0 and study("mqar", "--report", "--docs", "pages") == 0
    assert "Left out: 2 runs of other tables" in Path("pages/mqar.md").read_text()


def test_every_arm_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert study("mqar", "--lrs", "0.004", "--seeds", "1") == 0
    made = records("mqar")
    names = {arm.name for arm in (*arms.ARMS, *arms.late_arms(1))}
    assert {record["arm"] for record in made} == names and len(made) == len(names)
    assert {record["status"] for record in made} == {"done"}
    losses = {record["arm"]: record["test"]["loss"] for record in made}
    assert len(set(losses.values())) == len(names), "two arms that should differ gave the same"


def test_a_part_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert study("mqar", "--list", "--only", "arm=full,nsa", "lr=0.004") == 0
    printed = capsys.readouterr().out
    assert printed.count(" lr 0.004 seed 0") == 2 and "2 runs can be made now" in printed and "window" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "mqra"], "study 'mqra' is unknown; use one of mqar, passkey, language"),
        (["study", "mqar", "--scale", "huge"], "scale 'huge' is unknown; use one of full, mini, tiny"),
        (["study", "mqar", "--only", "arm=fulll"], "--only arm=fulll is not in the table; it has full, full_params"),
        (["study", "mqar", "--only", "lr=x"], "--only lr=x is not in the table; it has 0.001, 0.002, 0.004"),
        (["study", "mqar", "--only", "speed=1"], "--only 'speed=1' is not understood; write arm=VALUE, lr=VALUE, seed=VALUE"),
        (["study", "mqar", "--set", "window_size=8"], "--set 'window_size=8' is not understood; write nsa.FIELD=VALUE"),
        (["study", "mqar", "--set", "nsa.windows=8"], "--set nsa.windows=8: there is no setting 'windows' here, only compress_b"),
        (["study", "mqar", "--set", "model.nsa=8"], "--set model.nsa=8: there is no setting 'nsa' here, only vocab_size"),
        (["study", "mqar", "--set", "nsa.window_size=wide"], "--set nsa.window_size=wide: Input should be a valid integer"),
        (["study", "mqar", "--set", "nsa.compress_stride=5"], "--set: compress_block_size = 16 is not a multiple of compress_"),
        (["study", "mqar", "--set", "model.hidden_size=-8"], "--set: hidden_size = -8 must be at least 1"),
        (["study", "mqar", "--set", "model.num_outputs=1000"], "--set: num_outputs = 1000 must be from 1 to vocab_size ="),
        (["study", "mqar", "--set", "nsa.window_size=0"], "--set: nsa.window_size = 0, but several arms are about the window"),
        (["study", "mqar", "--set", "train.eval_every=0"], "--set: warmup_steps = 40 and eval_every = 0 must be at least"),
        (["study", "mqar", "--set", "train.weight_decay=nan"], "--set: weight_decay = nan and clip_norm = 1.0 must be positive"),
        (["study", "mqar", "--set", "train.betas=0.9"], "--set train.betas=0.9: there is no setting 'betas' here, only warmup"),
        (["study", "mqar", "--workers", "-1"], "--workers = -1 is too small"),
        (["study", "mqar", "--seeds", "0"], "--seeds = 0 is too small"),
        (["study", "mqar", "--report"], "runs/study/mqar.jsonl does not exist; make the runs first: nsa-cp study mqar"),
        (["study", "mqar", "--device", "tpu"], "--device 'tpu' is unknown; use cuda or cpu"),
        (["study", "language", "--scale", "tiny", "--text", "nowhere"], "--text nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert list(Path().iterdir()) == []


def test_too_little_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study("language", "--text", str(packages(tmp_path / "site", 2))) == 2
    assert "packages with Python sources; at least" in capsys.readouterr().err
