"""Pictures of a run: its loss curve, and the blocks that one layer's queries attended to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from megatron.core import parallel_state

from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.training.data import SampleSource, collate
from nsa_cp.training.forward import run_logits
from nsa_cp.training.metrics import attention_modules
from nsa_cp.training.setup import Trainer

_BRANCHES = ("compressed", "selected", "window")
_MAX_RASTER = 1024


@dataclass(frozen=True)
class LayerChoices:
    """The blocks and gates of one layer on one sequence of S tokens.

    Attributes:
        layer: 1-based global number of the layer.
        selection: [S, n] int32, block indices chosen by one query group's queries, -1 for none.
        gates: [S, 3] float32, gates of compressed, selected and window branch, mean over this process's heads.
        config: the layer's settings.
    """

    layer: int
    selection: np.ndarray
    gates: np.ndarray
    config: NSAConfig


def collect_choices(trainer: Trainer, source: SampleSource) -> LayerChoices | None:
    """Run one validation sequence and gather the middle NSA layer's choices on the first process. Collective.

    Returns:
        The choices on global rank 0; None elsewhere, and everywhere for a model without NSA layers.
    """
    kinds = trainer.config.layer_kinds
    layers = [index + 1 for index, kind in enumerate(kinds) if kind == "nsa"]
    if not layers:
        return None
    layer = layers[len(layers) // 2]
    modules = {number: module for number, module in _numbered_attention(trainer).items() if number == layer}
    for module in modules.values():
        module.record_selection = True
    batch = collate([source.validation_sample(0)])
    run_logits(trainer, batch)
    shard = None
    shown = parallel_state.get_data_parallel_rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
    for module in modules.values():
        if shown and module.last_selection is not None and module.last_gates is not None:
            gates = module.last_gates.float().mean(1).cpu().numpy()
            shard = (_layout(trainer).local_rows, module.last_selection[:, 0].cpu().numpy(), gates)
        module.record_selection, module.last_selection, module.last_gates = False, None, None
    shards: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(shard, shards)
    if shards is None:
        return None
    return _assemble(layer, [item for item in shards if item is not None], trainer.config.nsa_config)


def _numbered_attention(trainer: Trainer) -> dict[int, Any]:
    """This process's NSA modules by the global number of their layer."""
    found = {}
    own = set(map(id, attention_modules(trainer)))
    for chunk in trainer.chunks:
        for layer in chunk.decoder.layers:
            core = getattr(layer.self_attention, "core_attention", None)
            if id(core) in own:
                found[layer.layer_number] = core
    return found


def _layout(trainer: Trainer) -> SequenceLayout:
    return SequenceLayout.build(
        trainer.config.data.sequence_length,
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        kind=trainer.config.nsa.layout,
    )


def _assemble(layer: int, shards: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], config: NSAConfig) -> LayerChoices:
    rows = np.concatenate([shard[0] for shard in shards])
    order = np.argsort(rows)
    assert np.array_equal(rows[order], np.arange(len(rows))), "the ranks' rows must cover the sequence once"
    selection = np.concatenate([shard[1] for shard in shards])[order]
    gates = np.concatenate([shard[2] for shard in shards])[order]
    return LayerChoices(layer, selection, gates, config)


def plot_choices(choices: LayerChoices, path: Path) -> None:
    """Write blocks.png: queries x blocks, coloured where a query attends to a block, above the mean gates over positions."""
    config, raster = choices.config, choice_raster(choices.selection, choices.config)
    figure, (top, bottom) = _figure(2, (9.0, 9.0), heights=(3, 1))
    extent = (0, raster.shape[0], raster.shape[1], 0)
    step = max(1, -(-raster.shape[0] // _MAX_RASTER))
    colours = ListedColormap(["#f4f4f4", "#a9b8c6", "#1f5fa8"])
    top.imshow(raster[::step].T, aspect="auto", interpolation="nearest", cmap=colours, extent=extent, vmin=0, vmax=2)
    top.set_title(
        f"Layer {choices.layer}, query group 0: up to {config.num_selected_blocks} blocks of "
        f"{config.select_block_size} tokens a query"
    )
    top.legend(
        handles=[Patch(color=colours(1), label="forced"), Patch(color=colours(2), label="chosen by score")], loc="lower left"
    )
    top.set_ylabel("block")
    positions = np.arange(len(choices.gates))
    width = max(1, len(positions) // 256)
    for index, name in enumerate(_BRANCHES):
        bottom.plot(_block_means(positions, width), _block_means(choices.gates[:, index], width), label=name, linewidth=1.2)
    bottom.set_ylim(0, 1)
    bottom.set_xlim(0, len(positions))
    bottom.set_xlabel("position of the query, tokens")
    bottom.set_ylabel("gate, mean over heads")
    bottom.legend(loc="upper right", ncols=3)
    _save(figure, path)


def choice_raster(selection: np.ndarray, config: NSAConfig) -> np.ndarray:
    """[S, n] block indices (-1 for none) as a raster [S, blocks]: 0 not attended, 1 a forced block, 2 chosen by its score."""
    raster = np.zeros((len(selection), config.num_select_blocks(len(selection))), dtype=np.uint8)
    query, slot = np.nonzero(selection >= 0)
    block = selection[query, slot]
    own = query // config.select_block_size
    forced = (block < config.num_init_blocks) | (block > own - config.num_local_blocks)
    raster[query, block] = np.where(forced, 1, 2)
    return raster


def _block_means(values: np.ndarray, width: int) -> np.ndarray:
    whole = len(values) // width * width
    return values[:whole].reshape(-1, width).mean(1)


def plot_loss(rows: Sequence[Mapping[str, Any]], unigram: float, bytes_per_token: float, path: Path) -> None:
    """Write loss.png: training and validation loss over steps in bits a byte, with the unigram entropy as a line.

    Args:
        rows: metrics, one mapping a step.
        unigram: entropy of single tokens, bits a byte.
        bytes_per_token: to turn training losses (nats a token) into bits a byte.
        path: of the PNG.
    """
    figure, (axes,) = _figure(1, (8.0, 5.0))
    steps = [row["step"] for row in rows]
    losses = [row["loss"] / math.log(2) / bytes_per_token for row in rows]
    axes.plot(steps, losses, linewidth=0.8, color="#8fb3d9", label="training, each step")
    window = max(1, len(losses) // 40)
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color="#1f5fa8", label=f"training, mean of {window} steps")
    validated = [(row["step"], row["val_bits_per_byte"]) for row in rows if "val_bits_per_byte" in row]
    if validated:
        axes.plot(*zip(*validated), "o-", color="#c0392b", label=f"validation, last {validated[-1][1]:.3f}")
    axes.axhline(unigram, color="#666666", linestyle="--", linewidth=1, label=f"unigram entropy {unigram:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _figure(rows: int, size: tuple[float, float], heights: Sequence[float] | None = None) -> tuple[Figure, Sequence[Any]]:
    # Figures are made without pyplot: no global state and no display is ever looked for.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, squeeze=False, gridspec_kw={"height_ratios": heights or [1] * rows})
    return figure, list(axes[:, 0])


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
