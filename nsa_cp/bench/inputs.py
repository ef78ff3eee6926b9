"""Benchmark inputs: random queries, whose neighbours choose independently; drifting ones, which agree; a trained model's."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.ops import compress_kv, initial_compressor_weights, select_blocks
from nsa_cp.ops.rope import apply_rope, rotary_tables
from nsa_cp.study.neighbours import neighbour_agreement

KINDS = ("random", "drifting", "trained")
# Agreement of neighbouring queries' choices that drifting inputs aim at.
AGREEMENT = 0.8
# Tokens times groups on which drifting inputs are calibrated, if the head layout has so many groups.
_CALIBRATION_ROWS = 1 << 18
_TRAINED_KEYS = ("q", "k", "v", "gates", "k_weights", "v_weights", "config")
# A trained file's settings: _SIZES must equal the benchmark's, _FORMS are taken over from the file.
_SIZES = (
    "compress_block_size", "compress_stride", "select_block_size", "num_selected_blocks", "num_init_blocks",
    "num_local_blocks", "window_size",
)  # fmt: skip
_FORMS = ("compressor", "shared_kv", "gate")


@dataclass(frozen=True)
class HeadLayout:
    """N query heads over G groups, Dk query/key and Dv value channels."""

    num_heads: int
    num_groups: int
    qk_dim: int
    v_dim: int

    @classmethod
    def parse(cls, text: str) -> HeadLayout:
        """``64/4x128`` or, with Dk and Dv, ``64/4x192/128``.

        Raises:
            ValueError: any other form.
        """
        try:
            heads, dims = text.split("x")
            num_heads, num_groups = (int(x) for x in heads.split("/"))
            qk_dim, v_dim = (int(x) for x in (dims if "/" in dims else f"{dims}/{dims}").split("/"))
        except ValueError:
            raise ValueError(
                f"head layout {text!r} has the form HEADS/GROUPSxDIM or HEADS/GROUPSxDK/DV, as in 64/4x128"
            ) from None
        if min(num_heads, num_groups, qk_dim, v_dim) < 1 or num_heads % num_groups:
            raise ValueError(
                f"head layout {text!r}: {num_heads} heads must divide over {num_groups} groups, and widths be positive"
            )
        return cls(num_heads, num_groups, qk_dim, v_dim)

    def shard(self, ranks: int) -> HeadLayout:
        """The heads of one of ``ranks`` tensor-parallel ranks.

        Raises:
            ValueError: the groups do not divide over the ranks.
        """
        if self.num_groups % ranks:
            raise ValueError(
                f"{self.num_groups} K/V groups do not divide over {ranks} tensor-parallel ranks; "
                f"use a divisor of {self.num_groups}"
            )
        return replace(self, num_heads=self.num_heads // ranks, num_groups=self.num_groups // ranks)

    def __str__(self) -> str:
        """The form that :meth:`parse` reads."""
        dims = f"{self.qk_dim}" if self.qk_dim == self.v_dim else f"{self.qk_dim}/{self.v_dim}"
        return f"{self.num_heads}/{self.num_groups}x{dims}"


@dataclass
class AttentionInputs:
    """q, per-branch k and v, gates, compressor weights and the upstream gradient; all leaves require gradients but ``grad``."""

    q: torch.Tensor
    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    gates: torch.Tensor
    k_weights: tuple[torch.Tensor, ...]
    v_weights: tuple[torch.Tensor, ...]
    grad: torch.Tensor

    @property
    def leaves(self) -> list[torch.Tensor]:
        """All tensors for which a backward pass computes a gradient."""
        return [self.q, *self.k, *self.v, self.gates, *self.k_weights, *self.v_weights]


def make_inputs(
    config: NSAConfig,
    heads: HeadLayout,
    seq_len: int,
    kind: str,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    trained_file: Path | None = None,
) -> AttentionInputs:
    """Inputs of one sequence.

    Args:
        kind: ``random``: queries of neighbouring tokens are independent; ``drifting``: they change so slowly that a query
            keeps about 80% of the blocks its predecessor chose freely; ``trained``: tensors of one layer of a trained model
            on a text, see :func:`trained_inputs`.
        trained_file: the file of ``trained`` inputs.

    Raises:
        ValueError: an unknown kind, or a file that is missing or does not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"inputs {kind!r} are unknown; use one of {', '.join(KINDS)}")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def weights(dim: int) -> tuple[torch.Tensor, ...]:
        initial = initial_compressor_weights(config, heads.num_groups, dim, torch.Generator().manual_seed(seed))
        return tuple(w.to(device, dtype).requires_grad_() for w in initial)

    grad = normal(seq_len, heads.num_heads, heads.v_dim)
    if kind == "trained":
        if trained_file is None:
            raise ValueError("inputs 'trained' need a file of a trained model's tensors; give one with --trained-file FILE")
        return trained_inputs(trained_file, config, heads, grad)
    q = normal(seq_len, heads.num_heads, heads.qk_dim)
    if kind == "drifting":
        q = smooth(q, memory_for_agreement(config, heads, seq_len, AGREEMENT, device, dtype))
    branches, groups = config.num_branch_kv, heads.num_groups
    return AttentionInputs(
        q=q.requires_grad_(),
        k=tuple(normal(seq_len, groups, heads.qk_dim).requires_grad_() for _ in range(branches)),
        v=tuple(normal(seq_len, groups, heads.v_dim).requires_grad_() for _ in range(branches)),
        gates=torch.rand(seq_len, heads.num_heads, 3, generator=generator, device=device).to(dtype).requires_grad_(),
        k_weights=weights(heads.qk_dim),
        v_weights=weights(heads.v_dim),
        grad=grad,
    )


def trained_inputs(path: Path, config: NSAConfig, heads: HeadLayout, grad: torch.Tensor) -> AttentionInputs:
    """One layer's tensors from a file, repeated or cut to the length of ``grad`` [S, N, Dv], on its device and in its dtype.

    Args:
        path: a ``torch.save`` of a dict: ``q`` [T, N, Dk]; ``k`` and ``v``, tuples of [T, G, Dk] and [T, G, Dv] for each
            branch; ``gates`` [T, N or 1, 3] in (0, 1); ``k_weights`` and ``v_weights``, tuples; ``config``, the fields of
            the layer's NSAConfig; and, if q and k are not rotated yet, ``rotary``, the fields of its RotaryConfig.
        config: settings to measure with. Its compressor and shared_kv must be the file's (:func:`trained_config`).

    Raises:
        ValueError: a file of another format, or with other heads or settings; the message gives both.
    """
    saved = _read_trained(path)
    saved_config = trained_config(path, config)
    if saved_config != config:
        raise ValueError(f"{path} was made with {saved_config}, not {config}; measure with its compressor and shared_kv")
    q, k, v = saved["q"], tuple(saved["k"]), tuple(saved["v"])
    found = HeadLayout(q.shape[1], v[0].shape[1], q.shape[2], v[0].shape[2])
    if found != heads:
        raise ValueError(f"{path} holds heads {found}, not {heads}; measure with --heads {found}")
    if saved.get("rotary"):
        # The benchmark's attention does not rotate, so q and k are rotated here; keys are then compressed as under
        # compressed_rope = "before".
        position = torch.arange(q.shape[0], dtype=torch.int32)
        tables = rotary_tables(position, RotaryConfig(**saved["rotary"]), q.shape[-1], torch.float32)
        q, k = apply_rope(q, *tables), tuple(apply_rope(x, *tables) for x in k)
    rows = torch.arange(grad.shape[0]) % q.shape[0]

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.detach().to(grad.device, grad.dtype, copy=True).requires_grad_()

    def cut(x: torch.Tensor) -> torch.Tensor:
        return leaf(x[rows])

    return AttentionInputs(
        q=cut(q), k=tuple(map(cut, k)), v=tuple(map(cut, v)), gates=cut(saved["gates"]),
        k_weights=tuple(map(leaf, saved["k_weights"])), v_weights=tuple(map(leaf, saved["v_weights"])), grad=grad,
    )  # fmt: skip


def trained_config(path: Path, config: NSAConfig) -> NSAConfig:
    """``config`` with the file's compressor, sharing of K/V and kind of gate, to which its tensors belong; sizes must be equal.

    Raises:
        ValueError: no such file, another format, or other sizes; the message gives both and the remedy.
    """
    saved = _read_trained(path)["config"]
    other = {name: (saved[name], getattr(config, name)) for name in _SIZES if saved[name] != getattr(config, name)}
    if other:
        told = ", ".join(f"{name} = {theirs} (asked for: {ours})" for name, (theirs, ours) in other.items())
        options = " ".join(f"--{name.replace('_', '-')} {theirs}" for name, (theirs, _) in other.items())
        raise ValueError(f"{path} was made with {told}; measure with {options}")
    return replace(config, compressor=saved["compressor"], shared_kv=saved["shared_kv"], gate=saved["gate"])


def _read_trained(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no file of trained inputs: {str(error).splitlines()[0]}") from error
    missing = set(_TRAINED_KEYS) - set(saved) if isinstance(saved, dict) else set(_TRAINED_KEYS)
    missing |= {f"config.{name}" for name in (*_SIZES, *_FORMS) if name not in saved["config"]} if not missing else set()
    if missing:
        raise ValueError(f"{path} is no file of trained inputs: it lacks {', '.join(sorted(missing))}")
    return saved


def smooth(q: torch.Tensor, memory: float) -> torch.Tensor:
    """Turn independent normal rows ``q`` [T, N, D] into a stationary first-order process along the tokens: unit variance,
    correlation ``memory`` between neighbours."""
    length = min(256, q.shape[0])
    step = torch.arange(length, device=q.device)
    decay = (memory ** (step[:, None] - step).clamp(min=0).float()).tril()
    out = torch.empty_like(q)
    state = q[0].float()
    for start in range(0, q.shape[0], length):
        noise = q[start : start + length].float() * (1 - memory**2) ** 0.5
        rows = len(noise)
        chunk = torch.einsum("st,thd->shd", decay[:rows, :rows], noise) + decay[:rows, 0, None, None] * memory * state
        out[start : start + rows] = chunk
        state = chunk[-1]
    return out


@lru_cache(maxsize=64)
def memory_for_agreement(
    config: NSAConfig, heads: HeadLayout, seq_len: int, target: float, device: torch.device, dtype: torch.dtype
) -> float:
    """The correlation of neighbouring queries at which their choices agree to ``target``, by bisection. Recent results are
    cached.

    The same queries agree less the more blocks there are, so it is calibrated at the full length. Slowly changing queries are
    effectively few samples, so short sequences take several K/V groups; for long ones a group or two is enough.

    Raises:
        ValueError: a sequence so short that no query has a choice, or one on which no correlation gives the target.
    """
    groups = max(1, min(heads.num_groups, _CALIBRATION_ROWS // seq_len))
    fewer = replace(heads, num_heads=heads.num_heads // heads.num_groups * groups, num_groups=groups)
    inputs = make_inputs(config, fewer, seq_len, "random", seed=1, device=device, dtype=dtype)
    with torch.no_grad():
        k_cmp, _ = compress_kv(inputs.k[0], inputs.v[0], inputs.k_weights, inputs.v_weights, config, backend=config.backend)

        def agreement(memory: float) -> float:
            return neighbour_agreement(select_blocks(smooth(inputs.q, memory), k_cmp, config, backend=config.backend), config)

        # Correlations near 1 matter: the bisection is on the logarithm of 1 - memory.
        low, high = 0.5, 0.99999
        reached = agreement(high)
        if reached < target:
            raise ValueError(
                f"drifting inputs of {seq_len} tokens reach an agreement of {reached:.2f} at most, not {target}; measure at "
                f"least {4 * config.num_selected_blocks * config.select_block_size} tokens"
            )
        for _ in range(14):
            memory = 1 - ((1 - low) * (1 - high)) ** 0.5
            low, high = (memory, high) if agreement(memory) < target else (low, memory)
    return high
