"""Sets up training from a checked configuration: process groups, the model and the optimizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from nsa_cp.megatron import NSATransformerConfig, build_gpt_model, enable
from nsa_cp.training.config import RunConfig
from nsa_cp.training.errors import UserError, as_user_error


@dataclass(frozen=True)
class Launch:
    """This process's place among those that a launcher (torchrun, SLURM, mpirun) started.

    Attributes:
        rank: global rank.
        world_size: number of processes; 1 without a launcher.
        local_rank: rank on this machine; selects the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Launch:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them.

        Raises:
            UserError: some but not all of them are set, they are not whole numbers or contradict each other, or several processes
                have no MASTER_ADDR and MASTER_PORT to meet at.
        """
        if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
            return cls()
        try:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            launch = cls(rank, world_size, int(os.environ.get("LOCAL_RANK", rank)))
        except KeyError as error:
            raise UserError(
                f"the environment has RANK or WORLD_SIZE but not {error.args[0]}; start with torchrun, which sets both"
            ) from error
        except ValueError as error:
            raise UserError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error}); start with torchrun, which sets them"
            ) from error
        if not 0 <= rank < world_size:
            raise UserError(f"RANK = {rank} lies outside WORLD_SIZE = {world_size}; start with torchrun, which sets both")
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if world_size > 1 and name not in os.environ]:
            raise UserError(
                f"{world_size} processes have no {' and '.join(missing)} to meet at; start with torchrun, which sets both"
            )
        return launch


@dataclass
class Trainer:
    """This process's part of the model with all that is needed to train it.

    Attributes:
        config: the run.
        model_config: the run's settings as Megatron takes them.
        device: where tensors are.
        chunks: bare model chunks: one, or one for each virtual pipeline stage.
        wrapped: the same chunks inside Megatron's DDP (and Float16Module for bf16).
        optimizer: Megatron's optimizer; None when the model is only evaluated.
        num_parameters: parameters of the whole model, over all processes.
    """

    config: RunConfig
    model_config: NSATransformerConfig
    device: torch.device
    chunks: list[GPTModel]
    wrapped: list[torch.nn.Module]
    optimizer: Any
    num_parameters: int


def init_processes(config: RunConfig, launch: Launch, device: torch.device) -> None:
    """Join torch.distributed and form Megatron's groups. Collective: the first call that waits for other processes."""
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        enable()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Some clusters export MASTER_ADDR to every process, launched by a launcher or not.
        alone = launch.world_size == 1 and not {"MASTER_ADDR", "RANK"} <= os.environ.keys()
        where = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {"init_method": "env://"}
        dist.init_process_group(backend, timeout=timeout, **where)
    # NCCL learns each process's device from its first collective; a barrier would have to guess it.
    dist.all_reduce(torch.zeros(1, device=device))
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=max(1, round(parallel.timeout_minutes)),
        create_gloo_process_groups=parallel.distributed_optimizer,
        # See docs/context-parallel.md, "Streams of high priority".
        high_priority_stream_groups=["cp"] if device.type == "cuda" else None,
    )


def close_processes() -> None:
    """Leave Megatron's groups and torch.distributed."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def megatron_config(config: RunConfig, device: torch.device) -> NSATransformerConfig:
    """The run's model and parallel settings as Megatron's configuration, with NSA's fields.

    Raises:
        ValueError: settings that the attention layers cannot follow.
    """
    model, parallel, train = config.model, config.parallel, config.train
    dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
    interleaved, on_cpu = parallel.virtual_pipeline > 1, device.type == "cpu"
    recompute: dict[str, Any] = {}
    if train.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return NSATransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        v_channels=model.v_channels,
        layer_pattern=tuple(model.layer_pattern),
        equal_start=model.equal_start,
        nsa=config.nsa_config,
        rotary=config.rotary_config,
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_std,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=train.dtype == "bf16",
        use_cpu_initialization=on_cpu,
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        batch_p2p_sync=not on_cpu,
        # Losses are summed, and divided once by the whole batch's token count, so that the gradient depends neither on how masks
        # are spread nor on the number of context- or data-parallel processes.
        calculate_per_token_loss=True,
        **recompute,
    )


def build_trainer(config: RunConfig, device: torch.device, *, for_training: bool = True) -> Trainer:
    """Build this process's part of the model and its optimizer, with seeded weights. Collective.

    Args:
        config: a resolved run, whose process groups have been formed.
        device: this process's device.
        for_training: False leaves out DDP and the optimizer.

    Raises:
        UserError: settings that the model refuses.
    """
    # A seed for each pipeline stage: stages hold different layers, which must not begin with equal weights.
    seed = config.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    with as_user_error():
        model_config = megatron_config(config, device)
        chunks = [_build_chunk(config, model_config, stage) for stage in _virtual_stages(config)]
    wrapped: list[torch.nn.Module] = list(chunks)
    for chunk in chunks:
        chunk.to(device)
    if config.train.dtype == "bf16":
        wrapped = [Float16Module(model_config, chunk) for chunk in chunks]
    optimizer = None
    if for_training:
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=config.parallel.distributed_optimizer
        )
        wrapped = [DistributedDataParallel(model_config, ddp, chunk) for chunk in wrapped]
        for chunk in wrapped:
            chunk.broadcast_params()
        model_config.finalize_model_grads_func = finalize_model_grads
        optimizer = _build_optimizer(config, wrapped)
    return Trainer(config, model_config, device, chunks, wrapped, optimizer, count_parameters(chunks))


def _virtual_stages(config: RunConfig) -> Sequence[int | None]:
    return range(config.parallel.virtual_pipeline) if config.parallel.virtual_pipeline > 1 else (None,)


def _build_chunk(config: RunConfig, model_config: NSATransformerConfig, stage: int | None) -> GPTModel:
    assert config.data.vocab_size is not None, "the data source has set it"
    return build_gpt_model(
        model_config,
        config.data.vocab_size,
        config.data.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        vp_stage=stage,
        share_embeddings_and_output_weights=False,
    )


def _build_optimizer(config: RunConfig, wrapped: list[torch.nn.Module]) -> Any:
    train = config.train
    settings = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        adam_eps=train.epsilon,
        clip_grad=train.clip_grad,
        bf16=train.dtype == "bf16",
        params_dtype=torch.bfloat16 if train.dtype == "bf16" else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    return get_megatron_optimizer(settings, wrapped, use_gloo_process_groups=config.parallel.distributed_optimizer)


def count_parameters(chunks: Sequence[torch.nn.Module]) -> int:
    """Number of parameters of the whole model. Collective.

    Tensor-parallel shards are counted on every tensor-parallel process, replicated parameters on the first one only.
    """
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    local = sum(
        parameter.numel()
        for chunk in chunks
        for parameter in chunk.parameters()
        if first or getattr(parameter, "tensor_model_parallel", False)
    )
    count = torch.tensor([float(local)], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(count, group=parallel_state.get_model_parallel_group())
    return int(count.item())
