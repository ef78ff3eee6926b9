"""``SelectionMemory`` in plain PyTorch: torch's own checkpoint, nested runs, failed runs, threads."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nsa_cp.attention import NativeSparseAttention
from nsa_cp.config import NSAConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops import pipeline
from nsa_cp.ops.recompute import SelectionMemory, recall_selection, remember_selection, selection_contexts

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=3, window_size=12, backend="torch"
)


def test_torchs_checkpoint_chooses_once_and_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    module = NativeSparseAttention(
        CONFIG, num_attention_heads=4, num_query_groups=2, qk_dim=8, generator=generator, dtype=torch.float64
    )
    layout = SequenceLayout.build(96)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k, v = ([normal(96, 2, 8) for _ in range(3)] for _ in range(2))
    gates, x = normal(96, 4, 3), normal(96, 4, 8).requires_grad_()

    def two_layers(q: torch.Tensor) -> torch.Tensor:
        return module(module(q, k, v, gates, layout), k, v, gates, layout)

    select = pipeline.select_blocks_forward
    with mock.patch.object(pipeline, "select_blocks_forward", side_effect=select) as calls:
        (expected,) = torch.autograd.grad(two_layers(x).square().sum(), x)
        assert calls.call_count == 2
        out = checkpoint(two_layers, x, use_reentrant=False, context_fn=selection_contexts).square().sum()
        assert calls.call_count == 4
        for _ in range(2):  # a graph that is kept is recomputed every time
            (gradient,) = torch.autograd.grad(out, x, retain_graph=True)
            assert torch.equal(gradient, expected)
        assert calls.call_count == 4
        (gradient,) = torch.autograd.grad(checkpoint(two_layers, x, use_reentrant=False).square().sum(), x)
        assert calls.call_count > 6, "without the contexts blocks are chosen again"


def _choose(number: int) -> int:
    """A layer: its blocks are ``number`` unless it is told others."""
    given = recall_selection()
    blocks = torch.tensor([number]) if given is None else given
    remember_selection(blocks)
    return int(blocks)


def test_nested_checkpoints_and_their_recomputation() -> None:
    outer = SelectionMemory()

    def run(first: int) -> list[int]:
        inner = SelectionMemory()
        chosen = [_choose(first)]
        with inner:
            chosen.append(_choose(first + 1))
        with inner:  # recomputed while the outer one still runs for the first time
            chosen.append(_choose(99))
        return [*chosen, _choose(first + 2)]

    assert _choose(5) == 5, "outside a checkpoint nothing is remembered"
    with outer:
        assert run(10) == [10, 11, 11, 12]
    for _ in range(2):
        with outer:
            assert run(50) == [10, 11, 11, 12]
    assert _choose(6) == 6


def test_a_run_that_failed_is_not_remembered() -> None:
    memory = SelectionMemory()
    with pytest.raises(RuntimeError), memory:
        _choose(1)
        raise RuntimeError
    with memory:
        assert _choose(2) == 2
    with memory:
        assert _choose(3) == 2


def test_threads_do_not_see_each_others_checkpoints() -> None:
    seen = []
    with SelectionMemory():
        _choose(1)
        thread = threading.Thread(target=lambda: seen.append(recall_selection()))
        thread.start()
        thread.join()
    assert seen == [None]
