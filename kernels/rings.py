"""What the Gluon kernels share on the device; importable only where Gluon is. See ``hopper.py`` for the protocol of rings."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def make_barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier for each slot, [SLOTS, 1]; a round of it takes ARRIVALS arrivals, and the bytes that were announced."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=ARRIVALS)
    # The copy engine must see them as they are now.
    fence_async_shared()
    return barriers
