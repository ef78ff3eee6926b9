"""The arms' models: parameter counts, closed and random branches, and the probe's figures, against sums by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nsa_cp.attention import full_attention
from nsa_cp.bench.inputs import HeadLayout, make_inputs
from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.ops import select_blocks
from nsa_cp.study.arms import ARMS, DENSE_BLOCKS, Arm, from_full_arms, held_gates_arms, late_arms, model_of
from nsa_cp.study.model import Decoder, ModelSettings, _full_attention, count_parameters
from nsa_cp.study.probe import attention_calls, dense_block_mass, gate_means, probe, save_selections
from nsa_cp.study.random_blocks import random_blocks
from nsa_cp.study.studies import build_study
from nsa_cp.study.task import Batch, Group, pack_layout

NSA = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=4, num_local_blocks=1, window_size=24
)
# Branches that start alike would hide that one took another's keys.
BASE = ModelSettings(
    vocab_size=50, hidden_size=32, kv_channels=16, ffn_hidden_size=64, nsa=NSA, rotary=RotaryConfig(percent=0.5),
    equal_start=False,
)  # fmt: skip
ARM = {arm.name: arm for arm in ARMS}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["mqar", "passkey"])
def test_arms_said_to_have_equal_parameters_do(name: str) -> None:
    study = build_study(name, "full")
    counts = {arm.name: count_parameters(model_of(arm, study.model)) for arm in ARMS}
    assert counts["random_blocks"] == counts["nsa"] > 1.2 * counts["full"]
    for arm in ("full_params", "window", "compressed_window"):
        assert counts["nsa"] <= counts[arm] < 1.01 * counts["nsa"], arm
    layers = {"mqar": 1, "passkey": 2}[name]
    # By hand, for each layer: less of K/V for two branches, [128, 2 * 2 * 64].
    assert counts["nsa"] - counts["shared_kv"] == layers * 128 * 2 * 2 * 64
    # K and V: position [16, 64], w1 [16 * 64, 64], w2 [64, 64].
    assert counts["nsa"] - counts["compressor_mean"] == layers * 2 * (16 * 64 + 16 * 64 * 64 + 64 * 64)
    assert counts["nsa"] - counts["gate_branch"] == layers * 128 * 3 * (4 - 1)


def test_one_seed_gives_arms_the_same_weights_where_shapes_agree() -> None:
    models = {name: Decoder(model_of(ARM[name], BASE), seed=3).state_dict() for name in ("full", "nsa", "random_blocks")}
    for name, weight in models["full"].items():
        if weight.shape == models["nsa"][name].shape:
            assert torch.equal(weight, models["nsa"][name]), name
    assert all(torch.equal(w, models["random_blocks"][name]) for name, w in models["nsa"].items())
    other = Decoder(BASE, seed=4).state_dict()
    assert not torch.equal(other["embedding.weight"], models["nsa"]["embedding.weight"])


def test_branches_that_start_equal() -> None:
    """Their keys and values agree at the start, unless they are to start apart; the first branch starts the same either way."""
    equal_base = replace(BASE, equal_start=True)
    by_branch = {
        name: Decoder(model_of(ARM[name], equal_base), seed=3).attentions[0].kv_proj.weight.unflatten(0, (3, -1))
        for name in ("apart_start", "nsa")
    }
    equal, independent = by_branch["nsa"], by_branch["apart_start"]
    assert torch.equal(equal[0], equal[1]) and torch.equal(equal[0], equal[2])
    assert not torch.equal(independent[0], independent[1])
    assert torch.equal(equal[0], independent[0])


@torch.no_grad()
def test_a_model_that_is_dense_at_first_goes_on_as_nsa_with_its_weights() -> None:
    tokens, layout = torch.randint(50, (200,), generator=torch.Generator().manual_seed(0)), pack_layout(1, 200)
    settings = model_of(from_full_arms(2)[0], BASE)
    model, full = Decoder(settings, seed=3).double(), Decoder(model_of(ARM["full"], BASE), seed=3).double()
    state = model.state_dict()
    first = {f"layers.{i}.attention.kv_proj.weight": slice(0, 2 * 16) for i in range(2)}
    full.load_state_dict({name: state[name][first.get(name, slice(None))] for name in full.state_dict()})
    dense = full(tokens, layout)
    model.enter_stage(1)
    torch.testing.assert_close(model(tokens, layout), dense)
    assert gate_means(model) == []
    model.enter_stage(2)
    model.enter_stage(3)
    for attention, before in zip(model.attentions, full.attentions, strict=True):
        assert all(torch.equal(branch, before.kv_proj.weight) for branch in attention.kv_proj.weight.chunk(3))
        torch.testing.assert_close(attention.out_proj.weight, before.out_proj.weight / 1.5)
    sparse = model(tokens, layout)
    assert gate_means(model) == [[0.5, 0.5, 0.5]] * 2
    assert not torch.allclose(sparse, dense)


def logits(settings: ModelSettings, tokens: torch.Tensor, length: int) -> torch.Tensor:
    with torch.no_grad():
        return Decoder(settings, seed=1).double()(tokens, pack_layout(len(tokens) // length, length))


@pytest.mark.parametrize(("name", "reach"), [("full", 200), ("nsa", 200), ("compressed_window", 200), ("window", 47)])
def test_how_far_an_arm_sees(name: str, reach: int) -> None:
    """The furthest token before a query that changes its logits; windows of 24 in two layers reach 2 * 23, the shift one more."""
    settings = model_of(ARM[name], replace(BASE, shift=True))
    tokens = torch.randint(50, (256,), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[: 256 - 1 - reach] = (changed[: 256 - 1 - reach] + 1) % 50
    moved = (logits(settings, tokens, 256) - logits(settings, changed, 256))[-1].abs().max()
    assert (moved == 0) == (name == "window")
    changed = tokens.clone()
    changed[255 - reach] = (changed[255 - reach] + 1) % 50
    assert (logits(settings, tokens, 256) - logits(settings, changed, 256))[-1].abs().max() > 0


def test_sequences_of_a_pack_do_not_see_each_other() -> None:
    tokens = torch.randint(50, (192,), generator=torch.Generator().manual_seed(0))
    for name in ("full", "nsa", "random_blocks", "window"):
        settings = model_of(ARM[name], replace(BASE, shift=True))
        if name != "random_blocks":  # whose choice belongs to the place in the pack
            torch.testing.assert_close(logits(settings, tokens, 96)[96:], logits(settings, tokens[96:], 96))
        changed = torch.cat([tokens[:96].flip(0), tokens[96:]])
        torch.testing.assert_close(logits(settings, tokens, 96)[96:], logits(settings, changed, 96)[96:])


def test_batched_full_attention_is_that_of_the_library() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(120, heads, 16, generator=generator) for heads in (4, 2, 2))
    for layout in (pack_layout(3, 40), pack_layout(1, 120)):
        expected = full_attention(q, k, v, layout, rotary=BASE.rotary)
        torch.testing.assert_close(_full_attention(q, k, v, layout, BASE.rotary), expected)


def test_a_closed_branch_contributes_nothing() -> None:
    model = Decoder(model_of(ARM["compressed_window"], BASE), seed=0)
    batch, layout = Batch(np.arange(128) % 50, np.arange(128), np.zeros(128, np.int64)), pack_layout(1, 128)
    calls = attention_calls(model, batch, layout, torch.float32)
    assert all((call.gates[..., 1] == 0).all() and (call.gates[..., 0] > 0).all() for call in calls)
    loss = model(torch.from_numpy(batch.tokens), layout).square().sum()
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["late_selection", "late_shared_kv", "late_random"])
def test_a_selected_branch_that_opens_late(name: str) -> None:
    """Closed, it gives nothing and learns nothing; open, it starts from the window's keys and values."""
    (arm,) = (arm for arm in late_arms(2) if arm.name == name)
    model = Decoder(model_of(arm, BASE), seed=0)
    tokens, layout = torch.arange(256) % 50, pack_layout(1, 256)
    batch = Batch(tokens.numpy(), np.arange(256), np.zeros(256, np.int64))
    rest = [each.kv_proj.weight.detach().clone() for each in model.attentions]
    for stage in (0, 1):
        model.enter_stage(stage)
        assert all((call.gates[..., 1] == 0).all() for call in attention_calls(model, batch, layout, torch.float32))
        model(tokens, layout).square().sum().backward()
    if name != "late_shared_kv":
        for each in model.attentions:
            compressed, selected, window = each.kv_proj.weight.grad.unflatten(0, (3, -1))
            assert (selected == 0).all() and (compressed != 0).any() and (window != 0).any()
    closed = model(tokens, layout)
    model.enter_stage(2)
    assert all((call.gates[..., 1] > 0).all() for call in attention_calls(model, batch, layout, torch.float32))
    assert not torch.equal(model(tokens, layout), closed)
    for each, before in zip(model.attentions, rest, strict=True):
        if name == "late_shared_kv":
            assert torch.equal(each.kv_proj.weight, before)
            continue
        now, before = each.kv_proj.weight.unflatten(0, (3, -1)), before.unflatten(0, (3, -1))
        assert torch.equal(now[1], now[2]) and torch.equal(now[2], before[2]) and torch.equal(now[0], before[0])
        with torch.no_grad():
            now[1].zero_()
    # It opens once: what has been learned since stays.
    model.enter_stage(3)
    if name != "late_shared_kv":
        assert all((each.kv_proj.weight.unflatten(0, (3, -1))[1] == 0).all() for each in model.attentions)


@pytest.mark.parametrize("arm", held_gates_arms(1), ids=lambda arm: arm.name)
def test_gates_that_are_held_at_one_half(arm: Arm) -> None:
    """Held, the gates learn nothing and all else does; then they learn, from one half on, and are not reset again."""
    model = Decoder(model_of(arm, BASE), seed=0)
    tokens, layout = torch.arange(256) % 50, pack_layout(1, 256)
    batch = Batch(tokens.numpy(), np.arange(256), np.zeros(256, np.int64))

    def gates() -> list[torch.Tensor]:
        return [call.gates for call in attention_calls(model, batch, layout, torch.float32)]

    model.enter_stage(0)
    assert all((each == 0.5).all() for each in gates())
    model(tokens, layout).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.endswith("gate_proj.weight"), name
    held = model(tokens, layout)
    model.enter_stage(1)
    assert torch.equal(model(tokens, layout), held)
    model(tokens, layout).square().sum().backward()
    for each in model.attentions:
        assert each.gate_proj.weight.grad.any()
        with torch.no_grad():
            each.gate_proj.weight.fill_(0.1)
    model.enter_stage(2)
    assert not any((each == 0.5).all() for each in gates())


def test_random_blocks_are_visible_distinct_and_keep_the_forced_ones() -> None:
    layout = pack_layout(2, 100)
    blocks = random_blocks(layout, NSA, 2, 7, CPU)
    q, k = torch.zeros(200, 4, 16), torch.zeros(48, 2, 16)
    scored = select_blocks(q, k, NSA, layout.cu_seqlens)
    assert blocks.shape == scored.shape and blocks.dtype == scored.dtype
    assert ((blocks >= 0).sum(-1) == (scored >= 0).sum(-1)).all()
    for row, position in enumerate(layout.local_positions.tolist()):
        for chosen in blocks[row]:
            real = chosen[chosen >= 0].tolist()
            assert real == sorted(set(real)) and real[-1] == position // 16 and real[0] == 0
    assert torch.equal(blocks, random_blocks(layout, NSA, 2, 7, CPU))
    assert not torch.equal(blocks, random_blocks(layout, NSA, 2, 8, CPU))
    # Every block is chosen somewhere: the draw is no fixed pattern.
    assert set(blocks[99].flatten().tolist()) | set(blocks[98].flatten().tolist()) <= set(range(7))
    late = torch.stack([random_blocks(layout, NSA, 2, seed, CPU)[99] for seed in range(40)])
    assert set(late.flatten().tolist()) == set(range(7))


def test_dense_mass_by_block() -> None:
    k = torch.zeros(10, 1, 2)
    k[5, 0] = torch.tensor([3.0, 0.0]) * 2**0.5
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mass = dense_block_mass(q, k, 4)
    e = float(np.exp(3.0))
    first = np.array([4 / (9 + e), (3 + e) / (9 + e), 2 / (9 + e)])
    np.testing.assert_allclose(mass[0].numpy(), (first + np.array([0.4, 0.4, 0.2])) / 2, rtol=1e-6)


def test_the_probe_tells_scored_from_random_selection() -> None:
    """With one K for all branches and sharp queries the compressed scores know where dense attention looks, even untrained."""
    found, shared = {}, replace(BASE, num_layers=1, nsa=replace(NSA, shared_kv=True))
    for name in ("nsa", "random_blocks", "compressed_window"):
        model = Decoder(model_of(ARM[name], shared), seed=0)
        model.attentions[0].q_proj.weight.data.mul_(4)
        rng = np.random.default_rng(0)
        batch = Batch(rng.integers(0, 50, 1024), np.arange(512, 1024, 8), np.zeros(64, np.int64))
        found[name] = probe(model, Group("x", pack_layout(1, 1024), [batch]), torch.float32)
    assert set(found["nsa"]) == {"gates", "agreement", "recall", "mass"} and set(found["compressed_window"]) == {"gates"}
    for key in ("recall", "mass", "agreement"):
        assert 0 <= found["random_blocks"][key][0] <= 1
    assert found["nsa"]["recall"][0] > 1.5 * found["random_blocks"]["recall"][0]
    assert found["nsa"]["mass"][0] > found["random_blocks"]["mass"][0]
    assert probe(Decoder(model_of(ARM["full"], BASE), seed=0), Group("x", pack_layout(1, 1024), [batch]), torch.float32) == {}


@pytest.mark.parametrize("shared_kv", [False, True])
def test_dense_blocks_are_those_that_dense_attention_weights_most(shared_kv: bool) -> None:
    """Recall of them is 1 by the probe's own sums, in every sequence of a pack; the scored ones miss some."""
    base = replace(BASE, num_attention_heads=4, num_query_groups=2, nsa=replace(NSA, shared_kv=shared_kv))
    rng = np.random.default_rng(0)
    batch = Batch(rng.integers(0, 50, 512), np.arange(0, 512, 5), np.zeros(103, np.int64))
    found = {}
    for arm in (DENSE_BLOCKS, ARM["nsa"]):
        model = Decoder(model_of(arm, base), seed=0)
        found[arm.name] = probe(model, Group("x", pack_layout(2, 256), [batch]), torch.float32)
    assert found["dense_blocks"]["recall"] == [1.0, 1.0]
    assert all(recall < 0.9 for recall in found["nsa"]["recall"])
    assert all(dense > scored for dense, scored in zip(found["dense_blocks"]["mass"], found["nsa"]["mass"], strict=True))


def test_saved_selections_hold_what_the_benchmark_reads(tmp_path: Path) -> None:
    settings = replace(BASE, num_attention_heads=4, num_query_groups=2)
    model, file = Decoder(settings, seed=0), tmp_path / "selections.pt"
    batch = Batch(np.arange(256) % 50, np.arange(256), np.zeros(256, np.int64))
    save_selections(model, Group("x", pack_layout(2, 128), [batch]), torch.float32, file, {"arm": "nsa"})
    saved = torch.load(file, weights_only=True)
    assert saved["q"].shape == (128, 2, 16) and saved["gates"].shape == (128, 2, 3)
    assert [x.shape for x in (*saved["k"], *saved["v"])] == [(128, 1, 16)] * 6
    assert NSAConfig(**saved["config"]) == NSA and RotaryConfig(**saved["rotary"]) == settings.rotary
    assert [w.shape[0] for w in (*saved["k_weights"], *saved["v_weights"])] == [1] * 6 and saved["origin"] == {"arm": "nsa"}


def test_the_benchmark_takes_saved_selections(tmp_path: Path) -> None:
    model, file = Decoder(BASE, seed=0), tmp_path / "selections.pt"
    batch = Batch(np.arange(256) % 50, np.arange(256), np.zeros(256, np.int64))
    save_selections(model, Group("x", pack_layout(1, 256), [batch]), torch.float32, file, {})
    heads = HeadLayout(4, 1, 16, 16)
    inputs = make_inputs(NSA, heads, 256, "trained", seed=0, device=CPU, dtype=torch.float32, trained_file=file)
    saved = torch.load(file, weights_only=True)
    assert torch.equal(inputs.v[1], saved["v"][1]) and torch.equal(inputs.gates, saved["gates"])
