"""The parts of the oracle against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.reference import (
    reference_block_scores,
    reference_combine,
    reference_compress,
    reference_compressed_attention,
    reference_compressor_weights,
    reference_full_attention,
    reference_rope,
    reference_select_blocks,
    reference_selected_attention,
    reference_window_attention,
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


def column(*values: float) -> torch.Tensor:
    """One head of width one: [len(values), 1, 1]."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def assert_equal(actual: torch.Tensor, expected, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=False)


# ---- importance and selection, by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "l, d, l_sel, weights",
    [
        (32, 16, 64, [1, 2, 2, 2, 1]),
        (16, 16, 64, [1, 1, 1, 1]),
        (32, 16, 32, [1, 2, 1]),
        (64, 16, 64, [1, 2, 3, 4, 3, 2, 1]),
        (4, 2, 12, [1, 2, 2, 2, 2, 2, 1]),
        (5, 5, 5, [1]),
        (3, 1, 4, [1, 2, 3, 3, 2, 1]),
    ],
)
def test_overlap_weights(l, d, l_sel, weights) -> None:
    """A query whose whole probability lies on compressed token i scores block j with the weight of that pair."""
    config = make_config(l, d, l_sel, n=4)
    tokens, per_block, pieces = 4 * l_sel, l_sel // d, l // d
    count = (tokens - l) // d + 1
    table = torch.zeros(count, 4)
    for i in range(count):
        k_cmp = torch.zeros(count, 1, 1, dtype=torch.float64)
        k_cmp[i] = 1.0
        table[i] = reference_block_scores(torch.full((tokens, 1, 1), 1e4, dtype=torch.float64), k_cmp, config)[-1, 0]
    for j in range(4):
        first = per_block * j - (pieces - 1)
        expected = [0] * count
        for offset, weight in enumerate(weights):
            if 0 <= first + offset < count:
                expected[first + offset] = weight
        assert table[:, j].tolist() == expected
    assert table[:, 1].count_nonzero() == len(weights)  # an inner block shows its weights whole


def test_block_scores_by_hand() -> None:
    # l, d, l' = 4, 2, 4: block j counts compressed tokens 2j-1, 2j, 2j+1 with weights 1, 2, 1. Uniform p over the visible ones.
    scores = reference_block_scores(torch.zeros(12, 2, 3).double(), torch.zeros(5, 1, 3).double(), make_config())
    assert scores.shape == (12, 1, 3)
    assert_equal(scores[2, 0], [0, -INF, -INF])  # nothing visible
    assert_equal(scores[3, 0], [2 * 2, -INF, -INF])  # both heads on token 0
    assert_equal(scores[4, 0], [2 * 2, 0, -INF])  # block 1 has begun, none of it is compressed
    assert_equal(scores[5, 0], [2 * 3 / 2, 2 * 1 / 2, -INF])
    assert_equal(scores[11, 0], [2 * 3 / 5, 2 * 4 / 5, 2 * 3 / 5])  # tokens 0..4; the last is 4, so block 2 lacks its third


def test_scores_sum_over_the_group_only() -> None:
    # Heads 0, 1 (group 0) look at different compressed tokens, heads 2, 3 (group 1) both at token 0. l = d = l': block = token.
    config = make_config(2, 2, 2, n=2)
    q = torch.zeros(6, 4, 2, dtype=torch.float64)
    q[:, 0, 0], q[:, 1, 1], q[:, 2, 0], q[:, 3, 0] = 1e4, 1e4, 1e4, 1e4
    k_cmp = torch.tensor([[1.0, 0], [0, 1], [0, 0]], dtype=torch.float64)[:, None].expand(3, 2, 2)
    assert_equal(reference_block_scores(q, k_cmp, config)[5], [[1, 1, 0], [2, 0, 0]])


@pytest.mark.parametrize(
    "n, init, local, expected",
    [  # chosen blocks at positions 0, 4, 8, 12, 16 (own block 0, 1, 2, 3, 4) with l' = 4 and equal scores
        (4, 2, 2, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 4]]),
        (3, 1, 2, [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]),
        (3, 0, 3, [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]),
        (4, 3, 1, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4]]),
        (3, 0, 1, [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4]]),
        (7, 3, 4, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
    ],
)
def test_forced_blocks_in_young_documents(n, init, local, expected) -> None:
    config = make_config(4, 4, 4, n, init, local)
    for cu_seqlens, tokens, counts, first in [(None, 20, 5, 0), ((0, 7, 27), 27, 6, 7)]:  # alone, and behind another document
        q, k_cmp = torch.zeros(tokens, 1, 2).double(), torch.zeros(counts, 1, 2).double()
        blocks = reference_select_blocks(q, k_cmp, config, cu_seqlens)
        assert blocks.dtype == torch.int32 and blocks.shape == (tokens, 1, n)
        for own, chosen in enumerate(expected):
            for t in range(4 * own, 4 * own + 4):
                assert blocks[first + t, 0].tolist() == chosen + [-1] * (n - len(chosen))


def test_ties_go_to_the_lowest_index() -> None:
    tokens = 4 * 40
    config = make_config(4, 4, 4, n=5, init=0, local=1)
    q = torch.ones(tokens, 1, 1).double()
    k_cmp = torch.zeros(40, 1, 1).double()
    assert reference_select_blocks(q, k_cmp, config)[-1, 0].tolist() == [0, 1, 2, 3, 39]
    k_cmp[[7, 20, 21, 22, 30]] = 3.0  # five equal best for four places
    assert reference_select_blocks(q, k_cmp, config)[-1, 0].tolist() == [7, 20, 21, 22, 39]
    k_cmp[30] = 3.1
    assert reference_select_blocks(q, k_cmp, config)[-1, 0].tolist() == [7, 20, 21, 30, 39]
    k_cmp[:], k_cmp[25] = 0.0, 1e4  # all others tie at a score of exactly 0
    assert reference_select_blocks(q, k_cmp, config)[-1, 0].tolist() == [0, 1, 2, 25, 39]


def test_forced_blocks_outrank_any_score() -> None:
    config = make_config(4, 4, 4, n=3, init=1, local=1)
    k_cmp = column(0, 0, 9, 8, 7, 0)
    assert reference_select_blocks(torch.full((24, 1, 1), 100.0).double(), k_cmp, config)[-1, 0].tolist() == [0, 2, 5]


def test_scoring_takes_no_gradient() -> None:
    q, k_cmp = randn(12, 2, 3).requires_grad_(), randn(5, 1, 3).requires_grad_()
    assert not reference_block_scores(q, k_cmp, make_config()).requires_grad
    assert not reference_select_blocks(q, k_cmp, make_config()).requires_grad


# ---- branches, by hand -----------------------------------------------------------------------------------------------------


def test_all_branches_by_hand() -> None:
    """q = 0 makes every branch the mean of the values it sees, and v[t] = t names them; l, d, l', w = 4, 2, 4, 3."""
    config, q, x = make_config(), torch.zeros(10, 1, 1).double(), column(*range(10))
    compressed = reference_compress(x, (), config)
    assert_equal(compressed, column(1.5, 3.5, 5.5, 7.5))
    out, lse = reference_compressed_attention(q, compressed, compressed, config)
    assert_equal(out, column(0, 0, 0, 1.5, 1.5, 2.5, 2.5, 3.5, 3.5, 4.5))
    assert_equal(lse[:, 0], [-INF] * 3 + [0, 0, math.log(2), math.log(2), math.log(3), math.log(3), math.log(4)])
    out, lse = reference_window_attention(q, x, x, config)
    assert_equal(out, column(0, 0.5, 1, 2, 3, 4, 5, 6, 7, 8))
    assert_equal(lse[:, 0], [0, math.log(2)] + [math.log(3)] * 8)
    blocks = reference_select_blocks(q, compressed, config)
    assert blocks[:, 0].tolist() == [[0, -1]] * 4 + [[0, 1]] * 4 + [[0, 2]] * 2
    out, lse = reference_selected_attention(q, x, x, blocks, config)
    assert_equal(out, column(0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, (6 + 8) / 5, (6 + 8 + 9) / 6))
    assert_equal(lse[:, 0].exp(), [1, 2, 3, 4, 5, 6, 7, 8, 5, 6])


@pytest.mark.parametrize(
    "l, d, counts",  # how many compressed tokens position 0, 1, 2, ... sees
    [
        (4, 2, [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (3, 3, [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]),
        (6, 3, [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]),
        (1, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_a_compressed_token_is_visible_from_its_last_token_on(l, d, counts) -> None:
    config = make_config(l, d, 6)
    k_cmp = torch.zeros(max(0, (10 - l) // d + 1), 1, 1).double()
    _, lse = reference_compressed_attention(torch.zeros(10, 1, 1).double(), k_cmp, k_cmp, config)
    assert_equal(lse[:, 0].exp(), counts)


@pytest.mark.parametrize("w", [1, 2, 5, 11, 12, 13, 1000])
def test_window_holds_exactly_w_keys(w) -> None:
    q = torch.zeros(12, 1, 1).double()
    out, lse = reference_window_attention(q, q, column(*range(12)), make_config(w=w))
    for t in range(12):
        seen = list(range(t + 1))[-w:]
        assert_equal(lse[t, 0].exp(), len(seen))
        assert_equal(out[t, 0, 0], sum(seen) / len(seen))


def test_window_of_zero_is_off() -> None:
    out, lse = reference_window_attention(randn(5, 2, 3), randn(5, 1, 3), randn(5, 1, 4), make_config(w=0))
    assert out.eq(0).all() and out.shape == (5, 2, 4) and lse.eq(-INF).all()


def test_softmax_scale_is_of_the_key_width() -> None:
    # Two keys, Dk = 4, Dv = 1: scores 6/2 and 0.
    q, k = torch.tensor([[[3.0, 0, 0, 0]]] * 2).double(), torch.tensor([[[2.0, 0, 0, 0]], [[0.0] * 4]]).double()
    out, lse = reference_full_attention(q, k, column(1, 0))
    assert_equal(out[1, 0, 0], math.exp(3) / (math.exp(3) + 1))
    assert_equal(lse[1, 0], math.log(math.exp(3) + 1))


def test_combine_by_hand() -> None:
    outs = tuple(torch.full((1, 2, 1), x).double() for x in (1.0, 10.0, 100.0))
    gates = torch.tensor([[[0.1, 0.2, 0.3], [0.5, 0.25, 0.75]]], dtype=torch.float64)
    assert_equal(reference_combine(outs, gates), [[[0.1 + 2 + 30], [0.5 + 2.5 + 75]]])
    assert_equal(reference_combine(outs, gates[:, :1]), [[[32.1], [32.1]]])


@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 2), (4, 1)])
def test_full_attention_matches_torch(heads, groups) -> None:
    q, k, v = randn(13, heads, 4), randn(13, groups, 4, seed=1), randn(13, groups, 3, seed=2)
    out, lse = reference_full_attention(q, k, v, (0, 5, 5, 13))
    for rows in (slice(0, 5), slice(5, 13)):
        k_rows, v_rows = (x[rows].repeat_interleave(heads // groups, 1).transpose(0, 1) for x in (k, v))
        expected = scaled_dot_product_attention(q[rows].transpose(0, 1), k_rows, v_rows, is_causal=True)
        assert_equal(out[rows], expected.transpose(0, 1))
        scores = (q[rows].transpose(0, 1) @ k_rows.transpose(1, 2) / 2).tril()
        assert_equal(lse[rows][-1], scores[:, -1].logsumexp(-1))


# ---- queries that see nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cu_seqlens", [(0, 9), (0, 3), (0, 1, 4, 4, 13)], ids=str)
def test_blind_queries_have_zero_output_and_finite_gradients(cu_seqlens) -> None:
    config, tokens = make_config(), cu_seqlens[-1]
    x, q, v = (randn(tokens, *shape, seed=s).requires_grad_() for s, shape in enumerate([(1, 3), (2, 3), (1, 2)]))
    k_cmp, v_cmp = reference_compress(x, (), config, cu_seqlens), reference_compress(v, (), config, cu_seqlens)
    out, lse = reference_compressed_attention(q, k_cmp, v_cmp, config, cu_seqlens)
    positions = [t - max(b for b in cu_seqlens if b <= t) for t in range(tokens)]
    blind = torch.tensor([position < 3 for position in positions])
    assert torch.equal(lse[:, 0] == -INF, blind) and torch.equal(lse[:, 1] == -INF, blind)
    assert out[blind].eq(0).all() and out[~blind].ne(0).all()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way back either, not even a masked one
        (out.square().sum() + out.sum() + lse.sum()).backward()  # the sum of lse is -inf: its gradient is still finite
    for gradient in (q.grad, x.grad, v.grad):
        assert gradient.isfinite().all()
    assert q.grad[blind].eq(0).all()
    assert q.grad[~blind].ne(0).all()


# ---- compression and rotary embedding --------------------------------------------------------------------------------------


def test_linear_and_mlp_compressors_by_hand() -> None:
    # Blocks (1, 2) and (4, 8) plus positions (10, 20): (11, 22) and (14, 28).
    x, position = column(1, 2, 4, 8), torch.tensor([[[10.0], [20.0]]]).double()
    weight = torch.tensor([[[2.0], [3.0]]]).double()
    config = make_config(2, 2, 2, compressor="linear")
    assert_equal(reference_compress(x, (position, weight), config), column(22 + 66, 28 + 84))
    config = make_config(2, 2, 2, compressor="mlp")
    hidden = [x / (1 + math.exp(-x)) for x in (0.88, 1.12)]
    compressed = reference_compress(x, (position, weight / 100, torch.tensor([[[5.0]]]).double()), config)
    assert_equal(compressed, column(1.5 + 5 * hidden[0], 6 + 5 * hidden[1]))


@pytest.mark.parametrize("compressor", ["mean", "linear", "mlp"])
def test_compressors_start_as_the_block_mean(compressor) -> None:
    config = make_config(6, 2, 6, compressor=compressor)
    weights = reference_compressor_weights(config, 3, 4, torch.float64, torch.Generator().manual_seed(0))
    shapes = {"mean": [], "linear": [(3, 6, 4), (3, 24, 4)], "mlp": [(3, 6, 4), (3, 24, 4), (3, 4, 4)]}
    assert [tuple(w.shape) for w in weights] == shapes[compressor]
    x = randn(13, 3, 4)
    expected = torch.stack([x[0:6].mean(0), x[2:8].mean(0), x[4:10].mean(0), x[6:12].mean(0)])
    assert_equal(reference_compress(x, weights, config), expected)
    if compressor == "mlp":
        assert abs(weights[1].std().item() * math.sqrt(24) - 1) < 0.2
        assert weights[0].eq(0).all() and weights[2].eq(0).all()


def test_rope_by_hand() -> None:
    one = torch.eye(4, dtype=torch.float64)[:, None]  # four tokens, token c has a 1 in channel c
    positions = torch.tensor([1, 2, 3, 4])
    turned = reference_rope(one, positions, RotaryConfig(base=100.0))[:, 0]  # frequencies 1 and 0.1; pairs (0, 2) and (1, 3)
    cos, sin = math.cos, math.sin
    assert_equal(turned[0], [cos(1), 0, sin(1), 0])
    assert_equal(turned[1], [0, cos(0.2), 0, sin(0.2)])
    assert_equal(turned[2], [-sin(3), 0, cos(3), 0])
    assert_equal(turned[3], [0, -sin(0.4), 0, cos(0.4)])
    half = reference_rope(one, positions, RotaryConfig(base=100.0, percent=0.5))[:, 0]  # the pair (0, 1) alone turns
    assert_equal(half[:2], [[cos(1), sin(1), 0, 0], [-sin(2), cos(2), 0, 0]])
    assert_equal(half[2:], one[2:, 0])


def test_rope_scores_depend_on_relative_position_only() -> None:
    rotary, q, k = RotaryConfig(base=100.0, percent=0.75), randn(6, 2, 8), randn(6, 2, 8, seed=1)

    def scores(shift: int) -> torch.Tensor:
        positions = torch.arange(6) + shift
        return torch.einsum("thd,shd->hts", reference_rope(q, positions, rotary), reference_rope(k, positions, rotary))

    assert_equal(scores(0), scores(1000), tolerance=1e-10)
    assert (scores(0) - torch.einsum("thd,shd->hts", q, k)).abs().max() > 0.1


def test_compressed_keys_turn_by_their_first_token_of_the_document() -> None:
    rotary, config, x = RotaryConfig(base=100.0), make_config(), randn(17, 1, 4)
    cu_seqlens = (0, 9, 17)  # three compressed tokens in each document
    plain = reference_compress(x, (), config, cu_seqlens)
    turned = reference_compress(x, (), config, cu_seqlens, rotary)
    assert_equal(turned, reference_rope(plain, torch.tensor([0, 2, 4, 0, 2, 4]), rotary))
