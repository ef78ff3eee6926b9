"""The Triton path beside the torch path on a GPU: errors against float64, choices, determinism, CUDA graphs, long addresses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.ops import compress_kv, native_sparse_attention, select_blocks
from nsa_cp.reference import reference_block_scores
from nsa_cp.testing import relative_error
from nsa_cp.testing.cases import AttentionProblem, make_problem, solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PAPER = NSAConfig(compressor="linear")
SHORT = NSAConfig(compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=8, window_size=96)
# name: settings, documents, heads, groups, Dk, Dv
CASES = {
    "paper": (PAPER, (0, 4097), 64, 4, 128, 128),
    "wide_keys": (replace(PAPER, compressor="mlp"), (0, 1500), 32, 2, 192, 128),
    "one_head_a_group": (SHORT, (0, 1000), 4, 4, 64, 64),
    "two_heads_a_group": (SHORT, (0, 777), 4, 2, 96, 64),
    "five_heads_a_group": (SHORT, (0, 1023), 10, 2, 64, 96),
    "eight_heads_a_group": (PAPER, (0, 2049), 32, 4, 128, 128),
    "many_heads_a_group": (SHORT, (0, 600), 32, 1, 64, 256),
    "packed": (replace(SHORT, shared_kv=True, gate="branch"), (0, 0, 1, 32, 63, 128, 193, 900, 1000), 16, 4, 64, 64),
    "large_blocks": (
        NSAConfig(select_block_size=128, num_selected_blocks=12, window_size=1024, compress_block_size=64),
        (0, 4097), 16, 1, 128, 128,
    ),
    "no_window": (replace(SHORT, window_size=0, num_selected_blocks=64), (0, 4097), 8, 2, 64, 64),
    **{f"{length}_tokens": (SHORT, (0, length), 16, 2, 64, 64) for length in (1, 31, 33, 63, 65)},
}  # fmt: skip


def _problem(name: str) -> AttentionProblem:
    config, documents, heads, groups, qk_dim, v_dim = CASES[name]
    problem = make_problem(
        config,
        documents,
        num_heads=heads,
        num_groups=groups,
        qk_dim=qk_dim,
        v_dim=v_dim,
        rotary=RotaryConfig(),
        dtype=torch.bfloat16,
    )
    return problem.to("cuda")


def _with_backend(problem: AttentionProblem, backend: str) -> AttentionProblem:
    return replace(problem, config=replace(problem.config, backend=backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_errors_are_at_most_twice_the_torch_paths(name: str, dtype: torch.dtype) -> None:
    problem = _problem(name).to(dtype)
    blocks = solve(_with_backend(problem, "triton"))["blocks"]
    exact = solve(_with_backend(problem.to(torch.float64), "torch"), blocks=blocks)
    torch_path = solve(_with_backend(problem, "torch"), blocks=blocks)
    triton_path = solve(_with_backend(problem, "triton"), blocks=blocks)
    for key, value in exact.items():
        if key == "blocks":
            continue
        bound = 2 * relative_error(torch_path[key], value) + 1e-6
        error = relative_error(triton_path[key], value)
        assert error <= bound, f"{name} {key}: error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_selections_differ_only_between_blocks_of_equal_score(name: str) -> None:
    problem = _problem(name)
    config, documents = problem.config, problem.cu_seqlens
    k_cmp, _ = compress_kv(problem.k[0], problem.v[0], problem.k_weights, problem.v_weights, config, documents, backend="torch")
    ours = select_blocks(problem.q, k_cmp, config, documents, backend="triton")
    q, k_cmp = problem.q.double(), k_cmp.double()
    exact = select_blocks(q, k_cmp, config, documents, backend="torch")
    scores = reference_block_scores(q, k_cmp, config, documents)
    assert torch.equal(ours >= 0, exact >= 0)
    chosen, best = (scores.gather(2, b.clamp(min=0).long()).masked_fill(b < 0, 0.0).sum(-1) for b in (ours, exact))
    # Float32 scores: what a choice loses against the best one is rounding.
    assert bool(((best - chosen) <= 1e-4 * best).all()), f"{name}: loses up to {float((best - chosen).max()):.1e}"
    assert (ours != exact).any(-1).float().mean() < 2e-3


def test_two_runs_are_bitwise_equal() -> None:
    problem = _with_backend(_problem("packed"), "triton")
    first, second = solve(problem), solve(problem)
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_forward_and_backward_in_a_cuda_graph() -> None:
    problem = _with_backend(_problem("eight_heads_a_group"), "triton")
    leaves = [
        x.requires_grad_() for x in (problem.q, *problem.k, *problem.v, problem.gates, *problem.k_weights, *problem.v_weights)
    ]

    def step() -> tuple[torch.Tensor, ...]:
        result = native_sparse_attention(
            problem.q, problem.k, problem.v, problem.gates, problem.k_weights, problem.v_weights, problem.config,
            rotary=problem.rotary,
        )  # fmt: skip
        return result.out, *torch.autograd.grad(result.out, leaves, problem.grad)

    # Detached: a graph kept alive would tie its leaves to the stream it was made on.
    expected = [x.detach().clone() for x in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(captured, expected, strict=True):
        assert torch.equal(x, y)


def test_more_elements_than_32_bits_address() -> None:
    """512k tokens x 64 heads x 128 channels; the last rows, at the highest addresses, against the torch path."""
    tokens, tail = 1 << 19, 64
    config = NSAConfig(compressor="mean", shared_kv=True, backend="triton")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(tokens, 64, 128), normal(tokens, 4, 128), normal(tokens, 4, 128)
    gates = torch.full((tokens, 1, 3), 0.5, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        result = native_sparse_attention(q, (k,), (v,), gates, (), (), config)
        rows = slice(tokens - tail, tokens)
        own = result.blocks[rows]
        keys = (own.long()[..., None] * config.select_block_size + torch.arange(config.select_block_size, device="cuda")).flatten(
            2
        )
        hidden = keys > torch.arange(tokens - tail, tokens, device="cuda")[:, None, None]
        group = torch.arange(4, device="cuda")[:, None]
        chosen = k[keys.clamp(max=tokens - 1), group].float()
        scores = torch.einsum("tghd,tgkd->tghk", q[rows].float().view(tail, 4, 16, 128), chosen) * 128**-0.5
        lse = scores.masked_fill(hidden[:, :, None], float("-inf")).logsumexp(-1).flatten(1)
    assert relative_error(result.lse_selected[rows], lse) < 1e-5
    assert bool(result.out.isfinite().all())
