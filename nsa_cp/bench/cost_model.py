"""``nsa-cp bench cost-model``: step time, exposed communication and memory of context parallelism, predicted.

In go kernel times measured on one GPU (:class:`KernelTimes`, from ``docs/benchmarks``) and times of transfers measured between
two (:class:`Link`). The forward and the backward of ``ops/pipeline.py`` are then played, step by step, on two lanes, kernels and
transfers: a transfer starts when its input is there and the transfer before it has ended; kernels wait where the pipeline waits.

Assumed and not measured: ``Link.step_ms``, the network's latency, ``KernelTimes.copy_bytes_per_ms``, ``SORTED_BYTES`` and, until
it is measured, ``AGREEMENT_STEP_MS``. Launches are not modelled, nor kernels that run slower beside a transfer.
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
# Kernel times are functions of x = tokens / UNIT.
UNIT = 65536
LINEAR = ("compression", "recompression", "selected", "window", "gating")
QUADRATIC = ("compressed", "selection")
# What dq takes of the branches' backward: 28.9 of 56.4 ms, profiled in the whole at 64k, 64/4 heads of 128; since then the
# selected branch's dk, dv take about 1 ms less.
QUERY_GRADIENT_SHARE = 0.52
# Bytes that sorting the chosen blocks moves a block: four radix passes over an int32 key and an int64 place, read and written,
# and about as much as half of that to make the keys and divide the places. Counted, not measured.
SORTED_BYTES = 150
# Channels of the keys that stand in for values where scoring's normaliser is formed once more (``interval_lse`` on Hopper).
STAND_IN_CHANNELS = 64
# The hosts' agreement is gloo's all-gather, a ring of cp - 1 messages one after the other: milliseconds of each. An assumption,
# the network's latency; ``--agreement-step-ms`` takes a measured one.
AGREEMENT_STEP_MS = 0.05


@dataclass(frozen=True)
class Link:
    """Time of a transfer in ms by the bytes that a rank receives: straight lines between measured points.

    Attributes:
        all_gather, exchange, reduce_scatter: (bytes, ms), ascending; beyond the last point the last line goes on.
        step_ms: what every rank beyond two adds to a collective. An assumption: collectives alone were timed between two ranks.
    """

    all_gather: tuple[tuple[float, float], ...]
    exchange: tuple[tuple[float, float], ...]
    reduce_scatter: tuple[tuple[float, float], ...]
    step_ms: float

    @classmethod
    def of_rate(cls, gb_per_s: float, latency_ms: float, step_ms: float) -> Link:
        """A link of one rate for everything."""
        points = ((0.0, latency_ms), (gb_per_s * 1e6, latency_ms + 1.0))
        return cls(points, points, points, step_ms)

    def time(self, pattern: str, received: float, cp: int) -> float:
        """Milliseconds until a rank has received ``received`` bytes by ``pattern`` among ``cp`` ranks."""
        points = getattr(self, pattern)
        # The line whose right end is the first beyond, or the last line.
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
    compressor's forward run again in the backward, part of one GPU's backward too.

    Attributes:
        bytes_per_token: of one GPU's peak, forward and backward, inputs and gradients included; by pass.
        copy_bytes_per_ms: rate of copies within the GPU's memory, read and written bytes together. An assumption.
    """

    heads: HeadLayout
    ms: Mapping[tuple[str, str], float]
    bytes_per_token: Mapping[str, float]
    copy_bytes_per_ms: float = 2.5e9

    def shard(self, ranks: int) -> KernelTimes:
        """Of one of so many tensor-parallel ranks: its part of the heads, time and memory.

        Raises:
            ValueError: groups that do not divide over them.
        """
        ms = {key: value / ranks for key, value in self.ms.items()}
        memory = {pass_: value / ranks for pass_, value in self.bytes_per_token.items()}
        return replace(self, heads=self.heads.shard(ranks), ms=ms, bytes_per_token=memory)

    def at(self, pass_: str, stage: str, tokens: int) -> float:
        """Milliseconds of a stage for a sequence of ``tokens`` on one GPU."""
        return self.ms.get((pass_, stage), 0.0) * (tokens / UNIT) ** (2 if stage in QUADRATIC else 1)

    def total(self, pass_: str, tokens: int) -> float:
        """All stages."""
        return sum(self.at(pass_, stage, tokens) for stage in LINEAR + QUADRATIC)


class Prediction(NamedTuple):
    """Of the slowest rank: ms, of that ms in which it waits for transfers or hosts, one GPU's time / cp / ms, and peak GiB."""

    ms: float
    exposed_ms: float
    efficiency: float
    peak_gib: float


def fit_line_and_square(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """a, b >= 0 that make a * x + b * x**2 pass the points (x, y) with the smallest sum of squared relative errors."""
    # In the weights 1 / y: columns x / y and x**2 / y against 1.
    rows = [(x / y, x * x / y) for x, y in points]
    uu, vv, uv = (sum(f(u, v) for u, v in rows) for f in (lambda u, v: u * u, lambda u, v: v * v, lambda u, v: u * v))
    su, sv = sum(u for u, _ in rows), sum(v for _, v in rows)
    determinant = uu * vv - uv * uv
    if len(rows) > 1 and determinant > 1e-12 * uu * vv:
        a, b = (su * vv - sv * uv) / determinant, (sv * uu - su * uv) / determinant
        if a >= 0 and b >= 0:
            return a, b
    # On the border: the better of the two single terms.
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
        totals: by pass, length -> ms of the whole attention; two lengths or more of at least UNIT / 2 tell its linear from
            its quadratic part, one length leaves that to the stages.
        stages: (pass, stage) -> ms at one length, each timed alone: they give the shares within each part.
        peaks: by pass, length -> GiB.

    Raises:
        ValueError: no total, or stages that are missing.
    """
    ms = {}
    for pass_, by_length in totals.items():
        parts = [{s: stages[pass_, s] for s in names if (pass_, s) in stages} for names in (LINEAR, QUADRATIC)]
        if not by_length or not all(parts):
            raise ValueError(f"no kernel times for the {pass_}: measure with nsa-cp bench attention --stages")
        # Short sequences are launches rather than work.
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
    """Two clocks: kernels, and transfers, which run one after the other."""

    def __init__(self, link: Link, cp: int) -> None:
        self.link, self.cp = link, cp
        self.now = self.transfers_free = self.exposed = 0.0

    def compute(self, ms: float) -> None:
        """Kernels run for so long."""
        self.now += ms

    def issue(self, pattern: str, received: float) -> float:
        """Start a transfer when the one before it is through; returns when it ends."""
        self.transfers_free = max(self.now, self.transfers_free) + self.link.time(pattern, received, self.cp)
        return self.transfers_free

    def wait(self, end: float) -> None:
        """What follows needs something that ends then."""
        self.exposed += max(0.0, end - self.now)
        self.now = max(self.now, end)


@dataclass(frozen=True)
class CostModel:
    """Predicts one attention layer under context parallelism.

    Attributes:
        kernels: one GPU's times. link: between ranks.
        config: block sizes, the layout and how compressed tokens travel.
        itemsize: bytes of an element of q, k and v.
        agreement_step_ms: of the hosts' agreement for every rank beyond one.
        new_layout: the call is the first with its layout, and the hosts agree before anything is sent.
    """

    kernels: KernelTimes
    link: Link
    config: NSAConfig = NSAConfig()
    itemsize: int = 2
    agreement_step_ms: float = AGREEMENT_STEP_MS
    new_layout: bool = False

    def predict(self, pass_: str, tokens: int, cp: int) -> Prediction:
        """The ``forward`` or ``backward`` of a sequence of ``tokens`` over ``cp`` >= 2 ranks."""
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
        # The hosts start to compare layouts. A new one they settle first, the answer to a known one is looked at in the end.
        agreed = self.agreement_step_ms * (cp - 1)
        if self.new_layout:
            lanes.wait(agreed)
        # Halo rows of compression and window; nothing can be computed before they are there.
        self._fetch_halo(lanes, tokens, cp)
        lanes.compute(self._kernel("forward", "compression", tokens, cp))
        # The compressed tokens set out, to all ranks or to the next one, and behind them the first groups' raw rows.
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
            # The next groups' rows set out before these are awaited.
            following = self._gather(lanes, raw, cp) if step + 1 < steps else 0.0
            self._arrive(lanes, raw_there, raw)
            lanes.compute(self._kernel("forward", "selected", tokens, cp) / steps)
            raw_there = following
        lanes.compute(self._kernel("forward", "gating", tokens, cp))
        # All kernels are queued, so the hosts' answer delays the call only if these have ended before it is there.
        lanes.wait(agreed)

    def _compressed_by_shards(self, lanes: _Lanes, arrival: float, tokens: int, cp: int) -> None:
        """The ring: compressed attention shard by shard, each merged into a float32 output, and scoring's own normaliser."""
        heads, kernel = self.kernels.heads, self._kernel("forward", "compressed", tokens, cp)
        shard = self._compressed_bytes(tokens) / cp
        elements = tokens / cp * heads.num_heads * heads.v_dim
        for number in range(cp):
            if number > 0:
                # The next rank's shard is awaited and, but for the last, sent on before it is computed on.
                lanes.wait(arrival)
                arrival = self._pass_on(lanes, shard) if number + 1 < cp else 0.0
            # Its keys go to the buffer that scoring reads.
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
        # Part of the selected branch's dk, dv, but done for all groups at once.
        picks = tokens / cp * groups * self.config.num_selected_blocks
        sorting = min(self._copy(SORTED_BYTES * picks), steps * dkv["selected"])
        # Row sums and the gates' gradient come before the branches' backward begins.
        lanes.compute(self._kernel("backward", "gating", tokens, cp))
        # Halo rows, kept from the forward, meet the own ones; the compressor runs again; its tokens and, behind them, the first
        # groups' raw rows set out while the chosen blocks are sorted.
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
            # Those of the compressed tokens. The next groups' rows set out, and the sums over the ranks.
            lanes.compute(dkv["compressed"])
            following = self._gather(lanes, raw, cp) if step + 1 < steps else 0.0
            cmp_summed = self._scatter(lanes, compressed / steps, cp)
            # Those of the selected branch; their sums travel while one kernel makes dq of all branches.
            self._arrive(lanes, raw_there, raw)
            lanes.compute(dkv["selected"] - sorting / steps)
            under_way = self._scatter(lanes, raw, cp)
            if step + 1 == steps:
                returned = self._return_halo(lanes, cmp_summed, tokens, cp)
            lanes.compute(QUERY_GRADIENT_SHARE * sum(branches.values()))
            # The groups before must be through; these sums go on under the next. (The two sums end in their order.)
            lanes.wait(summed)
            summed, raw_there = under_way, following
        lanes.wait(summed)
        # The halo's gradients. (Groups of selected rows are joined and rounded in one pass, which one GPU makes too.)
        lanes.wait(returned)

    def _return_halo(self, lanes: _Lanes, summed: float, tokens: int, cp: int) -> float:
        """Before the last dq: own compressed tokens' gradients, once summed, go through the compressor, and float32 gradients of
        halo rows, cut out of the buffers, go back; returns when they are there."""
        steps, raw = self._steps(tokens)
        lanes.wait(summed)
        # Groups side by side: float32 gradients of the window's rows and of own compressed ones.
        joined = self._float32(raw * steps + self._compressed_bytes(tokens)) / cp
        lanes.compute(self._copy(2 * joined if steps > 1 else 0.0))
        lanes.compute(self._kernel("backward", "compression", tokens, cp))
        lanes.compute(self._copy(2 * self._float32(self._halo_buffers(tokens, cp))))
        return lanes.issue("exchange", self._float32(self._halo_bytes(cp)))

    def peak_gib(self, pass_: str, tokens: int, cp: int) -> float:
        """At the fuller of two moments: all outputs held, one GPU's own peak, or rows of all ranks beside the rank's own."""
        own = self.kernels.bytes_per_token.get(pass_, 0.0) * tokens / cp
        if cp == 1:
            return own / GIB
        # While gathered rows are held the gated sum is not there yet; in the backward the branches' outputs have made room, not
        # all of which dq and gradients of own rows take.
        beside = own - self.itemsize * tokens / cp * self.kernels.heads.num_heads * self.kernels.heads.v_dim
        steps, raw = self._steps(tokens)
        compressed = self._compressed_bytes(tokens)
        # Raw rows of a step's groups: as they arrive, in order, and the next ones' arriving.
        gathered = compressed + 3 * raw
        if pass_ == "backward":
            # Their float32 gradients: as computed, as a message, and the message of the step before, still travelling.
            gathered += 3 * 4 / self.itemsize * (raw + compressed / steps)
        return max(own, beside + gathered) / GIB

    def _kernel(self, pass_: str, stage: str, tokens: int, cp: int) -> float:
        """On the slowest rank: the last one of a contiguous cut holds the queries that see most."""
        uneven = 2 - 1 / cp if self.config.layout == "contiguous" and stage in QUADRATIC else 1.0
        return self.kernels.at(pass_, stage, tokens) * uneven / cp

    def _fetch_halo(self, lanes: _Lanes, tokens: int, cp: int) -> None:
        """Fetch halo rows and merge them with the own ones. (Their packing is nothing beside that.)"""
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
        """Bytes of float32 gradients of rows of so many bytes."""
        return rows * 4 / self.itemsize

    def _copy(self, moved: float) -> float:
        return moved / self.kernels.copy_bytes_per_ms

    def _steps(self, tokens: int) -> tuple[int, float]:
        """Into how many parts the groups are dealt, one after the other, and bytes of a part's raw keys and values."""
        groups, group_bytes = self.kernels.heads.num_groups, self._raw_bytes(tokens)
        at_once = groups_a_step(groups, int(group_bytes))
        return groups // at_once, at_once * group_bytes

    def _raw_bytes(self, tokens: int) -> float:
        """Keys and values of one group, whole sequence."""
        return float(tokens * (self.kernels.heads.qk_dim + self.kernels.heads.v_dim) * self.itemsize)

    def _compressed_bytes(self, tokens: int) -> float:
        """Compressed keys and values of all groups, whole sequence."""
        return self._raw_bytes(tokens) * self.kernels.heads.num_groups / self.config.compress_stride

    def _halo_bytes(self, cp: int) -> float:
        """What a rank with two chunks (zigzag) or one receives: window and compression rows of all groups, once if shared."""
        chunks = 2 if self.config.layout == "zigzag" and cp > 1 else 1
        depths = max(0, self.config.window_size - 1), self.config.compress_block_size - 1
        depth = max(depths) if self.config.shared_kv else sum(depths)
        return chunks * depth * self._raw_bytes(1) * self.kernels.heads.num_groups

    def _halo_buffers(self, tokens: int, cp: int) -> float:
        """A rank's own rows of compression and of the window, which halo rows are merged with."""
        return 2 * self._raw_bytes(tokens) * self.kernels.heads.num_groups / cp
