"""YAML to RunConfig: coercion, overrides, and every fault at once with its path."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml

from nsa_cp.config import NSAConfig
from nsa_cp.training.config import RunConfig
from nsa_cp.training.config_checks import check_world
from nsa_cp.training.config_load import build_config, load_config
from nsa_cp.training.errors import ConfigError, UserError

CONFIGS = Path(__file__).parents[2] / "configs"


def problems(tree: dict, *overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        build_config(tree, overrides)
    return {problem.path: problem.message for problem in caught.value.problems}


def test_defaults_are_valid_and_resolved() -> None:
    config = build_config({})
    assert config.model.kv_channels == config.model.v_channels == 16
    assert config.model.ffn_hidden_size == 3 * config.model.hidden_size
    assert config.data.vocab_size == 256
    assert config.nsa_config == NSAConfig()


def test_every_setting_of_the_attention_is_in_the_yaml() -> None:
    values = dict(
        compress_block_size=8,
        compress_stride=4,
        select_block_size=16,
        num_selected_blocks=5,
        num_init_blocks=0,
        num_local_blocks=1,
        window_size=32,
        compressor="linear",
        shared_kv=True,
        compressed_rope="before",
        gate="branch",
        gate_temperature=2.5,
        layout="contiguous",
        compressed_comm="ring",
        backend="torch",
    )
    assert build_config({"nsa": values}).nsa_config == NSAConfig(**values)


@pytest.mark.parametrize(
    ("size", "fault"),
    [
        (dict(window_size=512.0), "window_size = 512.0 is not a whole number; use an int of at least 0"),
        (dict(num_init_blocks=True), "num_init_blocks = True is not a whole number"),
        (dict(window_size=2**31), "window_size = 2147483648 must be at most 2147483647"),
        (dict(compress_stride="16"), "compress_stride = '16' is not a whole number; use an int of at least 1"),
    ],
)
def test_sizes_of_the_attention_are_whole_numbers(size: dict, fault: str) -> None:
    with pytest.raises(ValueError, match=f"^{fault}"):
        NSAConfig(**size)
    assert NSAConfig(window_size=np.int64(256)) == NSAConfig(window_size=256)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), 1e-4, 2000, True, "10", Fraction(3, 2)])
def test_the_gates_temperature_is_a_positive_number(temperature: object) -> None:
    said = f"gate_temperature = {temperature!r} is not a number from 0.001 to 1000.0; use 1.0"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        NSAConfig(gate_temperature=temperature)
    assert repr(NSAConfig(gate_temperature=10)) == repr(NSAConfig(gate_temperature=10.0))


def test_numbers_written_as_yaml_strings_are_coerced() -> None:
    tree = yaml.safe_load("train: {lr: 1e-4, min_lr: 1e-5, steps: '20'}")
    assert isinstance(tree["train"]["lr"], str)  # what PyYAML makes of 1e-4
    train = build_config(tree).train
    assert (train.lr, train.min_lr, train.steps) == (1e-4, 1e-5, 20)


@pytest.mark.parametrize("written", ["010", "+10", "1_0", "10.0"])
def test_whole_numbers_are_decimal(tmp_path: Path, written: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train: {{warmup_steps: 1, steps: {written}}}\nmodel: {{ffn_hidden_size: {written}}}")
    assert (load_config(path).train.steps, load_config(path).model.ffn_hidden_size) == (10, 10)
    assert build_config({"train": {"warmup_steps": 1}}, [f"train.steps={written}"]).train.steps == 10


def test_text_may_look_like_something_else_or_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "123.yaml"
    path.write_text("runs_dir: 2001-01-01\nsample: {prompt: no}\nparallel: {distributed_optimizer: on}")
    config = load_config(path, ["data.kind=text", "data.paths=[1.50]"])
    assert (config.name, config.runs_dir, config.sample.prompt, config.data.paths) == ("123", "2001-01-01", "no", ["1.50"])
    assert config.parallel.distributed_optimizer is True
    given = build_config({}, ["name=010", "sample.prompt=", "train.init_from="])
    assert (given.run_dir, given.sample.prompt, given.train.init_from) == (Path("runs/010"), "", None)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_true_is_no_number() -> None:
    found = problems({"train": {"lr": True, "steps": False}, "parallel": {"sequence_parallel": False}})
    assert set(found) == {"train.lr", "train.steps"} and "true is no value" in found["train.lr"]


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_config({"runs_dir": "~/runs", "name": "a"}).run_dir == tmp_path / "runs" / "a"
    with pytest.raises(UserError, match="~nobody-here/runs begins with ~, but that home folder is not known; write the whole"):
        build_config({"runs_dir": "~nobody-here/runs"}).run_dir
    (tmp_path / "run.yaml").write_text("seed: 7")
    assert load_config("~/run.yaml").seed == 7


def test_overrides_reach_nested_keys_and_create_sections() -> None:
    tree = {"train": {"steps": 5, "warmup_steps": 1}}
    config = build_config(
        tree, ["train.steps=9", "model.layer_pattern=[full, nsa]", "train.lr=2e-4", "sample.prompt=a=b", "seed=7"]
    )
    assert (config.train.steps, config.train.lr, config.seed) == (9, 2e-4, 7)
    assert config.model.layer_pattern == ["full", "nsa"]
    assert config.sample.prompt == "a=b"
    assert config.layer_kinds == ("full", "nsa", "full", "nsa")


def test_all_faults_are_told_at_once_each_with_its_path() -> None:
    found = problems(
        {
            "modle": {},
            "lr": 1,
            "model": {"num_layer": 3},
            "nsa": {"compress_block_size": 30, "num_selected_blocks": 2, "select_block_size": 16, "window_size": -3},
            "train": {"steps": "many", "lr": -1},
            "data": {"sequence_length": 2047},
            "parallel": {"context": 2},
        },
        "seed",
    )
    assert found["modle"] == "unknown key; did you mean model?"
    assert found["lr"] == "unknown key; did you mean train.lr?"
    assert found["model.num_layer"] == "unknown key; did you mean model.num_layers?"
    assert found["nsa.compress_block_size"] == "30 is not a multiple of nsa.compress_stride = 16; use 32"
    assert "use at least 3" in found["nsa.num_selected_blocks"]
    assert found["nsa.select_block_size"] == "16 is smaller than nsa.compress_block_size = 30; use at least 30"
    assert found["nsa.window_size"] == "-3 must be at least 0"
    assert found["train.steps"].startswith("'many' should be a valid integer")
    assert found["train.lr"].startswith("-1 should be greater than 0")
    assert "2047 is not a multiple of 2 * parallel.context = 2*2 = 4" in found["data.sequence_length"]
    assert found["data.sequence_length"].endswith("use 2048")
    assert found[""] == "override 'seed' is not of the form section.key=value"
    assert len(found) == 11


REFUSED = {
    "heads not a multiple of groups": (
        ["model.num_attention_heads=9", "model.hidden_size=144"],
        "model.num_attention_heads",
        "9.*2; use 10",
    ),
    "groups not divisible by TP": (
        ["parallel.tensor=4"],
        "model.num_query_groups",
        "2 is not divisible by parallel.tensor = 4; use 4",
    ),
    "l below 1": (["nsa.compress_stride=0"], "nsa.compress_stride", "0 must be at least 1"),
    "temperature": (["nsa.gate_temperature=-2"], "nsa.gate_temperature", "-2.0 is not a number from 0.001"),
    "l' not a multiple of d": (["nsa.select_block_size=72"], "nsa.select_block_size", "72.*compress_stride = 16; use 80"),
    "zigzag length": (
        ["parallel.context=8", "data.sequence_length=2056"],
        "data.sequence_length",
        "2056.*2\\*8 = 16.*use 2064",
    ),
    "contiguous length": (
        ["parallel.context=3", "nsa.layout=contiguous", "data.sequence_length=2048"],
        "data.sequence_length",
        "2048.*= 3; use 2049",
    ),
    "sequence parallel length": (
        [
            "parallel.context=2",
            "parallel.tensor=2",
            "parallel.sequence_parallel=true",
            "data.sequence_length=2052",
            "model.num_query_groups=2",
            "nsa.layout=contiguous",
            "data.sequence_length=2050",
        ],
        "data.sequence_length",
        "1025 tokens.*parallel.tensor = 2.*use 2052",
    ),
    "layers and stages": (["parallel.pipeline=3"], "model.num_layers", "4.*3\\*1 = 3; use 6"),
    "virtual without pipeline": (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline", "at least 2"),
    "warm-up longer than the run": (
        ["train.steps=5"],
        "train.warmup_steps",
        "20 is larger than train.steps = 5; use at most 5",
    ),
    "opens after the run": (
        ["train.selected_from_step=301"],
        "train.selected_from_step",
        "301 is larger than train.steps = 300; use at most 300, which keeps",
    ),
    "nothing to open": (
        ["train.selected_from_step=9", "model.layer_pattern=[full, window]"],
        "train.selected_from_step",
        r"9 is about .* model.layer_pattern = \['full', 'window'\] has none; set it to 0",
    ),
    "opens with an untrained window": (
        ["train.selected_from_step=9", "nsa.window_size=0"],
        "train.selected_from_step",
        "nsa.window_size = 0 leaves those untrained; use nsa.shared_kv = true or",
    ),
    "min above max": (["train.min_lr=1"], "train.min_lr", "1.0 is larger than train.lr = 0.001"),
    "batch": (["train.global_batch_size=3", "train.micro_batch_size=2"], "train.global_batch_size", "3.*2; use 4"),
    "no file named": (["data.kind=text"], "data.paths", "name at least one"),
    "no vocabulary": (["data.kind=indexed", "data.paths=[x]"], "data.vocab_size", "needs the vocabulary"),
    "vocabulary below bytes": (["data.vocab_size=255"], "data.vocab_size", "255 is too small for bytes"),
    "bytes of more than a byte": (["data.bytes_per_token=4.2"], "data.bytes_per_token", "4.2, but a token .* is one byte; leave"),
    "vocabulary and TP": (["data.vocab_size=257", "parallel.tensor=2"], "data.vocab_size", "257.*2; use 258"),
    "window layers without a window": (
        ["model.layer_pattern=[window]", "nsa.window_size=0"],
        "nsa.window_size",
        "use at least 1",
    ),
    "unknown layer": (["model.layer_pattern=[dense]"], "model.layer_pattern.0", "'dense' should be 'nsa', 'full' or 'window'"),
    "name that is a path": (["name=../x"], "name", "'../x' should match"),
    "infinite rate": (["train.lr=inf"], "train.lr", "'inf' should be a finite number"),
    "absurd depth": (["model.num_layers=4000000000"], "model.num_layers", "'4000000000' should be less than or equal to 10000"),
    "absurd width": (["model.hidden_size=4000000000"], "model.hidden_size", "should be less than or equal to 1000000"),
    "absurd window": (["nsa.window_size=9223372036854775808"], "nsa.window_size", "must be at most 2147483647"),
    "absurd length": (["train.steps=9223372036854775808"], "train.steps", "should be less than or equal to 2147483647"),
    "seed that data cannot have": (
        ["seed=4294967296", "data.kind=indexed", "data.paths=[x]", "data.vocab_size=256"],
        "seed",
        "use one below 4294967296",
    ),
    "a list for a name": (["train={[a]: 3}"], "train", "is not valid YAML"),
    "a tag that does not fit": (["train.steps=!!int abc"], "train.steps", "is not valid YAML"),
    "no text": (["sample.prompt=null"], "sample.prompt", "has no value; give one or leave it out"),
    "endless wait": (["parallel.timeout_minutes=1e300"], "parallel.timeout_minutes", "should be less than or equal to 1000000"),
    "base 60": (["train.steps=1:30"], "train.steps", "'1:30' should be a valid integer"),
    "a switch for a number": (["train.lr=true"], "train.lr", "'true' should be a valid number"),
    "nothing for a number": (["train.lr="], "train.lr", "has no value; give one or leave it out"),
    "no folder": (["runs_dir="], "runs_dir", "'' should have at least 1 character"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_name_the_numbers_and_the_remedy(case: str) -> None:
    overrides, path, pattern = REFUSED[case]
    found = problems({}, *overrides)
    assert list(found) == [path]
    assert re.search(pattern, found[path]), found[path]


def test_late_opening_is_allowed_where_it_means_something() -> None:
    assert build_config({}, ["train.selected_from_step=300"]).train.selected_from_step == 300
    build_config({}, ["train.selected_from_step=9", "model.layer_pattern=[full, nsa]"])
    build_config({}, ["train.selected_from_step=9", "nsa.window_size=0", "nsa.shared_kv=true"])


def test_a_plain_sequence_may_have_any_length_on_one_process() -> None:
    assert build_config({"data": {"sequence_length": 2047}}).data.sequence_length == 2047


@pytest.mark.parametrize(
    ("world", "overrides", "pattern"),
    [
        (3, ["parallel.context=2"], r"3 processes.*1\*1\*2 = 2; start 4"),
        (4, ["train.global_batch_size=6"], r"6 is not a multiple.*1\*4 = 4; use 8"),
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch_size=3"], r"3 micro-batches.*= 2.*= 4"),
    ],
)
def test_the_number_of_processes_is_checked(world: int, overrides: list[str], pattern: str) -> None:
    config = build_config({}, overrides)
    with pytest.raises(UserError, match=pattern):
        check_world(config, world)
    # Evaluation has batches of its own.
    if world % config.model_parallel_size == 0:
        check_world(config, world, for_training=False)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("train: [1\n", "not valid YAML at line"),
        ("- a\n", "holds a list, not sections"),
        ("seed: 1\nseed: 2\n", "'seed' appears twice .line 2."),
        ("train: {steps: 1, steps: 2}\n", "'steps' appears twice"),
        ("train: 3\n", "train: '3' should be a valid dictionary"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, text: str, pattern: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=pattern) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read.*nothing.yaml: No such file"):
        load_config(tmp_path / "nothing.yaml")


def test_the_name_defaults_to_the_file_and_yaml_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "small-run.yaml"
    path.write_text('train: {lr: 3e-4}\nsample: {prompt: "é "}\n')
    config = load_config(path, ["data.kind=text", "data.paths=[a.txt]"])
    assert config.name == "small-run"
    again = tmp_path / "config.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_that_are_shipped_are_valid(path: Path) -> None:
    overrides = ["data.paths=[corpus.txt]"] if "kind: text" in path.read_text() else []
    config = load_config(path, overrides)
    assert config.name == path.stem
    assert config.train.steps > 0


def test_quickstart_is_a_long_sequence_for_its_budget() -> None:
    config = load_config(CONFIGS / "quickstart.yaml")
    nsa = config.nsa
    assert config.data.sequence_length >= 8 * (nsa.num_selected_blocks * nsa.select_block_size + nsa.window_size)
    assert (config.parallel.context, nsa.layout, config.data.kind) == (2, "zigzag", "pydoc_topics")


def test_every_field_has_a_description() -> None:
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if name == "nsa" or not hasattr(section, "model_fields"):
            continue
        missing = [key for key, value in section.model_fields.items() if not value.description]
        assert not missing, (name, missing)


def test_model_shape_ignores_what_weights_do_not_depend_on() -> None:
    base = build_config({}).model_shape()
    assert (
        build_config({}, ["nsa.window_size=64", "nsa.num_selected_blocks=9", "parallel.context=2", "train.lr=0.1"]).model_shape()
        == base
    )
    assert build_config({}, ["model.layer_pattern=[nsa, nsa]"]).model_shape() == base
    for override in (
        "nsa.compressor=linear",
        "nsa.shared_kv=true",
        "model.num_layers=8",
        "nsa.gate=branch",
        "nsa.compress_block_size=16",
    ):
        assert build_config({}, [override]).model_shape() != base, override
    full = build_config({}, ["model.layer_pattern=[full]"]).model_shape()
    assert full == build_config({}, ["model.layer_pattern=[full]", "nsa.compressor=linear"]).model_shape()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("# Title", "# Title"), ("a # b", "a # b"), ("Note: ", "Note: "), ("The ", "The "), ("- item", "- item"), ("no", "no"),
        ("'it''s'", "it's"), ('"tab\\t"', "tab\t"), ("  ", ""),
    ],
)  # fmt: skip
def test_text_arguments_stand_as_they_are_unless_quoted(argument: str, value: str) -> None:
    assert build_config({}, [f"sample.prompt={argument}"]).sample.prompt == value
