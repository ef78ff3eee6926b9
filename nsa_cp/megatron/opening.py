"""Opens NSA's selected branch late in training, once the compressed branch has learned to rank blocks. See docs/training.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import Module

from nsa_cp.megatron.self_attention import NSASelfAttention


def close_selected_branches(chunks: Iterable[Module]) -> None:
    """Close the selected branch of all NSA layers: its gate is exactly 0 until :func:`open_selected_branches`.

    Checkpoints do not record this: after loading one from a time when the branch was closed, call this again.

    Args:
        chunks: this process's model chunks, wrapped or not.
    """
    for layer in _layers(chunks):
        layer.close_selected()


@torch.no_grad()
def open_selected_branches(chunks: Sequence[Module], optimizer: Any) -> None:
    """Open all selected branches that are closed. Call it on every process, between two optimizer steps.

    Unless branches share K/V, the selected branch's key and value projections become copies of the window's, and the optimizer's
    main weights follow. Adam's moments stay as they are: 0 for projections that have had no gradient.

    Args:
        chunks: this process's model chunks; give them wrapped in Megatron's DDP if that uses ``overlap_param_gather``.
        optimizer: Megatron's optimizer of these chunks.

    Raises:
        ValueError: an optimizer that cannot take over weights from the model, or no window to take them from; nothing has been
            opened then.
    """
    closed = [layer for layer in _layers(chunks) if not layer.selected_is_open]
    if not closed:
        return
    copies = not closed[0].settings.nsa.shared_kv
    if copies and closed[0].settings.nsa.window_size == 0:
        raise ValueError(
            "the selected branch opens with the window's keys and values, but window_size = 0 leaves those untrained; use "
            "shared_kv=True or a window of at least 1"
        )
    if copies and getattr(optimizer.config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False):
        raise ValueError(
            "use_precision_aware_optimizer=True keeps main weights that would overwrite what the selected branch begins with; "
            "train with use_precision_aware_optimizer=False or with NSAConfig(shared_kv=True)"
        )
    if copies:
        _await_parameters(chunks)
    for layer in closed:
        layer.open_selected()
    if copies:
        _reload_main_weights(optimizer, closed[0].linear_qkv.weight.dtype)


def _layers(chunks: Iterable[Module]) -> list[NSASelfAttention]:
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, NSASelfAttention)]


def _await_parameters(chunks: Iterable[Module]) -> None:
    """Under DDP's ``overlap_param_gather`` other ranks' parts of the last step's weights arrive only with the next forward."""
    for chunk in chunks:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            chunk.start_param_sync(force_sync=True)


def _reload_main_weights(optimizer: Any, dtype: torch.dtype) -> None:
    """Make float32 main weights follow the model's weights of ``dtype``, but only where the latter have changed.

    Megatron's ``reload_model_params`` overwrites all of them, and so drops the bits that do not fit in ``dtype``. The old values
    wait in host memory, of which there is more.
    """
    mains = [main for group in optimizer.param_groups for main in group["params"] if main.dtype != dtype]
    before = [main.to("cpu", copy=True) for main in mains]
    optimizer.reload_model_params()
    for main, on_host in zip(mains, before, strict=True):
        finer = on_host.to(main.device)
        main.copy_(torch.where(main.to(dtype) == finer.to(dtype), finer, main))
