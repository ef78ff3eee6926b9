"""Probes a trained model's sparse attention: its gates, the agreement of neighbours, and whether it picks the best blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops.plan import get_layout_plan
from nsa_cp.ops.rope import apply_rope, rotary_tables
from nsa_cp.study.evaluate import mixed_precision
from nsa_cp.study.model import Decoder, SelfAttention
from nsa_cp.study.neighbours import neighbour_agreement
from nsa_cp.study.task import Batch, Group

# Number of queries per layer whose dense attention is computed, and of sequences over which neighbours are compared.
_NUM_QUERIES, _NUM_SEQUENCES = 128, 4


@dataclass
class AttentionCall:
    """What one layer's attention was given and chose on one batch: q [T, N, Dk], k and v by branch, gates [T, N or 1, 3], blocks
    [T, G, n]."""

    q: torch.Tensor
    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    gates: torch.Tensor
    blocks: torch.Tensor


def gate_means(model: Decoder) -> list[list[float]]:
    """For each layer with native sparse attention the mean gates (compressed, selected, window) of the last forward."""
    names = ("gate_compressed", "gate_selected", "gate_window")
    metrics = [each.core.last_metrics for each in model.attentions if each.core is not None and not each.is_dense]
    return [[round(float(each[name]), 4) for name in names] for each in metrics]


@torch.no_grad()
def probe(model: Decoder, group: Group, dtype: torch.dtype) -> dict[str, list[Any]]:
    """Figures with one value for each layer, measured on the first batch of ``group``; empty for a model without NSA layers.

    Returns:
        ``gates``: means (compressed, selected, window). The others only with a selected branch. ``agreement``: see
        :func:`neighbour_agreement`. ``recall``: when m blocks are chosen freely, the fraction of them that are among the m free
        blocks with the most weight under dense attention with the selected branch's own queries and keys. ``mass``: the share of
        that dense attention's weight in the chosen blocks, forced ones included. Recall and mass are means over a sample of the
        queries whose predictions count and that have more blocks than they may choose; left out if there are none.
    """
    layers = [attention for attention in model.attentions if attention.core is not None]
    if not layers:
        return {}
    batch = group.batches[0]
    calls = attention_calls(model, batch, group.layout, dtype)
    found: dict[str, list[Any]] = {"gates": gate_means(model)}
    if layers[0].settings.selection == "none":
        return found
    config = layers[0].settings.nsa
    found["agreement"] = [round(_agreement(call.blocks, group.layout, config), 4) for call in calls]
    rows = _probe_rows(batch, group.layout, config)
    if len(rows):
        hits = [_block_recall(call, layer, group.layout, rows) for call, layer in zip(calls, layers, strict=True)]
        found["recall"], found["mass"] = [round(r, 4) for r, _ in hits], [round(m, 4) for _, m in hits]
    return found


@torch.no_grad()
def attention_calls(model: Decoder, batch: Batch, layout: SequenceLayout, dtype: torch.dtype) -> list[AttentionCall]:
    """What each layer's native sparse attention was given and chose, on one batch."""
    device = model.embedding.weight.device
    cores = [attention.core for attention in model.attentions if attention.core is not None]
    with _recording(cores) as inputs, mixed_precision(device, dtype):
        model(torch.from_numpy(batch.tokens).to(device), layout)
        return [
            AttentionCall(q, tuple(k), tuple(v), core.last_gates, core.last_selection)
            for core, (q, k, v, *_) in zip(cores, inputs, strict=True)
        ]


@contextmanager
def _recording(cores: list[torch.nn.Module]) -> Iterator[list[tuple[Any, ...]]]:
    """Collect the arguments of each core's calls, in order, and let the cores keep their selections meanwhile."""
    seen: list[tuple[Any, ...]] = []
    hooks = [core.register_forward_pre_hook(lambda _, arguments: seen.append(arguments)) for core in cores]
    for core in cores:
        core.record_selection = True
    try:
        yield seen
    finally:
        for core, hook in zip(cores, hooks, strict=True):
            hook.remove()
            core.record_selection, core.last_selection, core.last_gates = False, None, None


def _agreement(blocks: torch.Tensor, layout: SequenceLayout, config: NSAConfig) -> float:
    """Mean agreement of neighbours over the first few sequences of a pack."""
    borders = layout.cu_seqlens[: _NUM_SEQUENCES + 1]
    return float(np.mean([neighbour_agreement(blocks[a:b], config) for a, b in zip(borders[:-1], borders[1:], strict=True)]))


def _probe_rows(batch: Batch, layout: SequenceLayout, config: NSAConfig) -> np.ndarray:
    """A sample, evenly spread, of rows that count and have more blocks before them than they may choose."""
    rows = batch.rows[layout.local_positions[batch.rows] >= config.num_selected_blocks * config.select_block_size]
    return rows[np.linspace(0, len(rows) - 1, min(_NUM_QUERIES, len(rows))).astype(np.int64)]


def _block_recall(call: AttentionCall, layer: SelfAttention, layout: SequenceLayout, rows: np.ndarray) -> tuple[float, float]:
    """Means of recall and mass over the query rows, see :func:`probe`."""
    config, rotary = layer.settings.nsa, layer.settings.rotary
    tables = rotary_tables(get_layout_plan(layout, call.q.device).position, rotary, call.q.shape[-1])
    q, k = apply_rope(call.q.float(), *tables), apply_rope(call.k[1 % len(call.k)].float(), *tables)
    recalls, masses = [], []
    for row in rows.tolist():
        start, position = int(layout.local_document_starts[row]), int(layout.local_positions[row])
        mass = dense_block_mass(q[row], k[start : row + 1], config.select_block_size)
        chosen = torch.zeros_like(mass, dtype=torch.bool)
        for group, blocks in enumerate(call.blocks[row]):
            chosen[group, blocks[blocks >= 0].long()] = True
        block, own = torch.arange(mass.shape[1], device=mass.device), position // config.select_block_size
        free = (block >= config.num_init_blocks) & (block <= own - config.num_local_blocks)
        count = int((chosen[0] & free).sum())
        masses.append((mass * chosen).sum(1).mean())
        if count:
            best = mass.masked_fill(~free, -1.0).topk(count, dim=1).indices
            recalls.append(chosen.gather(1, best).float().mean())
    return float(torch.stack(recalls).mean()) if recalls else float("nan"), float(torch.stack(masses).mean())


def dense_block_mass(q: torch.Tensor, k: torch.Tensor, block_size: int) -> torch.Tensor:
    """The weight that dense attention of one query puts on each block, averaged over the heads of a group: [G, blocks].

    Args:
        q: [N, D]. k: [tokens, G, D], all that the query sees.
    """
    groups = k.shape[1]
    scores = torch.einsum("ghd,sgd->ghs", q.view(groups, -1, q.shape[-1]), k) * q.shape[-1] ** -0.5
    weight = scores.softmax(-1).mean(1)
    return torch.nn.functional.pad(weight, (0, -len(k) % block_size)).unflatten(1, (-1, block_size)).sum(-1)


def save_selections(model: Decoder, group: Group, dtype: torch.dtype, path: Path, origin: dict[str, Any]) -> None:
    """Write one layer's trained attention on one sequence, as input for the attention benchmark (``--inputs trained``).

    The file is a dictionary written by ``torch.save``; read it with ``torch.load(path, weights_only=True)``. All tensors are on
    the CPU, for the S tokens of the first sequence of ``group``, the middle layer, its first group (G = 1) and that group's N
    heads.

    - ``q`` [S, N, Dk], ``k`` and ``v``: tuples of [S, 1, Dk] and [S, 1, Dv], in the branch order compressed, selected, window,
      or of one with ``shared_kv``; in the precision of training (bfloat16 on CUDA), **not rotated**;
    - ``gates`` [S, N, 3] (or [S, 1, 3] with one gate for all heads), after the sigmoid;
    - ``k_weights``, ``v_weights``: the compressors' parameters, float32, tuples in the order that ``compress`` takes;
    - ``config``: the fields of NSAConfig; ``rotary``: those of RotaryConfig: without it the selections are other ones;
    - ``agreement``: of the selections made, see :func:`neighbour_agreement`;
    - ``origin``: study, arm, learning rate, seed and run.
    """
    layers = [attention for attention in model.attentions if attention.core is not None]
    layer, call = len(layers) // 2, attention_calls(model, group.batches[0], group.layout, dtype)[len(layers) // 2]
    settings, length = layers[layer].settings, group.layout.cu_seqlens[1]
    heads = settings.num_attention_heads // settings.num_query_groups

    def own(x: torch.Tensor, count: int) -> torch.Tensor:
        return x[:length, :count].detach().cpu().clone()

    core = layers[layer].core
    content = {
        "q": own(call.q, heads),
        "k": tuple(own(x, 1) for x in call.k),
        "v": tuple(own(x, 1) for x in call.v),
        "gates": own(call.gates, heads),
        "k_weights": tuple(w[:1].detach().cpu().clone() for w in core.k_compressor.weights),
        "v_weights": tuple(w[:1].detach().cpu().clone() for w in core.v_compressor.weights),
        "config": asdict(settings.nsa),
        "rotary": asdict(settings.rotary),
        "agreement": neighbour_agreement(call.blocks[:length, :1], settings.nsa),
        "origin": origin,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
