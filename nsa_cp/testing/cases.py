"""Random attention problems, and the answers of an implementation to them: outputs, log-sum-exps, chosen blocks, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.context_parallel import SequenceLayout
from nsa_cp.ops import initial_compressor_weights, native_sparse_attention

# Answers (by the start of their names) with a row per token, which the layout cuts; all others are summed over ranks.
TOKEN_ANSWERS = ("out", "blocks", "lse", "dq", "dk", "dv", "dgates")


@dataclass(frozen=True)
class AttentionProblem:
    """Inputs of ``native_sparse_attention`` and the upstream gradient ``grad`` [T, N, Dv]; names and shapes as there."""

    config: NSAConfig
    cu_seqlens: tuple[int, ...]
    rotary: RotaryConfig | None
    q: torch.Tensor
    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    gates: torch.Tensor
    k_weights: tuple[torch.Tensor, ...]
    v_weights: tuple[torch.Tensor, ...]
    grad: torch.Tensor

    def shard(self, layout: SequenceLayout) -> AttentionProblem:
        """The rows of one rank; weights stay whole."""
        return replace(
            self,
            q=layout.shard(self.q),
            k=tuple(map(layout.shard, self.k)),
            v=tuple(map(layout.shard, self.v)),
            gates=layout.shard(self.gates),
            grad=layout.shard(self.grad),
        )

    def to(self, *args: Any) -> AttentionProblem:
        """All tensors to a dtype or device."""
        tensors = {name: getattr(self, name).to(*args) for name in ("q", "gates", "grad")}
        lists = {n: tuple(x.to(*args) for x in getattr(self, n)) for n in ("k", "v", "k_weights", "v_weights")}
        return replace(self, **tensors, **lists)


def make_problem(
    config: NSAConfig,
    cu_seqlens: Sequence[int],
    *,
    num_heads: int = 4,
    num_groups: int = 2,
    qk_dim: int = 16,
    v_dim: int = 12,
    rotary: RotaryConfig | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> AttentionProblem:
    """A problem of ``cu_seqlens[-1]`` tokens with normal inputs, gates in (0, 1) and perturbed compressor weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def weights(dim: int) -> tuple[torch.Tensor, ...]:
        return tuple(w.to(dtype) + 0.1 * normal(*w.shape) for w in initial_compressor_weights(config, num_groups, dim, generator))

    tokens, branches = cu_seqlens[-1], config.num_branch_kv
    return AttentionProblem(
        config=config,
        cu_seqlens=tuple(cu_seqlens),
        rotary=rotary,
        q=normal(tokens, num_heads, qk_dim),
        k=tuple(normal(tokens, num_groups, qk_dim) for _ in range(branches)),
        v=tuple(normal(tokens, num_groups, v_dim) for _ in range(branches)),
        gates=normal(tokens, num_heads if config.gate == "head" else 1, config.num_gates).sigmoid(),
        k_weights=weights(qk_dim),
        v_weights=weights(v_dim),
        grad=normal(tokens, num_heads, v_dim),
    )


def solve(
    problem: AttentionProblem, attention: Callable[..., Any] = native_sparse_attention, **kwargs: Any
) -> dict[str, torch.Tensor]:
    """The answers of ``attention``, detached, by name: ``out``, ``blocks``, ``lse_*``, and the gradient ``d<input>`` of every
    input. An input that the settings leave unused gets a gradient of zeros.

    Args:
        attention: a function with the signature of ``native_sparse_attention``.
        **kwargs: further arguments of ``attention``.
    """
    if "layout" not in kwargs:
        kwargs["cu_seqlens"] = problem.cu_seqlens
    q, gates = problem.q.detach().requires_grad_(), problem.gates.detach().requires_grad_()
    lists = [[x.detach().requires_grad_() for x in xs] for xs in (problem.k, problem.v, problem.k_weights, problem.v_weights)]
    k, v, k_weights, v_weights = lists
    result = attention(
        q, tuple(k), tuple(v), gates, tuple(k_weights), tuple(v_weights), problem.config, rotary=problem.rotary, **kwargs
    )
    names = [
        "q",
        "gates",
        *(f"{n}[{i}]" for n, xs in zip(("k", "v", "k_weight", "v_weight"), lists, strict=True) for i in range(len(xs))),
    ]
    inputs = [q, gates, *(x for xs in lists for x in xs)]
    gradients = torch.autograd.grad(result.out, inputs, problem.grad, allow_unused=True)
    answers = {name: getattr(result, name).detach() for name in result._fields}
    for name, x, gradient in zip(names, inputs, gradients, strict=True):
        answers[f"d{name}"] = torch.zeros_like(x) if gradient is None else gradient
    return answers


def solve_shard(
    problem: AttentionProblem, layout: SequenceLayout, group: dist.ProcessGroup | None, **kwargs: Any
) -> dict[str, torch.Tensor]:
    """This rank's answers under context parallelism."""
    return solve(problem.shard(layout), layout=layout, group=group, **kwargs)


def join_shards(shards: Sequence[dict[str, torch.Tensor]], layout: SequenceLayout) -> dict[str, torch.Tensor]:
    """Whole answers from those of all ranks: token answers in global order, weight gradients summed."""
    return {
        name: layout.unshard([shard[name] for shard in shards])
        if name.startswith(TOKEN_ANSWERS) and "weight" not in name
        else torch.stack([shard[name] for shard in shards]).sum(0)
        for name in shards[0]
    }
