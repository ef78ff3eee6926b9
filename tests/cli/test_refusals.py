"""Bad input at the command line: exit code 2, one sentence on the first process, nothing on disk, nobody waited for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from nsa_cp.cli.main import main

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def one_process_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command; returns its one line of error."""
    before = sorted(Path().rglob("*"))
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("nsa-cp: ") and printed.err.count("\n") == 1, printed.err
    assert sorted(Path().rglob("*")) == before
    assert not dist.is_initialized()
    return printed.err


# What the issue lists, each with a pattern that holds the numbers and the remedy.
SETTINGS = {
    "l not a multiple of d": (
        ["nsa.compress_block_size=6"],
        "nsa.compress_block_size: 6 is not a multiple of nsa.compress_stride = 4; use 8",
    ),
    "l' below l": (
        ["nsa.compress_block_size=32"],
        "nsa.select_block_size: 8 is smaller than nsa.compress_block_size = 32; use at least 32",
    ),
    "l' not a multiple of d": (["nsa.select_block_size=18"], "18 is not a multiple of nsa.compress_stride = 4; use 20"),
    "n below the forced blocks": (["nsa.num_selected_blocks=2"], r"2 is smaller than .* = 1 \+ 2; use at least 3"),
    "heads not a multiple of groups": (
        ["model.num_query_groups=3"],
        "4 is not a multiple of model.num_query_groups = 3; use 6",
    ),
    "groups not divisible by TP": (
        ["parallel.tensor=4", "parallel.context=1"],
        "model.num_query_groups: 2 is not divisible by parallel.tensor = 4; use 4",
    ),
    "length not divisible for the layout": (
        ["data.sequence_length=2050"],
        "2050 is not a multiple of 2 . parallel.context = 2.2 = 4.*; use 2052",
    ),
    "unknown key": (["train.learning_rate=1"], "train.learning_rate: unknown key; the keys here are steps,"),
    "misspelt key": (["train.warmup=1"], r"train.warmup: unknown key; did you mean train.warmup_steps\?"),
    "too few processes": ([], "1 processes were started, .* = 1.1.2 = 2; start 2"),
    "no GPU": (["parallel.context=1", "train.device=cuda"], "train.device = cuda, but PyTorch finds no GPU .0 devices."),
    "missing data file": (
        ["parallel.context=1", "data.kind=text", "data.paths=[none.txt]"],
        "data file none.txt does not exist; correct data.paths",
    ),
    "missing index": (
        ["parallel.context=1", "data.kind=indexed", "data.paths=[none]", "data.vocab_size=9"],
        "data file none.idx does not exist",
    ),
    "missing vocabulary": (
        ["parallel.context=1", "data.kind=indexed", "data.paths=[x]", "data.vocab_file=v.txt"],
        "vocabulary file v.txt does not exist",
    ),
    "no vocabulary": (["data.kind=indexed", "data.paths=[x]"], "data.vocab_size: data.kind = indexed needs the vocabulary"),
    "sequence longer than the text": (
        ["parallel.context=1", "data.sequence_length=900000"],
        "bytes, too few for one training and one validation sequence of .* = 900001",
    ),
    "no run to resume": (
        ["parallel.context=1", "--resume"],
        "there is no checkpoint in runs/quickstart/checkpoints to resume from; begin with --overwrite, or without --resume",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, pattern = SETTINGS[case]
    assert re.search(pattern, refuse(capsys, "train", str(QUICKSTART), *arguments))


def test_files_that_cannot_be_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.txt").write_bytes(b"")
    Path("latin.txt").write_bytes("grün".encode("latin-1") * 2000)
    text = [str(QUICKSTART), "parallel.context=1", "data.kind=text"]
    assert "data file empty.txt is empty (0 bytes)" in refuse(capsys, "train", *text, "data.paths=[empty.txt]")
    assert "data file latin.txt is not UTF-8 text: byte 2 is invalid" in refuse(capsys, "train", *text, "data.paths=[latin.txt]")


def test_configurations_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("train: [1")
    assert "cannot read the configuration none.yaml: No such file" in refuse(capsys, "train", "none.yaml")
    assert "bad.yaml is not valid YAML at line" in refuse(capsys, "train", "bad.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no settings; see configs/quickstart.yaml"),
        ("# nothing\n", "holds no settings"),
        ("name: a\0b", "is not valid YAML: unacceptable character"),
        ("a: " + 3000 * "[", "is not valid YAML"),
        ("train: {steps: !!bool maybe}", "is not valid YAML"),
        ("train: {steps: !!timestamp foo}", "is not valid YAML"),
    ],
)
def test_yaml_that_holds_nothing_or_breaks_its_reader(capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    Path("odd.yaml").write_text(text)
    assert f"odd.yaml {message}" in refuse(capsys, "train", "odd.yaml")


def test_runs_that_cannot_be_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "none is not a run: it has no config.yaml" in refuse(capsys, "eval", "none")
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/config.yaml").write_text("{}")
    assert "there is no checkpoint in runs/x/checkpoints" in refuse(capsys, "eval", "runs/x")
    Path("foreign").mkdir()
    assert "foreign is not a checkpoint of nsa-cp" in refuse(capsys, "eval", "runs/x", "--checkpoint", "foreign")


def test_an_existing_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/config.yaml").write_text("{}")
    told = refuse(capsys, "train", str(QUICKSTART), "parallel.context=1")
    assert "run runs/quickstart exists; it has no checkpoint yet; begin again with --overwrite" in told
    Path("runs/quickstart/checkpoints").mkdir()
    Path("runs/quickstart/checkpoints/latest").write_text("step_00000050")
    assert "run runs/quickstart exists; go on with --resume" in refuse(capsys, "train", str(QUICKSTART), "parallel.context=1")


def test_several_faults_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(QUICKSTART), "nsa.compress_block_size=6", "train.steps=x", "data.sequence_length=2050"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("quickstart.yaml has 3 errors:")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "train.steps",
        "nsa.compress_block_size",
        "data.sequence_length",
    ]


def test_only_the_first_process_of_a_machine_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "none.yaml"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "none.yaml"]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_half_a_launcher(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "has RANK or WORLD_SIZE but not RANK; start with torchrun" in refuse(capsys, "train", str(QUICKSTART))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK = 0 lies outside WORLD_SIZE = 0; start with torchrun"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK = 5 lies outside WORLD_SIZE = 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "2 processes have no MASTER_ADDR and MASTER_PORT to meet at; start with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "must be whole numbers"),
        ({"LOCAL_WORLD_SIZE": "abc"}, "LOCAL_WORLD_SIZE = 'abc' is not a whole number"),
    ],
)
def test_a_launcher_that_contradicts_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in refuse(capsys, "train", str(QUICKSTART), "parallel.context=1")


def test_the_process_exits_with_2_and_no_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "nsa_cp.cli.main", "train", str(QUICKSTART), "parallel.context=3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert "1024 is not a multiple of 2 * parallel.context = 2*3 = 6" in done.stderr
    assert not list(Path().iterdir())


def test_settings_may_stand_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    error = refuse(
        capsys,
        "train",
        str(QUICKSTART),
        "parallel.context=3",
        "--overwrite",
        "data.sequence_length=2052",
        "model.num_query_groups=3",
    )
    assert "model.num_attention_heads: 4 is not a multiple" in error and "sequence_length" not in error


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized arguments: --resum; see nsa-cp --help" in refuse(
        capsys, "train", str(QUICKSTART), "--resum", "train.steps=2"
    )
    assert "unrecognized arguments: extra" in refuse(capsys, "env", "extra")
    assert "the following arguments are required: CONFIG" in refuse(capsys, "train")
    assert "invalid choice: 'trian'" in refuse(capsys, "trian")
    assert "--seq-lens: 0 is not a positive whole number" in refuse(capsys, "bench", "attention", "--seq-lens", "0")
    assert "--repetitions: 0 is not a positive whole number" in refuse(capsys, "bench", "attention", "--repetitions", "0")


def test_places_that_cannot_be_written_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is measured or trained."""
    Path("file").write_text("")
    study = ("study", "mqar", "--scale", "tiny", "--device", "cpu", "--workers", "0")
    assert "file: File exists; choose another path" in refuse(capsys, *study, "--out", "file")
    small = ("bench", "attention", "--device", "cpu", "--seq-lens", "128", "--heads", "4/2x16", "--impls", "nsa")
    assert "--csv . is a folder; give a file in it" in refuse(capsys, *small, "--csv", ".")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "has 300 bytes; a folder's name has at most 255" in refuse(
        capsys, "train", str(QUICKSTART), "parallel.context=1", f"name={300 * 'x'}"
    )
    check = ("bench", "context-parallel", "--check")
    assert "--check times nothing, so --csv rows.csv would get no rows" in refuse(capsys, *check, "--csv", "rows.csv")
    assert f"--csv {tmp_path} is a folder" in refuse(capsys, *small, "--csv=~")
    assert "argument --csv: ~nobody-here/x begins with ~, but that home" in refuse(capsys, *small, "--csv=~nobody-here/x")


@pytest.mark.parametrize("value", ["nan", "-1", "0"])
@pytest.mark.parametrize("option", ["--lrs", "--steps-scale", "--time-limit"])
def test_studies_want_finite_numbers_above_0(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert f"{option}: {value} is not" in refuse(capsys, "study", "mqar", "--scale", "tiny", f"{option}={value}")


def test_env_reports_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    report = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name in ("nsa-cp", "python", "torch", "triton", "megatron-core", "apex", "cuda", "nccl", "mpi"):
        assert report[name]
    assert report["python"].startswith(".".join(map(str, sys.version_info[:3])))
