"""The studies' model: a small pre-norm decoder in plain PyTorch, around the attentions that the Megatron layers call, too."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from nsa_cp.attention import NativeSparseAttention, full_attention, sliding_window_attention, without_selected
from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops.dispatch import accumulator_dtype
from nsa_cp.ops.plan import get_layout_plan
from nsa_cp.ops.rope import apply_rope, rotary_tables
from nsa_cp.study.dense_blocks import DenseBlockAttention
from nsa_cp.study.random_blocks import RandomBlockAttention

AttentionKind = Literal["full", "window", "nsa"]
Selection = Literal["scored", "random", "dense", "none"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Shape of the decoder.

    Args:
        num_outputs: only this many tokens, the last of the vocabulary, are ever predicted; None for all.
        ffn_hidden_size: width of the SwiGLU.
        attention: ``full``, ``window`` (the last ``nsa.window_size`` tokens) or ``nsa``.
        selection: blocks of ``nsa``: ``scored`` ones as the method says; instead ``random`` ones, or those that ``dense``
            attention weights most; or ``none``: the selected branch is closed (its gate is exactly 0) and has no keys and values
            of its own.
        shift: mix every token's embedding with that of the token before, channel by channel, with learned weights.
        equal_start: the branches' key and value projections start with equal weights and diverge in training. Without effect if
            there is only one.
        selected_from: first stage of training in which the selected branch is open. Before, its gate is exactly 0; when it opens,
            its key and value projections are set to the window's.
        gates_from: first stage of training in which the gates learn. Before, they are exactly one half.
        dense_until: first stage of training in which attention is sparse. Before, it is dense, with the model's queries and the
            first branch's keys and values; then ``nsa`` begins with these, as :func:`nsa_cp.megatron.copy_dense_weights` does.

    Raises:
        ValueError: a size that is out of range.
    """

    vocab_size: int
    num_outputs: int | None = None
    num_layers: int = 2
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int = 1
    kv_channels: int = 64
    ffn_hidden_size: int = 352
    attention: AttentionKind = "nsa"
    selection: Selection = "scored"
    shift: bool = False
    equal_start: bool = True
    selected_from: int = 0
    gates_from: int = 0
    dense_until: int = 0
    nsa: NSAConfig = field(default_factory=NSAConfig)
    rotary: RotaryConfig = field(default_factory=RotaryConfig)

    def __post_init__(self) -> None:
        names = ("vocab_size", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
        for name in (*names, "ffn_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.num_outputs is not None and not 1 <= self.num_outputs <= self.vocab_size:
            raise ValueError(f"num_outputs = {self.num_outputs} must be from 1 to vocab_size = {self.vocab_size}")


class SelfAttention(nn.Module):
    """One of the attentions with its projections; maps the rows [T, hidden] of a pack to rows of the same shape.

    Args:
        seed: of the compressors' weights and of random blocks.

    Attributes:
        is_dense: whether attention is dense for the time being (``dense_until``).
        selected_is_open: whether the selected branch is open (``selected_from``).
        gates_learn: whether the gates depend on the input yet (``gates_from``).
    """

    def __init__(self, settings: ModelSettings, seed: int) -> None:
        super().__init__()
        s = self.settings = settings
        self.is_dense = s.attention == "nsa" and s.dense_until > 0
        self.selected_is_open = s.selection != "none" and s.selected_from == 0
        self.gates_learn = s.attention != "nsa" or s.gates_from == 0
        pairs = 1
        if s.attention == "nsa":
            pairs = s.nsa.num_branch_kv - (s.selection == "none" and not s.nsa.shared_kv)
        self.kv_shape = (2 * pairs, s.num_query_groups, s.kv_channels)
        self.q_proj = nn.Linear(s.hidden_size, s.num_attention_heads * s.kv_channels, bias=False)
        self.kv_proj = nn.Linear(s.hidden_size, 2 * pairs * s.num_query_groups * s.kv_channels, bias=False)
        self.out_proj = nn.Linear(s.num_attention_heads * s.kv_channels, s.hidden_size, bias=False)
        self.core: NativeSparseAttention | None = None
        if s.attention == "nsa":
            self.num_gates = s.num_attention_heads if s.nsa.gate == "head" else 1
            self.gate_proj = nn.Linear(s.hidden_size, self.num_gates * 3, bias=False)
            shape = {"num_attention_heads": s.num_attention_heads, "num_query_groups": s.num_query_groups}
            generator = torch.Generator().manual_seed(seed)
            common = {**shape, "qk_dim": s.kv_channels, "rotary": s.rotary, "generator": generator}
            if s.selection == "random":
                self.core = RandomBlockAttention(s.nsa, seed=seed, **common)
            else:
                kind = DenseBlockAttention if s.selection == "dense" else NativeSparseAttention
                self.core = kind(s.nsa, **common)

    def forward(self, x: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        s = self.settings
        q = self.q_proj(x).view(x.shape[0], s.num_attention_heads, s.kv_channels)
        kv = self.kv_proj(x).view(x.shape[0], *self.kv_shape).unbind(1)
        k, v = kv[0::2], kv[1::2]
        if self.core is not None and not self.is_dense:
            out = self.core(q, self._branches(k), self._branches(v), self._gate_logits(x), layout)
        elif s.attention == "window":
            out = sliding_window_attention(q, k[0], v[0], layout, window_size=s.nsa.window_size, rotary=s.rotary)
        else:
            out = _full_attention(q, k[0], v[0], layout, s.rotary)
        return self.out_proj(out.flatten(1))

    @torch.no_grad()
    def become_sparse(self) -> None:
        """If attention has been dense so far, go on as native sparse attention: every branch begins with the dense keys and
        values, gates are one half, and the output's weights are divided by 1.5, the sum of the gates."""
        if not self.is_dense:
            return
        self.is_dense = False
        self.copy_first_branch()
        self.gate_proj.weight.zero_()
        self.out_proj.weight.div_(1.5)

    @torch.no_grad()
    def open_selected(self) -> None:
        """Open the selected branch if it has been closed so far. Its key and value projections, which have not been trained, are
        overwritten with the window's, which by then know how to find a token."""
        if self.selected_is_open or self.settings.selection == "none":
            return
        self.selected_is_open = True
        if not self.settings.nsa.shared_kv:
            compressed, selected, window = self.kv_proj.weight.unflatten(0, (3, -1)).unbind()
            selected.copy_(window)

    @torch.no_grad()
    def learn_gates(self) -> None:
        """Let the gates learn, from one half on, if they have been held there so far."""
        if not self.gates_learn:
            self.gates_learn = True
            self.gate_proj.weight.zero_()

    @torch.no_grad()
    def copy_first_branch(self) -> None:
        """Copy the first branch's key and value projections to all branches."""
        by_branch = self.kv_proj.weight.view(self.kv_shape[0] // 2, -1)
        by_branch.copy_(by_branch[:1].expand_as(by_branch).clone())

    def _branches(self, x: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """One tensor for each branch. With ``selection="none"`` the selected branch is given the window's, which its gate of 0
        ignores."""
        return (x[0], x[1], x[1]) if len(x) == 2 else x

    def _gate_logits(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.gate_proj(x).view(x.shape[0], self.num_gates, 3)
        if not self.gates_learn:
            logits = torch.zeros_like(logits)
        return logits if self.selected_is_open else without_selected(logits)


def _full_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, rotary: RotaryConfig
) -> torch.Tensor:
    """:func:`nsa_cp.attention.full_attention`, but in one call for all sequences if there are several of equal length."""
    length, count = layout.cu_seqlens[1], layout.num_documents
    if count == 1 or layout.cu_seqlens != tuple(range(0, length * count + 1, length)):
        return full_attention(q, k, v, layout, rotary=rotary)
    tables = rotary_tables(get_layout_plan(layout, q.device).position, rotary, q.shape[-1], accumulator_dtype(q))
    q, k = apply_rope(q, *tables), apply_rope(k, *tables)
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)


class Layer(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm and added to the residual stream."""

    def __init__(self, settings: ModelSettings, seed: int) -> None:
        super().__init__()
        hidden, wide = settings.hidden_size, settings.ffn_hidden_size
        self.attention_norm, self.ffn_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention = SelfAttention(settings, seed)
        self.up_proj = nn.Linear(hidden, 2 * wide, bias=False)
        self.down_proj = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        x = x + self.attention(self.attention_norm(x), layout)
        gate, value = self.up_proj(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down_proj(F.silu(gate) * value)


class Decoder(nn.Module):
    """Embedding, layers, norm, and an output layer that shares the embedding's weights.

    Two decoders with the same seed have equal weights wherever their shapes agree, whatever their attention.

    Args:
        seed: of all weights.
    """

    def __init__(self, settings: ModelSettings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings.vocab_size, settings.hidden_size)
        if settings.shift:
            self.shift = nn.Parameter(torch.empty(settings.hidden_size))
        self.layers = nn.ModuleList(Layer(settings, seed * 1000 + index) for index in range(settings.num_layers))
        self.norm = nn.RMSNorm(settings.hidden_size)
        self._initialise(seed)

    def forward(self, tokens: torch.Tensor, layout: SequenceLayout, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Logits.

        Args:
            tokens: int64 [T], a pack of sequences laid out as ``layout`` says.
            rows: int64 [R], the rows whose logits are wanted; None for all.

        Returns:
            [R, outputs], for the last ``num_outputs`` tokens of the vocabulary.
        """
        x = self.embedding(tokens)
        if self.settings.shift:
            has_previous = (get_layout_plan(layout, x.device).position > 0)[:, None]
            x = x * self.shift + x.roll(1, 0) * has_previous * (1 - self.shift)
        for layer in self.layers:
            x = layer(x, layout)
        x = self.norm(x if rows is None else x.index_select(0, rows))
        weight = self.embedding.weight[-(self.settings.num_outputs or self.settings.vocab_size) :]
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight) * self.settings.hidden_size**-0.5

    def enter_stage(self, number: int) -> None:
        """Call it before stage ``number`` (0-based) of training: makes attention sparse, opens selected branches and lets gates
        learn, each when its stage has come."""
        for attention in self.attentions:
            if number >= self.settings.dense_until:
                attention.become_sparse()
            if number >= self.settings.selected_from:
                attention.open_selected()
            if number >= self.settings.gates_from:
                attention.learn_gates()

    @property
    def attentions(self) -> list[SelfAttention]:
        """The attention of each layer."""
        return [layer.attention for layer in self.layers]

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Draw weights that keep the residual stream's variance; each parameter has a generator of its own, seeded by name."""
        residual = (2 * self.settings.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            if name == "embedding.weight":
                parameter.normal_(generator=generator)
            elif name == "shift":
                parameter.uniform_(generator=generator)
            elif name.endswith("gate_proj.weight"):
                parameter.normal_(std=0.02, generator=generator)
            elif name.endswith("_proj.weight"):
                scale = residual if name.endswith(("out_proj.weight", "down_proj.weight")) else 1.0
                parameter.normal_(std=scale * parameter.shape[1] ** -0.5, generator=generator)
        if self.settings.equal_start:
            for attention in self.attentions:
                attention.copy_first_branch()


def count_parameters(settings: ModelSettings) -> int:
    """Number of parameters of a decoder of this shape."""
    return sum(parameter.numel() for parameter in Decoder(settings, seed=0).parameters())
