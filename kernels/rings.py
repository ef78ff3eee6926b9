"""Device functions that the Gluon kernels share. Importable only where Gluon is; ``hopper.py`` explains the protocol of rings."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# Triton 3.7 renamed it.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def make_barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier for each slot, [SLOTS, 1]; a round of it takes ARRIVALS arrivals, and the bytes that were announced."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=ARRIVALS)
    # The copy engine must see them as they are now.
    fence_async_shared()
    return barriers


@gluon.jit
def fetch_tile(descs, buffers, slot, row, head, bar, DK_HEAD: gl.constexpr, DK_TAIL: gl.constexpr):
    """A tile of k and v, or of q and do, that begins with this row and head: the columns 0 .. DK_HEAD of the first, the DK_TAIL
    behind them if there are such, and the second's. ``bar`` must have been told of the bytes."""
    k_desc, k_tail_desc, v_desc = descs
    k_buffer, k_tail_buffer, v_buffer = buffers
    tma.async_copy_global_to_shared(k_desc, [row, head, 0], bar, k_buffer.index(slot).reshape(k_desc.block_type.shape))
    if DK_TAIL > 0:
        tail = k_tail_buffer.index(slot).reshape(k_tail_desc.block_type.shape)
        tma.async_copy_global_to_shared(k_tail_desc, [row, head, DK_HEAD], bar, tail)
    tma.async_copy_global_to_shared(v_desc, [row, head, 0], bar, v_buffer.index(slot).reshape(v_desc.block_type.shape))


@gluon.jit
def again(x):
    """x as if computed anew: what follows from it does not take registers across a loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
