"""``nsa-cp bench cost-model``: step time, exposed communication and memory of context parallelism, predicted.

In go kernel times measured on one GPU (:class:`KernelTimes`, from ``docs/benchmarks``) and times of transfers measured between
two (:class:`Link`). The forward and the backward of ``ops/pipeline.py`` are then played on two lanes, kernels and transfers:
a transfer starts when its input is there and the transfer before it has ended; kernels wait where the pipeline waits.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nsa_cp.bench.inputs import HeadLayout
from nsa_cp.config import NSAConfig

MIB = float(1 << 20)
GIB = float(1 << 30)
# Kernel times are functions of x = tokens / UNIT.
UNIT = 65536
LINEAR = ("compression", "selected", "window", "gating")
QUADRATIC = ("compressed", "selection")


@dataclass(frozen=True)
class Link:
    """Time of a transfer in ms by the bytes that a rank receives: straight lines between measured points.

    Attributes:
        all_gather, exchange, reduce_scatter: (bytes, ms), ascending; beyond the last point the last line goes on.
        step_ms: what every rank beyond two adds to a collective. An assumption: more than two ranks have not been measured.
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

    A stage of LINEAR takes ms * x for x * UNIT tokens, one of QUADRATIC ms * x**2.

    Attributes:
        bytes_per_token: of one GPU's peak, forward and backward, inputs and gradients included; by pass.
        copy_bytes_per_ms: rate of copies within the GPU's memory, read and written bytes together. An assumption.
    """

    heads: HeadLayout
    ms: Mapping[tuple[str, str], float]
    bytes_per_token: Mapping[str, float]
    copy_bytes_per_ms: float = 2.5e9

    def at(self, pass_: str, stage: str, tokens: int) -> float:
        """Milliseconds of a stage for a sequence of ``tokens`` on one GPU."""
        return self.ms.get((pass_, stage), 0.0) * (tokens / UNIT) ** (2 if stage in QUADRATIC else 1)

    def total(self, pass_: str, tokens: int) -> float:
        """All stages."""
        return sum(self.at(pass_, stage, tokens) for stage in LINEAR + QUADRATIC)


class Prediction(NamedTuple):
    """Of the slowest rank: ms, of that ms in which its kernels wait for transfers, one GPU's time / cp / ms, and peak GiB."""

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
        """Kernels need a transfer that ends then."""
        self.exposed += max(0.0, end - self.now)
        self.now = max(self.now, end)


@dataclass(frozen=True)
class CostModel:
    """Predicts one attention layer under context parallelism.

    Attributes:
        kernels: one GPU's times. link: between ranks.
        config: block sizes, the layout and how compressed tokens travel.
        itemsize: bytes of an element of q, k and v.
    """

    kernels: KernelTimes
    link: Link
    config: NSAConfig = NSAConfig()
    itemsize: int = 2

    def predict(self, pass_: str, tokens: int, cp: int) -> Prediction:
        """The ``forward`` or ``backward`` of a sequence of ``tokens`` over ``cp`` >= 2 ranks."""
        assert cp > 1, "one rank has nothing to communicate: see KernelTimes.total"
        lanes = _Lanes(self.link, cp)
        (self._forward if pass_ == "forward" else self._backward)(lanes, tokens, cp)
        alone = self.kernels.total(pass_, tokens)
        return Prediction(lanes.now, lanes.exposed, alone / cp / lanes.now, self.peak_gib(pass_, tokens, cp))

    def _forward(self, lanes: _Lanes, tokens: int, cp: int) -> None:
        lanes.wait(lanes.issue("exchange", self._halo_bytes(cp)))
        lanes.compute(self._kernel("forward", "compression", tokens, cp))
        ring = self.config.compressed_comm == "ring"
        compressed = 0.0 if ring else lanes.issue("all_gather", self._compressed_bytes(tokens) * (cp - 1) / cp)
        raw = self._issue_raw(lanes, tokens, cp)
        lanes.compute(self._kernel("forward", "window", tokens, cp))
        lanes.wait(compressed)
        if ring:
            self._ring(lanes, tokens, cp)
        else:
            lanes.compute(self._kernel("forward", "compressed", tokens, cp))
        lanes.compute(self._kernel("forward", "selection", tokens, cp))
        groups = self.kernels.heads.num_groups
        for group in range(groups):
            following = self._issue_raw(lanes, tokens, cp) if group + 1 < groups else 0.0
            lanes.wait(raw)
            lanes.compute(self._copy(2 * self._raw_bytes(tokens)))
            lanes.compute(self._kernel("forward", "selected", tokens, cp) / groups)
            raw = following
        lanes.compute(self._kernel("forward", "gating", tokens, cp))

    def _ring(self, lanes: _Lanes, tokens: int, cp: int) -> None:
        """Compressed attention shard by shard, each merged into a float32 output, and scoring's own normaliser."""
        heads, compressed = self.kernels.heads, self._kernel("forward", "compressed", tokens, cp)
        # A merge reads and writes output, part and weighted sums: about eight passes over the float32 output.
        merge = self._copy(8 * 4 * tokens / cp * heads.num_heads * heads.v_dim)
        for shard in range(cp):
            arrival = lanes.issue("exchange", self._compressed_bytes(tokens) / cp) if shard + 1 < cp else 0.0
            lanes.compute(compressed / cp + merge)
            lanes.wait(arrival)
        lanes.compute(compressed * heads.qk_dim / (heads.qk_dim + heads.v_dim))

    def _backward(self, lanes: _Lanes, tokens: int, cp: int) -> None:
        halo = lanes.issue("exchange", self._halo_bytes(cp))
        lanes.compute(self._kernel("backward", "gating", tokens, cp))
        lanes.wait(halo)
        lanes.compute(self._kernel("forward", "compression", tokens, cp))
        compressed = lanes.issue("all_gather", self._compressed_bytes(tokens) * (cp - 1) / cp)
        raw = self._issue_raw(lanes, tokens, cp)
        lanes.wait(compressed)
        groups, sums = self.kernels.heads.num_groups, 0.0
        stages = ("window", "compressed", "selected")
        for group in range(groups):
            following = self._issue_raw(lanes, tokens, cp) if group + 1 < groups else 0.0
            lanes.wait(raw)
            lanes.compute(self._copy(2 * self._raw_bytes(tokens)))
            lanes.compute(sum(self._kernel("backward", stage, tokens, cp) for stage in stages) / groups)
            # Gradients of the whole sequence, float32, put in rank order and summed over ranks.
            widening = 4 / self.itemsize
            rows = widening * (self._raw_bytes(tokens) + self._compressed_bytes(tokens) / groups)
            lanes.compute(self._copy(2 * rows))
            before, sums = sums, lanes.issue("reduce_scatter", rows * (cp - 1) / cp)
            lanes.wait(before)
            raw = following
        lanes.wait(sums)
        lanes.compute(self._kernel("backward", "compression", tokens, cp))
        lanes.wait(lanes.issue("exchange", 4 / self.itemsize * self._halo_bytes(cp)))

    def peak_gib(self, pass_: str, tokens: int, cp: int) -> float:
        """What grows with the rank's own tokens, as measured on one GPU, and what is gathered from all."""
        own = self.kernels.bytes_per_token.get(pass_, 0.0) * tokens / cp
        if cp == 1:
            return own / GIB
        raw, compressed = self._raw_bytes(tokens), self._compressed_bytes(tokens)
        # Raw rows of a group: as they arrive, in order, and the next group's arriving.
        gathered = compressed + 3 * raw
        if pass_ == "backward":
            # Their float32 gradients: as computed, as a message, and the message of the group before, still travelling.
            gathered += 3 * 4 / self.itemsize * (raw + compressed / self.kernels.heads.num_groups)
        return (own + gathered) / GIB

    def _kernel(self, pass_: str, stage: str, tokens: int, cp: int) -> float:
        """On the slowest rank: the last one of a contiguous cut holds the queries that see most."""
        uneven = 2 - 1 / cp if self.config.layout == "contiguous" and stage in QUADRATIC else 1.0
        return self.kernels.at(pass_, stage, tokens) * uneven / cp

    def _issue_raw(self, lanes: _Lanes, tokens: int, cp: int) -> float:
        lanes.compute(self._copy(2 * self._raw_bytes(tokens) / cp))
        return lanes.issue("all_gather", self._raw_bytes(tokens) * (cp - 1) / cp)

    def _copy(self, moved: float) -> float:
        return moved / self.kernels.copy_bytes_per_ms

    def _raw_bytes(self, tokens: int) -> float:
        """Keys and values of one group, whole sequence."""
        return float(tokens * (self.kernels.heads.qk_dim + self.kernels.heads.v_dim) * self.itemsize)

    def _compressed_bytes(self, tokens: int) -> float:
        """Compressed keys and values of all groups, whole sequence."""
        return self._raw_bytes(tokens) * self.kernels.heads.num_groups / self.config.compress_stride

    def _halo_bytes(self, cp: int) -> float:
        """What a rank with two chunks (zigzag) or one receives: window and compression rows of all groups."""
        chunks = 2 if self.config.layout == "zigzag" and cp > 1 else 1
        depth = max(0, self.config.window_size - 1) + self.config.compress_block_size - 1
        return chunks * depth * self._raw_bytes(1) * self.kernels.heads.num_groups
