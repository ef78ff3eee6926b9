"""``nsa-cp bench``: measurements, their CSV files and plots."""

from __future__ import annotations

import argparse
from pathlib import Path

from nsa_cp.training.errors import UserError

_SETTINGS = ("compress_block_size", "compress_stride", "select_block_size", "num_selected_blocks", "window_size")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``bench`` and its subcommands to the parser of ``nsa-cp``."""
    bench = commands.add_parser("bench", help="measure speed and memory")
    kinds = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    attention = kinds.add_parser(
        "attention",
        help="native sparse attention beside dense attention, on one device",
        description="Time forward and backward of the attention alone; prints a line a measurement and writes CSV and plots.",
    )
    attention.add_argument("--seq-lens", type=int, nargs="+", default=[8192, 65536], metavar="S")
    attention.add_argument("--heads", nargs="+", default=["64/4x128"], metavar="N/GxD[/Dv]", help="for example 64/4x192/128")
    attention.add_argument("--inputs", nargs="+", default=["random"], choices=["random", "drifting"])
    attention.add_argument("--impls", nargs="+", default=["nsa", "dense_cudnn", "dense_flash"], metavar="IMPL")
    attention.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    attention.add_argument("--device", default="", help="cuda or cpu; default: cuda where it is there")
    attention.add_argument("--stages", action="store_true", help="also time each stage alone")
    attention.add_argument("--repetitions", type=int, default=10)
    attention.add_argument("--csv", type=Path, default=None, metavar="FILE", help="write the rows, and plots beside them")
    for name in _SETTINGS:
        attention.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, metavar="N")
    attention.set_defaults(run=_attention)
    _add_context_parallel(kinds)


def _attention(arguments: argparse.Namespace) -> int:
    import torch

    from nsa_cp.bench.attention import IMPLEMENTATIONS, Row, default_cases, run_attention_benchmark
    from nsa_cp.bench.plots import plot_attention
    from nsa_cp.bench.rows import write_csv

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    unknown = set(arguments.impls) - set(IMPLEMENTATIONS)
    if unknown:
        raise UserError(f"implementations {sorted(unknown)} are unknown; use some of {', '.join(IMPLEMENTATIONS)}")
    settings = {name: getattr(arguments, name) for name in _SETTINGS if getattr(arguments, name) is not None}
    try:
        cases = default_cases(
            arguments.seq_lens, arguments.heads, arguments.inputs, getattr(torch, arguments.dtype), device, **settings
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    rows = []
    print(
        f"{'tokens':>8} {'heads':>14} {'inputs':>9} {'agree':>6} {'impl':>12} {'stage':>12} {'pass':>9} {'p50 ms':>9} {'GiB':>6}"
    )
    for row in run_attention_benchmark(
        cases, implementations=arguments.impls, stages=arguments.stages, repetitions=arguments.repetitions
    ):
        rows.append(row)
        heads = f"{row.num_heads}/{row.num_groups}x{row.qk_dim}/{row.v_dim}"
        print(
            f"{row.seq_len:>8} {heads:>14} {row.inputs:>9} {row.agreement:>6.2f} {row.impl:>12} {row.stage:>12} "
            f"{row.pass_:>9} {row.p50_ms:>9.3f} {row.peak_gib:>6.2f}",
            flush=True,
        )
    if arguments.csv:
        write_csv(Row, rows, arguments.csv)
        plots = plot_attention(arguments.csv, arguments.csv.parent)
        print(f"wrote {', '.join(map(str, [arguments.csv, *plots]))}")
    return 0


def _add_context_parallel(kinds: argparse._SubParsersAction) -> None:
    parallel = kinds.add_parser(
        "context-parallel",
        help="one GPU beside many, under torchrun",
        description="Time the attention on one GPU and under context parallelism over all processes of torchrun.",
    )
    parallel.add_argument("--seq-lens", type=int, nargs="+", default=[65536, 131072], metavar="S")
    parallel.add_argument("--heads", default="64/4x128", metavar="N/GxD[/Dv]")
    parallel.add_argument("--layouts", nargs="+", default=["zigzag"], choices=["zigzag", "contiguous"])
    parallel.add_argument("--comms", nargs="+", default=["ring", "all_gather"], choices=["ring", "all_gather"])
    parallel.add_argument("--repetitions", type=int, default=10)
    parallel.add_argument("--csv", type=Path, default=None, metavar="FILE")
    parallel.set_defaults(run=_context_parallel)


def _context_parallel(arguments: argparse.Namespace) -> int:
    import os

    import torch
    import torch.distributed as dist

    from nsa_cp.bench.context_parallel import Row, run_context_parallel_benchmark
    from nsa_cp.bench.inputs import HeadLayout
    from nsa_cp.bench.rows import write_csv
    from nsa_cp.config import NSAConfig

    if "RANK" not in os.environ:
        raise UserError("bench context-parallel runs under torchrun: torchrun --nproc-per-node 2 -m nsa_cp.cli.main bench ...")
    try:
        heads = HeadLayout.parse(arguments.heads)
    except ValueError as error:
        raise UserError(str(error)) from error
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    rows = []
    for row in run_context_parallel_benchmark(
        arguments.seq_lens, heads, layouts=arguments.layouts, comms=arguments.comms, config=NSAConfig(),
        dtype=torch.bfloat16 if cuda else torch.float32, device=device, group=dist.group.WORLD,
        repetitions=arguments.repetitions,
    ):  # fmt: skip
        rows.append(row)
        if dist.get_rank() == 0:
            print(
                f"{row.seq_len:>8} {row.layout:>10} {row.comm:>10} {row.pass_:>8} {row.p50_ms:>9.3f} ms, one GPU "
                f"{row.one_gpu_p50_ms:.3f} ms, efficiency {row.efficiency:.1%}, exposed {row.exposed_ms:.3f} ms, "
                f"{row.peak_gib} GiB",
                flush=True,
            )
    if arguments.csv and dist.get_rank() == 0:
        write_csv(Row, rows, arguments.csv)
        print(f"wrote {arguments.csv}")
    dist.destroy_process_group()
    return 0
