"""Self-attention for Megatron-Core's transformer layer: NSA, full or window attention, as the layer pattern says."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from nsa_cp.attention import NativeSparseAttention, full_attention, sliding_window_attention, without_selected
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.megatron.config import AttentionSettings, parameter_device, settings_of
from nsa_cp.megatron.gate import BranchGate
from nsa_cp.megatron.layout import sequence_layout
from nsa_cp.megatron.recompute import reuse_selections


class NSASelfAttention(MegatronModule):
    """Takes the place of Megatron's ``SelfAttention`` in a layer spec.

    One column-parallel projection, ``linear_qkv``, makes everything that the attention needs. Its output is laid out group by
    group, so that tensor parallelism shards it by groups. Each group has its H queries of width Dk; then, for each branch
    (compressed, selected, window), a key of width Dk and a value of width Dv (only one such pair if K/V are shared, and in
    ``full`` and ``window`` layers); then, with ``gate="head"``, 3 gate logits for each of its H heads. With ``gate="branch"`` the
    gate is a small projection of its own, ``linear_gate``, because it belongs to no group.

    Args:
        config: the model's settings: an ``NSATransformerConfig``, or a plain ``TransformerConfig`` beside ``settings``.
        submodules: builders of ``linear_qkv`` and ``linear_proj``, as in Megatron's local layer spec.
        layer_number: global and 1-based, as Megatron's layers pass it; selects the entry of the layer pattern.
        pg_collection: process groups ``tp`` and ``cp``; Megatron's own when None.
        settings: the attention's settings, for a plain ``TransformerConfig``.

    Attributes:
        selected_is_open: False while the selected branch's gate is held at exactly 0 (see :meth:`close_selected`). Not saved in
            checkpoints.

    Raises:
        ValueError: settings that the layer cannot follow.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        settings: AttentionSettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.settings = settings_of(config, settings)
        # NSATransformerConfig has it from the start, and says why; a plain config gets it here.
        config.hetereogenous_dist_checkpoint = True
        self.layer_number = layer_number
        self.layer_type = self.settings.layer_type(layer_number)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        nsa, is_nsa = self.settings.nsa, self.layer_type == "nsa"
        self.num_groups = config.num_query_groups // self.tp_group.size()
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.qk_dim = config.kv_channels
        self.v_dim = self.settings.v_channels or config.kv_channels
        self.num_pairs = nsa.num_branch_kv if is_nsa else 1
        self.selected_is_open = True
        gate_width = nsa.num_gates * self.heads_per_group if is_nsa and nsa.gate == "head" else 0
        # Widths of one group's part of the fused projection, in order: queries, (key, value) for each branch, gate logits.
        self.group_widths = [self.heads_per_group * self.qk_dim, *[self.qk_dim, self.v_dim] * self.num_pairs, gate_width]
        self.checkpoint_core_attention = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        if config.recompute_granularity is not None:
            reuse_selections()
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            config.num_query_groups * sum(self.group_widths),
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tp_group,
        )
        if is_nsa and self.settings.equal_start and not nsa.shared_kv:
            self._copy_key_values(0, 1, 2)
        self.linear_gate = BranchGate(config, nsa.num_gates, self.tp_group) if is_nsa and nsa.gate == "branch" else None
        self.core_attention = self._build_core(config) if is_nsa else None
        self.linear_proj = build_module(
            submodules.linear_proj,
            config.num_attention_heads * self.v_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        *args: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of this rank's tokens to the whole sequence. Collective over the ``cp`` and ``tp`` groups.

        Args:
            hidden_states: [s/cp, b, h], or [s/(cp*tp), b, h] under sequence parallelism. The s/cp tokens are those that
                the layout ``nsa.layout`` gives this context-parallel rank, in ascending order.
            packed_seq_params: documents of a pack (thd format, b = 1); None for b sequences of s tokens.

        Returns:
            The output [s/cp or s/(cp*tp), b, h], and the output projection's bias (or None), which Megatron adds later.

        Raises:
            ValueError: an argument that NSA layers cannot honour (a mask, an attention bias, keys and values from elsewhere,
                rotary embeddings, an inference context), or a length that does not fit the layout.
        """
        _refuse(attention_mask, key_value_states, inference_context, rotary_pos_emb, attention_bias)
        mixed, _ = self.linear_qkv(hidden_states)
        length, batch = mixed.shape[:2]
        layout = sequence_layout(
            self.settings.nsa.layout,
            self.cp_group,
            local_length=length,
            batch_size=batch,
            packed_seq_params=packed_seq_params,
        )
        tensors = self._split(mixed)
        if self.linear_gate is not None:
            tensors.append(_flatten_tokens(self.linear_gate(hidden_states)).unsqueeze(1))
        attend = partial(self._attend, layout)
        if self.checkpoint_core_attention and self.training:
            out = tensor_parallel.checkpoint(attend, False, *tensors)
        else:
            out = attend(*tensors)
        # A rank may hold no token, and reshape cannot infer a -1 from an empty tensor.
        out = out.reshape(batch, length, out.shape[1] * out.shape[2]).transpose(0, 1).contiguous()
        return self.linear_proj(out)

    def close_selected(self) -> None:
        """Hold the selected branch's gate at exactly 0, so that the branch adds nothing and its gate, keys and values get no
        gradient. Without effect in layers that are not ``nsa``."""
        self.selected_is_open = self.layer_type != "nsa"

    def open_selected(self) -> None:
        """Open the selected branch if it is closed.

        Its key and value projections, which have not been trained, are overwritten with the window branch's, which by then know
        how to find a token; with shared K/V nothing is copied. If the optimizer keeps main weights of its own, use
        :func:`nsa_cp.megatron.open_selected_branches`, which updates those, too.
        """
        if self.selected_is_open:
            return
        self.selected_is_open = True
        if not self.settings.nsa.shared_kv:
            self._copy_key_values(2, 1)

    def backward_dw(self) -> None:
        """Compute the weight gradients of both projections that Megatron has delayed."""
        self.linear_qkv.backward_dw()
        self.linear_proj.backward_dw()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Megatron's checkpoint entries; the compressors' weights are sharded over tensor-parallel ranks along their groups."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.core_attention is not None:
            weights = self.core_attention.state_dict(keep_vars=True)
            state.update(
                make_sharded_tensors_for_checkpoint(
                    weights,
                    f"{prefix}core_attention.",
                    dict.fromkeys(weights, 0),
                    sharded_offsets,
                    tp_group=self.tp_group,
                    dp_cp_group=metadata["dp_cp_group"],
                )
            )
        return state

    @torch.no_grad()
    def _copy_key_values(self, source: int, *targets: int) -> None:
        """Copy the key and value projections of branch ``source`` to ``targets`` (0 compressed, 1 selected, 2 window)."""
        for rows in (self.linear_qkv.weight, self.linear_qkv.bias):
            if rows is None:
                continue
            _, *pairs, _ = rows.unflatten(0, (self.num_groups, -1)).split(self.group_widths, dim=1)
            for target in targets:
                for part in (0, 1):
                    pairs[2 * target + part].copy_(pairs[2 * source + part])

    def _split(self, mixed: Tensor) -> list[Tensor]:
        """Split the fused projection [s, b, groups * width] into token-major tensors: q [T, N, Dk], then k [T, G, Dk] and
        v [T, G, Dv] for each branch, then the gate logits [T, N, 3] if they are part of the projection."""
        parts = _flatten_tokens(mixed).unflatten(1, (self.num_groups, -1)).split(self.group_widths, dim=-1)
        heads = self.num_groups * self.heads_per_group
        tensors = [parts[0].reshape(-1, heads, self.qk_dim), *(part.contiguous() for part in parts[1:-1])]
        if parts[-1].shape[-1]:
            tensors.append(parts[-1].reshape(-1, heads, self.settings.nsa.num_gates))
        return tensors

    def _attend(self, layout: SequenceLayout, *tensors: Tensor) -> Tensor:
        """Core attention [T, N, Dv] of the tensors from :meth:`_split`; the part that selective recompute runs again."""
        q, pairs = tensors[0], tensors[1 : 1 + 2 * self.num_pairs]
        keys, values = tuple(pairs[0::2]), tuple(pairs[1::2])
        nsa, rotary = self.settings.nsa, self.settings.rotary
        if self.core_attention is not None:
            logits = tensors[-1] if self.selected_is_open else without_selected(tensors[-1])
            return self.core_attention(q, keys, values, logits, layout)
        if self.layer_type == "full":
            return full_attention(q, keys[0], values[0], layout, rotary=rotary, cp_group=self.cp_group)
        return sliding_window_attention(
            q,
            keys[0],
            values[0],
            layout,
            window_size=nsa.window_size,
            rotary=rotary,
            cp_group=self.cp_group,
            backend=nsa.backend,
        )

    def _build_core(self, config: TransformerConfig) -> NativeSparseAttention:
        """The attention of this rank's groups, with initial weights that do not depend on the tensor-parallel size.

        Every rank draws the weights of all groups from the CPU generator, which Megatron seeds alike on all tensor-parallel
        ranks, and keeps its slice, as ``use_cpu_initialization`` does for the linear layers.
        """

        def make(num_groups: int, **kwargs: Any) -> NativeSparseAttention:
            """An attention with ``num_groups`` of the model's groups."""
            return NativeSparseAttention(
                self.settings.nsa,
                num_attention_heads=num_groups * self.heads_per_group,
                num_query_groups=num_groups,
                qk_dim=self.qk_dim,
                v_dim=self.v_dim,
                rotary=self.settings.rotary,
                cp_group=self.cp_group,
                dtype=config.params_dtype,
                **kwargs,
            )

        whole = make(config.num_query_groups, device="cpu")
        # A throw-away generator: what is drawn here is overwritten, and must not advance the shared one.
        core = make(self.num_groups, device=parameter_device(config), generator=torch.Generator())
        first = self.tp_group.rank() * self.num_groups
        for own, full in zip(core.parameters(), whole.parameters(), strict=True):
            with torch.no_grad():
                own.copy_(full[first : first + self.num_groups])
            tensor_parallel.set_tensor_model_parallel_attributes(own, True, 0, 1)
        return core


def _flatten_tokens(x: Tensor) -> Tensor:
    """[s, b, channels] to [b * s, channels]: a batch is treated as a pack, one sequence after the other."""
    return x.transpose(0, 1).reshape(-1, x.shape[-1])


def _refuse(mask: Any, key_value_states: Any, inference_context: Any, rotary_pos_emb: Any, bias: Any) -> None:
    """Raise ValueError for arguments that ought to change the result but which NSA layers would ignore."""
    if rotary_pos_emb is not None:
        raise ValueError(
            "NSA layers rotate queries and keys themselves, by config.rotary, because compressed keys have positions of "
            'their own; build GPTModel with position_embedding_type="none"'
        )
    if mask is not None:
        raise ValueError(
            "NSA layers are causal and take documents from packed_seq_params; pass attention_mask=None "
            "(create_attention_mask=False in Megatron's datasets)"
        )
    if bias is not None:
        raise ValueError("NSA layers take no attention_bias; leave it out")
    if key_value_states is not None:
        raise ValueError("NSA is self-attention and takes no key_value_states; use Megatron's CrossAttention for those")
    if inference_context is not None:
        raise ValueError("NSA layers have no key/value cache yet; run the model on the whole sequence, without inference_context")
