"""Writes the page of a study: what was compared, the results with their intervals, and whether the claims hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nsa_cp.study.changes import change_settings
from nsa_cp.study.corpus import Corpus
from nsa_cp.study.plots import plot_study
from nsa_cp.study.results import ArmResult, arrange, current_runs, difference, newest_table, trained_alike, write_csv
from nsa_cp.study.statistics import Interval, verdict
from nsa_cp.study.store import Record, RunStore
from nsa_cp.study.studies import build_study
from nsa_cp.study.table import Claim, Study
from nsa_cp.training.errors import UserError

_VERDICTS = {"shown": "**shown**", "refuted": "**refuted**: it is worse by more", "open": "open: the interval holds both"}
# Pairs of arms to compare: an arm, and one that lacks a part of it or (dense_blocks) has a better one.
_CONTROLS = (
    ("nsa", "window"), ("nsa", "compressed_window"), ("nsa", "random_blocks"), ("nsa", "dense_blocks"),
    ("late_selection", "late_random"), ("held_gates", "held_gates_random"), ("from_full", "from_full_random"),
)  # fmt: skip


def write_report(name: str, scale: str, runs: Path, folder: Path, changes: Sequence[str] = ()) -> list[Path]:
    """Write ``NAME.md``, ``NAME.csv`` and plots about the newest table of runs of a study.

    Args:
        name, scale: which study.
        runs: its file of runs (see ``RunStore``).
        folder: where to write.
        changes: the settings that were changed for these runs (see ``change_settings``).

    Returns:
        The files written, the page first.

    Raises:
        UserError: the file has no finished run of that scale, or none of an arm as it is defined now (and changed).
    """
    study = build_study(name, scale, corpus=Corpus(digest="", num_packages=(0, 0, 0), num_bytes=(0, 0, 0)))
    study = change_settings(study, changes)
    everything = RunStore(runs).load()
    done = [record for record in everything.values() if record["status"] == "done" and record["scale"] == scale]
    records = newest_table(trained_alike(study, done), scale)
    if not records:
        raise UserError(
            f"{runs} has no finished run of scale {scale} with these training settings; make some first: nsa-cp study {name} "
            f"--scale {scale}"
        )
    elsewhere = len(done) - len(records)
    of_table, records = len(records), current_runs(study, records)
    if not records:
        raise UserError(f"{runs} has {of_table} runs of the newest table, none of an arm as it is defined now; make them again")
    results = arrange(study, records)
    folder.mkdir(parents=True, exist_ok=True)
    page, table = folder / f"{name}.md", folder / f"{name}.csv"
    write_csv(records, table)
    plots = plot_study(name, results, study.metrics, folder)
    failed = [record for record in everything.values() if record["status"] == "failed"]
    text = list(_page(study, records, results, plots, failed, changes))
    if of_table > len(records):
        text += ["", f"Left out: {of_table - len(records)} runs of arms that were defined otherwise then."]
    if elsewhere:
        text += ["", f"Left out: {elsewhere} runs of other tables (other stages, training settings or text)."]
    page.write_text("\n".join(text) + "\n", encoding="utf-8")
    return [page, table, *plots]


def _page(
    study: Study,
    records: Sequence[Record],
    results: dict[str, ArmResult],
    plots: Sequence[Path],
    failed: Sequence[Record],
    changes: Sequence[str],
) -> Iterator[str]:
    yield f"# {study.title}"
    yield ""
    machines = sorted({f"{record['device']}, PyTorch {record['torch']}" for record in records})
    minutes = sum(record["seconds"] for record in records) / 60
    options = f"--scale {study.scale}" + (f" --set {' '.join(changes)}" if changes else "")
    yield (
        f"Written by `nsa-cp study {study.name} {options} --report` from {len(records)} runs, table "
        f"`{records[0]['table']}`, made on {'; '.join(machines)}. The runs' times add up to {minutes:.1f} minutes, several at "
        f"a time. Every run: [{study.name}.csv]({study.name}.csv); what the tasks, the arms, recall and mass are: "
        f"`docs/learning/README.md`."
    )
    yield ""
    yield from _settings(records[0]["settings"])
    yield from _arms_table(study, results)
    yield from _claims(study, results)
    yield from _controls(study, results)
    yield from _defaults(study, results)
    yield from _attention(results)
    yield from _sweep(study, results)
    for plot in plots:
        yield f"![{plot.stem}]({plot.name})"
    if failed:
        yield ""
        yield f"Failed runs: {', '.join(_name(record) for record in failed)}."


def _name(record: Record) -> str:
    return f"{record['arm']} lr {record['lr']:g} seed {record['seed']}"


def _settings(settings: dict[str, Any]) -> Iterator[str]:
    model, train, task = settings["model"], settings["train"], settings["task"]
    yield (
        f"Model of the arm `nsa`'s shape: {model['num_layers']} layers, hidden size {model['hidden_size']}, "
        f"{model['num_attention_heads']} heads in {model['num_query_groups']} groups of width {model['kv_channels']}, vocabulary "
        f"{model['vocab_size']}."
    )
    nsa = model["nsa"]
    yield (
        f"NSA: l {nsa['compress_block_size']}, d {nsa['compress_stride']}, l' {nsa['select_block_size']}, "
        f"n {nsa['num_selected_blocks']}, w {nsa['window_size']}. Training: {train['warmup_steps']} warm-up steps, weight decay "
        f"{train['weight_decay']}, betas {tuple(train['betas'])}, {train['precision']}."
    )
    lengths = [stage.get("length") or stage["shape"]["length"] for stage in task["schedule"]]
    stages = zip(task["schedule"], lengths, strict=True)
    shapes = "; ".join(f"{stage['num_sequences']} x {length}, {stage['steps']}" for stage, length in stages)
    yield f"Stages (sequences x tokens, most steps): {shapes}."
    if "corpus" in task:
        corpus = task["corpus"]
        parts = zip(("test", "validation", "training"), corpus["num_bytes"], corpus["num_packages"], strict=True)
        yield "Text: " + ", ".join(f"{size:,} bytes of {count} packages for {part}" for part, size, count in parts) + "."
    yield ""


def _number(value: float, metric: str) -> str:
    return f"{100 * value:.2f}%" if metric.startswith("accuracy") else f"{value:.4f}"


def _with_interval(interval: Interval | None, metric: str) -> str:
    if interval is None:
        return "-"
    if interval.count == 1:
        return f"{_number(interval.mean, metric)} (one seed)"
    return f"{_number(interval.mean, metric)} [{_number(interval.low, metric)}, {_number(interval.high, metric)}]"


def _arms_table(study: Study, results: dict[str, ArmResult]) -> Iterator[str]:
    metrics = study.metrics
    yield "## By arm"
    yield ""
    yield "Test figures at the learning rate that validated best of those run: mean over seeds [95% interval]."
    yield ""
    yield f"| arm | | parameters | rate | seeds | {' | '.join(metrics)} | steps | seconds |"
    yield "|---" * (7 + len(metrics)) + "|"
    for result in results.values():
        cells = [_with_interval(result.mean(metric), metric) for metric in metrics]
        runs = list(result.runs.values())
        steps, seconds = (sum(run[key] for run in runs) / len(runs) for key in ("steps", "seconds"))
        yield (
            f"| {result.name} | {result.description} | {result.parameters:,} | {result.lr:g} | {len(runs)} | {' | '.join(cells)} "
            f"| {steps:.0f} | {seconds:.1f} |"
        )
    yield ""


def _claims(study: Study, results: dict[str, ArmResult]) -> Iterator[str]:
    yield "## Claims"
    yield ""
    for claim in study.claims:
        if claim.arm not in results:
            continue
        bound = f"{claim.margin:.1%} of it" if claim.relative else f"{100 * claim.margin:g} points"
        yield f"- `{claim.metric}` of `{claim.arm}` is no worse than full attention's by more than {bound}:"
        for rival in ("full", "full_params"):
            yield f"  - against `{rival}`: {_judged(claim, results[claim.arm], results.get(rival))}"
    yield ""
    missing = dict.fromkeys(claim.arm for claim in study.claims if claim.arm not in results)
    if missing:
        yield f"Claims about arms without runs: {', '.join(f'`{name}`' for name in missing)}."
        yield ""


def _judged(claim: Claim, ours: ArmResult, theirs: ArmResult | None) -> str:
    interval = difference(ours, theirs, claim.metric) if theirs else None
    if interval is None or theirs is None:
        return "not measured"
    if interval.count == 1:
        return f"difference {_with_interval(interval, claim.metric)}; open"
    reference = theirs.mean(claim.metric)
    margin = claim.margin * (reference.mean if claim.relative and reference else 1.0)
    outcome = _VERDICTS[verdict(interval, margin, claim.higher_is_better)]
    return f"difference {_with_interval(interval, claim.metric)} over {interval.count} seeds; {outcome}"


def _controls(study: Study, results: dict[str, ArmResult]) -> Iterator[str]:
    pairs = [pair for pair in _CONTROLS if results.keys() >= set(pair)]
    if pairs:
        yield "## What each part is for"
        yield ""
        yield "An arm minus one that lacks a part of it (dense_blocks: that chooses better), paired by seed."
        yield ""
        yield from _differences(study, results, pairs)


def _defaults(study: Study, results: dict[str, ArmResult]) -> Iterator[str]:
    pairs = [(arm.name, "nsa") for arm in study.arms if arm.tests_default and results.keys() >= {arm.name, "nsa"}]
    if pairs:
        yield "## Defaults"
        yield ""
        yield "Each arm differs from `nsa` in its defaults; the arm minus `nsa`, paired by seed."
        yield ""
        yield from _differences(study, results, pairs)


def _differences(study: Study, results: dict[str, ArmResult], pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"| | {' | '.join(study.metrics)} |"
    yield "|---" * (1 + len(study.metrics)) + "|"
    for ours, theirs in pairs:
        cells = [_with_interval(difference(results[ours], results[theirs], metric), metric) for metric in study.metrics]
        yield f"| {ours} minus {theirs} | {' | '.join(cells)} |"
    yield ""


def _attention(results: dict[str, ArmResult]) -> Iterator[str]:
    yield "## Gates and selections after training"
    yield ""
    yield "By layer, means over seeds. Gates: compressed / selected / window."
    yield ""
    yield "| arm | gates | agreement of neighbours | recall of dense attention's best blocks | dense mass in chosen blocks |"
    yield "|---|---|---|---|---|"
    for result in results.values():
        found = [run["attention"] for run in result.runs.values() if run["attention"]]
        if found:
            gates = ", ".join(" / ".join(f"{gate:.2f}" for gate in layer) for layer in _mean([each["gates"] for each in found]))
            others = [_by_layer([each.get(key) for each in found]) for key in ("agreement", "recall", "mass")]
            yield f"| {result.name} | {gates} | {' | '.join(others)} |"
    yield ""


def _by_layer(values: Sequence[list[float] | None]) -> str:
    known = [each for each in values if each is not None and None not in each]
    return ", ".join(f"{value:.2f}" for value in _mean(known)) if known else "-"


def _mean(values: Sequence[Any]) -> Any:
    """Element by element over nested lists of one shape."""
    if isinstance(values[0], list):
        return [_mean(each) for each in zip(*values, strict=True)]
    return sum(values) / len(values)


def _sweep(study: Study, results: dict[str, ArmResult]) -> Iterator[str]:
    rates = sorted({lr for result in results.values() for lr in result.sweep})
    yield "## Learning rates"
    yield ""
    yield f"Validation `{study.select_by}` of the first seed at each rate that was run; the best one has the other seeds."
    yield ""
    yield f"| arm | {' | '.join(f'{lr:g}' for lr in rates)} |"
    yield "|---" * (1 + len(rates)) + "|"
    for result in results.values():
        values = [result.sweep[lr]["valid"].get(study.select_by) if lr in result.sweep else None for lr in rates]
        yield f"| {result.name} | {' | '.join('-' if v is None else _number(v, study.select_by) for v in values)} |"
    yield ""
