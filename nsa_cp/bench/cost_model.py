"""``nsa-cp bench cost-model``: predicts step time, exposed communication and memory of context parallelism.

Inputs are kernel times measured on one GPU (:class:`KernelTimes`, from ``docs/benchmarks``) and times of transfers measured
between two (:class:`Link`). The forward and backward of ``ops/pipeline.py`` are simulated step by step on two lanes, one of
kernels and one of transfers: a transfer starts when its input is ready and the transfer before it has ended; kernels wait where
the pipeline waits. A change of the pipeline's order has to be repeated here.

Assumed and not measured: ``Link.step_ms``, the network's latency, ``KernelTimes.copy_bytes_per_ms``, ``SORTED_BYTES`` and, until
it is measured, ``AGREEMENT_STEP_MS``. Launches are not modelled, nor that kernels run slower beside a transfer.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from nsa_cp.bench.inputs import HeadLayout
from nsa_cp.config import NSAConfig
from nsa_cp.ops.pipeline import groups_a_step

MIB = float(1 << 20)
GIB = float(1 << 30)
# Kernel times are modelled as functions of x = tokens / UNIT: stages in LINEAR as a * x, those in QUADRATIC as b * x**2.
UNIT = 65536
LINEAR = ("compression", "recompression", "selected", "window", "gating")
QUADRATIC = ("compressed", "selection")
# The share of dq in the branches' backward: 28.9 of 56.4 ms, profiled within the whole at 64k tokens, 64/4 heads of 128; since
# then the selected branch's dk and dv take about 1 ms less.
QUERY_GRADIENT_SHARE = 0.52
# Bytes moved per chosen block to sort the blocks: four radix passes that read and write an int32 key and an int64 place, and
# about half as much again to make keys and divide places. Counted, not measured.
SORTED_BYTES = 150
# Channels of keys that stand in for values when scoring recomputes the log-sum-exp (``interval_lse`` on Hopper).
STAND_IN_CHANNELS = 64
# Milliseconds of one of the cp - 1 messages, one after the other, of the hosts' agreement (gloo's all-gather is a ring). Assumed
# to be the network's latency; ``--agreement-step-ms`` takes a measured value.
AGREEMENT_STEP_MS = 0.05


@dataclass(frozen=True)
class Link:
    """Time of a transfer in ms as a function of the bytes that a rank receives, interpolated between measured points.

    Attributes:
        all_gather, exchange, reduce_scatter: points (bytes, ms), ascending; extrapolated beyond the last one.
        step_ms: what every rank beyond two adds to a collective. Assumed: collectives were timed between two ranks only.
    """

    all_gather: tuple[tuple[float, float], ...]
    exchange: tuple[tuple[float, float], ...]
    reduce_scatter: tuple[tuple[float, float], ...]
    step_ms: float

    @classmethod
    def of_rate(cls, gb_per_s: float, latency_ms: float, step_ms: float) -> Link:
        """A link with the same rate (GB/s, 1e9 bytes) and latency for all kinds of transfers."""
        points = ((0.0, latency_ms), (gb_per_s * 1e6, latency_ms + 1.0))
        return cls(points, points, points, step_ms)

    def time(self, pattern: str, received: float, cp: int) -> float:
        """Milliseconds until a rank has received ``received`` bytes by ``pattern`` among ``cp`` ranks."""
        points = getattr(self, pattern)
        # The segment whose right end is the first point beyond ``received``, else the last segment.
        right = next((i for i, (size, _) in enumerate(points) if received <= size), len(points) - 1)
        (x0, y0), (x1, y1) = points[max(0, right - 1)], points[max(1, right)]
        measured = max(points[0][1], y0 + (received - x0) * (y1 - y0) / (x1 - x0))
        return measured + (0.0 if pattern == "exchange" else self.step_ms * (cp - 2))


# Two H200 over NVLink (docs/context-parallel.md): an all-gather or reduce-scatter of m bytes moves m / 2 to each of two ranks.
NVLINK = Link(
    all_gather=((0.5 * MIB, 0.04), (4 * MIB, 0.08), (67 * MIB, 0.36), (512 * MIB, 2.07)),
    exchange=((1 * MIB, 0.14), (8 * MIB, 0.15), (134 * MIB, 0.62), (1024 * MIB, 3.2)),
    reduce_scatter=((0.0, 0.04), (134 * MIB, 0.64)),
    step_ms=0.003,
)
# One 400 Gbit/s adapter a GPU: its rate; latencies are assumptions.
NETWORK = Link.of_rate(50, latency_ms=0.05, step_ms=0.006)


@dataclass(frozen=True)
class KernelTimes:
    """Milliseconds of each (pass, stage) on one GPU for a sequence of UNIT tokens, and how one GPU's peak memory grows.

    A stage of LINEAR takes ms * x for x * UNIT tokens, one of QUADRATIC ms * x**2. The stage ``recompression`` is the
    compressors' forward run again in the backward, which one GPU does, too.

    Attributes:
        heads: the heads these times are for.
        ms: by (pass, stage).
        bytes_per_token: peak memory of one GPU per token, inputs and gradients included; by pass.
        copy_bytes_per_ms: rate of copies within the GPU's memory, read and written bytes together. An assumption.
    """

    heads: HeadLayout
    ms: Mapping[tuple[str, str], float]
    bytes_per_token: Mapping[str, float]
    copy_bytes_per_ms: float = 2.5e9

    def shard(self, ranks: int) -> KernelTimes:
        """The times of one of ``ranks`` tensor-parallel ranks: its part of the heads, time and memory.

        Raises:
            ValueError: the groups do not divide over the ranks.
        """
        ms = {key: value / ranks for key, value in self.ms.items()}
        memory = {pass_: value / ranks for pass_, value in self.bytes_per_token.items()}
        return replace(self, heads=self.heads.shard(ranks), ms=ms, bytes_per_token=memory)

    def at(self, pass_: str, stage: str, tokens: int) -> float:
        """Milliseconds of a stage for a sequence of ``tokens`` on one GPU."""
        return self.ms.get((pass_, stage), 0.0) * (tokens / UNIT) ** (2 if stage in QUADRATIC else 1)

    def total(self, pass_: str, tokens: int) -> float:
        """Milliseconds of all stages of a pass on one GPU."""
        return sum(self.at(pass_, stage, tokens) for stage in LINEAR + QUADRATIC)


class Prediction(NamedTuple):
    """For the slowest rank: time in ms, the part of it spent waiting for transfers or hosts (exposed), efficiency (one GPU's time
    / cp / ms), and peak memory in GiB."""

    ms: float
    exposed_ms: float
    efficiency: float
    peak_gib: float


def fit_line_and_square(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """a, b >= 0 for which a * x + b * x**2 fits the points (x, y) with the smallest sum of squared relative errors."""
    # Dividing by y turns relative errors into absolute ones: fit columns x / y and x**2 / y to 1.
    rows = [(x / y, x * x / y) for x, y in points]
    uu, vv, uv = (sum(f(u, v) for u, v in rows) for f in (lambda u, v: u * u, lambda u, v: v * v, lambda u, v: u * v))
    su, sv = sum(u for u, _ in rows), sum(v for _, v in rows)
    determinant = uu * vv - uv * uv
    if len(rows) > 1 and determinant > 1e-12 * uu * vv:
        a, b = (su * vv - sv * uv) / determinant, (sv * uu - su * uv) / determinant
        if a >= 0 and b >= 0:
            return a, b
    # If one would be negative it is 0: take the better of the two single terms.
    line, square = (su / uu, 0.0), (0.0, sv / vv)
    errors = [sum((a * u + b * v - 1) ** 2 for u, v in rows) for a, b in (line, square)]
    return line if errors[0] <= errors[1] else square


def fit_kernel_times(
    totals: Mapping[str, Mapping[int, float]],
    stages: Mapping[tuple[str, str], float],
    peaks: Mapping[str, Mapping[int, float]],
    heads: HeadLayout,
) -> KernelTimes:
    """Kernel times from measurements on one GPU.

    Args:
        totals: by pass, length -> ms of the whole attention. From two or more lengths of at least UNIT / 2 its linear and its
            quadratic part are fitted; with one length the stages tell how it divides.
        stages: (pass, stage) -> ms at one length, each timed alone; they give the shares of the stages within each part.
        peaks: by pass, length -> GiB.
        heads: the heads measured.

    Raises:
        ValueError: no total, or stages that are missing.
    """
    ms = {}
    for pass_, by_length in totals.items():
        parts = [{s: stages[pass_, s] for s in names if (pass_, s) in stages} for names in (LINEAR, QUADRATIC)]
        if not by_length or not all(parts):
            raise ValueError(f"no kernel times for the {pass_}: measure with nsa-cp bench attention --stages")
        # In short sequences launches outweigh work.
        used = {n: y for n, y in by_length.items() if n >= UNIT // 2} or by_length
        if len(used) > 1:
            coefficients = fit_line_and_square([(n / UNIT, y) for n, y in used.items()])
        else:
            ((length, y),) = used.items()
            share = sum(parts[0].values()) / sum(sum(part.values()) for part in parts)
            coefficients = share * y / (length / UNIT), (1 - share) * y / (length / UNIT) ** 2
        for coefficient, part in zip(coefficients, parts, strict=True):
            ms.update({(pass_, stage): coefficient * value / sum(part.values()) for stage, value in part.items()})
    bytes_per_token = {
        pass_: statistics.median(gib * GIB / n for n, gib in by_length.items()) if by_length else 0.0
        for pass_, by_length in peaks.items()
    }
    return KernelTimes(heads, ms, bytes_per_token)


class _Lanes:
    """Two clocks in ms, one of kernels (``now``) and one of transfers; on each, one thing runs after the other."""

    def __init__(self, link: Link, cp: int) -> None:
        self.link, self.cp = link, cp
        self.now = self.transfers_free = self.exposed = 0.0

    def compute(self, ms: float) -> None:
        """Run kernels for ``ms``."""
        self.now += ms

    def issue(self, pattern: str, received: float) -> float:
        """Start a transfer as soon as the one before it has ended; returns the time when it ends."""
        self.transfers_free = max(self.now, self.transfers_free) + self.link.time(pattern, received, self.cp)
        return self.transfers_free

    def wait(self, end: float) -> None:
        """Let kernels wait until time ``end``, when something that they need is there."""
        self.exposed += max(0.0, end - self.now)
        self.now = max(self.now, end)


@dataclass(frozen=True)
class CostModel:
    """Predicts one attention layer under context parallelism.

    Attributes:
        kernels: one GPU's times. link: the link between ranks.
        config: block sizes, the layout and how compressed tokens travel.
        itemsize: bytes of an element of q, k and v.
        agreement_step_ms: what every rank beyond one adds to the hosts' agreement.
        new_layout: whether the call is the first with its layout, so that the hosts agree before anything is sent.
    """

    kernels: KernelTimes
    link: Link
    config: NSAConfig = NSAConfig()
    itemsize: int = 2
    agreement_step_ms: float = AGREEMENT_STEP_MS
    new_layout: bool = False

    def predict(self, pass_: str, tokens: int, cp: int) -> Prediction:
        """Predict the ``forward`` or ``backward`` of a sequence of ``tokens`` over ``cp`` >= 2 ranks."""
        assert cp > 1, "one rank has nothing to communicate: see KernelTimes.total"
        lanes = _Lanes(self.link, cp)
        (self._forward if pass_ == "forward" else self._backward)(lanes, tokens, cp)
        alone = self.kernels.total(pass_, tokens)
        return Prediction(lanes.now, lanes.exposed, alone / cp / lanes.now, self.peak_gib(pass_, tokens, cp))

    def _forward(self, lanes: _Lanes, tokens: int, cp: int) -> None:
        """``_Branches.forward``, then ``_GatedSum.forward``."""
        ring = self.config.compressed_comm == "ring"
        steps, raw = self._steps(tokens)
        compressed = self._compressed_bytes(tokens)
        # The hosts start to compare layouts. For a new layout the answer is awaited here, for a known one at the end.
        agreed = self.agreement_step_ms * (cp - 1)
        if self.new_layout:
            lanes.wait(agreed)
        # Halo rows of compression and window; nothing can be computed before they have arrived.
        self._fetch_halo(lanes, tokens, cp)
        lanes.compute(self._kernel("forward", "compression", tokens, cp))
        # Compressed tokens are sent, to all ranks or to the next one, and then raw rows of the first slice of groups.
        tokens_there = self._pass_on(lanes, compressed / cp) if ring else self._gather(lanes, compressed, cp)
        raw_there = self._gather(lanes, raw, cp)
        # The window computes while they travel.
        lanes.compute(self._kernel("forward", "window", tokens, cp))
        if ring:
            self._compressed_by_shards(lanes, tokens_there, tokens, cp)
        else:
            self._arrive(lanes, tokens_there, compressed)
            lanes.compute(self._kernel("forward", "compressed", tokens, cp))
        # All compressed keys are there: the choice of blocks needs no transfer.
        lanes.compute(self._kernel("forward", "selection", tokens, cp))
        for step in range(steps):
            # The next slice's rows are sent before this slice's are awaited.
            following = self._gather(lanes, raw, cp) if step + 1 < steps else 0.0
            self._arrive(lanes, raw_there, raw)
            lanes.compute(self._kernel("forward", "selected", tokens, cp) / steps)
            raw_there = following
        lanes.compute(self._kernel("forward", "gating", tokens, cp))
        # All kernels are queued, so the hosts' answer delays the call only if it comes after they have ended.
        lanes.wait(agreed)

    def _compressed_by_shards(self, lanes: _Lanes, arrival: float, tokens: int, cp: int) -> None:
        """The ring: compressed attention shard by shard, each merged into a float32 output; then scoring's own log-sum-exp."""
        heads, kernel = self.kernels.heads, self._kernel("forward", "compressed", tokens, cp)
        shard = self._compressed_bytes(tokens) / cp
        elements = tokens / cp * heads.num_heads * heads.v_dim
        for number in range(cp):
            if number > 0:
                # The next rank's shard is awaited and, but for the last, sent on before it is computed on.
                lanes.wait(arrival)
                arrival = self._pass_on(lanes, shard) if number + 1 < cp else 0.0
            # The shard's keys are copied to the buffer that scoring reads.
            lanes.compute(self._copy(2 * shard * heads.qk_dim / (heads.qk_dim + heads.v_dim)))
            # A merge scales the output (8 bytes an element), weights the part (4 and its own) and adds it (12).
            lanes.compute(kernel / cp + self._copy((24 + self.itemsize) * elements))
        # The output is zeroed before and rounded after.
        lanes.compute(self._copy((8 + self.itemsize) * elements))
        lanes.compute(kernel * (heads.qk_dim + min(STAND_IN_CHANNELS, heads.v_dim)) / (heads.qk_dim + heads.v_dim))

    def _backward(self, lanes: _Lanes, tokens: int, cp: int) -> None:
        """``_GatedSum.backward``, then ``_Branches.backward``."""
        groups = self.kernels.heads.num_groups
        steps, raw = self._steps(tokens)
        compressed = self._compressed_bytes(tokens)
        branches = {stage: self._kernel("backward", stage, tokens, cp) / steps for stage in ("window", "compressed", "selected")}
        dkv = {stage: (1 - QUERY_GRADIENT_SHARE) * ms for stage, ms in branches.items()}
        # Sorting is part of the selected branch's dk, dv time, but is done for all groups at once.
        picks = tokens / cp * groups * self.config.num_selected_blocks
        sorting = min(self._copy(SORTED_BYTES * picks), steps * dkv["selected"])
        # Row sums and the gates' gradient come before the branches' backward begins.
        lanes.compute(self._kernel("backward", "gating", tokens, cp))
        # Halo rows kept from the forward are merged with own rows; the compressor runs again; its tokens, and then the first
        # slice's raw rows, are sent while the chosen blocks are sorted.
        lanes.compute(self._copy(2 * self._halo_buffers(tokens, cp)))
        lanes.compute(self._kernel("backward", "recompression", tokens, cp))
        tokens_there = self._gather(lanes, compressed, cp)
        raw_there = self._gather(lanes, raw, cp)
        lanes.compute(sorting)
        summed = 0.0
        for step in range(steps):
            # The window's dk, dv while compressed tokens travel.
            lanes.compute(dkv["window"])
            if step == 0:
                self._arrive(lanes, tokens_there, compressed)
            # dk, dv of the compressed tokens. Then the next slice's rows are sent, and the sums over ranks start.
            lanes.compute(dkv["compressed"])
            following = self._gather(lanes, raw, cp) if step + 1 < steps else 0.0
            cmp_summed = self._scatter(lanes, compressed / steps, cp)
            # dk, dv of the selected branch; their sums travel while one kernel makes dq of all branches.
            self._arrive(lanes, raw_there, raw)
            lanes.compute(dkv["selected"] - sorting / steps)
            under_way = self._scatter(lanes, raw, cp)
            if step + 1 == steps:
                returned = self._return_halo(lanes, cmp_summed, tokens, cp)
            lanes.compute(QUERY_GRADIENT_SHARE * sum(branches.values()))
            # The previous slice's sums must have ended; this slice's go on during the next. (The two sums end in their order.)
            lanes.wait(summed)
            summed, raw_there = under_way, following
        lanes.wait(summed)
        # The halo's gradients. (Slices of the selected branch's gradients are joined and rounded in one pass, as on one GPU.)
        lanes.wait(returned)

    def _return_halo(self, lanes: _Lanes, summed: float, tokens: int, cp: int) -> float:
        """Before the last dq: own compressed tokens' gradients, once summed, go through the compressor, and float32 gradients of
        halo rows, cut out of the buffers, go back; returns when they are there."""
        steps, raw = self._steps(tokens)
        lanes.wait(summed)
        # Joining the slices of groups: float32 gradients of the window's rows and of own compressed tokens.
        joined = self._float32(raw * steps + self._compressed_bytes(tokens)) / cp
        lanes.compute(self._copy(2 * joined if steps > 1 else 0.0))
        lanes.compute(self._kernel("backward", "compression", tokens, cp))
        lanes.compute(self._copy(2 * self._float32(self._halo_buffers(tokens, cp))))
        return lanes.issue("exchange", self._float32(self._halo_bytes(cp)))

    def peak_gib(self, pass_: str, tokens: int, cp: int) -> float:
        """Peak memory in GiB, at the worse of two moments: when all outputs are held (one GPU's peak, per rank), or when rows of
        all ranks are held beside the rank's own."""
        own = self.kernels.bytes_per_token.get(pass_, 0.0) * tokens / cp
        if cp == 1:
            return own / GIB
        # While gathered rows are held, the gated sum is not allocated yet; in the backward the branches' outputs have been freed,
        # and dq and the gradients of own rows do not take all that room.
        beside = own - self.itemsize * tokens / cp * self.kernels.heads.num_heads * self.kernels.heads.v_dim
        steps, raw = self._steps(tokens)
        compressed = self._compressed_bytes(tokens)
        # Raw rows of a slice of groups: as received, in global order, and those of the next slice arriving.
        gathered = compressed + 3 * raw
        if pass_ == "backward":
            # Their float32 gradients: as computed, as a message, and the previous slice's message, still under way.
            gathered += 3 * 4 / self.itemsize * (raw + compressed / steps)
        return max(own, beside + gathered) / GIB

    def _kernel(self, pass_: str, stage: str, tokens: int, cp: int) -> float:
        """Milliseconds of a stage on the slowest rank: in a contiguous cut the last one, whose queries see most."""
        uneven = 2 - 1 / cp if self.config.layout == "contiguous" and stage in QUADRATIC else 1.0
        return self.kernels.at(pass_, stage, tokens) * uneven / cp

    def _fetch_halo(self, lanes: _Lanes, tokens: int, cp: int) -> None:
        """Fetch halo rows and merge them with own rows. (Packing them takes next to nothing.)"""
        lanes.wait(lanes.issue("exchange", self._halo_bytes(cp)))
        lanes.compute(self._copy(2 * self._halo_buffers(tokens, cp)))

    def _gather(self, lanes: _Lanes, whole: float, cp: int) -> float:
        """Pack own rows and start an all-gather of ``whole`` bytes; returns when it ends."""
        lanes.compute(self._copy(2 * whole / cp))
        return lanes.issue("all_gather", whole * (cp - 1) / cp)

    def _arrive(self, lanes: _Lanes, end: float, whole: float) -> None:
        """Wait for an all-gather and put its ``whole`` bytes in global order."""
        lanes.wait(end)
        lanes.compute(self._copy(2 * whole))

    def _scatter(self, lanes: _Lanes, whole: float, cp: int) -> float:
        """Put float32 gradients of ``whole`` bytes of rows in rank order and start to sum them; returns when that ends."""
        lanes.compute(self._copy(2 * self._float32(whole)))
        return lanes.issue("reduce_scatter", self._float32(whole) * (cp - 1) / cp)

    def _pass_on(self, lanes: _Lanes, shard: float) -> float:
        """Pack a shard of compressed tokens and send it on while the one behind it comes; returns when that is there."""
        lanes.compute(self._copy(2 * shard))
        return lanes.issue("exchange", shard)

    def _float32(self, rows: float) -> float:
        """Bytes of the float32 gradients of rows that take ``rows`` bytes."""
        return rows * 4 / self.itemsize

    def _copy(self, moved: float) -> float:
        return moved / self.kernels.copy_bytes_per_ms

    def _steps(self, tokens: int) -> tuple[int, float]:
        """Into how many slices the groups are cut, and bytes of one slice's raw keys and values over the whole sequence."""
        groups, group_bytes = self.kernels.heads.num_groups, self._raw_bytes(tokens)
        at_once = groups_a_step(groups, int(group_bytes))
        return groups // at_once, at_once * group_bytes

    def _raw_bytes(self, tokens: int) -> float:
        """Bytes of the keys and values of one group, whole sequence."""
        return float(tokens * (self.kernels.heads.qk_dim + self.kernels.heads.v_dim) * self.itemsize)

    def _compressed_bytes(self, tokens: int) -> float:
        """Bytes of the compressed keys and values of all groups, whole sequence."""
        return self._raw_bytes(tokens) * self.kernels.heads.num_groups / self.config.compress_stride

    def _halo_bytes(self, cp: int) -> float:
        """Bytes of halo rows that a rank with two chunks (zigzag) or one receives: those of the window and of compression, of all
        groups, once if K/V are shared."""
        chunks = 2 if self.config.layout == "zigzag" and cp > 1 else 1
        depths = max(0, self.config.window_size - 1), self.config.compress_block_size - 1
        depth = max(depths) if self.config.shared_kv else sum(depths)
        return chunks * depth * self._raw_bytes(1) * self.kernels.heads.num_groups

    def _halo_buffers(self, tokens: int, cp: int) -> float:
        """Bytes of a rank's own rows for compression and for the window, with which halo rows are merged."""
        return 2 * self._raw_bytes(tokens) * self.kernels.heads.num_groups / cp
