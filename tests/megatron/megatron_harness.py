"""What the Megatron tests run in their worker processes: a tiny GPTModel, its data, one optimizer-less step, its gradients.

A worker returns what its rank holds; `assemble` puts the ranks together to whole tensors, so that any two parallel layouts
can be compared name by name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nsa_cp.config import NSAConfig
from nsa_cp.ops.plan import get_plan

VOCAB = 64
LENGTH = 64
BATCH = 2
MICROBATCHES = 2
DOCUMENTS = (0, 16, 48, 48, 128)  # every length divides by 2 * cp_size * tp_size for all layouts tested; one is empty
UNEVEN_DOCUMENTS = (0, 1, 8, 49, 128)
SINGLE_TOKENS = tuple(range(10))  # documents of one token: the first rank holds them all


@dataclass(frozen=True)
class Parallel:
    """A way to spread the model; what is left of the processes is data parallel."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sp: bool = False
    vpp: int | None = None

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp

    def __str__(self) -> str:
        parts = [f"{name}{size}" for name, size in (("TP", self.tp), ("PP", self.pp), ("CP", self.cp)) if size > 1]
        return "x".join(parts or ["TP1"]) + ("+SP" if self.sp else "") + (f"+VPP{self.vpp}" if self.vpp else "")


@dataclass(frozen=True)
class Model:
    """What is trained."""

    nsa: NSAConfig = NSAConfig(
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=3, num_local_blocks=1, window_size=12
    )
    layer_pattern: tuple[str, ...] = ("nsa", "full", "window")
    dtype: torch.dtype = torch.float64
    num_layers: int = 4
    extra: dict[str, Any] = field(default_factory=dict)

    def with_nsa(self, **changes: Any) -> Model:
        return replace(self, nsa=replace(self.nsa, **changes))

    def with_extra(self, **extra: Any) -> Model:
        return replace(self, extra={**self.extra, **extra})


# Between them: both kinds of K/V, gates, compressors with weights, orders of rotation, and ways of communication. (With a
# linear compressor of rotated keys the gradient of its key position is zero, which leaves nothing to compare.) Branches that
# start alike would hide that one took another's keys.
INDEPENDENT = Model().with_nsa(compressor="linear", compressed_comm="ring").with_extra(equal_start=False)
SHARED = Model().with_nsa(shared_kv=True, gate="branch", compressed_rope="before", compressed_comm="all_gather")


@dataclass
class Shard:
    """A parameter's gradient as one rank holds it."""

    gradient: torch.Tensor
    dim: int | None


@dataclass
class RankResult:
    """One rank's outcome of a scenario."""

    tp_rank: int
    loss: float | None
    norm: float
    shards: dict[str, Shard]


@dataclass
class Result:
    """A scenario's outcome, whole."""

    loss: float
    norm: float
    gradients: dict[str, torch.Tensor]


@contextlib.contextmanager
def megatron(parallel: Parallel) -> Iterator[None]:
    """Model-parallel groups and seeds for the block, on the CPU; afterwards nothing of them is left."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nsa_cp.megatron import cpu_compatibility

    with cpu_compatibility(force=True):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            context_parallel_size=parallel.cp,
            virtual_pipeline_model_parallel_size=parallel.vpp,
        )
        model_parallel_cuda_manual_seed(123, force_reset_rng=True)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            unset_num_microbatches_calculator()
            parallel_state.destroy_model_parallel()
            get_plan.cache_clear()  # its plans remember which process groups have agreed on them


def make_config(model: Model, parallel: Parallel) -> Any:
    from nsa_cp.megatron import NSATransformerConfig

    settings = dict(
        num_layers=model.num_layers,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        v_channels=4,
        nsa=model.nsa,
        layer_pattern=model.layer_pattern,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        init_method_std=0.2,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.sp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        use_cpu_initialization=True,
        params_dtype=model.dtype,
        pipeline_dtype=model.dtype,
        batch_p2p_comm=parallel.vpp is None,
        overlap_p2p_comm=parallel.vpp is not None,
    )
    return NSATransformerConfig(**{**settings, **model.extra})


def build(model: Model, parallel: Parallel) -> tuple[Any, list[Any]]:
    """The configuration and this rank's model chunks, one for each virtual stage."""
    from megatron.core import parallel_state

    from nsa_cp.megatron import build_gpt_model

    config = make_config(model, parallel)
    chunks = []
    for stage in range(parallel.vpp or 1):
        vp_stage = stage if parallel.vpp else None
        chunks.append(
            build_gpt_model(
                config,
                VOCAB,
                2 * LENGTH,
                parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
            )
        )
    return config, chunks


def state_of(chunks: Sequence[Any]) -> dict[str, Any]:
    """Megatron's sharded state of all chunks under one name, so that any number of them can read it."""
    return {"model" if len(chunks) == 1 else f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}


def save(chunks: Sequence[Any], directory: str) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        os.makedirs(directory, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state_of(chunks), directory)


def load(chunks: Sequence[Any], directory: str) -> None:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(state_of(chunks), directory)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{index}"])


# --- data -------------------------------------------------------------------------------------------------------------------


def make_batch(scenario: str, seed: int) -> tuple[dict[str, torch.Tensor], Sequence[int] | None]:
    """A global batch and, for packs, its document borders. Loss masks leave every rank another number of tokens.

    Scenarios: ``plain``; ``masked`` (all tokens of one context-parallel rank are masked, zigzag at cp 2 and 4); ``packed``;
    ``uneven`` (documents of lengths that do not divide, so ranks hold different numbers of tokens); ``single`` (documents so
    short that some ranks hold nothing).
    """
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = {"packed": DOCUMENTS, "uneven": UNEVEN_DOCUMENTS, "single": SINGLE_TOKENS}.get(scenario)
    shape = (BATCH, LENGTH) if cu_seqlens is None else (1, cu_seqlens[-1])
    tokens = torch.randint(0, VOCAB, (shape[0], shape[1] + 1), generator=generator)
    mask = (torch.rand(shape, generator=generator) < torch.linspace(0.2, 0.9, shape[1])).double()
    if scenario == "masked":
        eighth = LENGTH // 8
        mask[:, : 2 * eighth] = 0
        mask[:, 6 * eighth :] = 0
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}, cu_seqlens


def batches(scenario: str, config: Any) -> Iterator[Any]:
    from megatron.core import parallel_state

    from nsa_cp.megatron import shard_batch

    for number in range(MICROBATCHES):
        batch, cu_seqlens = make_batch(scenario, 77 + number)
        yield shard_batch(batch, config, cp_rank=parallel_state.get_context_parallel_rank(), cu_seqlens=cu_seqlens)


def masked_mean(losses: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over this rank's tokens by the token count of all context-parallel ranks, as Megatron's schedule expects it."""
    from megatron.core import parallel_state

    total = torch.stack([(losses.detach() * mask).sum(), mask.sum()]).double()
    dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return (losses * mask).sum() / total[1], {"loss": total[0] / total[1]}


def exact_step(iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Forward step with a cross entropy in the model's dtype (Megatron's own always computes in float32)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    batch, packed = next(iterator)
    logits = model(batch["tokens"], batch["position_ids"], None, packed_seq_params=packed)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        whole = gather_from_tensor_model_parallel_region(output, group=parallel_state.get_tensor_model_parallel_group())
        losses = F.cross_entropy(whole.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        return masked_mean(losses.view_as(batch["labels"]), batch["loss_mask"])

    return logits, loss


def megatron_step(iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Forward step as a training script writes it, with Megatron's vocabulary-parallel cross entropy."""
    batch, packed = next(iterator)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
    return losses, lambda output: masked_mean(output.float(), batch["loss_mask"].float())


# --- one step ---------------------------------------------------------------------------------------------------------------


def wrap(config: Any, chunks: Sequence[Any], **ddp: Any) -> list[Any]:
    """The chunks in Megatron's DDP, which reduces gradients over data and context parallel ranks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    config.finalize_model_grads_func = finalize_model_grads
    return [DistributedDataParallel(config, DistributedDataParallelConfig(**ddp), chunk) for chunk in chunks]


def forward_backward(
    config: Any, wrapped: Sequence[Any], scenario: str, parallel: Parallel, step: Callable[..., Any] = exact_step
) -> float | None:
    """One forward and backward over all microbatches; the mean loss on the last pipeline stage, else None."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    packed = make_batch(scenario, 0)[1] is not None
    iterators = [batches(scenario, config) for _ in wrapped]
    losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if parallel.vpp else iterators[0],
        model=list(wrapped) if parallel.vpp else wrapped[0],
        num_microbatches=MICROBATCHES,
        seq_length=2 * LENGTH if packed else LENGTH,
        micro_batch_size=1 if packed else BATCH,
        forward_only=False,
    )
    return sum(float(each["loss"]) for each in losses) / MICROBATCHES if losses else None


def gradient_norm(chunks: Sequence[Any]) -> float:
    """The norm of the whole gradient by Megatron's own rule of which rank counts which parameter."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    squares = torch.zeros((), dtype=torch.float64)
    for chunk in chunks:
        for parameter in chunk.parameters():
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                squares += parameter.main_grad.double().square().sum()
    dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return float(squares.sqrt())


def global_name(chunk: Any, name: str) -> str:
    """A parameter's name with the global number of its layer in place of the stage's own."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number)
    return ".".join(parts)


def collect(chunks: Sequence[Any], loss: float | None) -> RankResult:
    from megatron.core import parallel_state

    shards = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            shards[global_name(chunk, name)] = Shard(parameter.main_grad.clone(), dim)
    return RankResult(parallel_state.get_tensor_model_parallel_rank(), loss, gradient_norm(chunks), shards)


def assemble(ranks: Sequence[RankResult]) -> Result:
    """Whole gradients; fails where ranks that must agree (replicas, context-parallel ranks) do not."""
    losses = {rank.loss for rank in ranks if rank.loss is not None}
    norms = [rank.norm for rank in ranks]
    assert max(norms) - min(norms) <= 1e-9 * max(norms), f"ranks disagree on the gradient norm: {norms}"
    assert max(losses) - min(losses) <= 1e-9, f"ranks disagree on the loss: {losses}"
    pieces: dict[str, dict[int, Shard]] = {}
    for rank in ranks:
        for name, shard in rank.shards.items():
            held = pieces.setdefault(name, {})
            first = held.setdefault(rank.tp_rank if shard.dim is not None else 0, shard)
            scale = first.gradient.abs().max()
            tolerance = 1e-12 if first.gradient.dtype == torch.float64 else 1e-5
            assert (shard.gradient - first.gradient).abs().max() <= tolerance * scale, f"replicas of {name} differ"
    gradients = {}
    for name, held in pieces.items():
        dim = held[0].dim
        gradients[name] = held[0].gradient if dim is None else join([held[r].gradient for r in sorted(held)], name, dim)
    return Result(losses.pop(), norms[0], gradients)


def join(shards: Sequence[torch.Tensor], name: str, dim: int) -> torch.Tensor:
    """A whole tensor; of a gated MLP's first layer every rank holds a part of the gate and a part of the input half."""
    if name.endswith("linear_fc1.weight"):
        halves = [shard.chunk(2, dim) for shard in shards]
        return torch.cat([half[i] for i in range(2) for half in halves], dim)
    return torch.cat(list(shards), dim)


# --- what workers run -------------------------------------------------------------------------------------------------------


def make_checkpoint(rank: int, world: int, model: Model, directory: str) -> None:
    """Save a model whose every weight is random: none of the zeros and ones that initialisation leaves."""
    with megatron(Parallel()):
        _, chunks = build(model, Parallel())
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save(chunks, directory)


def run_step(
    rank: int,
    world: int,
    model: Model,
    parallel: Parallel,
    scenarios: Sequence[str],
    directory: str,
    save_to: str | None = None,
    rate: float = 0.0,
) -> dict[str, RankResult]:
    """Load the checkpoint into ``parallel``, run every scenario once; then optionally take a plain gradient step and save."""
    with megatron(parallel):
        config, chunks = build(model, parallel)
        load(chunks, directory)
        wrapped = wrap(config, chunks)
        step = exact_step if model.dtype == torch.float64 else megatron_step
        results = {}
        for scenario in scenarios:
            loss = forward_backward(config, wrapped, scenario, parallel, step)
            results[scenario] = collect(chunks, loss)
        if save_to is not None:
            with torch.no_grad():
                for parameter in (p for chunk in chunks for p in chunk.parameters()):
                    parameter.sub_(rate * parameter.main_grad)
            save(chunks, save_to)
        return results


def initial_weights(rank: int, world: int, model: Model, parallel: Parallel) -> RankResult:
    """The weights of a fresh model, in place of gradients."""
    with megatron(parallel):
        _, chunks = build(model, parallel)
        for parameter in chunks[0].parameters():
            parameter.main_grad = parameter.detach()
        return collect(chunks, 0.0)


def run_optimizer(
    rank: int, world: int, model: Model, parallel: Parallel, directory: str, steps: int
) -> list[tuple[float | None, float]]:
    """(loss, gradient norm) of a few steps with Megatron's optimizer and cross entropy."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    with megatron(parallel):
        config, chunks = build(model, parallel)
        load(chunks, directory)
        if config.bf16:
            chunks = [Float16Module(config, chunk) for chunk in chunks]
        wrapped = wrap(config, chunks)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, bf16=config.bf16), wrapped)
        figures = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = forward_backward(config, wrapped, "plain", parallel, megatron_step)
            figures.append((loss, float(optimizer.step()[1])))
        return figures


def loss_with_layer_spec(rank: int, world: int, model: Model, directory: str) -> float:
    """Loss of the ``plain`` scenario with a plain ``TransformerConfig`` and ``get_nsa_transformer_layer_spec``."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    from nsa_cp.megatron import get_nsa_transformer_layer_spec

    with megatron(Parallel()):
        full = make_config(model, Parallel())
        ours = ("nsa", "rotary", "v_channels", "layer_pattern")
        plain = {f.name: getattr(full, f.name) for f in fields(TransformerConfig) if f.name not in ours}
        config = TransformerConfig(**plain)
        spec = get_nsa_transformer_layer_spec(full.attention_settings)
        gpt = GPTModel(config, spec, VOCAB, LENGTH, position_embedding_type="none")
        load([gpt], directory)
        loss = 0.0
        for batch, _ in batches("plain", full):
            logits = gpt(batch["tokens"], batch["position_ids"], None)
            losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
            loss += float(masked_mean(losses.view_as(batch["labels"]), batch["loss_mask"])[0])
        return loss / MICROBATCHES


def refusal(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the ValueError that ``function`` raises; anything else is a failure."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{function} accepted {args} {kwargs}")


def forward_refusals(rank: int, world: int, model: Model) -> dict[str, str]:
    """What a layer says to arguments it has no use for."""
    from megatron.core.transformer import TransformerConfig

    from nsa_cp.megatron import build_gpt_model, get_nsa_layer_spec, make_packed_seq_params

    with megatron(Parallel()):
        config, (gpt,) = build(model, Parallel())
        layer = gpt.decoder.layers[0].self_attention
        hidden = torch.zeros(LENGTH, 1, 32, dtype=model.dtype)
        names = ("rotary_pos_emb", "attention_mask", "attention_bias", "key_value_states", "inference_context")
        messages = {name: refusal(layer, hidden, **{name: hidden}) for name in names}
        packed = make_packed_seq_params(DOCUMENTS, "cpu")
        messages["packed batch"] = refusal(layer, hidden.expand(-1, 2, -1), packed_seq_params=packed)
        messages["packed length"] = refusal(layer, hidden, packed_seq_params=packed)
        plain = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True)
        messages["plain config"] = refusal(get_nsa_layer_spec, plain)
        messages["position embedding"] = refusal(build_gpt_model, config, VOCAB, LENGTH, position_embedding_type="rope")
        messages["vocabulary"] = refusal(build_gpt_model, config, 0, LENGTH)
        return messages


def odd_length_refusal(rank: int, world: int, model: Model) -> str:
    """What a layer says to a length that the zigzag layout cannot cut."""
    with megatron(Parallel(cp=2)):
        _, (gpt,) = build(model, Parallel(cp=2))
        return refusal(gpt.decoder.layers[0].self_attention, torch.zeros(33, 1, 32, dtype=model.dtype))
