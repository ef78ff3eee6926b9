"""The torch stages against the oracle in float64: outputs, lse, choices and every gradient, over drawn configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_cp import reference
from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.ops import (
    combine_branches,
    compress_kv,
    compressed_attention,
    dispatch,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_cp.ops.compression import compress, initial_compressor_weights
from nsa_cp.testing import assert_close
from nsa_cp.testing.cases import make_problem, solve

SMALL = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=11, backend="torch"
)
PACKED = (0, 0, 1, 8, 15, 60, 68)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, so that even these sizes run in several."""
    monkeypatch.setattr(dispatch, "CPU_CHUNK", 4096)


@st.composite
def configurations(draw: st.DrawFn) -> tuple[NSAConfig, list[int], dict]:
    """Settings, documents and widths, all small, many of them awkward."""
    stride = draw(st.sampled_from([1, 2, 4]))
    block = stride * draw(st.integers(1, 3))
    select = stride * draw(st.integers(-(-block // stride), 6))
    init, local = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    config = NSAConfig(
        compress_block_size=block,
        compress_stride=stride,
        select_block_size=select,
        num_selected_blocks=init + local + draw(st.integers(0, 4)),
        num_init_blocks=init,
        num_local_blocks=local,
        window_size=draw(st.integers(0, 30)),
        compressor=draw(st.sampled_from(["mlp", "linear", "mean"])),
        shared_kv=draw(st.booleans()),
        compressed_rope=draw(st.sampled_from(["after", "before"])),
        gate=draw(st.sampled_from(["head", "branch"])),
        backend="torch",
    )
    interesting = st.sampled_from([0, 1, block - 1, block, select, select + 1])
    lengths = draw(st.lists(st.one_of(st.integers(0, 70), interesting), min_size=1, max_size=4).filter(any))
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    groups = draw(st.sampled_from([1, 2, 3]))
    widths = {
        "num_groups": groups,
        "num_heads": groups * draw(st.sampled_from([1, 2, 5])),
        "qk_dim": draw(st.sampled_from([4, 6, 8])),
        "v_dim": draw(st.sampled_from([1, 4, 8])),
        "rotary": draw(st.sampled_from([None, RotaryConfig(), RotaryConfig(base=100.0, percent=0.5)])),
        "seed": draw(st.integers(0, 1000)),
    }
    return config, borders, widths


@given(drawn=configurations())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_whole_equals_the_oracle(drawn: tuple[NSAConfig, list[int], dict]) -> None:
    config, borders, widths = drawn
    problem = make_problem(config, borders, **widths)
    actual, expected = solve(problem), solve(problem, reference.reference_native_sparse_attention)
    assert torch.equal(actual["blocks"], expected["blocks"])
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def _stages(problem) -> dict[str, tuple]:  # noqa: ANN001
    """Each stage with its oracle, as functions of tensors that take gradients."""
    config, borders = problem.config, problem.cu_seqlens
    q, k, v = problem.q, problem.k[0], problem.v[0]
    k_cmp, v_cmp = compress_kv(k, v, problem.k_weights, problem.v_weights, config, borders)
    blocks = select_blocks(q, k_cmp, config, borders)
    assert torch.equal(blocks, reference.reference_select_blocks(q, k_cmp, config, borders))
    outs = [torch.randn_like(problem.grad) for _ in range(3)]
    count = len(problem.k_weights)
    return {
        "compress_kv": (
            lambda k, v, *w: compress_kv(k, v, w[:count], w[count:], config, borders, RotaryConfig()),
            lambda k, v, *w: (
                reference.reference_compress(k, w[:count], config, borders, RotaryConfig()),
                reference.reference_compress(v, w[count:], config, borders),
            ),
            [k, v, *problem.k_weights, *problem.v_weights],
        ),
        "compressed_attention": (
            lambda *x: compressed_attention(*x, config, borders),
            lambda *x: reference.reference_compressed_attention(*x, config, borders),
            [q, k_cmp, v_cmp],
        ),
        "selected_attention": (
            lambda *x: selected_attention(*x, blocks, config, borders),
            lambda *x: reference.reference_selected_attention(*x, blocks, config, borders),
            [q, k, v],
        ),
        "window_attention": (
            lambda *x: window_attention(*x, config, borders),
            lambda *x: reference.reference_window_attention(*x, config, borders),
            [q, k, v],
        ),
        "combine_branches": (
            lambda gates, *outs: (combine_branches(outs, gates),),
            lambda gates, *outs: (reference.reference_combine(outs, gates),),
            [problem.gates, *outs],
        ),
    }


STAGES = ("compress_kv", "compressed_attention", "selected_attention", "window_attention", "combine_branches")


@pytest.mark.parametrize("compressor", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_equals_its_oracle_lse_gradient_included(stage: str, compressor: str) -> None:
    problem = make_problem(replace(SMALL, compressor=compressor, shared_kv=True), PACKED, num_heads=6)
    ours, oracle, inputs = _stages(problem)[stage]
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs, expected = ours(*inputs), oracle(*inputs)
    upstream = [torch.randn_like(x) for x in expected]
    if stage.endswith("_attention"):
        # A row that sees nothing has lse -inf, through which no gradient can flow.
        upstream[1] = upstream[1].masked_fill(expected[1] == float("-inf"), 0.0)
    assert_close([x.detach() for x in outputs], [x.detach() for x in expected], rtol=1e-10, atol=1e-10)
    actual_gradients = torch.autograd.grad(outputs, inputs, upstream)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    assert_close(actual_gradients, expected_gradients, rtol=1e-10, atol=1e-10, name=stage)


@pytest.mark.parametrize("stage", STAGES)
def test_gradcheck_of_each_stage(stage: str) -> None:
    config = replace(SMALL, compress_block_size=4, compress_stride=2, select_block_size=4, window_size=5, shared_kv=True)
    problem = make_problem(config, (0, 3, 14), num_heads=2, num_groups=1, qk_dim=2, v_dim=3)
    ours, _, inputs = _stages(problem)[stage]
    # lse is -inf where nothing is seen, which numerical differences cannot take.
    values = lambda *x: ours(*x) if stage in ("compress_kv", "combine_branches") else ours(*x)[0]  # noqa: E731
    assert torch.autograd.gradcheck(values, [x.detach().requires_grad_() for x in inputs])


def test_gradcheck_of_the_whole() -> None:
    config = replace(SMALL, compress_block_size=4, compress_stride=2, select_block_size=4, window_size=5)
    problem = make_problem(config, (0, 3, 14), num_heads=2, num_groups=1, qk_dim=2, v_dim=3, rotary=RotaryConfig())
    blocks = solve(problem)["blocks"]
    tensors = [problem.q, *problem.k, *problem.v, problem.gates, *problem.k_weights, *problem.v_weights]

    def whole(q, *rest):  # noqa: ANN001, ANN202
        k, v, gates, weights = rest[:3], rest[3:6], rest[6], rest[7:]
        result = native_sparse_attention(
            q, k, v, gates, weights[:3], weights[3:], config, problem.cu_seqlens, problem.rotary, blocks=blocks
        )
        return result.out

    assert torch.autograd.gradcheck(whole, [x.detach().requires_grad_() for x in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_exact_as_its_inputs(dtype: torch.dtype) -> None:
    exact = make_problem(replace(SMALL, compressor="mean"), PACKED, dtype=dtype).to(torch.float64)
    rounded = exact.to(dtype)
    blocks = solve(exact)["blocks"]
    actual, expected = solve(rounded, blocks=blocks), solve(exact, blocks=blocks)
    # Compressed tokens, branch outputs and the result are each rounded once to the dtype.
    bound = 8 * torch.finfo(dtype).eps
    for name, value in expected.items():
        if name not in ("blocks",):
            assert_close(actual[name].double(), value, max_relative_error=bound, name=name)
    assert actual["out"].dtype == dtype and actual["lse_window"].dtype == torch.float32


@pytest.mark.parametrize("compressor", ["linear", "mlp"])
def test_compression_by_weights_of_another_dtype_is_in_the_inputs_dtype(compressor: str) -> None:
    """As the kernels do it: products' weights rounded to the inputs' dtype, one rounding at the end."""
    config, dtype = replace(SMALL, compressor=compressor), torch.bfloat16
    torch.manual_seed(1)
    x, starts = torch.randn(40, 2, 6).to(dtype), torch.arange(0, 33, 4, dtype=torch.int32)
    weights = [0.3 * torch.randn_like(w) for w in initial_compressor_weights(config, 2, 6)]
    exact = [weights[0].double(), *(w.to(dtype).double() for w in weights[1:])]
    out = compress(x, starts, tuple(w.requires_grad_() for w in weights), config)
    assert out.dtype == dtype
    assert_close(out.double(), compress(x.double(), starts, tuple(exact), config), max_relative_error=torch.finfo(dtype).eps)
    out.float().sum().backward()
    assert all(w.grad.dtype == torch.float32 and w.grad.abs().max() > 0 for w in weights)


def test_autocast_changes_no_bit() -> None:
    problem = make_problem(SMALL, PACKED, dtype=torch.float32)
    expected = solve(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = solve(problem)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("loss", [torch.Tensor.sum, lambda out: out.square().sum()])
def test_a_second_derivative_is_refused(loss: Callable) -> None:
    """Also where the incoming gradient is a constant: a penalty on ours would otherwise be dropped without a word."""
    problem = make_problem(SMALL, (0, 40))
    q = problem.q.requires_grad_()
    out, _ = window_attention(q, problem.k[0], problem.v[0], SMALL)
    (gradient,) = torch.autograd.grad(loss(out), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (loss(out) + gradient.square().sum()).backward()
    (again,) = torch.autograd.grad(loss(window_attention(q, problem.k[0], problem.v[0], SMALL)[0]), q)
    assert torch.equal(gradient, again)


def test_two_runs_are_bitwise_equal() -> None:
    problem = make_problem(SMALL, PACKED, dtype=torch.float32)
    first, second = solve(problem), solve(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_memory_is_linear() -> None:
    """No tensor of the forward or backward has more elements than a fixed multiple of the longest input."""
    largest: dict[int, int] = {}

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    largest[tokens] = max(largest.get(tokens, 0), x.numel())
            return result

    for tokens in (1024, 2048):
        problem = make_problem(SMALL, (0, tokens), num_heads=2, num_groups=1, qk_dim=8, v_dim=8, dtype=torch.float32)
        with Largest():
            solve(problem)
    assert largest[2048] <= 2.1 * largest[1024]
    assert largest[2048] < 2048 * 2048 // SMALL.compress_stride


def test_an_injected_selection_of_another_shape_is_refused() -> None:
    problem = make_problem(SMALL, PACKED)
    blocks = solve(problem)["blocks"]
    for wrong in (blocks[:, :1], blocks[:-1], blocks.long()):
        with pytest.raises(ValueError, match="blocks are"):
            solve(problem, blocks=wrong)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_that_cannot_run_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = make_problem(SMALL, (0, 32), dtype=torch.float32)
    q, k, v = problem.q, problem.k[0], problem.v[0]
    with pytest.raises(ValueError, match=f"backend = '{backend}'"):
        window_attention(q, k, v, SMALL, backend=backend)


def test_the_interpreter_is_not_trusted_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(4, 2, 16)
    assert dispatch.resolve_backend("auto", x) == "triton" and dispatch.resolve_backend("auto", x.bfloat16()) == "torch"
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly; use backend = 'auto' or 'torch'"):
        dispatch.resolve_backend("triton", x.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, q=p.q[:-1]), "q has 67 rows"),
        (lambda p: replace(p, q=p.q[..., :-1]), "q has 15 channels and k 16"),
        (lambda p: replace(p, q=p.q[:, :3]), "3 query heads are not a multiple of 2 groups"),
        (lambda p: replace(p, k=p.k[:1], v=p.v[:1]), "shared_kv = False takes 3"),
        (lambda p: replace(p, gates=p.gates[..., :2]), "gates"),
        (lambda p: replace(p, v=tuple(x.float() for x in p.v)), "v is torch.float32"),
        (lambda p: replace(p, cu_seqlens=(0, 60)), "60"),
        (lambda p: replace(p, v=(p.v[0], p.v[1][..., :-1], p.v[2])), "branches differ"),
        (lambda p: replace(p, k_weights=p.k_weights[:2]), "k_weights of shapes .* do not fit compressor = 'mlp'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message: str) -> None:  # noqa: ANN001
    problem = change(make_problem(SMALL, PACKED))
    with pytest.raises(ValueError, match=message):
        solve(problem)


_STAGE_CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=3, num_local_blocks=1, compressor="linear"
)


def _stage_inputs(num_tokens: int = 24) -> dict[str, Any]:
    """Inputs of every stage: 4 heads in 2 groups of 16 channels."""
    torch.manual_seed(5)
    make = lambda heads: torch.randn(num_tokens, heads, 16)  # noqa: E731
    weights = initial_compressor_weights(_STAGE_CONFIG, 2, 16)
    q, k, v, out = make(4), make(2), make(2), make(4)
    k_cmp, _ = compress_kv(k, v, weights, weights, _STAGE_CONFIG)
    blocks = select_blocks(q, k_cmp, _STAGE_CONFIG)
    return {"q": q, "k": k, "v": v, "out": out, "k_cmp": k_cmp, "w": weights, "blocks": blocks}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: selected_attention(x["q"], x["k"], x["v"], x["blocks"][:, :1], _STAGE_CONFIG), r"\(24, 1, 3\).*\(24, 2, 3\)"),
        (lambda x: selected_attention(x["q"], x["k"], x["v"], x["blocks"][..., 0], _STAGE_CONFIG), r"\(24, 2\).*\(24, 2, 3\)"),
        (lambda x: selected_attention(x["q"], x["k"], x["v"], x["blocks"].long(), _STAGE_CONFIG), "int64.*give torch.int32"),
        (lambda x: select_blocks(x["q"], x["k_cmp"], _STAGE_CONFIG, lse=torch.zeros(24, 1)), r"lse \(24, 1\).* 24 tokens of 4"),
        (lambda x: compress_kv(x["k"], x["v"], (), x["w"], _STAGE_CONFIG), "k_weights of shapes"),
        (lambda x: compress_kv(x["k"], x["v"], x["w"], tuple(w[:1] for w in x["w"]), _STAGE_CONFIG), "v_weights of shapes"),
        (lambda x: compress_kv(x["k"], x["v"][:, :1], x["w"], x["w"], _STAGE_CONFIG), "with equal groups"),
        (lambda x: combine_branches([x["out"], x["out"][..., :1]], torch.rand(24, 4, 2)), r"outs\[1\] is \(24, 4, 1\)"),
        (lambda x: combine_branches([x["out"], x["out"][:, :1]], torch.rand(24, 4, 2)), r"outs\[1\] is \(24, 1, 16\)"),
        (lambda x: window_attention(*(x[n].long() for n in "qkv"), _STAGE_CONFIG), "q is torch.int64; .*must be floating-point"),
        (lambda x: window_attention(x["q"], x["k"][:, :0], x["v"][:, :0], _STAGE_CONFIG), "4 query heads .* 0 groups"),
    ],
)  # fmt: skip
def test_stages_refuse_what_does_not_fit(call, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        call(_stage_inputs())
