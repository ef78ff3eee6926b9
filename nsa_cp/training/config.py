"""The configuration of a run (its YAML file) as typed sections; every field has its own description."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator

from nsa_cp.config import LARGEST_SIZE, NSAConfig, RotaryConfig
from nsa_cp.training.files import expanded

# Upper bounds catch typing errors, which would otherwise end in an overflow or in a run that never ends.
Positive = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST_SIZE)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]
NUM_BYTES = 256
LayerKind = Literal["nsa", "full", "window"]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused and values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        # Python's True is a 1: `lr: true` would train at a rate of 1.0.
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{str(value).lower()} is no value for this; true and false are for switches only")
        # A shell turns train.init_from='' into an empty value: None, except for text, where it is the empty string.
        return None if value == "" and kind is not str else value


class ModelSection(Section):
    """The transformer, in Megatron-Core's words."""

    num_layers: Annotated[int, Field(ge=1, le=10_000)] = Field(4, description="transformer layers")
    hidden_size: Width = Field(128, description="width of the residual stream, channels")
    ffn_hidden_size: Width | None = Field(None, description="width of the gated MLP, channels; default 3 * hidden_size")
    num_attention_heads: Width = Field(8, description="query heads")
    num_query_groups: Width = Field(2, description="key/value heads; must divide num_attention_heads")
    kv_channels: Width | None = Field(None, description="width of a query/key head; default hidden_size / num_attention_heads")
    v_channels: Width | None = Field(None, description="width of a value head; default kv_channels")
    layer_pattern: Annotated[list[LayerKind], Field(min_length=1)] = Field(
        ["nsa"], description="attention of each layer, repeated until num_layers is reached"
    )
    rotary_base: Annotated[float, Field(gt=0)] = Field(10000.0, description="base of the rotary wavelengths")
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="part of a query/key head that rotates")
    norm_epsilon: Annotated[float, Field(gt=0)] = Field(1e-5, description="epsilon of RMSNorm")
    init_std: Annotated[float, Field(gt=0)] = Field(0.02, description="standard deviation of the initial weights")
    equal_start: bool = Field(
        True, description="nsa layers: the branches' key and value projections, unless shared, start with the same weights"
    )


_NSA_TYPES = get_type_hints(NSAConfig)
# Fields, types and defaults are taken from NSAConfig, so that each setting is written down once.
NSASection = create_model(
    "NSASection",
    __base__=Section,
    __doc__="Native Sparse Attention; the fields of nsa_cp.config.NSAConfig.",
    **{field.name: (_NSA_TYPES[field.name], field.default) for field in fields(NSAConfig)},
)


class ParallelSection(Section):
    """How the model is spread; what is left of the processes is data parallel."""

    tensor: Positive = Field(1, description="tensor-parallel processes; must divide num_query_groups")
    pipeline: Positive = Field(1, description="pipeline stages")
    virtual_pipeline: Positive = Field(1, description="model chunks on each pipeline stage (interleaved schedule)")
    context: Positive = Field(1, description="context-parallel processes: the sequence is cut over them")
    sequence_parallel: bool = Field(False, description="shard the norms' activations over the tensor-parallel processes")
    distributed_optimizer: bool = Field(False, description="shard the optimizer's state over the data-parallel processes")
    timeout_minutes: Annotated[float, Field(gt=0, le=1_000_000)] = Field(
        30.0, description="how long a collective may wait for other processes"
    )


class DataSection(Section):
    """Where tokens come from."""

    kind: Literal["pydoc_topics", "text", "indexed"] = Field(
        "pydoc_topics",
        description="pydoc_topics: the text of Python's own pydoc_data.topics; text: files, read as bytes; "
        "indexed: a Megatron indexed dataset (.bin and .idx)",
    )
    paths: list[str] = Field([], description="kind text: UTF-8 files; kind indexed: one path prefix, without .bin or .idx")
    sequence_length: Positive = Field(2048, description="tokens of one training sequence, over all context-parallel processes")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="share of the data held out for validation: the end of the text, or the last documents of an index"
    )
    vocab_size: Positive | None = Field(None, description="kind indexed: number of token ids; default for bytes: 256")
    vocab_file: str | None = Field(
        None, description="kind indexed, instead of vocab_size: JSON object token -> id, or a text file of one token a line"
    )
    end_of_document: NotNegative | None = Field(None, description="kind indexed: token id after which no next token is predicted")
    bytes_per_token: Annotated[float, Field(gt=0)] = Field(
        1.0, description="kind indexed: mean UTF-8 bytes of one token, to state losses in bits per byte"
    )


class TrainSection(Section):
    """Optimisation, precision, and how often something is written."""

    steps: Positive = Field(300, description="optimizer steps of the whole run")
    global_batch_size: Positive = Field(1, description="sequences of one optimizer step, over all processes")
    micro_batch_size: Positive = Field(1, description="sequences of one forward pass of one data-parallel process")
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate")
    min_lr: Annotated[float, Field(ge=0)] = Field(1e-4, description="learning rate at the last step")
    warmup_steps: NotNegative = Field(20, description="steps of linear warm-up; the cosine follows")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="AdamW decay of matrices; vectors have none")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Adam's first-moment factor")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="Adam's second-moment factor")
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's epsilon")
    clip_grad: Annotated[float, Field(gt=0)] = Field(1.0, description="largest norm of the whole gradient")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="parameters and activations; bf16 keeps fp32 main weights")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where every process has a GPU")
    recompute: Literal["none", "full"] = Field("none", description="full: recompute every layer in the backward pass")
    init_from: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="run or checkpoint folder with whose weights the run begins; step, optimizer and data begin anew; without "
        "effect on --resume",
    )
    selected_from_step: NotNegative = Field(
        0,
        description="steps before which NSA's selected branch is closed (its gate is 0); it opens with the window's key and "
        "value projections; 0: open from the start",
    )
    log_interval: Positive = Field(1, description="steps between printed lines")
    eval_interval: NotNegative = Field(100, description="steps between validations; 0 validates only at the end")
    eval_sequences: Positive = Field(8, description="validation sequences, always the same ones")
    checkpoint_interval: NotNegative = Field(0, description="steps between checkpoints; 0 saves only at the end")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints that are kept")

    def selected_is_closed(self, step: int) -> bool:
        """Whether NSA's selected branch is closed in a model that has had ``step`` optimizer steps.

        The branch opens when the next step begins, so a model saved or validated after step ``selected_from_step`` still has it
        closed.
        """
        return self.selected_from_step > 0 and step <= self.selected_from_step


class SampleSection(Section):
    """The text that the finished model continues."""

    prompt: str = Field("The ", description="text to continue; empty for none")
    tokens: NotNegative = Field(200, description="tokens to generate; 0 writes no sample")
    temperature: Annotated[float, Field(ge=0)] = Field(0.8, description="softmax temperature; 0 takes the likeliest token")


class RunConfig(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field("run", description="folder under runs_dir")
    runs_dir: Annotated[str, Field(min_length=1)] = Field("runs", description="parent folder of all runs")
    seed: Annotated[int, Field(ge=0, lt=2**62)] = Field(1234, description="seed of the weights and of the order of the data")
    model: ModelSection = ModelSection()
    nsa: NSASection = NSASection()  # type: ignore[valid-type]
    parallel: ParallelSection = ParallelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    sample: SampleSection = SampleSection()

    @property
    def run_dir(self) -> Path:
        """Folder of everything the run writes: ``runs_dir/name``."""
        return expanded(self.runs_dir) / self.name

    @property
    def nsa_config(self) -> NSAConfig:
        """The settings of the attention layers."""
        return NSAConfig(**self.nsa.model_dump())

    @property
    def rotary_config(self) -> RotaryConfig:
        """The rotary embedding of queries and keys."""
        return RotaryConfig(base=self.model.rotary_base, percent=self.model.rotary_percent)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer: ``layer_pattern`` repeated to ``num_layers``."""
        pattern = self.model.layer_pattern
        return tuple(pattern[i % len(pattern)] for i in range(self.model.num_layers))

    @property
    def model_parallel_size(self) -> int:
        """Number of processes that share one copy of the model and one sequence."""
        return self.parallel.tensor * self.parallel.pipeline * self.parallel.context

    def data_parallel_size(self, world_size: int) -> int:
        """Number of copies of the model among ``world_size`` processes."""
        return world_size // self.model_parallel_size

    def resolved(self) -> RunConfig:
        """The same run with the defaults that depend on other settings filled in."""
        model = self.model
        kv_channels = model.kv_channels or max(1, model.hidden_size // model.num_attention_heads)
        update: dict[str, Any] = {
            "ffn_hidden_size": model.ffn_hidden_size or 3 * model.hidden_size,
            "kv_channels": kv_channels,
            "v_channels": model.v_channels or kv_channels,
        }
        data = self.data
        if data.kind != "indexed" and data.vocab_size is None:
            data = data.model_copy(update={"vocab_size": NUM_BYTES})
        return self.model_copy(update={"model": model.model_copy(update=update), "data": data})

    def to_yaml(self) -> str:
        """The run as YAML that ``load_config`` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def model_shape(self) -> dict[str, Any]:
        """The settings that a checkpoint's weights depend on: two runs can exchange weights if and only if these are equal."""
        model = self.model.model_dump(mode="json")
        shape = {key: model[key] for key in _SHAPE_KEYS}
        shape["layer_pattern"] = list(self.layer_kinds)
        if "nsa" in self.layer_kinds:
            shape.update({f"nsa.{key}": getattr(self.nsa, key) for key in _NSA_SHAPE_KEYS})
            if self.nsa.compressor == "mean":
                shape.pop("nsa.compress_block_size")
        shape["vocab_size"] = self.data.vocab_size
        return shape


def differences(before: dict[str, Any], now: dict[str, Any], section: str = "") -> Iterator[str]:
    """``name: old -> new`` of every setting that differs, sections joined by dots."""
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{section}{key}.")
        elif old != new:
            yield f"{section}{key}: {old} -> {new}"


_SHAPE_KEYS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "v_channels",
)  # fmt: skip
_NSA_SHAPE_KEYS = ("compressor", "compress_block_size", "shared_kv", "gate")
