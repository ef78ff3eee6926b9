"""Interval attention kernels against dense float64 attention: outputs, lse and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nsa_cp.kernels.interval_attention.backward import interval_attention_backward, interval_attention_backward_dkv
from nsa_cp.kernels.interval_attention.forward import interval_attention_forward, interval_lse
from nsa_cp.kernels.tuning import TileConfig
from nsa_cp.testing import assert_close

SMALL = TileConfig(rows=32, keys=16, num_warps=4, num_stages=2)


class Rows(NamedTuple):
    """Key range of each query [T] and the number of key rows."""

    begin: Tensor
    end: Tensor
    num_keys: int


def causal(tokens: int) -> Rows:
    last = torch.arange(tokens)
    return Rows(torch.zeros_like(last), last + 1, tokens)


def packed_window(tokens: int, window: int = 21) -> Rows:
    """Documents of 3 lengths, one of them a single token, each query seeing its last ``window`` tokens."""
    bounds = torch.tensor([0, tokens // 3, tokens // 3 + 1, tokens])
    row = torch.arange(tokens)
    start = bounds[torch.searchsorted(bounds, row, right=True) - 1]
    return Rows(torch.maximum(start, row - window + 1), row + 1, tokens)


def compressed(tokens: int) -> Rows:
    """Two documents of compressed tokens (l = 8, d = 4): the first queries of each see none."""
    half = tokens // 2
    position = torch.cat([torch.arange(half), torch.arange(tokens - half)])
    counts = [max(0, (n - 8) // 4 + 1) for n in (half, tokens - half)]
    base = torch.tensor([0, counts[0]]).repeat_interleave(torch.tensor([half, tokens - half]))
    return Rows(base, base + torch.clamp((position - 7 + 4) // 4, min=0), sum(counts))


def two_chunks(tokens: int) -> Rows:
    """A zigzag rank's window: two runs of queries far apart in one buffer with halos and rows that nobody sees."""
    half = tokens // 2
    end = torch.cat([torch.arange(half) + 9, torch.arange(tokens - half) + half + 40])
    return Rows(end - 9, end, tokens + 45)


def nothing(tokens: int) -> Rows:
    return Rows(torch.full((tokens,), 3), torch.full((tokens,), 3), 7)


CASES: dict[str, tuple[Callable[[int], Rows], int, int, int, int, int]] = {
    # name: (ranges, T, G, H, Dk, Dv)
    "causal-1head": (causal, 61, 2, 1, 16, 32),
    "causal-16heads": (causal, 21, 1, 16, 64, 64),
    "window-2heads": (packed_window, 52, 2, 2, 32, 16),
    "compressed-5heads": (compressed, 55, 1, 5, 24, 40),
    "chunks-4heads": (two_chunks, 40, 1, 4, 96, 48),
    "wide-8heads": (compressed, 47, 1, 8, 192, 128),
    "nothing": (nothing, 9, 1, 2, 16, 16),
}
# Every case with masked loads; tiles fetched in bulk where the layouts differ most (short ranges, and a width in two parts).
WAYS = [*((name, False) for name in CASES), ("window-2heads", True), ("wide-8heads", True)]


def make_inputs(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Rows, Tensor]:
    """q, k, v, do; key ranges; gates [T, N]. Inputs carry the rounding of ``dtype``."""
    ranges, tokens, groups, heads, dk, dv = CASES[name]
    rows = Rows(*(x.to(torch.int32).to(device) if isinstance(x, Tensor) else x for x in ranges(tokens)))
    shapes = [
        (tokens, groups * heads, dk),
        (rows.num_keys, groups, dk),
        (rows.num_keys, groups, dv),
        (tokens, groups * heads, dv),
    ]
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    return tensors, rows, torch.rand(tokens, groups * heads, device=device)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """Float64 attention with an explicit mask: out [T, N, Dv], lse [T, N]."""
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    key = torch.arange(k.shape[0], device=q.device)
    hidden = (key < rows.begin[:, None]) | (key >= rows.end[:, None])
    scores = torch.einsum("tnd,mnd->tnm", q, k) * scale
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return torch.einsum("tnm,mnd->tnd", p, v), lse


def query_ranges(rows: Rows) -> tuple[Tensor, Tensor]:
    """The query rows that see each key."""
    key = torch.arange(rows.num_keys, device=rows.end.device, dtype=torch.int32)
    first = torch.searchsorted(rows.end, key, right=True, out_int32=True)
    last = torch.searchsorted(rows.begin, key, right=True, out_int32=True)
    return first, torch.maximum(first, last)


def dense_gradients(tensors: list[Tensor], rows: Rows, gate: Tensor | None, scale: float) -> list[Tensor]:
    q, k, v, do = (x.double() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = dense_attention(*leaves, rows, scale)
    weight = do if gate is None else do * gate.double()[..., None]
    return list(torch.autograd.grad((out * weight).sum(), leaves))


def row_shift(lse: Tensor, gate: Tensor | None) -> Tensor:
    """lse - log(gate), +inf for rows that see nothing."""
    shift = lse if gate is None else lse - gate.float().log()
    return shift.masked_fill(lse == float("-inf"), float("inf"))


def run_backward(tensors: list[Tensor], rows: Rows, gate: Tensor | None, scale: float, **options: object) -> tuple[Tensor, ...]:
    q, k, v, do = tensors
    out, lse = interval_attention_forward(q, k, v, rows.begin, rows.end, scale, config=SMALL)
    delta = (do.float() * out.float()).sum(-1)
    bounds = (rows.begin, rows.end, *query_ranges(rows))
    options = {"dq_config": SMALL, "dkv_config": SMALL, "splits": 1, **options}
    return interval_attention_backward(q, k, v, do, row_shift(lse, gate), delta, *bounds, scale, **options)


@pytest.mark.parametrize("name, bulk", WAYS, ids=lambda x: x if isinstance(x, str) else "bulk" if x else "plain")
def test_forward(name: str, bulk: bool, dtype: torch.dtype, tolerance: float, device: str) -> None:
    (q, k, v, _), rows, _ = make_inputs(name, dtype, device)
    out, lse = interval_attention_forward(q, k, v, rows.begin, rows.end, 0.3, config=SMALL, bulk=bulk)
    expected, expected_lse = dense_attention(q.double(), k.double(), v.double(), rows, 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, expected, max_relative_error=tolerance, name="out")
    assert_close(lse, expected_lse, atol=2e-5, rtol=1e-5, name="lse")
    blind = rows.begin >= rows.end
    assert (lse[blind] == float("-inf")).all() and (out[blind] == 0).all()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, gated: bool, dtype: torch.dtype, tolerance: float, device: str) -> None:
    tensors, rows, gate = make_inputs(name, dtype, device)
    gate = gate if gated else None
    gradients = run_backward(tensors, rows, gate, 0.3, splits=2 if gated else 1, bulk=gated)
    expected = dense_gradients(tensors, rows, gate, 0.3)
    for actual, reference, which in zip(gradients, expected, ("dq", "dk", "dv")):
        assert actual.dtype == torch.float32
        assert_close(actual, reference, max_relative_error=2 * tolerance, name=which)


def test_table_of_tile_shapes(dtype: torch.dtype, tolerance: float, device: str) -> None:
    """The shapes of the table, not the tests' own, at tile-sized inputs."""
    tensors, rows, gate = make_inputs("causal-1head", dtype, device)
    q, k, v, do = tensors
    out, lse = interval_attention_forward(q, k, v, rows.begin, rows.end, 0.25)
    expected, _ = dense_attention(q.double(), k.double(), v.double(), rows, 0.25)
    assert_close(out, expected, max_relative_error=tolerance, name="out")
    delta = (do.float() * out.float()).sum(-1)
    bounds = (rows.begin, rows.end, *query_ranges(rows))
    gradients = interval_attention_backward(q, k, v, do, row_shift(lse, gate), delta, *bounds, 0.25)
    assert_close(list(gradients), dense_gradients(tensors, rows, gate, 0.25), max_relative_error=2 * tolerance, name="gradient")


@pytest.mark.parametrize("name", ["causal-1head", "window-2heads", "chunks-4heads", "wide-8heads", "nothing"])
def test_sums_are_taken_piece_by_piece(name: str, device: str) -> None:
    """As many pieces as wanted add up to the same dk and dv."""
    (q, k, v, do), rows, gate = make_inputs(name, torch.float32, device)
    out, lse = dense_attention(q.double(), k.double(), v.double(), rows, 0.3)
    statistics = (row_shift(lse.float(), gate), (do * out).sum(-1).float())
    expected = dense_gradients([q, k, v, do], rows, gate, 0.3)[1:]
    for splits in (1, 2):
        pieces = interval_attention_backward_dkv(
            q, k, v, do, *statistics, *query_ranges(rows), 0.3, config=SMALL, splits=splits, rows_a_sum=SMALL.rows
        )
        assert_close(list(pieces), expected, max_relative_error=1e-5, name=f"{splits} splits")


@pytest.mark.parametrize("bulk", [False, True], ids=["plain", "bulk"])
def test_rows_outside_every_range_are_never_read(bulk: bool, device: str) -> None:
    (q, k, v, do), rows, gate = make_inputs("window-2heads", torch.float32, device)
    guard = torch.full((5, *k.shape[1:]), float("nan"), device=device)
    shifted = Rows(rows.begin + 5, rows.end + 5, rows.num_keys + 10)
    tensors = [q, torch.cat([guard, k, guard]), torch.cat([guard[..., : v.shape[-1]], v, guard[..., : v.shape[-1]]]), do]
    out, _ = interval_attention_forward(*tensors[:3], shifted.begin, shifted.end, 0.3, config=SMALL, bulk=bulk)
    plain, _ = interval_attention_forward(q, k, v, rows.begin, rows.end, 0.3, config=SMALL)
    assert_close(out, plain, max_relative_error=1e-6, name="out")
    dq, dk, dv = run_backward(tensors, shifted, gate, 0.3, bulk=bulk)
    expected = dense_gradients([q, k, v, do], rows, gate, 0.3)
    assert_close([dq, dk[5:-5], dv[5:-5]], expected, max_relative_error=1e-5, name="gradient")
    assert (dk[:5] == 0).all() and (dv[-5:] == 0).all()


def test_strided_inputs_and_a_gate_shared_by_the_heads(device: str) -> None:
    tensors, rows, gate = make_inputs("compressed-5heads", torch.float32, device)
    strided = [torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, : x.shape[1]] for x in tensors]
    strided[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    strided[1] = torch.stack([tensors[1], tensors[1]], 1).select(1, 0)
    shared = gate[:, :1].expand(-1, gate.shape[1])
    assert not any(x.is_contiguous() for x in strided)
    gradients = run_backward(strided, rows, shared, 0.3)
    assert_close(list(gradients), dense_gradients(tensors, rows, shared, 0.3), max_relative_error=1e-5, name="gradient")


def test_rows_with_lse_of_minus_infinity_get_and_give_no_gradient(device: str) -> None:
    tensors, rows, gate = make_inputs("causal-1head", torch.float32, device)
    q, k, v, do = tensors
    _, lse = interval_attention_forward(q, k, v, rows.begin, rows.end, 0.3, config=SMALL)
    lse[40:] = float("-inf")
    delta = torch.randn(lse.shape, device=device)
    bounds = (rows.begin, rows.end, *query_ranges(rows))
    gradients = interval_attention_backward(
        q, k, v, do, row_shift(lse, gate), delta, *bounds, 0.3, dq_config=SMALL, dkv_config=SMALL, splits=1
    )
    assert (gradients[0][40:] == 0).all() and (gradients[2][40:] == 0).all()
    assert all(x.isfinite().all() for x in gradients)


def test_same_bits_twice_and_in_any_tile(device: str) -> None:
    """Two runs agree to the bit, and so does a row whose tile starts elsewhere: other ranks see it among other rows."""
    tensors, rows, gate = make_inputs("window-2heads", torch.float32, device)
    q, k, v, _ = tensors
    out, lse = interval_attention_forward(q, k, v, rows.begin, rows.end, 0.3, config=SMALL)
    again = interval_attention_forward(q, k, v, rows.begin, rows.end, 0.3, config=SMALL)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    cut = interval_attention_forward(q[11:], k, v, rows.begin[11:], rows.end[11:], 0.3, config=SMALL)
    assert torch.equal(out[11:], cut[0]) and torch.equal(lse[11:], cut[1])
    first, second = (run_backward(tensors, rows, gate, 0.3, splits=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dv", [32, 96])
def test_the_lse_alone_has_the_bits_of_the_whole(dv: int, device: str) -> None:
    """Also where the values are wider than the keys, and decide the tile shape."""
    (q, k, _, _), rows, _ = make_inputs("window-2heads", torch.float32, device)
    v = torch.randn(*k.shape[:2], dv, device=device)
    for span in (16, 1 << 30):
        lse = interval_attention_forward(q, k, v, rows.begin, rows.end, 0.3, span=span)[1]
        assert torch.equal(lse, interval_lse(q, k, rows.begin, rows.end, 0.3, dv, span=span))


def test_gradients_add_up_over_shards(device: str) -> None:
    """With the lse and delta of all keys, the gradients of two halves of the keys are those of the whole (a ring's steps)."""
    tensors, rows, gate = make_inputs("causal-1head", torch.float32, device)
    q, k, v, do = tensors
    out, lse = dense_attention(q.double(), k.double(), v.double(), rows, 0.3)
    delta, shift = (do * out).sum(-1).float(), row_shift(lse.float(), gate)
    half, parts = rows.num_keys // 2, []
    for low, high in ((0, half), (half, rows.num_keys)):
        shard = Rows(rows.begin.clamp(low, high) - low, rows.end.clamp(low, high) - low, high - low)
        bounds = (shard.begin, shard.end, *query_ranges(shard))
        parts.append(
            interval_attention_backward(
                q, k[low:high], v[low:high], do, shift, delta, *bounds, 0.3, dq_config=SMALL, dkv_config=SMALL, splits=2
            )
        )
    gradients = [parts[0][0] + parts[1][0], torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])]
    assert_close(gradients, dense_gradients(tensors, rows, gate, 0.3), max_relative_error=1e-5, name="gradient")


def test_bad_arguments_are_refused(device: str) -> None:
    (q, k, v, _), rows, _ = make_inputs("window-2heads", torch.float32, device)
    with pytest.raises(ValueError, match="do not divide"):
        interval_attention_forward(q[:, :3], k, v, rows.begin, rows.end, 0.3)
    with pytest.raises(ValueError, match="must be positive"):
        interval_attention_forward(q, k, v, rows.begin, rows.end, 0.0)
    with pytest.raises(ValueError, match="wider"):
        wide = torch.zeros(*q.shape[:2], 300, device=device)
        interval_attention_forward(wide, torch.zeros(*k.shape[:2], 300, device=device), v, rows.begin, rows.end, 0.3)
