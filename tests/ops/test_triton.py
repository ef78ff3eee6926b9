"""The Triton path beside the torch path on a GPU: errors against float64, choices, determinism, CUDA graphs, long addresses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops import branches_backward, compress_kv, native_sparse_attention, select_blocks
from nsa_cp.ops.branches_backward import Branch, BranchesBackward, ChosenBlocks
from nsa_cp.ops.gating import row_statistics, split_statistics
from nsa_cp.ops.interval_attention import interval_attention_forward
from nsa_cp.ops.plan import NSAPlan, get_plan
from nsa_cp.ops.selected import selected_attention_forward
from nsa_cp.ops.selection import select_blocks_forward
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
    "one_head_a_group": (SHORT, (0, 1000), 4, 4, 64, 192),
    "two_heads_a_group": (SHORT, (0, 777), 4, 2, 96, 64),
    "four_heads_a_group": (PAPER, (0, 1201), 16, 4, 128, 128),
    "five_heads_a_group": (SHORT, (0, 1023), 10, 2, 64, 96),
    "eight_heads_a_group": (PAPER, (0, 2049), 32, 4, 128, 128),
    "many_heads_a_group": (SHORT, (0, 600), 32, 1, 64, 256),
    "widest": (replace(SHORT, compressor="mean"), (0, 500), 16, 1, 256, 256),
    "packed": (replace(SHORT, shared_kv=True, gate="branch"), (0, 0, 1, 32, 63, 128, 193, 900, 1000), 16, 4, 64, 64),
    "large_blocks": (
        NSAConfig(select_block_size=128, num_selected_blocks=12, window_size=4096, compress_block_size=64),
        (0, 4097), 16, 1, 128, 128,
    ),
    "no_window": (replace(SHORT, window_size=0, num_selected_blocks=64), (0, 4097), 8, 2, 64, 64),
    **{f"{length}_tokens": (SHORT, (0, length), 16, 2, 64, 64) for length in (1, 31, 33, 63, 65)},
}  # fmt: skip


def _problem(name: str, documents: tuple[int, ...] | None = None, seed: int = 0) -> AttentionProblem:
    config, own_documents, heads, groups, qk_dim, v_dim = CASES[name]
    problem = make_problem(
        config,
        documents or own_documents,
        num_heads=heads,
        num_groups=groups,
        qk_dim=qk_dim,
        v_dim=v_dim,
        rotary=RotaryConfig(),
        seed=seed,
        dtype=torch.bfloat16,
    )
    return problem.to("cuda")


def _with_backend(problem: AttentionProblem, backend: str) -> AttentionProblem:
    return replace(problem, config=replace(problem.config, backend=backend))


def _check_errors(name: str, problem: AttentionProblem) -> None:
    """Outputs and every gradient are at most twice as far from float64 as the torch path in the same dtype is."""
    answers = solve(_with_backend(problem, "triton"))
    blocks = answers["blocks"]
    exact = solve(_with_backend(problem.to(torch.float64), "torch"), blocks=blocks)
    torch_path = solve(_with_backend(problem, "torch"), blocks=blocks)
    for key, value in exact.items():
        if key == "blocks":
            continue
        bound = 2 * relative_error(torch_path[key], value) + 1e-6
        error = relative_error(answers[key], value)
        assert error <= bound, f"{name} {key}: error {error:.2e}, bound {bound:.2e}"


def _check_selection(name: str, problem: AttentionProblem) -> None:
    """Choices are those of float64 scores, but for blocks whose scores differ by no more than rounding."""
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_errors_are_at_most_twice_the_torch_paths(name: str, dtype: torch.dtype) -> None:
    _check_errors(name, _problem(name).to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_selections_differ_only_between_blocks_of_equal_score(name: str) -> None:
    _check_selection(name, _problem(name))


def test_any_packing() -> None:
    """Random document borders, empty and one-token documents among them: shapes that are compiled already."""
    generator = torch.Generator().manual_seed(7)
    for seed in range(8):
        total = int(torch.randint(1, 1200, (), generator=generator))
        borders = torch.randint(0, total + 1, (int(torch.randint(0, 12, (), generator=generator)),), generator=generator)
        documents = (0, *sorted(borders.tolist()), total)
        problem = _problem("packed", documents, seed)
        _check_errors(f"documents {documents}", problem)
        _check_selection(f"documents {documents}", problem)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """PyTorch fills memory that nobody has written yet with NaN, and integers with their largest value."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8, device="cuda").isnan().all(), "otherwise this fixture poisons nothing"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*deterministic.*")
@pytest.mark.parametrize("name", ["packed", "one_head_a_group", "65_tokens"])
def test_everything_read_has_been_written(name: str, request: pytest.FixtureRequest) -> None:
    problem = _with_backend(_problem(name), "triton")
    expected = solve(problem)
    request.getfixturevalue("poisoned_memory")
    for key, value in solve(problem).items():
        if key == "blocks":
            assert torch.equal(value, expected[key])
        else:
            # The compressor's small products may take another algorithm in this mode.
            assert relative_error(value, expected[key]) < 5e-3, key


def test_tensors_that_are_not_contiguous() -> None:
    """Views into one projection, heads before tokens, and an expanded gradient: the bits of contiguous copies."""
    problem = _with_backend(_problem("packed"), "triton")
    tokens, heads, width = problem.q.shape

    def between(x: torch.Tensor) -> torch.Tensor:
        around = torch.full_like(x, float("nan"))
        return torch.cat([around, x, around], -1)[..., x.shape[-1] : 2 * x.shape[-1]]

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    grad = problem.grad[:1].expand(tokens, -1, -1)
    strided = replace(
        problem, q=heads_first(problem.q), k=tuple(map(between, problem.k)), v=tuple(map(heads_first, problem.v)),
        gates=between(problem.gates), grad=grad,
    )  # fmt: skip
    assert not any(x.is_contiguous() for x in (strided.q, *strided.k, *strided.v, strided.gates, strided.grad))
    answers, expected = solve(strided), solve(replace(problem, grad=grad.contiguous()))
    for key, value in expected.items():
        assert torch.equal(answers[key], value), key


def _branches(problem: AttentionProblem, plan: NSAPlan) -> dict[str, torch.Tensor]:
    """Answers of the plan's rows, whose queries lie anywhere in the whole K/V; gradients as the pipeline has them."""
    layout, (k,), (v,) = plan.layout, problem.k, problem.v
    q, grad, gates = (layout.shard(x) for x in (problem.q, problem.grad, problem.gates))
    count, window = int(plan.compressed_base[-1]), torch.from_numpy(plan.window_halo.buffer_rows).to(k.device)
    held = {"compressed": (k[:count], v[:count]), "selected": (k, v), "window": (k[window], v[window])}
    results = {
        "compressed": interval_attention_forward(q, *held["compressed"], plan.compressed_intervals, "triton"),
        "window": interval_attention_forward(q, *held["window"], plan.window_intervals, "triton"),
    }
    blocks = select_blocks_forward(q, k[:count], results["compressed"][1], plan, "triton", v.shape[-1])
    results["selected"] = selected_attention_forward(q, k, v, blocks, plan, "triton")
    outs, lses = ([results[name][i] for name in held] for i in range(2))
    statistics = dict(zip(held, split_statistics(row_statistics(grad, outs, lses, gates, "triton")), strict=True))
    backward, dq = BranchesBackward(q, grad, ChosenBlocks(blocks, plan, "triton"), plan, "triton"), torch.empty_like(q)
    gradients = {
        name: getattr(backward, name)(Branch(*held[name], statistics[name])) for name in ("window", "compressed", "selected")
    }
    backward.query_gradients(out=dq)
    answers = {"blocks": blocks, "dq": dq}
    for name, out, lse in zip(held, outs, lses, strict=True):
        answers |= {f"out {name}": out, f"lse {name}": lse}
        for which, whole, part in zip(("dk", "dv"), (k, v), gradients[name], strict=True):
            if name == "window":
                part = torch.zeros(whole.shape, dtype=part.dtype, device=part.device).index_add_(0, window, part)
            answers[f"sum {which} {name}"] = part
    return answers


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_queries_at_any_offset_of_longer_keys(kind: str) -> None:
    """What each of three ranks computes on its rows and the whole K/V makes up what one process computes."""
    problem = _problem("packed", (0, 100, 101, 1003))
    config, device = problem.config, problem.q.device
    whole = _branches(problem, get_plan(SequenceLayout.build(problem.cu_seqlens), config, device))
    layouts = [
        SequenceLayout.build(problem.cu_seqlens, cp_size=3, cp_rank=rank, kind=kind, per_document=False) for rank in range(3)
    ]
    parts = [_branches(problem, get_plan(layout, config, device)) for layout in layouts]
    for key, value in whole.items():
        shards = [part[key] for part in parts]
        joined = sum(shards) if "sum" in key else layouts[0].unshard(shards)
        if key == "blocks":
            assert torch.equal(joined, value)
        else:
            # Probabilities are rounded to bf16 against another maximum where tiles are cut otherwise.
            assert relative_error(joined, value) < (1e-5 if "lse" in key else 5e-3), key


def test_two_runs_are_bitwise_equal() -> None:
    problem = _with_backend(_problem("packed"), "triton")
    first, second = solve(problem), solve(problem)
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize(
    "name, long",
    [
        ("two_heads_a_group", False),
        ("four_heads_a_group", False),
        ("eight_heads_a_group", False),
        ("four_heads_a_group", True),
        ("eight_heads_a_group", True),
    ],
)
def test_forward_and_backward_in_a_cuda_graph(name: str, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if long:
        # The backward takes the kernels of long sequences.
        monkeypatch.setattr(branches_backward, "LEAST_PAIRS", 0)
    problem = _with_backend(_problem(name), "triton")
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


def _tail_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    """Float32 attention, every gate 1/2, of the last rows ``q`` of one document with K/V ``k``, ``v`` [S, G, D]."""
    position = torch.arange(k.shape[0] - q.shape[0], k.shape[0], device=q.device)
    k_cmp, v_cmp = compress_kv(k, v, (), (), config, backend="torch")
    last = torch.arange(len(k_cmp), device=q.device) * config.compress_stride + config.compress_block_size - 1
    span = torch.arange(config.select_block_size, device=q.device)
    chosen = (blocks.long()[..., None] * config.select_block_size + span).flatten(2)
    group = torch.arange(k.shape[1], device=q.device)[:, None]
    window = position[:, None] - torch.arange(config.window_size, device=q.device)
    q = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])

    def attend(keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """keys, values [t or 1, G, K, D]; hidden [t, G or 1, K]."""
        scores = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(hidden[:, :, None], float("-inf"))
        return (scores.softmax(-1) @ values).flatten(1, 2)

    rows = chosen.clamp(0, k.shape[0] - 1)
    compressed = attend(k_cmp.transpose(0, 1)[None], v_cmp.transpose(0, 1)[None], (last > position[:, None])[:, None])
    selected = attend(k[rows, group], v[rows, group], (chosen < 0) | (chosen > position[:, None, None]))
    near = attend(k[window].transpose(1, 2), v[window].transpose(1, 2), (window < 0)[:, None])
    return 0.5 * (compressed + selected + near)


@pytest.mark.parametrize("tokens, backward", [((1 << 18) + 100, True), (1 << 19, False)], ids=["backward", "512k"])
def test_more_elements_than_32_bits_address(tokens: int, backward: bool) -> None:
    """64 heads of 128 channels; the last rows, at the highest addresses, against float32.

    No query before the last rows sees them, so their keys' and values' gradients come from these rows alone.
    """
    tail, config = 64, NSAConfig(compressor="mean", shared_kv=True, backend="triton")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = (normal(tokens, heads, 128).requires_grad_(backward) for heads in (64, 4, 4))
    gates = torch.full((tokens, 1, 3), 0.5, device="cuda", dtype=torch.bfloat16)
    assert q.numel() >= 1 << 31
    result = native_sparse_attention(q, (k,), (v,), gates, (), (), config)
    rows = slice(tokens - tail, tokens)
    leaves = [x.detach()[part].float().requires_grad_(backward) for x, part in ((q, rows), (k, slice(None)), (v, slice(None)))]
    out = _tail_attention(*leaves, result.blocks[rows], config)
    assert relative_error(result.out[rows], out) < 1e-2
    assert bool(result.out.isfinite().all())
    if backward:
        grad = normal(*result.out.shape)
        expected = torch.autograd.grad(out, leaves, grad[rows].float())
        gradients = torch.autograd.grad(result.out, (q, k, v), grad)
        assert relative_error(gradients[0][rows], expected[0]) < 2e-2
        for ours, exact in zip(gradients[1:], expected[1:], strict=True):
            assert relative_error(ours[rows], exact[rows]) < 2e-2
            assert bool(ours.isfinite().all())
