"""The commands ``nsa-cp bench context-parallel``, ``timeline`` and ``cost-model``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_cp.cli.arguments import add_sizes, duration, given_sizes, place, positive, rate, seconds
from nsa_cp.training.errors import UserError, as_user_error

if TYPE_CHECKING:
    import torch.distributed as dist

    from nsa_cp.bench.context_parallel import Measured, Settings
    from nsa_cp.bench.cost_model import CostModel

_TORCHRUN = "torchrun --nproc-per-node 2 -m nsa_cp.cli.main bench"
_BENCHMARKS = Path("docs/benchmarks")
_ATTENTION_CSV, _PARALLEL_CSV = _BENCHMARKS / "attention.csv", _BENCHMARKS / "context_parallel.csv"


def add_parsers(kinds: argparse._SubParsersAction) -> None:
    """Add the subcommands to those of ``nsa-cp bench``."""
    _add_context_parallel(kinds)
    _add_timeline(kinds)
    _add_cost_model(kinds)


def _add_context_parallel(kinds: argparse._SubParsersAction) -> None:
    parallel = kinds.add_parser(
        "context-parallel",
        help="one GPU beside many, under torchrun",
        description="Time the attention on one GPU and under context parallelism over all processes of torchrun, "
        "with communication and without; prints a line a measurement and writes CSV and plots.",
    )
    parallel.add_argument(
        "--seq-lens", type=positive, nargs="+", default=[32768, 65536, 131072, 262144, 524288], metavar="S"
    )  # fmt: skip
    parallel.add_argument("--layouts", nargs="+", default=["zigzag"], choices=["zigzag", "contiguous"])
    parallel.add_argument("--comms", nargs="+", default=["all_gather", "ring"], choices=["ring", "all_gather"])
    parallel.add_argument("--repetitions", type=positive, default=10, help="of each timing, at most")
    parallel.add_argument(
        "--seconds", type=seconds, default=3.0, help="of each timing, about; three repetitions at least unless one takes longer"
    )
    parallel.add_argument("--csv", type=place, default=None, metavar="FILE", help="write the rows, and plots beside them")
    parallel.add_argument(
        "--check", action="store_true", help="compare blocks, outputs and gradients with one GPU's on one input, and time nothing"
    )
    _add_inputs(parallel)
    parallel.set_defaults(run=_context_parallel)


def _add_timeline(kinds: argparse._SubParsersAction) -> None:
    timeline = kinds.add_parser(
        "timeline",
        help="picture of compute and communication on every GPU, under torchrun",
        description="Trace one forward and backward under context parallelism and draw when kernels compute and when NCCL's run.",
    )
    timeline.add_argument("--seq-len", type=positive, default=131072, metavar="S")
    timeline.add_argument("--layout", default="zigzag", choices=["zigzag", "contiguous"])
    timeline.add_argument("--comm", default="all_gather", choices=["ring", "all_gather"])
    timeline.add_argument("--png", type=place, default=Path("context_parallel_timeline.png"), metavar="FILE")
    _add_inputs(timeline)
    timeline.set_defaults(run=_timeline)


def _add_cost_model(kinds: argparse._SubParsersAction) -> None:
    model = kinds.add_parser(
        "cost-model",
        help="predict step time, exposed communication and memory of context parallelism",
        description="Predict from kernel times measured on one GPU and measured transfers; --check compares with measurements.",
    )
    model.add_argument("--attention-csv", type=place, default=_ATTENTION_CSV, metavar="FILE")
    model.add_argument(
        "--csv", type=place, default=None, metavar="FILE",
        help="measurements under context parallelism; those on one GPU replace the totals of --attention-csv, if there are any; "
        f"default: {_PARALLEL_CSV}, and without --check none if that does not exist",
    )  # fmt: skip
    model.add_argument("--heads", default="64/4x128", metavar="N/GxD[/Dv]")
    model.add_argument("--layout", default="zigzag", choices=["zigzag", "contiguous"])
    model.add_argument("--comm", default="all_gather", choices=["ring", "all_gather"])
    model.add_argument("--seq-lens", type=positive, nargs="+", default=[1 << n for n in range(16, 23)], metavar="S")
    model.add_argument("--cp", type=int, nargs="+", default=[1 << n for n in range(1, 10)], metavar="CP")
    model.add_argument("--network-gb-per-s", type=rate, default=50.0, help="rate of the slow link, bytes/s / 1e9 into each rank")
    model.add_argument(
        "--agreement-step-ms", type=duration, default=None, metavar="MS",
        help="what every rank beyond one adds to the hosts' agreement; default: an assumption",
    )  # fmt: skip
    model.add_argument("--new-layouts", action="store_true", help="every call meets a new layout and waits for the agreement")
    model.add_argument("--check", action="store_true", help="a prediction beside every measured point of --csv, and the error")
    model.set_defaults(run=_cost_model)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", default="64/4x128", metavar="N/GxD[/Dv]", help="of the whole model")
    parser.add_argument(
        "--tp", type=positive, default=1, help="tensor-parallel ranks, which divide the heads; the rest of the processes is CP"
    )
    add_sizes(parser)


@contextlib.contextmanager
def _joined(arguments: argparse.Namespace) -> Iterator[Settings]:
    """Join torchrun's processes in a process group for the ``with`` block, and yield the settings of the measurement."""
    import torch
    import torch.distributed as dist

    from nsa_cp.bench.context_parallel import Settings
    from nsa_cp.bench.inputs import HeadLayout
    from nsa_cp.config import NSAConfig

    if "RANK" not in os.environ:
        raise UserError(f"bench {arguments.benchmark} runs under torchrun: {_TORCHRUN} {arguments.benchmark}")
    with as_user_error():
        heads = HeadLayout.parse(arguments.heads)
        heads.shard(arguments.tp)
        config = NSAConfig(**given_sizes(arguments))
    processes = int(os.environ["WORLD_SIZE"])
    if processes % arguments.tp:
        raise UserError(f"--tp {arguments.tp} does not divide {processes} processes; use a divisor of {processes}")
    if processes == arguments.tp > 1:
        raise UserError(f"--tp {arguments.tp} leaves no context parallelism among {processes} processes; start more")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    if cuda:
        torch.cuda.set_device(device)
    elif os.environ["RANK"] == "0":
        print("no CUDA device: this runs on the CPU, where 2048 tokens and --heads 8/2x32 take seconds", file=sys.stderr)
    ours = not dist.is_initialized()
    if ours:
        options = _high_priority() if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo", pg_options=options, device_id=device if cuda else None)
    try:
        yield Settings(heads, config, dtype, device, dist.group.WORLD, _context_parallel_group(arguments.tp))
    finally:
        if ours:
            dist.destroy_process_group()


def _context_parallel_group(tp: int) -> dist.ProcessGroup:
    """This process's context-parallel group. Neighbouring ranks are tensor-parallel ones, as Megatron orders them."""
    import torch.distributed as dist

    if tp == 1:
        return dist.group.WORLD
    world = range(dist.get_world_size())
    options = _high_priority() if dist.get_backend() == "nccl" else None
    groups = [dist.new_group(list(world[first::tp]), pg_options=options) for first in range(tp)]
    return groups[dist.get_rank() % tp]


def _high_priority() -> dist.ProcessGroupNCCL.Options:
    """Options that let the kernels of transfers go before the attention's, as docs/context-parallel.md recommends."""
    import torch.distributed as dist

    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)


def _context_parallel(arguments: argparse.Namespace) -> int:
    from nsa_cp.bench.context_parallel import Row, run_context_parallel_benchmark
    from nsa_cp.bench.context_parallel_plots import plot_context_parallel
    from nsa_cp.bench.rows import write_csv

    if arguments.check and arguments.csv:
        raise UserError(f"--check times nothing, so --csv {arguments.csv} would get no rows; leave one of the two out")
    with _joined(arguments) as settings:
        first = settings.world.rank() == 0
        if arguments.check:
            return _check(arguments, settings)
        settings = replace(settings, repetitions=arguments.repetitions, seconds=arguments.seconds)
        rows: list[Row] = []
        for measured in run_context_parallel_benchmark(
            arguments.seq_lens, settings, layouts=arguments.layouts, comms=arguments.comms
        ):
            rows.append(measured.row)
            if first:
                print(_line(measured), flush=True)
                if arguments.csv:
                    # Written anew after every row, so that a run that is cut off leaves what it measured.
                    write_csv(Row, rows, arguments.csv)
        if arguments.csv and first:
            plots = plot_context_parallel(arguments.csv, arguments.csv.parent)
            print(f"wrote {', '.join(map(str, [arguments.csv, *plots]))}")
    return 0


def _line(measured: Measured) -> str:
    from nsa_cp.bench.context_parallel import ONE_GPU

    row = measured.row
    start = f"{row.seq_len:>8} cp {row.cp:<3} tp {row.tp} {row.layout:>10} {row.comm:>10} {row.pass_:>8} {row.p50_ms:>10.3f} ms"
    if row.comm == ONE_GPU:
        return f"{start}, {row.peak_gib} GiB"
    alone = "one GPU cannot hold it"
    if row.efficiency == row.efficiency:
        alone = f"one GPU {row.one_gpu_p50_ms:.3f} ms, efficiency {row.efficiency:.1%}"
    return (
        f"{start}, {alone}, exposed {row.exposed_ms:.3f} ms ({row.exposed_ms / row.p50_ms:.1%}), {row.peak_gib} GiB, sent "
        f"{measured.sent / 2**20:.1f} MiB, received {measured.received / 2**20:.1f} MiB, of the remote blocks "
        f"{measured.remote_blocks_needed:.1%} needed"
    )


def _check(arguments: argparse.Namespace, settings: Settings) -> int:
    from nsa_cp.bench.context_parallel_check import check_against_one_gpu

    wrong = 0
    for seq_len in arguments.seq_lens:
        for kind in arguments.layouts:
            for comm in arguments.comms:
                config = replace(settings.config, layout=kind, compressed_comm=comm)
                check = check_against_one_gpu(seq_len, replace(settings, config=config))
                told = "one GPU cannot hold it: not compared"
                if check is not None:
                    wrong += not check.passed
                    told = (
                        f"{check.differing} of {check.selections} selections differ from one GPU's; largest relative difference "
                        f"of the output {check.out_error:.2e}, of gradients {check.gradient_error:.2e}, of the compressors' "
                        f"parameters, summed over ranks, {check.weight_error:.2e} (at most {check.tolerance:.0e})"
                    )
                if settings.world.rank() == 0:
                    print(f"{seq_len:>8} cp {settings.group.size()} tp {settings.tp} {kind:>10} {comm:>10} {told}", flush=True)
    return 1 if wrong else 0


def _timeline(arguments: argparse.Namespace) -> int:
    import torch.distributed as dist

    from nsa_cp.bench.context_parallel import make_step
    from nsa_cp.bench.timeline import draw_timeline, overlap_of, trace_kernels

    with _joined(arguments) as settings:
        if settings.device.type != "cuda":
            raise UserError("bench timeline shows what runs on GPUs; start it on a machine with CUDA devices")
        config = replace(settings.config, layout=arguments.layout, compressed_comm=arguments.comm)
        step = make_step(arguments.seq_len, replace(settings, config=config))
        for _ in range(3):
            step()
        ranks = [None] * settings.world.size()
        dist.all_gather_object(ranks, trace_kernels(step, dist.barrier))
        if settings.world.rank() == 0:
            for rank, kernels in enumerate(ranks):
                overlap = overlap_of(kernels)
                print(
                    f"rank {rank}: forward + backward {overlap.span_ms:.3f} ms, NCCL kernels {overlap.transfers_ms:.3f} ms, "
                    f"{overlap.hidden_ms:.3f} ms of it with compute beside it, {overlap.exposed_ms:.3f} ms "
                    f"({overlap.exposed_ms / overlap.span_ms:.1%} of the step) without",
                    flush=True,
                )
            title = (
                f"{arguments.seq_len // 1024}k tokens, {arguments.heads}, {len(ranks)} GPUs, {arguments.layout}, {arguments.comm}"
            )
            draw_timeline(ranks, title, arguments.png)
            print(f"wrote {arguments.png}")
    return 0


def _cost_model(arguments: argparse.Namespace) -> int:
    from nsa_cp.bench import cost_model_data as data
    from nsa_cp.bench.cost_model import AGREEMENT_STEP_MS, NETWORK, NVLINK, CostModel, Link
    from nsa_cp.bench.inputs import HeadLayout
    from nsa_cp.config import NSAConfig

    with as_user_error():
        if min(arguments.cp) < 2:
            raise UserError(f"--cp {min(arguments.cp)} has nothing to communicate; use 2 or more")
        config = replace(NSAConfig(), layout=arguments.layout, compressed_comm=arguments.comm)
        measured = _measurements(arguments)
        attention = data.read_rows(arguments.attention_csv, data.ATTENTION_COLUMNS)
        kernels = data.kernel_times(attention, HeadLayout.parse(arguments.heads), measured)
    step = AGREEMENT_STEP_MS if arguments.agreement_step_ms is None else arguments.agreement_step_ms
    model = CostModel(kernels, NVLINK, config, agreement_step_ms=step)
    if arguments.check:
        _check_model(arguments, measured, model)
        return 0
    model = replace(model, new_layout=arguments.new_layouts)
    network = Link.of_rate(arguments.network_gb_per_s, NETWORK.all_gather[0][1], NETWORK.step_ms)
    models = {"NVLink": model, f"{arguments.network_gb_per_s:g} GB/s": replace(model, link=network)}
    print(data.prediction_table(models, arguments.seq_lens, arguments.cp))
    return 0


def _measurements(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """The rows of --csv. Only the default file may be missing, and only without --check."""
    from nsa_cp.bench import cost_model_data as data

    if arguments.csv is None and not arguments.check and not _PARALLEL_CSV.is_file():
        print(f"nsa-cp: {_PARALLEL_CSV} does not exist; one GPU's totals are from {arguments.attention_csv}", file=sys.stderr)
        return []
    return data.read_rows(arguments.csv or _PARALLEL_CSV, data.PARALLEL_COLUMNS)


def _check_model(arguments: argparse.Namespace, measured: list[dict[str, str]], model: CostModel) -> None:
    from nsa_cp.bench import cost_model_data as data

    compared = list(data.compare(measured, model))
    if not compared:
        raise UserError(
            f"{arguments.csv or _PARALLEL_CSV} has no measurement of {arguments.heads} on several GPUs; make one with "
            f"{_TORCHRUN} context-parallel --heads {arguments.heads}"
        )
    for point in compared:
        print(
            f"{point.seq_len:>8} cp {point.cp:<3} tp {point.tp} {point.layout:>10} {point.comm:>10} {point.pass_:>8} measured "
            f"{point.measured_ms:.2f} ms, predicted {point.predicted_ms:.2f} ({point.error:+.1%}); exposed "
            f"{point.measured_exposed_ms:.2f}, predicted {point.predicted_exposed_ms:.2f}; memory "
            f"{point.measured_gib:.1f} GiB, predicted {point.predicted_gib:.1f}"
        )
    print(data.summary(compared))
