"""Settings of a Megatron-Core model with NSA layers, validated on construction: before any collective or allocation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from megatron.core.transformer import TransformerConfig

from nsa_cp.config import NSAConfig, RotaryConfig

LayerType = Literal["nsa", "full", "window"]

# TransformerConfig fields that ask for something NSA layers do not do: (name, the only value accepted, why).
FIXED_FIELDS: tuple[tuple[str, Any, str], ...] = (
    ("multi_latent_attention", False, "NSA layers have their own projections"),
    ("experimental_attention_variant", None, "NSA layers come in through the layer spec"),
    ("attention_dropout", 0.0, "sparse attention drops no weights"),
    ("attention_output_gate", False, "NSA gates its branches instead"),
    ("qk_layernorm", False, "queries and keys are not normalised"),
    ("qk_l2_norm", False, "queries and keys are not normalised"),
    ("qk_clip", False, "attention logits are not clipped"),
    ("log_max_attention_logit", False, "kernels do not report their logits"),
    ("use_kitchen_attention", False, "attention is this library's"),
    ("softmax_scale", None, "the scale is 1/sqrt(kv_channels)"),
    ("softmax_type", "vanilla", "there is no attention sink"),
    ("window_size", None, "the window's width is nsa.window_size, its layers those called 'window' in layer_pattern"),
    ("window_attn_skip_freq", None, "choose the layers by layer_pattern"),
    ("no_rope_freq", None, "every layer rotates by config.rotary"),
    ("rotary_interleaved", False, "the half-split form is used"),
    ("layernorm_zero_centered_gamma", False, "the RMSNorm's weight is centred at one"),
    ("normalization", "RMSNorm", "this is the norm that works under sequence parallelism without Transformer Engine"),
    ("fp8", None, "train in bf16 or fp32"),
    ("fp4", None, "train in bf16 or fp32"),
    ("cpu_offloading", False, "use activation recompute to save memory"),
    ("heterogeneous_block_specs", False, "all layers share one shape; vary them by layer_pattern"),
    ("apply_query_key_layer_scaling", False, "the scale is 1/sqrt(kv_channels)"),
    ("hierarchical_context_parallel_sizes", None, "one context-parallel group serves every layer"),
    ("hybrid_context_parallel", False, "one context-parallel group serves every layer"),
    ("fine_grained_activation_offloading", False, "use activation recompute to save memory"),
    ("cuda_graph_impl", "none", "the index structures of a pack are made on the host"),
    ("enable_cuda_graph", False, "the index structures of a pack are made on the host"),
    ("external_cuda_graph", False, "the index structures of a pack are made on the host"),
    ("init_model_with_meta_device", False, "weights are drawn where they are allocated"),
    ("mtp_num_layers", None, "multi-token prediction cuts sequences by itself"),
    ("flash_decode", False, "there is no inference path"),
)


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """What an attention layer needs to know beyond Megatron's ``TransformerConfig``.

    Args:
        nsa: the method's settings; ``nsa.window_size`` is also the width of ``window`` layers.
        rotary: rotary embedding of queries and keys; None for no position embedding.
        v_channels: Dv, width of a value head; None for Megatron's ``kv_channels`` (which is Dk).
        layer_pattern: kinds of attention, ``nsa`` | ``full`` | ``window``, repeated over the layers in global order.
        equal_start: the key and value projections of an NSA layer's three branches start with equal weights and diverge in
            training (docs/learning/README.md tells why). Without effect with ``nsa.shared_kv``, which has only one.

    Raises:
        ValueError: an unknown or empty layer pattern, window layers without a window, or v_channels below 1.
    """

    nsa: NSAConfig = field(default_factory=NSAConfig)
    rotary: RotaryConfig | None = field(default_factory=RotaryConfig)
    v_channels: int | None = None
    layer_pattern: tuple[str, ...] = ("nsa",)
    equal_start: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_pattern", check_layer_pattern(self.layer_pattern, self.nsa))
        if self.v_channels is not None and self.v_channels < 1:
            raise ValueError(f"v_channels = {self.v_channels} must be at least 1; leave it out to use kv_channels")

    def layer_type(self, layer_number: int) -> str:
        """Kind of attention of the layer with this global, 1-based number, whichever pipeline stage holds it."""
        return self.layer_pattern[(layer_number - 1) % len(self.layer_pattern)]


@dataclass
class NSATransformerConfig(TransformerConfig):
    """Megatron's ``TransformerConfig`` with the settings of :class:`AttentionSettings` as further fields.

    Three defaults differ from Megatron's: RMSNorm, no attention dropout, no biases.

    Raises:
        ValueError: heads that do not divide into groups, groups that do not divide over tensor-parallel ranks, an unknown
            layer kind, or a Megatron setting that NSA layers would silently not follow.
    """

    normalization: Literal["LayerNorm", "RMSNorm"] = "RMSNorm"
    attention_dropout: float = 0.0
    add_bias_linear: bool = False
    nsa: NSAConfig = field(default_factory=NSAConfig)
    rotary: RotaryConfig | None = field(default_factory=RotaryConfig)
    v_channels: int | None = None
    layer_pattern: tuple[str, ...] = ("nsa",)
    equal_start: bool = True

    def __post_init__(self) -> None:
        self.layer_pattern = self.attention_settings.layer_pattern
        check_transformer_config(self, self.attention_settings)
        # Layers of different kinds have parameters of different shapes, so Megatron must save each layer under keys of its own.
        # (The field's name is Megatron's spelling.)
        self.hetereogenous_dist_checkpoint = True
        super().__post_init__()

    @property
    def attention_settings(self) -> AttentionSettings:
        """The fields that attention layers read, as one object."""
        return AttentionSettings(
            nsa=self.nsa, rotary=self.rotary, v_channels=self.v_channels, layer_pattern=self.layer_pattern,
            equal_start=self.equal_start,
        )  # fmt: skip


def settings_of(config: TransformerConfig, settings: AttentionSettings | None = None) -> AttentionSettings:
    """``settings`` if given (needed with a plain ``TransformerConfig``), else those of an :class:`NSATransformerConfig`.

    Raises:
        ValueError: no settings in either place, or ``settings`` and ``config`` together ask for what NSA layers cannot do.
    """
    if settings is None:
        if not isinstance(config, NSATransformerConfig):
            raise ValueError(
                f"{type(config).__name__} carries no NSA settings; use NSATransformerConfig, or give "
                "AttentionSettings(...) to the layer spec"
            )
        return config.attention_settings
    check_transformer_config(config, settings)
    return settings


def check_layer_pattern(pattern: tuple[str, ...], nsa: NSAConfig) -> tuple[str, ...]:
    """``pattern`` as a tuple.

    Raises:
        ValueError: it is empty or a string, has an unknown entry, or has ``window`` layers while ``nsa.window_size`` is 0.
    """
    if isinstance(pattern, str):
        raise ValueError(f"layer_pattern = {pattern!r} is one string; write a list such as [{pattern!r}]")
    pattern = tuple(pattern)
    if not pattern:
        raise ValueError("layer_pattern is empty; give at least one of 'nsa', 'full', 'window'")
    for index, kind in enumerate(pattern):
        if kind not in get_args(LayerType):
            raise ValueError(f"layer_pattern[{index}] = {kind!r} is unknown; use 'nsa', 'full' or 'window'")
    if "window" in pattern and nsa.window_size < 1:
        raise ValueError(f"layer_pattern has 'window' layers, but nsa.window_size = {nsa.window_size}; use at least 1")
    return pattern


def check_transformer_config(config: TransformerConfig, settings: AttentionSettings) -> None:
    """Check Megatron's settings against what NSA layers can do. Runs before Megatron's own checks and changes nothing.

    Raises:
        ValueError: one sentence with the numbers and the remedy.
    """
    heads, tp = config.num_attention_heads, config.tensor_model_parallel_size
    groups = heads if config.num_query_groups is None else config.num_query_groups
    if heads < 1 or groups < 1:
        raise ValueError(f"num_attention_heads = {heads} and num_query_groups = {groups} must both be at least 1")
    if heads % groups:
        raise ValueError(
            f"num_attention_heads = {heads} is not a multiple of num_query_groups = {groups}; "
            f"use {-(-heads // groups) * groups} heads or a number of groups that divides {heads}"
        )
    if groups < tp:
        raise ValueError(
            f"num_query_groups = {groups} is smaller than tensor_model_parallel_size = {tp}: the heads of a group choose "
            f"their blocks together and must stay on one rank; use tensor_model_parallel_size of at most {groups}"
        )
    if groups % tp:
        raise ValueError(
            f"num_query_groups = {groups} is not a multiple of tensor_model_parallel_size = {tp}; "
            f"use {-(-groups // tp) * tp} groups or another tensor_model_parallel_size"
        )
    if config.kv_channels is None and config.hidden_size % heads:
        raise ValueError(
            f"hidden_size = {config.hidden_size} is not a multiple of num_attention_heads = {heads}; set kv_channels"
        )
    channels = config.hidden_size // heads if config.kv_channels is None else config.kv_channels
    if settings.rotary is not None and settings.rotary.dim(channels) < 2:
        raise ValueError(
            f"rotary percent = {settings.rotary.percent} of kv_channels = {channels} rotates no channel; "
            "raise it, or set rotary to None for no position embedding"
        )
    for name, accepted, why in FIXED_FIELDS:
        value = getattr(config, name, accepted)
        if value != accepted:
            raise ValueError(f"{name} = {value!r} is not supported by NSA layers: {why}; set it to {accepted!r}")


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron puts parameters: the CPU under ``use_cpu_initialization``, else the current CUDA device."""
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
