"""The oracle as a whole: against plain Python loops written from the formulas, and what must hold of any input."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.reference import (
    ReferenceOutput,
    reference_block_scores,
    reference_compressor_weights,
    reference_full_attention,
    reference_native_sparse_attention,
    reference_selected_attention,
)

INF = float("inf")


def make_config(l=4, d=2, l_sel=4, n=2, init=1, local=1, w=3, **rest) -> NSAConfig:
    rest.setdefault("compressor", "mean")
    return NSAConfig(
        compress_block_size=l, compress_stride=d, select_block_size=l_sel, num_selected_blocks=n,
        num_init_blocks=init, num_local_blocks=local, window_size=w, **rest,
    )  # fmt: skip


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_equal(actual: torch.Tensor, expected, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=False)


# ---- the formulas once more, in plain Python -------------------------------------------------------------------------------


def loop_attend(query: list, keys: list, values: list, width: int) -> tuple[list, float, list]:
    """Output, lse and probabilities of one query over the keys given."""
    if not keys:
        return [0.0] * width, -INF, []
    weights = [math.exp(sum(a * b for a, b in zip(query, key)) / math.sqrt(len(query))) for key in keys]
    total = sum(weights)
    p = [weight / total for weight in weights]
    return [sum(p_s * value[c] for p_s, value in zip(p, values)) for c in range(width)], math.log(total), p


def loop_rotate(vector: list, position: int, rotary: RotaryConfig | None) -> list:
    """Channel pairs (c, c + dim/2) as complex numbers, turned."""
    rotated = list(vector)
    dim = 0 if rotary is None else int(len(vector) * rotary.percent) // 2 * 2
    for c in range(dim // 2):
        z = complex(vector[c], vector[c + dim // 2]) * cmath.rect(1.0, position * rotary.base ** (-2 * c / dim))
        rotated[c], rotated[c + dim // 2] = z.real, z.imag
    return rotated


def loop_phi(tokens: list, weights: tuple, group: int) -> list:
    """phi of one block of l tokens: mean without weights, linear with two, mlp with three."""
    l, width = len(tokens), len(tokens[0])
    mean = [sum(token[c] for token in tokens) / l for c in range(width)]
    if not weights:
        return mean
    position, first, *second = (weight[group].tolist() for weight in weights)
    flat = [tokens[s][c] + position[s][c] for s in range(l) for c in range(width)]
    hidden = [sum(x * row[f] for x, row in zip(flat, first)) for f in range(len(first[0]))]
    if not second:
        return hidden
    hidden = [x / (1 + math.exp(-x)) for x in hidden]
    return [mean[c] + sum(x * row[c] for x, row in zip(hidden, second[0])) for c in range(width)]


def loop_scores(p_cmp: list, num_blocks: int, config: NSAConfig) -> list:
    """The double sum of the method, terms out of range being 0."""
    per_block, pieces = config.select_block_size // config.compress_stride, config.compress_block_size // config.compress_stride
    scores = []
    for j in range(num_blocks):
        indices = [per_block * j + m - k for m in range(per_block) for k in range(pieces)]
        scores.append(sum(p_cmp[i] for i in indices if 0 <= i < len(p_cmp)))
    return scores


def loop_select(scores: list, own: int, config: NSAConfig) -> list:
    """Forced blocks, then the best of the others, lowest index first among equals."""
    chosen = {j for j in range(config.num_init_blocks) if j <= own}
    chosen |= {own - back for back in range(config.num_local_blocks) if own - back >= 0}
    others = sorted((-scores[j], j) for j in range(own + 1) if j not in chosen)
    chosen |= {j for _, j in others[: config.num_selected_blocks - len(chosen)]}
    return sorted(chosen) + [-1] * (config.num_selected_blocks - len(chosen))


def loop_document(q, k, v, gates, k_weights, v_weights, config, rotary) -> tuple[list, list, list]:
    """Native Sparse Attention of one document: out [L][N][Dv], blocks [L][G][n], lse [L][N][3]."""
    length, heads, groups, width = q.shape[0], q.shape[1], k[0].shape[1], v[0].shape[2]
    k, v = ([x.tolist() for x in (t * 3 if len(t) == 1 else t)] for t in (k, v))
    q, gates = q.tolist(), gates.expand(-1, heads, -1).tolist()
    l, d, l_sel = config.compress_block_size, config.compress_stride, config.select_block_size
    after = config.compressed_rope == "after"
    rows = range(length)
    k_rot = [[[loop_rotate(k[b][t][g], t, rotary) for t in rows] for g in range(groups)] for b in range(3)]
    k_cmp, v_cmp = [[] for _ in range(groups)], [[] for _ in range(groups)]
    for g in range(groups):
        for first in range(0, length - l + 1, d):
            tokens = range(first, first + l)
            if after:
                k_cmp[g].append(loop_rotate(loop_phi([k[0][s][g] for s in tokens], k_weights, g), first, rotary))
            else:
                k_cmp[g].append(loop_phi([k_rot[0][g][s] for s in tokens], k_weights, g))
            v_cmp[g].append(loop_phi([v[0][s][g] for s in tokens], v_weights, g))
    outs, blocks, lses = [], [], []
    for t in rows:
        out_row, block_row, lse_row = [], [], []
        for g in range(groups):
            group_heads = range(g * (heads // groups), (g + 1) * (heads // groups))
            queries = {h: loop_rotate(q[t][h], t, rotary) for h in group_heads}
            seen = [i for i in range(len(k_cmp[g])) if i * d + l - 1 <= t]
            compressed = {
                h: loop_attend(queries[h], [k_cmp[g][i] for i in seen], [v_cmp[g][i] for i in seen], width) for h in group_heads
            }
            per_head = [loop_scores(compressed[h][2], -(-length // l_sel), config) for h in group_heads]
            chosen = loop_select([sum(head) for head in zip(*per_head)], t // l_sel, config)
            block_row.append(chosen)
            picked = [s for s in range(t + 1) if s // l_sel in chosen]
            window = list(range(max(0, t - config.window_size + 1), t + 1)) if config.window_size else []
            for h in group_heads:
                parts = [compressed[h]]
                for branch, keys in ((1, picked), (2, window)):
                    k_seen, v_seen = [k_rot[branch][g][s] for s in keys], [v[branch][s][g] for s in keys]
                    parts.append(loop_attend(queries[h], k_seen, v_seen, width))
                out_row.append([sum(gates[t][h][b] * parts[b][0][c] for b in range(3)) for c in range(width)])
                lse_row.append([part[1] for part in parts])
        outs.append(out_row), blocks.append(block_row), lses.append(lse_row)
    return outs, blocks, lses


def make_case(config, cu_seqlens, heads=2, groups=1, qk=4, vd=3, gate_heads=None, seed=0) -> dict:
    """Random arguments of ``reference_native_sparse_attention``; the compressors are perturbed away from their start."""
    tokens, kvs = cu_seqlens[-1], config.num_branch_kv

    def weights(dim: int, offset: int) -> tuple:
        start = reference_compressor_weights(config, groups, dim, torch.float64, torch.Generator().manual_seed(seed + offset))
        return tuple(w + 0.3 * randn(*w.shape, seed=seed + offset + i) for i, w in enumerate(start))

    return dict(
        q=2 * randn(tokens, heads, qk, seed=seed),
        k=tuple(randn(tokens, groups, qk, seed=seed + 1 + b) for b in range(kvs)),
        v=tuple(randn(tokens, groups, vd, seed=seed + 5 + b) for b in range(kvs)),
        gates=torch.sigmoid(randn(tokens, heads if gate_heads is None else gate_heads, 3, seed=seed + 9)),
        k_weights=weights(qk, 20), v_weights=weights(vd, 40), config=config, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def assert_matches_loops(case: dict, rotary: RotaryConfig | None) -> None:
    actual = reference_native_sparse_attention(**case, rotary=rotary)
    for start, end in zip(case["cu_seqlens"], case["cu_seqlens"][1:]):
        if start == end:
            continue
        rows = slice(start, end)
        k, v = (tuple(x[rows] for x in case[name]) for name in "kv")
        out, blocks, lse = loop_document(
            case["q"][rows], k, v, case["gates"][rows], case["k_weights"], case["v_weights"], case["config"], rotary
        )
        assert actual.blocks[rows].tolist() == blocks
        assert_equal(actual.out[rows], out)
        for b, part in enumerate((actual.lse_compressed, actual.lse_selected, actual.lse_window)):
            assert_equal(part[rows], torch.tensor(lse, dtype=torch.float64)[..., b])


# ---- against the loops -----------------------------------------------------------------------------------------------------

# l, d, l', n, init, local, w
SHAPES = {
    "overlap-2": (4, 2, 8, 3, 1, 1, 5),
    "overlap-4": (8, 2, 8, 3, 0, 2, 1),
    "no-overlap": (3, 3, 6, 4, 2, 1, 7),
    "stride-1": (2, 1, 3, 2, 1, 1, 0),
    "paper-ratios": (4, 2, 8, 4, 1, 2, 64),
}


@pytest.mark.parametrize("compressor", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("rope", ["after", "before", "none"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_whole_matches_loops(shape, rope, compressor) -> None:
    order = "after" if rope == "none" else rope
    config = make_config(*shape, compressor=compressor, compressed_rope=order)
    rotary = None if rope == "none" else RotaryConfig(base=50.0, percent=0.8)
    assert_matches_loops(make_case(config, (0, 29, 30, 46), heads=4, groups=2, qk=5), rotary)


@pytest.mark.parametrize("shared_kv", [False, True], ids=["independent", "shared"])
@pytest.mark.parametrize("heads, groups", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (6, 3)])
def test_group_sizes_and_shared_kv_match_loops(heads, groups, shared_kv) -> None:
    config = make_config(4, 2, 4, 3, 1, 1, 5, compressor="mlp", shared_kv=shared_kv)
    assert_matches_loops(make_case(config, (0, 21, 35), heads=heads, groups=groups, qk=2, vd=5), RotaryConfig(base=100.0))


def test_one_gate_for_all_heads_matches_loops() -> None:
    assert_matches_loops(make_case(make_config(gate="branch"), (0, 17), heads=4, groups=2, gate_heads=1), None)


@pytest.mark.parametrize("order", ["given", "reversed"])
def test_odd_document_lengths_match_loops(order) -> None:
    l, l_sel = 4, 6
    lengths = [0, 1, l - 1, l, l_sel, 0, 0, l + 1, l_sel - 1, l_sel + 1, 2 * l_sel + 5, 0]
    cu_seqlens = [0]
    for length in lengths if order == "given" else lengths[::-1]:
        cu_seqlens.append(cu_seqlens[-1] + length)
    config = make_config(l, 2, l_sel, 3, 1, 1, 5, compressor="linear")
    assert_matches_loops(make_case(config, tuple(cu_seqlens), heads=2, groups=2), RotaryConfig())


@pytest.mark.parametrize("cu_seqlens", [(0,), (0, 0), (0, 0, 0)], ids=str)
def test_no_tokens_at_all(cu_seqlens) -> None:
    output = reference_native_sparse_attention(**make_case(make_config(), cu_seqlens), rotary=RotaryConfig())
    assert [tuple(x.shape) for x in output] == [(0, 2, 3), (0, 1, 2), (0, 2), (0, 2), (0, 2)]


# ---- the branches as a whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, groups", [(2, 2), (4, 2), (4, 1)])
def test_selecting_every_block_is_full_attention(heads, groups) -> None:
    config, cu_seqlens = make_config(n=8), (0, 30, 32, 47)
    case = make_case(config, cu_seqlens, heads=heads, groups=groups)
    q, k, v = case["q"], case["k"][1], case["v"][1]
    blocks = reference_native_sparse_attention(**case).blocks
    expected = reference_full_attention(q, k, v, cu_seqlens)
    for actual, dense in zip(reference_selected_attention(q, k, v, blocks, config, cu_seqlens), expected):
        assert_equal(actual, dense)
    case["gates"] = torch.tensor([0.0, 1.0, 0.0]).double().expand(47, 1, 3)
    assert_equal(reference_native_sparse_attention(**case).out, expected[0])


def test_an_injected_selection_is_used() -> None:
    case = make_case(make_config(n=3), (0, 20), groups=2)
    blocks = torch.full((20, 2, 3), -1, dtype=torch.int32)
    blocks[:, 0, 0], blocks[10:, 1, 1] = 0, 1  # group 1 sees nothing before t = 10; padding may stand anywhere
    output = reference_native_sparse_attention(**case, blocks=blocks)
    assert output.blocks is blocks
    assert output.lse_selected[:10, 1].eq(-INF).all() and output.lse_selected[10:, 1].isfinite().all()
    own = reference_native_sparse_attention(**case)
    assert not torch.equal(own.out, output.out)
    assert torch.equal(reference_native_sparse_attention(**case, blocks=own.blocks).out, own.out)


@pytest.mark.parametrize("compressor", ["mean", "mlp"])
def test_rope_orders_differ_in_the_compressed_branch_alone(compressor) -> None:
    outputs = {}
    for order in ("after", "before"):
        case = make_case(make_config(n=8, compressor=compressor, compressed_rope=order), (0, 30))
        outputs[order] = reference_native_sparse_attention(**case, rotary=RotaryConfig(base=100.0))
    after, before = outputs["after"], outputs["before"]
    assert (after.lse_compressed[3:] - before.lse_compressed[3:]).abs().max() > 1e-2
    assert (after.out - before.out).abs().max() > 1e-2
    assert torch.equal(after.lse_window, before.lse_window) and torch.equal(after.lse_selected, before.lse_selected)


def test_whole_has_no_nan_anywhere_when_most_see_nothing() -> None:
    case = make_case(make_config(w=0, compressor="mlp"), (0, 1, 1, 3, 6, 13))
    leaves = [case["q"], *case["k"], *case["v"], case["gates"], *case["k_weights"], *case["v_weights"]]
    for leaf in leaves:
        leaf.requires_grad_()
    output = reference_native_sparse_attention(**case, rotary=RotaryConfig())
    assert not any(x.isnan().any() for x in output)
    with torch.autograd.set_detect_anomaly(True):
        output.out.square().sum().backward()
    for leaf in leaves:
        if leaf is not case["k"][2] and leaf is not case["v"][2]:
            assert leaf.grad.isfinite().all() and leaf.grad.ne(0).any()
        else:  # the window is off
            assert leaf.grad is None or leaf.grad.eq(0).all()


# ---- packing, causality, gradients, dtypes ---------------------------------------------------------------------------------

CU_SEQLENS = (0, 13, 13, 14, 30)


def bitwise_equal(a: ReferenceOutput, b: ReferenceOutput, rows: slice) -> bool:
    return all(torch.equal(x[rows], y[rows]) for x, y in zip(a, b))


@pytest.mark.parametrize("poison", [3.0, float("nan")], ids=["shifted", "nan"])
@pytest.mark.parametrize("document", [0, 2, 3])
def test_documents_never_see_each_other(document, poison) -> None:
    case = make_case(make_config(n=3, init=1, local=1, compressor="mlp"), CU_SEQLENS, heads=4, groups=2)
    before = reference_native_sparse_attention(**case, rotary=RotaryConfig())
    changed = slice(CU_SEQLENS[document], CU_SEQLENS[document + 1])
    for x in (case["q"], *case["k"], *case["v"], case["gates"]):
        x[changed] += poison
    after = reference_native_sparse_attention(**case, rotary=RotaryConfig())
    assert not torch.equal(before.out[changed], after.out[changed])
    assert bitwise_equal(before, after, slice(0, changed.start)) and bitwise_equal(before, after, slice(changed.stop, 30))


def test_gradients_stay_in_their_document() -> None:
    case = make_case(make_config(n=3, compressor="mlp"), CU_SEQLENS, heads=4, groups=2)
    leaves = [case["q"], *case["k"], *case["v"], case["gates"]]
    for leaf in leaves:
        leaf.requires_grad_()
    reference_native_sparse_attention(**case, rotary=RotaryConfig()).out[:13].square().sum().backward()
    for leaf in leaves:
        assert leaf.grad[:13].ne(0).any() and leaf.grad[13:].eq(0).all()


@pytest.mark.parametrize("t", [1, 6, 7, 8, 15, 22])
def test_outputs_before_a_changed_token_stay(t) -> None:
    case = make_case(make_config(n=3, init=1, local=1, compressor="mlp"), (0, 23), heads=4, groups=2)
    before = reference_native_sparse_attention(**case, rotary=RotaryConfig())
    for x in (case["q"], *case["k"], *case["v"], case["gates"]):
        x[t] += 5.0
    after = reference_native_sparse_attention(**case, rotary=RotaryConfig())
    assert bitwise_equal(before, after, slice(0, t))
    assert not torch.equal(before.out[t], after.out[t])


@pytest.mark.parametrize("order, shared_kv", [("after", False), ("before", True)], ids=["after-independent", "before-shared"])
def test_gradcheck_packed(order, shared_kv) -> None:
    config = make_config(n=2, compressor="mlp", compressed_rope=order, shared_kv=shared_kv)
    case = make_case(config, (0, 2, 2, 11), heads=2, groups=1, qk=2, vd=1)
    kvs, blocks = config.num_branch_kv, reference_native_sparse_attention(**case, rotary=RotaryConfig()).blocks
    leaves = [case["q"], *case["k"], *case["v"], case["gates"], *case["k_weights"], *case["v_weights"]]

    def function(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        k, v, gates, weights = x[1 : 1 + kvs], x[1 + kvs : 1 + 2 * kvs], x[1 + 2 * kvs], x[2 + 2 * kvs :]
        output = reference_native_sparse_attention(
            x[0], k, v, gates, weights[:3], weights[3:], config, (0, 2, 2, 11), RotaryConfig(), blocks
        )
        lses = (output.lse_compressed, output.lse_selected, output.lse_window)
        return output.out, *(lse.masked_fill(lse == -INF, 0.0) for lse in lses)

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves], check_batched_grad=False)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_dtype_of_the_inputs_is_kept(dtype, tolerance) -> None:
    case = make_case(make_config(compressor="mlp"), (0, 5, 24))
    exact = reference_native_sparse_attention(**case, rotary=RotaryConfig())
    for name, value in case.items():
        if name not in ("config", "cu_seqlens"):
            case[name] = value.to(dtype) if isinstance(value, torch.Tensor) else tuple(x.to(dtype) for x in value)
    output = reference_native_sparse_attention(**case, rotary=RotaryConfig(), blocks=exact.blocks)
    assert {x.dtype for x in output if x is not exact.blocks} == {dtype}
    for actual, expected in zip(output, exact):
        assert_equal(actual.double(), expected.double(), tolerance)


# ---- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cu_seqlens", [(), (1, 20), (0, 19), (0, 21), (0, 12, 8, 20)], ids=str)
def test_wrong_cu_seqlens_are_refused(cu_seqlens) -> None:
    case = make_case(make_config(), (0, 20))
    with pytest.raises(ValueError, match="rise from 0 to the 20 tokens"):
        reference_native_sparse_attention(**{**case, "cu_seqlens": cu_seqlens})


def test_wrong_counts_are_refused() -> None:
    config = make_config()
    with pytest.raises(ValueError, match="8 compressed tokens given, but the documents have 9"):
        reference_block_scores(randn(20, 2, 3), randn(8, 1, 3), config)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 KV groups"):
        reference_full_attention(randn(5, 3, 2), randn(5, 2, 2), randn(5, 2, 2))
    case = make_case(make_config(shared_kv=True), (0, 20))
    with pytest.raises(ValueError, match="1 keys and 1 values given, but shared_kv = False needs 3"):
        reference_native_sparse_attention(**{**case, "config": config})
