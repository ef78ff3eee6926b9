"""What is refused before anything is built, and the parts that need no processes: batches, packs, apex, the CPU module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.megatron import (
    AttentionSettings,
    NSATransformerConfig,
    check_apex,
    check_cpu_config,
    check_sequence_length,
    cpu_compatibility,
    get_nsa_layer_spec,
    has_apex,
    make_packed_seq_params,
    sequence_layout,
    shard_batch,
)
from nsa_cp.megatron.layout import packed_borders
from nsa_cp.megatron.norm import RMSNorm

CUDA_CALLS = (
    (torch.cuda, "current_device"),
    (torch.cuda, "synchronize"),
    (torch.cuda, "get_rng_state"),
    (torch.cuda, "manual_seed"),
    (torch.cuda.random, "get_rng_state"),
)


def config(**changes: Any) -> NSATransformerConfig:
    settings = dict(num_layers=2, hidden_size=32, num_attention_heads=8, num_query_groups=4, use_cpu_initialization=True)
    return NSATransformerConfig(**{**settings, **changes})


# --- configuration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_attention_heads=6), "num_attention_heads = 6 is not a multiple of num_query_groups = 4; use 8 heads"),
        (dict(tensor_model_parallel_size=8), "num_query_groups = 4 is smaller than tensor_model_parallel_size = 8"),
        (dict(tensor_model_parallel_size=3), "num_query_groups = 4 is not a multiple of tensor_model_parallel_size = 3; use 6"),
        (dict(num_attention_heads=0), "num_attention_heads = 0 and num_query_groups = 4 must both be at least 1"),
        (dict(hidden_size=36), "hidden_size = 36 is not a multiple of num_attention_heads = 8; set kv_channels"),
        (dict(v_channels=0), "v_channels = 0 must be at least 1"),
        (dict(layer_pattern=("nsa", "dense")), r"layer_pattern\[1\] = 'dense' is unknown; use 'nsa', 'full' or 'window'"),
        (dict(layer_pattern=()), "layer_pattern is empty"),
        (dict(layer_pattern="nsa"), "layer_pattern = 'nsa' is one string"),
        (dict(layer_pattern=("window",), nsa=NSAConfig(window_size=0)), "nsa.window_size = 0; use at least 1"),
        (dict(rotary=RotaryConfig(percent=0.3)), "percent = 0.3 of kv_channels = 4 rotates no channel"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("multi_latent_attention", True),
        ("attention_dropout", 0.1),
        ("attention_output_gate", True),
        ("qk_layernorm", True),
        ("qk_clip", True),
        ("external_cuda_graph", True),
        ("use_kitchen_attention", True),
        ("softmax_scale", 0.5),
        ("softmax_type", "learnable"),
        ("window_size", (128, 0)),
        ("no_rope_freq", 4),
        ("rotary_interleaved", True),
        ("layernorm_zero_centered_gamma", True),
        ("normalization", "LayerNorm"),
        ("fp8", "hybrid"),
        ("apply_query_key_layer_scaling", True),
        ("mtp_num_layers", 1),
        ("cuda_graph_impl", "local"),
        ("flash_decode", True),
    ],
)
def test_settings_that_layers_would_ignore_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} = .* is not supported by NSA layers: .*; set it to"):
        config(**{name: value})


def test_pattern_follows_global_layer_numbers() -> None:
    made = config(layer_pattern=["nsa", "full", "window"])
    assert made.layer_pattern == ("nsa", "full", "window")
    kinds = [made.attention_settings.layer_type(number) for number in range(1, 8)]
    assert kinds == ["nsa", "full", "window", "nsa", "full", "window", "nsa"]


def test_settings_object_is_checked_alike() -> None:
    with pytest.raises(ValueError, match="'sparse' is unknown"):
        AttentionSettings(layer_pattern=("sparse",))


def test_cpu_settings_that_fail_or_go_wrong_are_refused() -> None:
    with cpu_compatibility(force=True):
        check_cpu_config(config())
        with pytest.raises(ValueError, match="use_cpu_initialization = False needs CUDA"):
            check_cpu_config(config(use_cpu_initialization=False))
        with pytest.raises(ValueError, match="use_cpu_initialization = False needs CUDA"):
            get_nsa_layer_spec(config(use_cpu_initialization=False))
        interleaved = dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=1, pipeline_dtype=torch.float32)
        with pytest.raises(ValueError, match="set overlap_p2p_comm=True and batch_p2p_comm=False"):
            check_cpu_config(config(**interleaved))


# --- batches and packs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "kind", "cp", "shared", "message"),
    [
        (66, "zigzag", 2, 1, "66 is not a multiple of 2 \\* context_parallel_size = 4 for the zigzag layout; pad to 68"),
        (66, "contiguous", 4, 1, "66 is not a multiple of context_parallel_size = 4 for the contiguous layout; pad to 68"),
        (68, "zigzag", 2, 4, "context_parallel_size \\* tensor_model_parallel_size = 8 .* pad to 72"),
        (0, "zigzag", 1, 1, "sequence length 0"),
    ],
)
def test_lengths_that_do_not_divide_are_refused(length: int, kind: Any, cp: int, shared: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sequence_length(length, kind, cp, shared)


@pytest.mark.parametrize(("length", "kind", "cp"), [(7, "zigzag", 1), (8, "zigzag", 2), (9, "contiguous", 3)])
def test_lengths_that_divide_are_accepted(length: int, kind: Any, cp: int) -> None:
    check_sequence_length(length, kind, cp)


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_batch_is_cut_as_megatron_cuts_it(kind: Any) -> None:
    made = config(context_parallel_size=4, nsa=NSAConfig(layout=kind))
    tokens = torch.arange(3 * 32).view(3, 32)
    for rank in range(4):
        local, packed = shard_batch({"tokens": tokens, "mask": tokens[..., None] > 5}, made, cp_rank=rank)
        pieces = tokens.chunk(8, 1) if kind == "zigzag" else tokens.chunk(4, 1)
        expected = torch.cat([pieces[rank], pieces[7 - rank]], 1) if kind == "zigzag" else pieces[rank]
        assert packed is None
        assert torch.equal(local["tokens"], expected)
        assert torch.equal(local["mask"], expected[..., None] > 5)
        assert torch.equal(local["position_ids"], expected % 32)


def test_pack_is_cut_document_by_document() -> None:
    made = config(context_parallel_size=2)
    tokens = torch.arange(20)[None]
    locals_ = [shard_batch({"tokens": tokens}, made, cp_rank=rank, cu_seqlens=(0, 8, 8, 20)) for rank in range(2)]
    assert locals_[0][0]["tokens"].tolist() == [[0, 1, 6, 7, 8, 9, 10, 17, 18, 19]]
    assert locals_[0][0]["position_ids"].tolist() == [[0, 1, 6, 7, 0, 1, 2, 9, 10, 11]]
    assert locals_[1][0]["tokens"].tolist() == [[2, 3, 4, 5, 11, 12, 13, 14, 15, 16]]
    packed = locals_[0][1]
    assert packed.qkv_format == "thd" and packed.cu_seqlens_q.tolist() == [0, 8, 8, 20] and packed.max_seqlen_q == 12


@pytest.mark.parametrize(
    ("changes", "shape", "borders", "message"),
    [
        ({}, (2, 20), (0, 20), "batch of 1, not 2"),
        ({}, (1, 20), (0, 16), "cu_seqlens ends at 16, but the batch has 20 tokens; end it at 20"),
        ({}, (1, 20), (0, 24, 20), "descends from 24 to 20"),
        (
            dict(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32),
            (1, 20),
            (0, 1, 2, 20),
            r"hold \[11, 9\] tokens of this pack, but pipeline stages exchange equal shapes; pad every .* multiple of 4",
        ),
        (
            dict(tensor_model_parallel_size=2, sequence_parallel=True),
            (1, 20),
            (0, 1, 2, 20),
            "sequence parallelism cannot share over tensor_model_parallel_size = 2; pad every document to a multiple of 8",
        ),
    ],
)
def test_packs_that_cannot_be_cut_are_refused(
    changes: dict[str, Any], shape: tuple[int, int], borders: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shard_batch({"tokens": torch.zeros(shape)}, config(context_parallel_size=2, **changes), cp_rank=0, cu_seqlens=borders)


def test_tensors_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="must share"):
        shard_batch({"tokens": torch.zeros(1, 8), "labels": torch.zeros(1, 7)}, config(), cp_rank=0)


def test_borders_are_copied_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = make_packed_seq_params((0, 8, 20), "cpu")
    del packed._nsa_cp_borders
    padded = torch.tensor([0, 16, 32], dtype=torch.int32)
    packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = padded
    copies = []
    copy = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(1) or copy(self))
    assert packed_borders(packed) == (0, 16, 32), "padded borders say where the tokens lie"
    assert len(copies) == 2
    layouts = [sequence_layout("zigzag", None, local_length=32, packed_seq_params=packed) for _ in range(3)]
    assert len(copies) == 2 and layouts[0] is layouts[2]


@pytest.mark.parametrize("change", ["in place", "assigned"])
def test_borders_that_change_are_read_again(change: str) -> None:
    """The next microbatch's in the same object."""
    packed, following = make_packed_seq_params((0, 8, 20), "cpu"), torch.tensor([0, 12, 20], dtype=torch.int32)
    for _ in range(2):
        assert packed_borders(packed) == (0, 8, 20)
    if change == "in place":
        packed.cu_seqlens_q.copy_(following)
    else:
        packed.cu_seqlens_q = packed.cu_seqlens_kv = following
    for _ in range(2):
        assert packed_borders(packed) == (0, 12, 20)
    with torch.inference_mode():
        assert packed_borders(make_packed_seq_params((0, 4), "cpu")) == (0, 4)


def test_what_is_none_in_a_batch_stays_none() -> None:
    batch = {"tokens": torch.arange(8)[None], "attention_mask": None, "position_ids": None}
    local, _ = shard_batch(batch, config(context_parallel_size=2), cp_rank=0)
    assert local["attention_mask"] is None
    assert local["tokens"].tolist() == local["position_ids"].tolist() == [[0, 1, 6, 7]]
    with pytest.raises(ValueError, match="must share"):
        shard_batch({"attention_mask": None}, config(), cp_rank=0)


def test_norm_of_a_float32_residual_stream_has_the_weights_dtype() -> None:
    norm = RMSNorm(config(params_dtype=torch.bfloat16), 32)
    x = torch.randn(5, 32)
    expected = torch.nn.functional.rms_norm(x, (32,), eps=1e-5)
    assert norm(x).dtype == norm(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), expected.bfloat16())


def test_layers_of_several_kinds_are_saved_under_keys_of_their_own() -> None:
    assert config().hetereogenous_dist_checkpoint, "not only once a layer has been built"


def test_packs_of_another_format_are_refused() -> None:
    packed = make_packed_seq_params((0, 8), "cpu")
    del packed._nsa_cp_borders
    packed.cu_seqlens_kv = torch.tensor([0, 4, 8])
    with pytest.raises(ValueError, match="different borders for queries and keys"):
        packed_borders(packed)
    packed.qkv_format = "sbhd"
    with pytest.raises(ValueError, match="qkv_format = 'sbhd' is not supported; use 'thd'"):
        packed_borders(packed)


# --- apex -------------------------------------------------------------------------------------------------------------------


def test_unrelated_apex_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="is not NVIDIA's: .*Pyramid.* run `pip uninstall apex`"):
        check_apex()
    (tmp_path / "apex" / "normalization").mkdir()
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    assert check_apex() is False
    (tmp_path / "amp_C.py").write_text("")
    assert check_apex() is True and has_apex()
    assert "apex" not in sys.modules and "amp_C" not in sys.modules


def test_unrelated_apex_that_breaks_megatrons_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('made for another framework')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run([sys.executable, "-c", "import nsa_cp.megatron"], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "made for another framework" in run.stderr and "pip uninstall apex" in run.stderr.splitlines()[-1]


# --- the CPU module ---------------------------------------------------------------------------------------------------------


def test_cpu_module_maps_cuda_to_the_cpu_and_leaves_no_trace() -> None:
    before = [getattr(owner, name) for owner, name in CUDA_CALLS]
    with cpu_compatibility(force=True), cpu_compatibility(force=True):
        assert torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
        assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.ones(1).to("cuda").cuda().device.type == "cpu"
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.float64).dtype == torch.float64
        torch.cuda.synchronize()
    assert [getattr(owner, name) for owner, name in CUDA_CALLS] == before
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_cpu_module_gives_megatrons_generators(caplog: pytest.LogCaptureFixture) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    def draws(tp_rank: int) -> tuple[float, float, float]:
        model_parallel_cuda_manual_seed(7, tp_rank=tp_rank, ep_rank=0, etp_rank=0, force_reset_rng=True)
        shared = float(torch.rand(()))
        with get_cuda_rng_tracker().fork():
            own = float(torch.rand(()))
        return shared, own, float(torch.rand(()))

    with cpu_compatibility(force=True):
        first, again, other = draws(0), draws(0), draws(1)
    assert first == again
    assert (first[0], first[2]) == (other[0], other[2]) and first[1] != other[1]
    assert "CPU RNG state changed" not in caplog.text


def test_cpu_module_does_nothing_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [getattr(owner, name) for owner, name in CUDA_CALLS]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with cpu_compatibility():
        assert [getattr(owner, name) for owner, name in CUDA_CALLS] == before
        assert torch.ones(1).type() == "torch.FloatTensor"
        check_cpu_config(config(use_cpu_initialization=False))
