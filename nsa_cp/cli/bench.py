"""``nsa-cp bench``: measurements, their CSV files and plots."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nsa_cp.cli import bench_context_parallel
from nsa_cp.cli.arguments import add_sizes, chosen_device, given_sizes, place, positive
from nsa_cp.training.errors import UserError, as_user_error

if TYPE_CHECKING:
    from nsa_cp.bench.attention import Row
    from nsa_cp.bench.work import Work

_HEADER = (
    f"{'tokens':>8} {'heads':>14} {'inputs':>9} {'agree':>6} {'impl':>12} {'stage':>12} {'pass':>9} {'p50 ms':>9} {'GiB':>6} "
    f"{'TFLOP/s':>8} {'floor':>8} {'times':>6}    (floor: ms on an H100)"
)


# Defaults by type of device. On a CPU, where nothing is fast, just enough to see the command work.
_DEFAULTS = {
    "cuda": {
        "seq_lens": [8192, 65536], "heads": ["64/4x128"], "impls": ["nsa", "dense_cudnn", "dense_flash"], "dtype": "bfloat16",
        "repetitions": 10,
    },
    "cpu": {"seq_lens": [1024], "heads": ["8/2x64"], "impls": ["nsa", "dense_flash"], "dtype": "float32", "repetitions": 3},
}  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``bench`` and its subcommands to the parser of ``nsa-cp``."""
    bench = commands.add_parser("bench", help="measure speed and memory")
    kinds = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    attention = kinds.add_parser(
        "attention",
        help="native sparse attention beside dense attention, on one device",
        description="Time forward and backward of the attention alone; prints a line a measurement and writes CSV and plots. "
        f"Defaults on a GPU: {_described('cuda')}; on a CPU: {_described('cpu')}.",
    )
    attention.add_argument("--seq-lens", type=positive, nargs="+", metavar="S")
    attention.add_argument("--heads", nargs="+", metavar="N/GxD[/Dv]", help="for example 64/4x192/128")
    attention.add_argument("--inputs", nargs="+", default=["random"], choices=["random", "drifting", "trained"])
    attention.add_argument("--trained-file", type=place, default=None, metavar="FILE", help="tensors for --inputs trained")
    attention.add_argument(
        "--impls", nargs="+", metavar="IMPL",
        help="of nsa, dense_cudnn, dense_flash and, where installed, fla and flash_nsa",
    )  # fmt: skip
    attention.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    attention.add_argument("--device", default="", help="cuda or cpu; default: cuda where it is there")
    attention.add_argument("--stages", action="store_true", help="also time each stage alone")
    attention.add_argument("--repetitions", type=positive)
    attention.add_argument("--csv", type=place, default=None, metavar="FILE", help="write the rows, and plots beside them")
    add_sizes(attention)
    attention.set_defaults(run=_attention)
    bench_context_parallel.add_parsers(kinds)


def _described(device: str) -> str:
    defaults = {name: value if isinstance(value, list) else [value] for name, value in _DEFAULTS[device].items()}
    return " ".join(f"--{name.replace('_', '-')} {' '.join(map(str, values))}" for name, values in defaults.items())


def _attention(arguments: argparse.Namespace) -> int:
    import torch

    from nsa_cp.bench.attention import IMPLEMENTATIONS, Row, default_cases, run_attention_benchmark
    from nsa_cp.bench.plots import plot_attention
    from nsa_cp.bench.rows import write_csv
    from nsa_cp.bench.work import stage_work

    device = chosen_device(arguments.device)
    for name, value in _DEFAULTS[device.type].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    unknown = set(arguments.impls) - set(IMPLEMENTATIONS)
    if unknown:
        raise UserError(f"implementations {sorted(unknown)} are unknown; use some of {', '.join(IMPLEMENTATIONS)}")
    dtype = getattr(torch, arguments.dtype)
    if arguments.csv and arguments.csv.is_dir():
        raise UserError(f"--csv {arguments.csv} is a folder; give a file in it")
    rows = []
    with as_user_error():
        cases = default_cases(
            arguments.seq_lens, arguments.heads, arguments.inputs, dtype, device, arguments.trained_file, **given_sizes(arguments)
        )
        work = {case.key: stage_work(case.config, case.heads, case.seq_len, dtype.itemsize) for case in cases}
        print(_HEADER)
        for row in run_attention_benchmark(
            cases, implementations=arguments.impls, stages=arguments.stages, repetitions=arguments.repetitions
        ):
            rows.append(row)
            print(_line(row, work[row.key]), flush=True)
            if arguments.csv:
                write_csv(Row, rows, arguments.csv)
    if arguments.csv and rows:
        plots = plot_attention(arguments.csv, arguments.csv.parent)
        print(f"wrote {', '.join(map(str, [arguments.csv, *plots]))}")
    return 0 if rows else 1


def _line(row: Row, work: dict[tuple[str, str], Work]) -> str:
    """A row of the printed table. On a GPU, for our attention and dense attention (whose work is known), with rate and floor."""
    heads = f"{row.num_heads}/{row.num_groups}x{row.qk_dim}/{row.v_dim}"
    line = (
        f"{row.seq_len:>8} {heads:>14} {row.inputs:>9} {row.agreement:>6.2f} {row.impl:>12} {row.stage:>12} "
        f"{row.pass_:>9} {row.p50_ms:>9.3f} {row.peak_gib:>6.2f}"
    )
    if row.gpu == "cpu":
        return line
    if row.impl.startswith("dense"):
        parts = [work["dense", row.pass_]]
    elif row.impl != "nsa":
        return line
    elif row.stage == "all":
        parts = [part for (stage, pass_), part in work.items() if pass_ == row.pass_ and stage != "dense"]
    else:
        parts = [work[row.stage, row.pass_]]
    floor, rate = sum(part.floor_ms for part in parts), sum(part.tflops(row.p50_ms) for part in parts)
    return f"{line} {rate:>8.1f} {floor:>8.3f} {row.p50_ms / floor:>6.2f}"
