"""Interval attention, fused backward (dq, dk and dv in one kernel) for Hopper: 5 products a tile; separate kernels take 4 + 3.

One program: 128 keys of one group against one chunk of the query tiles (64 rows each). Two warp groups own 64 keys each; one warp
fetches q, do and the row statistics into a ring, see ``kernels/hopper.py``. Beside dk and dv a program adds dq = dS^T K of every
query tile to a float32 buffer in memory: both warp groups leave dS in shared memory, [2 x 64 keys, 64 rows], and each computes dq
for half of the columns.

The buffer is [G, tiles, 16, 128, 4], in the order of a warp group's registers for a tile [64, 128]: quad b of thread i holds the
columns 8 b + 2 (i % 4) and the next one, of the rows 16 (i // 32) + i % 32 // 4 and 8 rows further, so that the additions of a
warp cover 512 adjacent bytes. It lacks the factor scale. ``query_gradients/hopper.py`` starts from it in this layout.

Additions have a fixed order, for the same bits every time: later key tiles first. They begin at later queries, so they are ahead
of the others at every query tile both meet. With first[j] and last[j] (query tiles) ascending in key tile j, the key tiles that
meet query tile t are consecutive, ending with last_of[t]. counter[group, t] starts as last_of[t]; program j may add while it is
j, then sets it to j - 1. Programs are numbered in this order, chunk by chunk, and wait for none with a higher number. They draw
their numbers as they start, since CUDA does not promise to start blocks in order. Two more warps do the waiting: the usher reads
the counters of the next tiles and lets the warp groups in (``turn``); the releaser waits until both have added (``added``), then
sets the counter. dk and dv are added to memory at the end of a chunk, in the order of the chunks: flag[group, j, warp group] says
whose turn it is.

Order within a warp group, for tile n (products asynchronous, finished in the order of issue):

    issue S_n = K Q_n^T, dV += P_{n-1} dO_{n-1}, dK += dS_{n-1} Q_{n-1}
    wait for S_n alone;  P_n = exp2 while the other two run
    wait for both;  issue dP_n = V dO_n^T, then, the other warp group's dS_{n-1} being there, dQ_{n-1} = dS_{n-1}^T K
    wait for dP_n;  dS_n, to registers and shared memory, while dQ_{n-1} runs
    wait for dQ_{n-1}, add it to memory
"""

from __future__ import annotations

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common import LOG2_E
from ..hopper import fetchable, shared_layout, tiles
from ..rings import again, make_barriers, thread_barrier
from .backward import ROWS_A_SUM
from .hopper_backward import fetch, group_by_group, hide, issue_gradients, transposed

ROWS = gl.constexpr(64)  # of a query tile
KEYS = gl.constexpr(64)  # of a warp group
WIDTH = gl.constexpr(128)  # of q, k, v and do
QUADS = gl.constexpr(4096)  # floats of a tile's half, 64 columns
STAGES = gl.constexpr(2)  # slots of the ring
TURNS = gl.constexpr(4)  # one more than the tiles that the usher may be ahead of the releaser
# Fewest query tiles of a chunk.
_LEAST_CHUNK = 32


@gluon.jit
def load_acquire(pointer):
    """The word there; what other programs released with it may be read afterwards (this empties the L1 cache)."""
    return gl.inline_asm_elementwise("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [pointer], gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_relaxed(pointer):
    """The word there, as the L2 cache has it."""
    return gl.inline_asm_elementwise("ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [pointer], gl.int32, is_pure=False, pack=1)


@gluon.jit
def store_release(pointer, value):
    """Write the word, once what was written before is there for others. For one warp, whose lanes write at once."""
    gl.inline_asm_elementwise(
        "st.release.gpu.global.b32 [$1], $2;\n mov.b32 $0, 0;", "=r,l,r", [pointer, value], gl.int32, is_pure=False, pack=1
    )


def _add_quads_asm() -> tuple[str, str]:
    """PTX that adds 8 quads to memory, and its operands: 8 unused outputs, 32 times the same address, 32 values, 32 times the
    same condition. One block, so that one branch and one address serve all quads."""
    quads = [", ".join(f"${40 + 4 * block + i}" for i in range(4)) for block in range(8)]
    adds = " ".join(f"red.relaxed.gpu.global.add.v4.f32 [$8+{2048 * b}], {{{quad}}};" for b, quad in enumerate(quads))
    words = " ".join(f"mov.b32 ${word}, 0;" for word in range(8))
    text = f"{{ .reg .pred none; setp.eq.b32 none, $72, 0; @none bra SKIP; {adds} SKIP: {words} }}"
    return text, ",".join(["=r"] * 8 + ["l"] * 32 + ["f"] * 32 + ["r"] * 32)


ADD_QUADS, ADD_QUADS_OPERANDS = map(gl.constexpr, _add_quads_asm())


@gluon.jit
def add_quads(base, x, wanted):
    """Add x [64, 64] to 4096 floats at ``base``, in the order of its registers: quad b of thread i at (128 b + i) * 4. Nothing
    unless ``wanted``, 0 or 1."""
    row = gl.arange(0, 64, gl.SliceLayout(1, x.type.layout))
    column = gl.arange(0, 64, gl.SliceLayout(0, x.type.layout))
    # The same for all values of a thread.
    thread = (row // 16 * 32 + row % 8 * 4)[:, None] + (column % 8 // 2)[None, :]
    pointers = (base + thread * 4).to(gl.int64)
    wanted = gl.full(x.shape, wanted, gl.int32, x.type.layout)
    gl.inline_asm_elementwise(ADD_QUADS, ADD_QUADS_OPERANDS, [pointers, x, wanted], gl.int8, is_pure=False, pack=32)


@gluon.jit
def usher(counter_ptr, key_tile, count, order):
    """One warp: tell the warp groups of every tile when it is their turn, less than TURNS ahead of the releaser: so the phases of
    a barrier cannot be mistaken, nor that of the tile "before" the first, which warp groups wait for like for any other."""
    turn, added, released = order
    for step in range(count):
        mbarrier.wait(released.index((step + 1) % TURNS), (((step + 1) // TURNS) & 1) ^ 1)
        # What follows are additions in the L2 cache, issued once this has been seen: nothing is read that could be stale.
        found = load_relaxed(counter_ptr + step)
        while found != key_tile:
            found = load_relaxed(counter_ptr + step)
        mbarrier.arrive(turn.index(step % TURNS))


@gluon.jit
def release(counter_ptr, key_tile, count, order):
    """One warp: pass every tile on to the key tile before, once both warp groups have added theirs."""
    turn, added, released = order
    for step in range(count):
        mbarrier.wait(added.index(step % TURNS), (step // TURNS) & 1)
        store_release(counter_ptr + step, key_tile - 1)
        mbarrier.arrive(released.index(step % TURNS))


@gluon.jit
def issue_query_gradients(k_smem, ds_smem, buffer, zero, HALF: gl.constexpr):
    """dS^T K of both warp groups' keys, this one's half of the columns, left in flight: two products."""
    PART: gl.constexpr = WIDTH // 2
    first = k_smem.index(0).reshape([KEYS, WIDTH]).slice(HALF * PART, PART, dim=1)
    second = k_smem.index(1).reshape([KEYS, WIDTH]).slice(HALF * PART, PART, dim=1)
    dq = warpgroup_mma(ds_smem.index(2 * buffer).permute([1, 0]), first, zero, use_acc=False, is_async=True)
    return warpgroup_mma(ds_smem.index(2 * buffer + 1).permute([1, 0]), second, dq, is_async=True)


@gluon.jit
def add_query_gradients(dq, step, target, order):
    """dq of tile ``step - 1``, if there is one, to memory, when it is our turn. ``added`` is still to be told."""
    turn, added, released = order
    # Before a barrier's first phase it lets everybody in.
    place = step - 1 + TURNS
    mbarrier.wait(turn.index(place % TURNS), ((place // TURNS) & 1) ^ 1)
    add_quads(target, dq, (step > 0).to(gl.int32))


@gluon.jit
def tell_added(step, order):
    """Of tile ``step - 1``; one thread arrives for all, behind a barrier of the warp group."""
    turn, added, released = order
    mbarrier.arrive(added.index((step - 1 + TURNS) % TURNS), pred=step > 0)


@gluon.jit
def clear_hidden(tile, bounds, half):
    """Zero the rows of keys that nobody sees: they may not be finite, and dq adds them up times 0."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    KEY: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    keep = (bounds.index(2 * half).load(KEY) < bounds.index(2 * half + 1).load(KEY))[:, None]
    tile.store(gl.where(keep, tile.load(LAYOUT), gl.zeros([KEYS, WIDTH], tile.dtype, LAYOUT)))


@gluon.jit
def consume(HALF: gl.constexpr, shared, rest, TOKENS: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr):
    """A warp group: 64 keys against all tiles."""
    keys, rings, stats_ring, bounds, ds_smem, kv_full, full, empty, ds_full, order = shared
    (q_begin_ptr, q_end_ptr, dq_ptr, dk_ptr, dv_ptr, flag_ptr,
     first, count, key, num_keys, group, chunk, scale, scale_log2) = rest  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    DKV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH // 2, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DKV_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    KEY: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    k_smem, _, v_smem = keys
    q_ring, _, do_ring = rings
    dtype: gl.constexpr = q_ring.dtype

    wanted = key + HALF * KEYS + gl.arange(0, KEYS, KEY)
    # Nobody sees keys past the end; nor may their p, which is not bounded, meet the zeros fetched for them in dq.
    q_begin = gl.load(q_begin_ptr + wanted, mask=wanted < num_keys, other=0)
    q_end = gl.load(q_end_ptr + wanted, mask=wanted < num_keys, other=0)
    # The loop has no registers for them.
    bounds.index(2 * HALF).store(q_begin)
    bounds.index(2 * HALF + 1).store(q_end)
    thread_barrier()
    # Tiles that all 64 keys see whole.
    full_first = gl.cdiv(gl.max(q_begin, 0), TOKENS) - first
    full_last = gl.min(q_end, 0) // TOKENS - first
    hidden = gl.max((q_begin >= q_end).to(gl.int32), 0)
    place = gl.arange(0, ROWS, ROW) // HEADS
    # Of the tile before, like everything that is added to it.
    dq_ptr += HALF * QUADS - 2 * QUADS

    no_scores = gl.zeros([KEYS, ROWS], gl.float32, S_LAYOUT)
    no_dq = gl.zeros([ROWS, WIDTH // 2], gl.float32, DQ_LAYOUT)
    dk = gl.zeros([KEYS, WIDTH], gl.float32, DKV_LAYOUT)
    dv = gl.zeros([KEYS, WIDTH], gl.float32, DKV_LAYOUT)
    # The tile before: none yet, its products add 0.
    p = gl.zeros([KEYS, ROWS], dtype, OPERAND)
    ds = gl.zeros([KEYS, ROWS], dtype, OPERAND)
    if count > 0:
        mbarrier.wait(kv_full, 0)
        if hidden > 0:
            clear_hidden(k_smem.index(HALF).reshape([KEYS, WIDTH]), bounds, HALF)
            clear_hidden(v_smem.index(HALF).reshape([KEYS, WIDTH]), bounds, HALF)
            fence_async_shared()
            thread_barrier()
    for step in range(count):
        slot = step % STAGES
        # At first there is none before; its own is at least finite.
        before = gl.maximum(step - 1, 0) % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        # The addresses of K and V are made anew in every tile: kept, they would be spilled.
        k = k_smem.index(again(gl.to_tensor(HALF))).reshape([KEYS, WIDTH])
        s = warpgroup_mma(k, transposed(q_ring.index(slot), ROWS, WIDTH), no_scores, use_acc=False, is_async=True)
        dv, dk, no_tail = issue_gradients(p, ds, rings, before, dv, dk, dk, ROWS, WIDTH, 0, WIDTH)
        s = warpgroup_mma_wait(2, deps=[s])
        shift = stats_ring.index(2 * slot).load(ROW) * LOG2_E
        wide = gl.exp2(s * scale_log2 - shift[None, :])
        # The branch also keeps ptxas from moving the exponentials behind the wait.
        if (step < full_first) | (step >= full_last):
            wide = hide(wide, (first + step) * TOKENS + place, bounds, HALF)
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        v = v_smem.index(again(gl.to_tensor(HALF))).reshape([KEYS, WIDTH])
        dp = warpgroup_mma(v, transposed(do_ring.index(slot), ROWS, WIDTH), no_scores, use_acc=False, is_async=True)
        mbarrier.arrive(empty.index(before), pred=step > 0)
        # dS of the tile before; the first time none is waited for, and the product is of no use.
        left = (step + 1) & 1
        mbarrier.wait(ds_full.index(left), (((step + 1) >> 1) & 1) ^ 1)
        dq = issue_query_gradients(k_smem, ds_smem, left, no_dq, HALF)
        dp = warpgroup_mma_wait(2, deps=[dp])
        delta = stats_ring.index(2 * slot + 1).load(ROW)
        dp = wide * (dp - delta[None, :])
        p = gl.convert_layout(wide.to(dtype), OPERAND)
        narrow = dp.to(dtype)
        ds_smem.index(2 * (step & 1) + HALF).store(narrow)
        fence_async_shared()
        ds = gl.convert_layout(narrow, OPERAND)
        dq = warpgroup_mma_wait(0, deps=[dq])
        add_query_gradients(dq, step, dq_ptr, order)
        # Behind the wait for dq: the other warp group may then write over dS of the tile before.
        thread_barrier()
        mbarrier.arrive(ds_full.index(step & 1))
        tell_added(step, order)
        dq_ptr += 2 * QUADS
    if count > 0:
        end = count - 1
        dv, dk, no_tail = issue_gradients(p, ds, rings, end % STAGES, dv, dk, dk, ROWS, WIDTH, 0, WIDTH)
        mbarrier.wait(ds_full.index(end & 1), (end >> 1) & 1)
        dq = issue_query_gradients(k_smem, ds_smem, end & 1, no_dq, HALF)
        dv, dk, dq = warpgroup_mma_wait(0, deps=[dv, dk, dq])
        add_query_gradients(dq, count, dq_ptr, order)
        thread_barrier()
        tell_added(count, order)
        target = (bounds, again(key + HALF * KEYS), num_keys, group)
        flag_ptr += HALF
        found = load_acquire(flag_ptr)
        while found != chunk:
            found = load_acquire(flag_ptr)
        add(dk_ptr, dk * scale, HALF, target, GROUPS)
        add(dv_ptr, dv, HALF, target, GROUPS)
        thread_barrier()
        # By one thread: written again by a late warp it would undo what the next chunk's program writes.
        gl.atomic_xchg(flag_ptr, chunk + 1, sem="release", scope="gpu")


@gluon.jit
def add(out_ptr, x, half, target, GROUPS: gl.constexpr):
    """``x`` to a warp group's keys in out [M, G, WIDTH]."""
    bounds, key, num_keys, group = target
    KEY: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    row = key + gl.arange(0, x.shape[0], KEY)
    columns = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    some = bounds.index(2 * half).load(KEY) < bounds.index(2 * half + 1).load(KEY)
    x = gl.where(some[:, None], x, 0.0)
    pointers = out_ptr + ((row.to(gl.int64) * GROUPS + group) * WIDTH)[:, None] + columns[None, :]
    keep = (row < num_keys)[:, None]
    # Another multiprocessor may have written them: not from the L1 cache.
    gl.store(pointers, x + gl.load(pointers, mask=keep, other=0.0, cache_modifier=".cg"), mask=keep)


@gluon.jit(do_not_specialize=["num_keys", "key_tiles", "num_tiles", "chunk_tiles", "group_rows"])
def interval_attention_fused_backward_hopper_kernel(
    q_desc, do_desc, k_desc, v_desc, shift_desc, delta_desc, q_begin_ptr, q_end_ptr, first_ptr, last_ptr, counter_ptr, flag_ptr,
    ticket_ptr, dq_ptr, dk_ptr, dv_ptr, num_keys, key_tiles, num_tiles, chunk_tiles, group_rows, scale, scale_log2,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, TOKENS: gl.constexpr, DS_LAYOUT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Chunk after chunk of the queries; in it late key tiles first, all groups of one side by side."""
    # The number is drawn, see above.
    ticket = gl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    group = ticket % GROUPS
    key_tile = key_tiles - 1 - ticket // GROUPS % key_tiles
    chunk = ticket // (GROUPS * key_tiles)
    key = key_tile * (2 * KEYS)
    first = gl.maximum(gl.load(first_ptr + key_tile), chunk * chunk_tiles)
    last = gl.minimum(gl.load(last_ptr + key_tile), (chunk + 1) * chunk_tiles)
    count = gl.maximum(last - first, 0)
    number = group * num_tiles + first
    counter_ptr += number
    dq_ptr += number.to(gl.int64) * (2 * QUADS)
    flag_ptr += (group * key_tiles + key_tile) * 2

    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [2, KEYS, 1, WIDTH], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, KEYS, 1, WIDTH], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, HEADS, WIDTH], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, HEADS, WIDTH], do_desc.layout)
    # Of two tiles and both warp groups.
    ds_smem = gl.allocate_shared_memory(dtype, [4, KEYS, ROWS], DS_LAYOUT)
    stats_ring = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], shift_desc.layout)
    bounds = gl.allocate_shared_memory(gl.int32, [4, KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = make_barriers(1, 1).index(0)
    full = make_barriers(STAGES, 1)
    empty = make_barriers(STAGES, 2)
    ds_full = make_barriers(2, 2)
    order = (make_barriers(TURNS, 1), make_barriers(TURNS, 2), make_barriers(TURNS, 1))
    # There are no tails: their places are taken by the heads, and nothing is fetched to them.
    keys = (k_smem, k_smem, v_smem)
    rings = (q_ring, q_ring, do_ring)
    shared = (keys, rings, stats_ring, bounds, ds_smem, kv_full, full, empty, ds_full, order)
    rest = (
        q_begin_ptr, q_end_ptr, dq_ptr, dk_ptr, dv_ptr, flag_ptr,
        first, count, key, num_keys, group, chunk, scale, scale_log2,
    )  # fmt: skip
    gl.warp_specialize([
        (consume, (gl.constexpr(0), shared, rest, TOKENS, HEADS, GROUPS)),
        (consume, (gl.constexpr(1), shared, rest, TOKENS, HEADS, GROUPS)),
        (fetch, (
            (q_desc, q_desc, do_desc), (k_desc, k_desc, v_desc), shift_desc, delta_desc,
            (keys, rings, stats_ring, bounds, kv_full, full, empty), first, first + count, key, group, group_rows,
            TOKENS, HEADS, ROWS, KEYS, STAGES, WIDTH, 0, WIDTH,
        )),
        (usher, (counter_ptr, key_tile, count, order)),
        (release, (counter_ptr, key_tile, count, order)),
    ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> bool:
    """Whether :func:`interval_attention_fused_backward` can take these: widths of 128, heads a group that are a power of two of
    at most 64, tensors that the copy engine can fetch."""
    return (
        k.shape[2] == v.shape[2] == WIDTH.value
        and k.shape[1] > 0
        and ROWS.value % (q.shape[1] // k.shape[1]) == 0
        and fetchable(q, k, v, do)
    )


def dq_bytes(tokens: int, heads: int) -> int:
    """Bytes of the dq buffer for one group of ``heads`` heads."""
    return triton.cdiv(tokens * heads, ROWS.value) * ROWS.value * WIDTH.value * 4


def tile_ranges(q_begin: torch.Tensor, q_end: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The query tiles (of ``tokens`` tokens) ``first .. last`` that each tile of 128 keys meets, int32 [key tiles] each, both
    ascending; none if last <= first.

    Ranges that do not ascend are widened until they do; masks hide what that adds.
    """
    none, keys = 1 << 30, 2 * KEYS.value
    spare = -q_begin.shape[0] % keys
    some = q_begin < q_end
    begin = torch.nn.functional.pad(torch.where(some, q_begin, none), (0, spare), value=none).view(-1, keys).amin(1)
    end = torch.nn.functional.pad(torch.where(some, q_end, 0), (0, spare)).view(-1, keys).amax(1)
    first = (begin // tokens).flip(0).cummin(0).values.flip(0)
    last = ((end + tokens - 1) // tokens).cummax(0).values
    return first.to(torch.int32), last.to(torch.int32)


def turns(first: torch.Tensor, num_tiles: int, groups: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial turns, int32, which the kernel overwrites: counters [G, tiles], the last key tile that meets each query tile (or
    one that meets no tile any more), and flags [G, key tiles, 2], the first chunk that each key tile meets.

    Args:
        first: of :func:`tile_ranges`. chunk: query tiles of a chunk.
    """
    every = torch.arange(num_tiles, dtype=torch.int32, device=first.device)
    last_of = torch.searchsorted(first, every, right=True, out_int32=True) - 1
    return last_of.expand(groups, -1).contiguous(), (first // chunk)[None, :, None].expand(groups, -1, 2).contiguous()


def chunk_length(key_tiles: int, num_tiles: int, groups: int) -> int:
    """Number of query tiles in a chunk: a power of two, of at most ROWS_A_SUM rows in all.

    From measured times on 132 multiprocessors: a program spends about 7 us on its start and on the additions to dk and dv, and
    20 us / ``groups`` until its first turn; in the end multiprocessors idle for half a chunk, at 2.4 us a tile. With half of all
    pairs of tiles to compute, the sum of these is smallest at ``best``, and flat around it.
    """
    best = math.sqrt(key_tiles * num_tiles * (7 * groups + 20) / (132 * 2.4))
    return min(max(_LEAST_CHUNK, 1 << round(math.log2(max(1.0, best)))), ROWS_A_SUM // ROWS.value)


def interval_attention_fused_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    q_begin: torch.Tensor,
    q_end: torch.Tensor,
    scale: float,
    *,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk [M, G, Dk] and dv [M, G, Dv], float32, for tensors for which :func:`takes` is true; arguments as of
    ``interval_attention_backward_dkv``. The same inputs give the same bits.

    dq is the buffer [G, tiles, 16, 128, 4] described at the top of this module, without the factor scale; :func:`unpack` turns it
    into rows. ``chunk``: number of query tiles in a chunk, instead of :func:`chunk_length`.
    """
    (tokens, num_heads, width), (num_keys, groups, _) = q.shape, k.shape
    heads = num_heads // groups
    tile_tokens = ROWS.value // heads
    num_tiles = triton.cdiv(tokens, tile_tokens)
    group_rows = num_tiles * ROWS.value
    first, last = tile_ranges(q_begin, q_end, tile_tokens)
    key_tiles = len(first)
    chunk = chunk or chunk_length(key_tiles, num_tiles, groups)
    shape = (groups, num_tiles, 2 * QUADS.value // 512, 128, 4)
    # Behind the buffer lies the counter from which programs draw their numbers; 0.0 has the bits of the integer 0.
    zeros = torch.zeros(math.prod(shape) + 4, dtype=torch.float32, device=q.device)
    dq, ticket = zeros[:-4].view(shape), zeros[-4:].view(torch.int32)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (k, v))
    q_block, k_block = (tile_tokens, heads, width), (KEYS.value, 1, width)
    interval_attention_fused_backward_hopper_kernel[(key_tiles * groups * triton.cdiv(num_tiles, chunk),)](
        tiles(q, q_block), tiles(do, q_block), tiles(k, k_block), tiles(v, k_block),
        *(tiles(group_by_group(x, groups, group_rows), (ROWS.value,)) for x in (shift, delta)),
        q_begin, q_end, first, last, *turns(first, num_tiles, groups, chunk), ticket, dq, dk, dv,
        num_keys, key_tiles, num_tiles, chunk, group_rows, scale, scale * LOG2_E.value,
        GROUPS=groups, HEADS=heads, TOKENS=tile_tokens, DS_LAYOUT=shared_layout((KEYS.value, ROWS.value), q.dtype), num_warps=4,
    )  # fmt: skip
    return dq, dk, dv


def unpack(dq: torch.Tensor, tokens: int, heads: int) -> torch.Tensor:
    """The buffer [G, tiles, 16, 128, 4] as rows [T, N, 128], still without the factor scale. For tests: ``query_gradients`` reads
    the buffer's own layout."""
    groups, num_tiles = dq.shape[:2]
    # Dimensions: block of 8 columns, warp, row of 8, pair of columns, upper or lower 8 rows, column of the pair.
    x = dq.view(groups, num_tiles, 16, 4, 8, 4, 2, 2).permute(1, 3, 6, 4, 0, 2, 5, 7)
    x = x.reshape(num_tiles, ROWS.value // heads, heads, groups, WIDTH.value).transpose(2, 3)
    return x.reshape(-1, groups * heads, WIDTH.value)[:tokens]
