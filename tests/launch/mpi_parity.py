"""Run by test_launch.py under mpirun: the attention over MPI's processes equals that of one process, in float64.

Usage: mpirun -n 2 python tests/launch/mpi_parity.py
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
import torch.distributed as dist
from mpi4py import MPI

from nsa_cp import NativeSparseAttention, NSAConfig, RotaryConfig, SequenceLayout
from nsa_cp.testing import assert_close

CU_SEQLENS = (0, 37, 38, 131)
CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=9, backend="torch"
)


def launcher():
    """launch/mpirun.py as a module; the folder is no package."""
    path = Path(__file__).parents[2] / "launch" / "mpirun.py"
    spec = importlib.util.spec_from_file_location("mpirun", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attention(layout, inputs, cotangent, group):
    """Output, the inputs' gradients and the compressors' for the rows of ``layout``."""
    module = NativeSparseAttention(
        CONFIG, num_attention_heads=4, num_query_groups=2, qk_dim=12, v_dim=8, rotary=RotaryConfig(), cp_group=group,
        dtype=torch.float64,
    )  # fmt: skip
    weights = torch.Generator().manual_seed(7)
    for parameter in module.parameters():  # as initialised, some of their gradients are zero
        torch.nn.init.normal_(parameter, std=0.3, generator=weights)
    leaves = [layout.shard(x).clone().requires_grad_() for x in inputs]
    q, k, v, logits = leaves[0], leaves[1:4], leaves[4:7], leaves[7]
    out = module(q, k, v, logits, layout)
    out.backward(layout.shard(cotangent))
    return out.detach(), [x.grad for x in leaves], [p.grad for p in module.parameters()]


def main() -> None:
    """Compare this rank's share with the whole, print one line."""
    environment = launcher().torch_environment(MPI.COMM_WORLD)
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    assert (rank, size) == (MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size())
    assert int(environment["LOCAL_RANK"]) == rank and int(environment["LOCAL_WORLD_SIZE"]) == size
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 12)] + [(2, 12)] * 3 + [(2, 8)] * 3 + [(4, 3)]
    inputs = [torch.randn(CU_SEQLENS[-1], *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    cotangent = torch.randn(CU_SEQLENS[-1], 4, 8, generator=generator, dtype=torch.float64)

    out, gradients, weight_gradients = attention(SequenceLayout.build(CU_SEQLENS), inputs, cotangent, None)
    layout = SequenceLayout.build(CU_SEQLENS, cp_size=size, cp_rank=rank)
    local_out, local_gradients, partial = attention(layout, inputs, cotangent, dist.group.WORLD)
    for gradient in partial:
        dist.all_reduce(gradient)
    tolerance = {"rtol": 1e-10, "atol": 1e-10}
    assert_close(local_out, layout.shard(out), name="out", **tolerance)
    assert_close(local_gradients, [layout.shard(g) for g in gradients], name="gradient", **tolerance)
    assert_close(partial, weight_gradients, name="compressor gradient", **tolerance)
    print(f"rank {rank} of {size} agrees on {layout.num_local_tokens} of {layout.num_tokens} rows", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
