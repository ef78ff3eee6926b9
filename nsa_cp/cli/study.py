"""``nsa-cp study``: small models that show what the attention learns."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_cp.cli.arguments import chosen_device, factor, place, seconds
from nsa_cp.training.errors import UserError

if TYPE_CHECKING:
    from nsa_cp.study.table import Study


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``study`` to the parser of ``nsa-cp``."""
    study = commands.add_parser(
        "study",
        allow_abbrev=False,
        help="train small models, arm by arm, and report what they learn",
        description="Make the runs of a study that are not made yet, or write the page about those that are.",
    )
    study.add_argument("name", metavar="NAME", help="mqar, passkey or language")
    study.add_argument("--scale", default="full", help="full (one GPU), mini (a CPU, patience) or tiny (seconds, proves nothing)")
    study.add_argument("--out", type=place, default="runs/study", metavar="FOLDER", help="finished runs; default runs/study")
    study.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time; 0: in this process")
    study.add_argument(
        "--time-limit", type=seconds, metavar="SECONDS", help="when no run starts any more and those at work give up"
    )
    study.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=A,B",
        help="a part of the table: arm=nsa,full lr=0.004 seed=0",
    )
    study.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 in place of the study's")
    study.add_argument("--lrs", type=factor, nargs="+", metavar="LR", help="learning rates in place of the study's")
    study.add_argument("--steps-scale", type=factor, default=1.0, metavar="X", help="X times the steps of every stage")
    study.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings for every arm: nsa.window_size=256 model.num_layers=2",
    )
    study.add_argument("--device", default="", help="cuda or cpu; default: cuda where it is there")
    study.add_argument(
        "--text", type=place, metavar="FOLDER", help="of language: packages of Python sources; default: the installed"
    )
    study.add_argument("--no-graph", action="store_true", help="launch every kernel of a step instead of replaying CUDA graphs")
    study.add_argument("--verbose", action="store_true", help="a line for every validation too")
    study.add_argument("--list", action="store_true", help="print the arms with their parameters and the runs still to make")
    study.add_argument("--report", action="store_true", help="write CSV, plots and page of the finished runs, and make none")
    study.add_argument("--docs", type=place, metavar="FOLDER", help="of the report; default: report in the folder of --out")
    study.set_defaults(run=_study)


def _study(arguments: argparse.Namespace) -> int:
    from nsa_cp.study.store import RunStore
    from nsa_cp.study.studies import SCALES, STUDIES

    if arguments.name not in STUDIES:
        raise UserError(f"study {arguments.name!r} is unknown; use one of {', '.join(STUDIES)}")
    if arguments.scale not in SCALES:
        raise UserError(f"scale {arguments.scale!r} is unknown; use one of {', '.join(SCALES)}")
    store = RunStore(arguments.out / f"{arguments.name}.jsonl")
    if arguments.report:
        return _report(arguments, store.path)
    deadline = None if arguments.time_limit is None else time.monotonic() + arguments.time_limit
    study = _chosen(arguments)
    if arguments.list:
        return _list(study, store.path)
    device = chosen_device(arguments.device)
    # Now, so that a folder that cannot be made is reported before hours of runs.
    arguments.out.mkdir(parents=True, exist_ok=True)
    from nsa_cp.study.workers import Table
    from nsa_cp.training.signals import StopRequest

    with StopRequest() as stop:
        table = Table(
            study,
            store,
            device,
            num_workers=arguments.workers,
            deadline=deadline,
            use_graph=not arguments.no_graph,
            report=lambda line: print(line, flush=True),
            verbose=arguments.verbose,
            should_stop=lambda: stop.name is not None,
        )
        complete = table.run()
    failed = sum(record["status"] != "done" for record in table.records.values())
    state = "complete" if complete else "not complete; the same command goes on"
    print(f"{state}{f', but {failed} runs failed' if failed else ''}: {store.path}")
    return 1 if failed else 0


def _chosen(arguments: argparse.Namespace) -> Study:
    """The study with the changes and restrictions that the options ask for."""
    from dataclasses import replace

    from nsa_cp.study.changes import change_settings
    from nsa_cp.study.studies import build_study, scale_steps

    for name, least in (("workers", 0), ("seeds", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} = {value} is too small; use a positive number")
    if arguments.text is not None and not arguments.text.is_dir():
        raise UserError(f"--text {arguments.text} is not a folder; give one that holds Python packages, or leave it out")
    study = change_settings(build_study(arguments.name, arguments.scale, arguments.text), arguments.set)
    if arguments.steps_scale != 1.0:
        study = scale_steps(study, arguments.steps_scale)
    if arguments.seeds is not None:
        study = replace(study, seeds=tuple(range(arguments.seeds)))
    if arguments.lrs is not None:
        study = replace(study, lrs=tuple(arguments.lrs))
    return study.restricted(**_filters(arguments.only, study))


def _filters(texts: list[str], study: Study) -> dict[str, list]:
    """The texts of --only (``arm=a,b lr=x seed=0``) as arguments of ``Study.restricted``."""
    known = {
        "arm": ("arms", str, [arm.name for arm in study.arms]),
        "lr": ("lrs", float, list(study.lrs)),
        "seed": ("seeds", int, list(study.seeds)),
    }
    chosen: dict[str, list] = {field: [] for field, _, _ in known.values()}
    for text in texts:
        key, _, values = text.partition("=")
        if key not in known or not values:
            raise UserError(f"--only {text!r} is not understood; write {', '.join(f'{name}=VALUE' for name in known)}")
        field, kind, possible = known[key]
        for value in values.split(","):
            try:
                parsed = kind(value)
            except ValueError:
                parsed = None
            if parsed not in possible:
                raise UserError(f"--only {key}={value} is not in the table; it has {', '.join(map(str, possible))}")
            chosen[field].append(parsed)
    return chosen


def _list(study: Study, path: Path) -> int:
    from nsa_cp.study.model import count_parameters
    from nsa_cp.study.store import RunStore
    from nsa_cp.study.table import pending_runs

    for arm in study.arms:
        model = study.run(arm.name, study.lrs[0], study.seeds[0]).model
        print(f"{arm.name:>18} {count_parameters(model):>9} parameters, {arm.description}")
    done = {run: record for run, record in RunStore(path).load().items() if record["status"] == "done"}
    pending = list(pending_runs(study, done))
    for run in pending:
        print(f"{run.run_id} {run.arm} lr {run.lr:g} seed {run.seed}")
    print(f"{len(pending)} runs can be made now")
    return 0


def _report(arguments: argparse.Namespace, path: Path) -> int:
    from nsa_cp.study.report import write_report

    if not path.is_file():
        raise UserError(f"{path} does not exist; make the runs first: nsa-cp study {arguments.name} --out {arguments.out}")
    folder = arguments.docs or arguments.out / "report"
    written = write_report(arguments.name, arguments.scale, path, folder, changes=arguments.set)
    print(f"wrote {', '.join(map(str, written))}")
    return 0
