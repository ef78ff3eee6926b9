"""Finds contradictions between settings, before any process group, allocation or file exists.

Each check takes the resolved run and yields Problems, whose message is a sentence with the values and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nsa_cp.config import number_faults
from nsa_cp.training.config import RunConfig
from nsa_cp.training.errors import Problem, UserError


def find_problems(config: RunConfig, skip: frozenset[str] = frozenset()) -> list[Problem]:
    """All contradictions between the settings of a resolved run.

    Args:
        config: the run.
        skip: sections whose values are already known to be wrong; checks that read them are left out.
    """
    return [problem for sections, check in _CHECKS if not skip & set(sections) for problem in check(config)]


def check_world(config: RunConfig, world_size: int, *, for_training: bool = True) -> None:
    """Check what depends on the number of processes.

    Args:
        config: a resolved run.
        world_size: number of processes that were started.
        for_training: also check that the global batch divides over the processes, into as many micro-batches as the pipeline's
            schedule needs; evaluation does not depend on it.

    Raises:
        UserError: the processes do not divide into the parallel sizes, or the batch does not divide over them.
    """
    parallel, train = config.parallel, config.train
    size = config.model_parallel_size
    if world_size % size:
        raise UserError(
            f"{world_size} processes were started, which is not a multiple of "
            f"parallel.tensor * parallel.pipeline * parallel.context = "
            f"{parallel.tensor}*{parallel.pipeline}*{parallel.context} = {size}; start {_round_up(world_size, size)} "
            f"(torchrun --nproc-per-node) or change the parallel section"
        )
    if not for_training:
        return
    dp = config.data_parallel_size(world_size)
    step = train.micro_batch_size * dp
    if train.global_batch_size % step:
        raise UserError(
            f"train.global_batch_size = {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size * data-parallel size = {train.micro_batch_size}*{dp} = {step}; "
            f"use {_round_up(train.global_batch_size, step)}"
        )
    if parallel.virtual_pipeline > 1 and (train.global_batch_size // step) % parallel.pipeline:
        raise UserError(
            f"{train.global_batch_size // step} micro-batches a step are not a multiple of "
            f"parallel.pipeline = {parallel.pipeline}, which the interleaved schedule needs; "
            f"use train.global_batch_size = {_round_up(train.global_batch_size, step * parallel.pipeline)}"
        )


def _check_nsa(config: RunConfig) -> Iterator[Problem]:
    yield from (Problem(path, fault) for path, fault in number_faults(config.nsa, prefix="nsa."))


def _check_model(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        yield Problem(
            "model.num_attention_heads",
            f"{heads} is not a multiple of model.num_query_groups = {groups}; use {_round_up(heads, groups)}",
        )
    if model.hidden_size % heads and model.kv_channels == model.hidden_size // heads:
        yield Problem(
            "model.hidden_size",
            f"{model.hidden_size} is not a multiple of model.num_attention_heads = {heads}; "
            f"use {_round_up(model.hidden_size, heads)} or set model.kv_channels",
        )
    if len(model.layer_pattern) > model.num_layers:
        yield Problem(
            "model.layer_pattern",
            f"names {len(model.layer_pattern)} layers but model.num_layers = {model.num_layers}; shorten it or add layers",
        )
    if config.rotary_config.dim(model.kv_channels or 1) == 0:
        yield Problem(
            "model.rotary_percent",
            f"{model.rotary_percent} of {model.kv_channels} channels leaves none to rotate; rotation needs at least 2",
        )


def _check_window(config: RunConfig) -> Iterator[Problem]:
    if "window" in config.layer_kinds and config.nsa.window_size == 0:
        yield Problem("nsa.window_size", "0 switches the window off, but model.layer_pattern has window layers; use at least 1")


def _check_tensor_parallel(config: RunConfig) -> Iterator[Problem]:
    model, tensor = config.model, config.parallel.tensor
    for key in ("num_query_groups", "num_attention_heads", "ffn_hidden_size"):
        value = getattr(model, key)
        if value % tensor:
            yield Problem(
                f"model.{key}",
                f"{value} is not divisible by parallel.tensor = {tensor}; use {_round_up(value, tensor)} or fewer processes",
            )
    if config.parallel.sequence_parallel and tensor == 1:
        yield Problem("parallel.sequence_parallel", "true needs parallel.tensor of at least 2, and it is 1; set it to false")


def _check_vocabulary(config: RunConfig) -> Iterator[Problem]:
    vocab, tensor = config.data.vocab_size, config.parallel.tensor
    if vocab is not None and vocab % tensor:
        yield Problem(
            "data.vocab_size", f"{vocab} is not divisible by parallel.tensor = {tensor}; use {_round_up(vocab, tensor)}"
        )


def _check_pipeline(config: RunConfig) -> Iterator[Problem]:
    layers, parallel = config.model.num_layers, config.parallel
    stages = parallel.pipeline * parallel.virtual_pipeline
    if layers % stages:
        yield Problem(
            "model.num_layers",
            f"{layers} is not a multiple of parallel.pipeline * parallel.virtual_pipeline = "
            f"{parallel.pipeline}*{parallel.virtual_pipeline} = {stages}; use {_round_up(layers, stages)}",
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield Problem(
            "parallel.virtual_pipeline", f"{parallel.virtual_pipeline} needs parallel.pipeline of at least 2, and it is 1"
        )


def _check_layout(config: RunConfig) -> Iterator[Problem]:
    """Every process must hold equally many tokens, because Megatron's pipeline and sequence parallelism exchange equal shapes."""
    length, cp = config.data.sequence_length, config.parallel.context
    pieces, formula = cp, f"parallel.context = {cp}"
    if config.nsa.layout == "zigzag" and cp > 1:
        pieces, formula = 2 * cp, f"2 * parallel.context = 2*{cp} = {2 * cp}, the pieces of the zigzag layout"
    if length % pieces:
        yield Problem("data.sequence_length", f"{length} is not a multiple of {formula}; use {_round_up(length, pieces)}")
    elif config.parallel.sequence_parallel and (length // cp) % config.parallel.tensor:
        multiple = pieces * config.parallel.tensor
        yield Problem(
            "data.sequence_length",
            f"{length} leaves {length // cp} tokens a context-parallel process, not a multiple of parallel.tensor = "
            f"{config.parallel.tensor} as sequence parallelism needs; use {_round_up(length, multiple)}",
        )


def _check_train(config: RunConfig) -> Iterator[Problem]:
    train = config.train
    if train.min_lr > train.lr:
        yield Problem("train.min_lr", f"{train.min_lr} is larger than train.lr = {train.lr}; use at most {train.lr}")
    if train.warmup_steps > train.steps:
        yield Problem(
            "train.warmup_steps", f"{train.warmup_steps} is larger than train.steps = {train.steps}; use at most {train.steps}"
        )
    if train.selected_from_step > train.steps:
        yield Problem(
            "train.selected_from_step",
            f"{train.selected_from_step} is larger than train.steps = {train.steps}; use at most {train.steps}, which keeps the "
            f"selected branch closed for the whole run",
        )
    if train.global_batch_size % train.micro_batch_size:
        yield Problem(
            "train.global_batch_size",
            f"{train.global_batch_size} is not a multiple of train.micro_batch_size = {train.micro_batch_size}; "
            f"use {_round_up(train.global_batch_size, train.micro_batch_size)}",
        )


def _check_opening(config: RunConfig) -> Iterator[Problem]:
    late, nsa = config.train.selected_from_step, config.nsa
    if late and "nsa" not in config.layer_kinds:
        yield Problem(
            "train.selected_from_step",
            f"{late} is about the selected branch of nsa layers, but model.layer_pattern = "
            f"{list(config.model.layer_pattern)} has none; set it to 0",
        )
    elif late and nsa.window_size == 0 and not nsa.shared_kv:
        yield Problem(
            "train.selected_from_step",
            f"{late} opens the selected branch with the window's keys and values, but nsa.window_size = 0 leaves those "
            f"untrained; use nsa.shared_kv = true or a window of at least 1",
        )


def _check_data(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if data.kind == "pydoc_topics" and data.paths:
        yield Problem("data.paths", "must be empty for data.kind = pydoc_topics; use data.kind = text for files")
    if data.kind == "text" and not data.paths:
        yield Problem("data.paths", "is empty; name at least one UTF-8 file, or use data.kind = pydoc_topics")
    if data.kind == "indexed":
        if config.seed >= 2**32:
            yield Problem("seed", f"{config.seed} is too large for data.kind = indexed; use one below {2**32}")
        if len(data.paths) != 1:
            yield Problem("data.paths", f"holds {len(data.paths)} entries, but data.kind = indexed takes one path prefix")
        if data.vocab_size is None and data.vocab_file is None:
            yield Problem("data.vocab_size", "data.kind = indexed needs the vocabulary: give data.vocab_size or data.vocab_file")
    else:
        yield from _check_bytes(config)


def _check_bytes(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if data.vocab_file is not None:
        yield Problem("data.vocab_file", f"data.kind = {data.kind} is bytes and needs no vocabulary file; leave it out")
    if data.vocab_size is not None and data.vocab_size < 256:
        yield Problem("data.vocab_size", f"{data.vocab_size} is too small for bytes, of which there are 256; leave it out")
    if data.end_of_document is not None:
        yield Problem("data.end_of_document", f"data.kind = {data.kind} has no such token; leave it out")
    if data.bytes_per_token != 1:
        yield Problem(
            "data.bytes_per_token", f"{data.bytes_per_token}, but a token of data.kind = {data.kind} is one byte; leave it out"
        )


Check = Callable[[RunConfig], Iterator[Problem]]
_CHECKS: tuple[tuple[tuple[str, ...], Check], ...] = (
    (("nsa",), _check_nsa),
    (("model",), _check_model),
    (("model", "nsa"), _check_window),
    (("model", "parallel"), _check_tensor_parallel),
    (("data", "parallel"), _check_vocabulary),
    (("model", "parallel"), _check_pipeline),
    (("data", "parallel", "nsa"), _check_layout),
    (("train",), _check_train),
    (("train", "model", "nsa"), _check_opening),
    (("data",), _check_data),
)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
