"""The layer-facing attentions: NSA module, dense and sliding window, against the oracle and across context-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from nsa_cp import reference
from nsa_cp.attention import (
    NativeSparseAttention,
    full_attention,
    sliding_window_attention,
    without_selected,
)
from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.testing import assert_close
from nsa_cp.testing.cases import join_shards

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=11, backend="torch"
)
ROTARY = RotaryConfig()
PACKED = (0, 0, 1, 8, 15, 60, 69)
WINDOW = 13


def full(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, group: dist.ProcessGroup | None
) -> torch.Tensor:
    return full_attention(q, k, v, layout, rotary=ROTARY, cp_group=group)


def window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, group: dist.ProcessGroup | None
) -> torch.Tensor:
    return sliding_window_attention(q, k, v, layout, window_size=WINDOW, rotary=ROTARY, cp_group=group)


def full_oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: tuple[int, ...]) -> torch.Tensor:
    return reference.reference_full_attention(q, k, v, borders)[0]


def window_oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: tuple[int, ...]) -> torch.Tensor:
    return reference.reference_window_attention(q, k, v, NSAConfig(window_size=WINDOW), borders)[0]


DENSE = {"full": (full, full_oracle), "window": (window, window_oracle)}


def _inputs(tokens: int) -> list[torch.Tensor]:
    torch.manual_seed(7)
    shapes = [(tokens, 4, 16), (tokens, 2, 16), (tokens, 2, 12), (tokens, 4, 12)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def _answers(attention: Callable, inputs: list[torch.Tensor], grad: torch.Tensor, *args: object) -> dict[str, torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(*inputs, *args)
    gradients = torch.autograd.grad(out, inputs, grad, materialize_grads=True)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


def _dense_on_rank(rank: int, world_size: int, name: str, kind: str, per_document: bool) -> dict[str, torch.Tensor]:
    layout = SequenceLayout.build(PACKED, cp_size=world_size, cp_rank=rank, kind=kind, per_document=per_document)
    *inputs, grad = map(layout.shard, _inputs(PACKED[-1]))
    return _answers(DENSE[name][0], inputs, grad, layout, dist.group.WORLD)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_dense_layers_equal_the_oracle_at_any_world_size(workers, world_size: int, name: str, kind: str) -> None:
    *inputs, grad = _inputs(PACKED[-1])
    borders = torch.tensor(PACKED)
    rows = torch.arange(PACKED[-1])
    positions = rows - borders[torch.searchsorted(borders[1:], rows, right=True)]

    def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rotated = (reference.reference_rope(x, positions, ROTARY) for x in (q, k))
        return DENSE[name][1](*rotated, v, PACKED)

    expected = _answers(oracle, inputs, grad)
    for per_document in (True, False):
        shards = workers(world_size).run(_dense_on_rank, name, kind, per_document)
        layout = SequenceLayout.build(PACKED, cp_size=world_size, kind=kind, per_document=per_document)
        assert_close(join_shards(shards, layout), expected, rtol=1e-10, atol=1e-10, name=f"{name} {kind}")


def _dense_with_empty_rank(rank: int, world_size: int, name: str) -> tuple[int, bool, list[bool]]:
    layout = SequenceLayout.build((0, 1, 2), cp_size=world_size, cp_rank=rank)
    *inputs, grad = map(layout.shard, _inputs(2))
    answers = _answers(DENSE[name][0], inputs, grad, layout, dist.group.WORLD)
    # All three must be in the graph: the weights that made them take part in collectives of their own.
    inputs = [x.requires_grad_() for x in inputs]
    DENSE[name][0](*inputs, layout, dist.group.WORLD).backward(grad)
    return len(answers["out"]), all(bool(x.isfinite().all()) for x in answers.values()), [x.grad is not None for x in inputs]


@pytest.mark.distributed
@pytest.mark.parametrize("name", DENSE)
def test_a_rank_without_rows_takes_part(workers, name: str) -> None:
    lengths, finite, reached = zip(*workers(2).run(_dense_with_empty_rank, name, timeout=60), strict=True)
    assert sorted(lengths) == [0, 2] and all(finite)
    assert reached == ([True] * 3,) * 2


def _refused_rank(rank: int, world_size: int, name: str) -> str:
    layout = SequenceLayout.build(64, cp_size=world_size, cp_rank=1 - rank)
    inputs = [x[: layout.num_local_tokens] for x in _inputs(64)[:3]]
    try:
        if name == "nsa":
            q, k, v, logits = _module_inputs(layout.num_local_tokens)
            _module(dist.group.WORLD)(q, k, v, logits, layout)
        else:
            DENSE[name][0](*inputs, layout, dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*DENSE, "nsa"])
def test_a_layout_of_another_rank_is_refused(workers, name: str) -> None:
    for rank, message in enumerate(workers(2).run(_refused_rank, name, timeout=60)):
        assert f"describes rank {1 - rank}, this process is rank {rank} of the group" in message


def _module(group: dist.ProcessGroup | None = None, config: NSAConfig = CONFIG, **changes: object) -> NativeSparseAttention:
    generator = torch.Generator().manual_seed(3)
    return NativeSparseAttention(
        config, num_attention_heads=4, num_query_groups=2, qk_dim=16, v_dim=12, rotary=ROTARY, cp_group=group,
        generator=generator, dtype=torch.float64, **changes,
    )  # fmt: skip


def _module_inputs(tokens: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(11)
    make = lambda heads, dim: torch.randn(tokens, heads, dim, dtype=torch.float64)  # noqa: E731
    return make(4, 16), [make(2, 16) for _ in range(3)], [make(2, 12) for _ in range(3)], make(4, 3)


def _module_on_rank(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    layout = SequenceLayout.build(96, cp_size=world_size, cp_rank=rank)
    module = _module(dist.group.WORLD)
    module.record_selection = True
    q, k, v, logits = _module_inputs(96)
    out = module(layout.shard(q), list(map(layout.shard, k)), list(map(layout.shard, v)), layout.shard(logits), layout)
    return out.detach(), module.last_selection, {name: float(value) for name, value in module.last_metrics.items()}


@pytest.mark.distributed
def test_module_equals_the_oracle_and_counts_remote_blocks(workers) -> None:
    q, k, v, logits = _module_inputs(96)
    module = _module()
    expected = reference.reference_native_sparse_attention(
        q, tuple(k), tuple(v), logits.sigmoid(), module.k_compressor.weights, module.v_compressor.weights, CONFIG, rotary=ROTARY
    )
    alone = module(q, k, v, logits, SequenceLayout.build(96))
    assert_close(alone.detach(), expected.out.detach(), atol=1e-10)
    assert float(module.last_metrics["remote_block_fraction"]) == 0.0

    results = workers(2).run(_module_on_rank)
    layouts = [SequenceLayout.build(96, cp_size=2, cp_rank=rank) for rank in range(2)]
    assert_close(layouts[0].unshard([result[0] for result in results]), expected.out.detach(), atol=1e-10)
    assert torch.equal(layouts[0].unshard([result[1] for result in results]), expected.blocks)
    for layout, (_, selection, metrics) in zip(layouts, results, strict=True):
        own = set(layout.local_rows.tolist())
        chosen = selection[selection >= 0].tolist()
        remote = sum(not set(range(block * 8, block * 8 + 8)) <= own for block in chosen)
        assert metrics["remote_block_fraction"] == pytest.approx(remote / len(chosen))
        assert metrics["gate_window"] == pytest.approx(float(layout.shard(logits).sigmoid()[..., 2].mean()), rel=1e-6)


def test_a_gate_temperature_divides_the_logits() -> None:
    """In the output and in the logits' gradient."""
    q, k, v, logits = _module_inputs(96)
    layout = SequenceLayout.build(96)

    def answers(temperature: float, logits: torch.Tensor, divisor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.clone().requires_grad_()
        out = _module(config=replace(CONFIG, gate_temperature=temperature))(q, k, v, logits / divisor, layout)
        return out.detach(), torch.autograd.grad(out.square().sum(), logits)[0]

    for ours, expected in zip(answers(10.0, logits), answers(1.0, logits, divisor=10.0), strict=True):
        assert torch.equal(ours, expected)
    expected = reference.reference_native_sparse_attention(
        q, tuple(k), tuple(v), (logits / 10).sigmoid(), *_compressor_weights(), CONFIG, rotary=ROTARY
    )
    assert_close(answers(10.0, logits)[0], expected.out.detach(), atol=1e-10)
    assert (answers(10.0, logits)[0] - answers(1.0, logits)[0]).abs().max() > 0.1
    closed = without_selected(logits)
    assert torch.equal(answers(10.0, closed)[1][..., 1], torch.zeros_like(logits[..., 1]))


def test_branches_may_come_stacked_in_one_tensor() -> None:
    module, layout = _module(), SequenceLayout.build(96)
    q, k, v, logits = _module_inputs(96)
    assert torch.equal(module(q, torch.stack(k), torch.stack(v), logits, layout), module(q, k, v, logits, layout))


@pytest.mark.parametrize("documents", [0, [0, 0]])
def test_a_pack_without_tokens(documents: int | list[int]) -> None:
    """Values and gradients are empty, and weights get gradients of zero, not none: other ranks may have tokens."""
    module, layout = _module(), SequenceLayout.build(documents)
    q, k, v, logits = _module_inputs(0)
    leaves = [x.requires_grad_() for x in (q, *k, *v, logits)]
    out = module(q, k, v, logits, layout)
    dense = full_attention(q, k[0], v[0], layout) + sliding_window_attention(q, k[0], v[0], layout, window_size=3)
    assert out.shape == dense.shape == (0, 4, 12)
    (out + dense).sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)
    assert all(weight.grad is not None and not weight.grad.any() for weight in module.parameters())


def _compressor_weights() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    module = _module()
    return module.k_compressor.weights, module.v_compressor.weights


def test_gradients_reach_every_compressor_parameter() -> None:
    module = _module()
    q, k, v, logits = _module_inputs(96)
    module(q, k, v, logits, SequenceLayout.build(96)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert set(gradients) == {f"{x}_compressor.{name}" for x in "kv" for name in ("position", "w1", "w2")}
    # With w2 = 0 at the start only w2 feels a gradient: phi is exactly the block mean.
    assert all(
        (gradient is not None and (gradient.abs().max() > 0) == name.endswith("w2")) for name, gradient in gradients.items()
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NativeSparseAttention(CONFIG, num_attention_heads=5, num_query_groups=2, qk_dim=8), "5 is not"),
        (lambda: NativeSparseAttention(CONFIG, num_attention_heads=4, num_query_groups=2, qk_dim=0), "at least 1 channel"),
        (lambda: _module()(*_module_inputs(24), None), r"layout is NoneType, .*SequenceLayout.build\(S\)"),
        (lambda: _module()(*_module_inputs(24), [0, 24]), r"layout is list, .*SequenceLayout.build\(\[0, ..., S\]\)"),
        (lambda: window(*_inputs(24)[:3], 24, None), "layout is int, not SequenceLayout"),
        (lambda: _module()(*_inputs(24), SequenceLayout.build(24)), "takes 3 key and value tensors, got a tensor"),
        (
            lambda: NativeSparseAttention(
                CONFIG, num_attention_heads=4, num_query_groups=2, qk_dim=16, rotary=RotaryConfig(percent=0.1)
            ),
            "percent = 0.1 of 16 channels rotates none",
        ),
        (
            lambda: full_attention(*_inputs(24)[:3], SequenceLayout.build(24), rotary=RotaryConfig(percent=0.1)),
            "percent = 0.1 of 16 channels rotates none",
        ),
        (lambda: RotaryConfig(base=float("nan")), "rotary base = nan must be positive"),
        (lambda: window(*_inputs(20)[:3], SequenceLayout.build(24), None), "20 rows.* 24"),
        (lambda: full(*_inputs(24)[:3], SequenceLayout.build(48, cp_size=2), None), "cut for 2 ranks, the process group has 1"),
        (lambda: sliding_window_attention(*_inputs(8)[:3], SequenceLayout.build(8), window_size=0), "window_size = 0"),
    ],
)
def test_refusals(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("k", (4, 16), "k has 4 groups of 16"), ("k", (2, 12), "k has 2 groups of 12"), ("v", (2, 16), "v has 2 groups of 16 ch")],
)
def test_groups_and_widths_other_than_those_the_module_was_made_for(name: str, shape: tuple[int, int], message: str) -> None:
    q, k, v, logits = _module_inputs(24)
    (k if name == "k" else v)[1] = torch.zeros(24, *shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{message}.* made for num_query_groups = 2 of"):
        _module()(q, k, v, logits, SequenceLayout.build(24))


def test_heads_other_than_those_the_module_was_made_for() -> None:
    config = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=3, window_size=16)
    module = NativeSparseAttention(config, num_attention_heads=8, num_query_groups=2, qk_dim=8)
    q, k = torch.randn(64, 4, 8), [torch.randn(64, 2, 8)] * 3
    with pytest.raises(ValueError, match="q has 4 heads; this module was made for num_attention_heads = 8"):
        module(q, k, k, torch.zeros(64, 4, 3), SequenceLayout.build(64))
    with pytest.raises(ValueError, match="8 is not a positive multiple of num_query_groups = 0"):
        NativeSparseAttention(config, num_attention_heads=8, num_query_groups=0, qk_dim=8)


def test_activation_checkpoints_change_no_bit() -> None:
    module, layout = _module(), SequenceLayout.build(96)
    torch.nn.init.normal_(module.k_compressor.w2)
    q, k, v, logits = _module_inputs(96)
    leaf = q.requires_grad_()
    leaves = (leaf, *module.parameters())
    plain = torch.autograd.grad(module(leaf, k, v, logits, layout).square().sum(), leaves)
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    out = checkpoint(module, leaf, k, v, logits, layout, use_reentrant=False)
    for expected, actual in zip(plain, torch.autograd.grad(out.square().sum(), leaves), strict=True):
        assert torch.equal(actual, expected)
    assert len(calls) == 2


def test_a_compiled_model_calls_the_attention_as_it_is() -> None:
    """``torch.compile``: the same values and gradients, nothing compiled anew for a third length (a second makes sizes free)."""
    module, graphs, counts = _module(), [], []

    def step(q: torch.Tensor, k: list[torch.Tensor], v: list[torch.Tensor], logits: torch.Tensor, layout: SequenceLayout):
        return module(q.sin(), k, v, logits, layout).cos().sum()

    def run_as_it_is(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, backend=run_as_it_is)
    for tokens in (96, 80, 57):
        inputs, layout = _module_inputs(tokens), SequenceLayout.build(tokens)
        leaf = inputs[0].requires_grad_()
        actual = compiled(*inputs, layout)
        expected = step(*inputs, layout)
        assert torch.equal(actual, expected)
        assert torch.equal(torch.autograd.grad(actual, leaf)[0], torch.autograd.grad(expected, leaf)[0])
        counts.append(len(graphs))
    # Before the attention and behind it.
    assert counts == [2, 4, 4]
