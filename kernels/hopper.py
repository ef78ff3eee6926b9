"""What the kernels for Hopper (sm_90) share on the host: where they can run, and descriptors of tiles. The kernels are written in
Gluon, the level below Triton; their files are called ``hopper*.py``.

Why Gluon: Triton waits for every matrix product whose result the same iteration uses, so that products and exponentials take
turns. Here the code itself says what is in flight. One warp fetches tiles with the copy engine (TMA) into a ring of slots; the
other warps form groups of four ("warp groups"), which own 64 rows each (128 in block scores) and do not wait for each other,
except in the fused backward (``hopper_fused_backward.py``). Each kernel has a twin in Triton (the fused one has two) that gives
the same results up to rounding and runs wherever this one cannot: on other devices, in the interpreter, for widths and alignments
that the copy engine cannot handle.

Rings. Tile i is in slot i % STAGES. Barrier ``full[slot]`` completes when the tile's bytes have arrived, ``empty[slot]`` when all
readers are done with it. Both count rounds: round i // STAGES of a slot has phase (i // STAGES) & 1, and waiting on a fresh
barrier for the phase before its first returns at once. A reader arrives at ``empty`` only after it has waited for ``full`` of the
same round.

What ptxas needs to leave products in flight, found by trial (it warns of "serialization" otherwise): nothing in flight across a
loop's back edge, and no write to registers that a product in flight reads or adds to.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor as TritonDescriptor

from .common import split_width

# Gluon is not a stable interface: the first Triton release that these kernels were run with, and the first that is untried.
_FIRST_TRITON, _UNTRIED_TRITON = (3, 6), (3, 7)


@cache
def on_hopper(device: torch.device) -> bool:
    """Whether these kernels can run on ``device``: compute capability 9, and a tested release of Triton."""
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return (
        device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and _FIRST_TRITON <= release < _UNTRIED_TRITON
    )


def fetchable(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can fetch tiles of these 16-bit tensors: not empty, rows at multiples of 16 bytes."""
    return all(
        x.dtype in (torch.bfloat16, torch.float16)
        and x.numel() > 0
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def tiles(x: torch.Tensor, block: tuple[int, ...]) -> TritonDescriptor:
    """Gluon's descriptor of tiles of shape ``block`` of ``x``."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block), shared_layout(block, x.dtype))


def pair_tiles(x: torch.Tensor, y: torch.Tensor, rows: int, heads: int) -> list[TritonDescriptor]:
    """Descriptors of tiles of (q, do) or (k, v): of the head columns of ``x``, of its tail columns (without a tail of the head
    again, which nothing fetches), and of ``y``."""
    head, tail = split_width(x.shape[2])
    return [tiles(x, (rows, heads, head)), tiles(x, (rows, heads, tail or head)), tiles(y, (rows, heads, y.shape[2]))]


@cache
def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> object:
    """The layout in which products can read a tile of shape ``block`` from shared memory."""
    from triton.experimental.gluon import language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(block), element)


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of ``device``: so many programs run at once if each fills one."""
    return torch.cuda.get_device_properties(device).multi_processor_count
