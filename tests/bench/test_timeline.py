"""The timeline reads a profiler's trace: kernels by stage, and NCCL's time beside compute or alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_cp.bench.timeline import OTHER, TRANSFERS, draw_timeline, overlap_of, parse_trace, stage_of


def _event(name: str, start: float, duration: float, category: str = "kernel", stream: int = 7) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": stream, "args": {"stream": stream}}


TRACE = {
    "baseTimeNanoseconds": 5000,
    "traceEvents": [
        _event("interval_attention_forward_kernel", 1000, 1000),
        _event("ncclDevKernel_AllGather_RING_LL(args)", 500, 1000, stream=20),
        _event("ncclDevKernel_AllGather_RING_LL(args)", 1400, 200, stream=21),
        _event("selected_attention_forward_kernel", 2500, 500),
        _event("ncclDevKernel_SendRecv(args)", 1800, 900, stream=20),
        _event("Memcpy DtoD", 3000, 10, category="gpu_memcpy"),
        # What must be passed over: host side, annotations, incomplete and malformed events.
        _event("aten::mm", 0, 9000, category="cpu_op"),
        _event("nccl:all_gather", 0, 9000, category="gpu_user_annotation"),
        {"ph": "X", "cat": "kernel", "name": "no duration", "ts": 1},
        {"ph": "X", "cat": "kernel", "name": "bad time", "ts": "soon", "dur": 1},
        {"ph": "i", "cat": "kernel", "name": "instant", "ts": 1},
        "noise",
    ],
}


def test_kernels_of_a_trace() -> None:
    kernels = parse_trace(TRACE)
    assert [kernel.stage for kernel in kernels] == [
        TRANSFERS, "window + compressed", TRANSFERS, TRANSFERS, "selected", OTHER,
    ]  # fmt: skip
    assert kernels[0].start == 505.0 and kernels[0].end == 1505.0 and kernels[0].stream == "20"
    assert parse_trace(TRACE["traceEvents"])[0].start == 500.0
    assert parse_trace({}) == [] and parse_trace({"traceEvents": None}) == []


def test_overlap_by_hand() -> None:
    """NCCL runs in [500, 1600] and [1800, 2700]; compute in [1000, 2000], [2500, 3000] and a copy to 3010."""
    overlap = overlap_of(parse_trace(TRACE))
    assert overlap.transfers_ms == pytest.approx(2.0)
    assert overlap.hidden_ms == pytest.approx(0.6 + 0.2 + 0.2)
    assert overlap.exposed_ms == pytest.approx(1.0)
    assert overlap.compute_ms == pytest.approx(1.51)
    assert overlap.span_ms == pytest.approx(2.51)
    assert overlap_of([]) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "transfers"),
        ("block_scores_kernel", "selection"),
        ("top_blocks_kernel", "selection"),
        ("block_product_kernel", "compression"),
        ("selected_attention_backward_dkv_kernel", "selected"),
        ("interval_attention_backward_dq_kernel", "window + compressed"),
        ("combine_backward_kernel", "gating"),
        ("query_gradients_kernel", "query gradients"),
        ("interval_attention_forward_hopper_kernel", "window + compressed"),
        ("activation_gradient_kernel", "compression"),
        ("list_numbers_kernel", "selected"),
        ("void at::native::CatArrayBatchedCopy_contig", OTHER),
    ],
)
def test_stages_of_kernels(kernel: str, stage: str) -> None:
    assert stage_of(kernel) == stage


def test_the_picture(tmp_path: Path) -> None:
    kernels = parse_trace(TRACE)
    draw_timeline([kernels, kernels, []], "three ranks", tmp_path / "new" / "timeline.png")
    assert (tmp_path / "new" / "timeline.png").stat().st_size > 10_000
