"""How long should a step take?

A prediction from few numbers, as an optimist makes it: the chip reaches its peak of arithmetic or that
of its memory, whichever takes longer (Williams, Waterman & Patterson 2009), and exchanges with its
neighbours afterwards at the full rate of its links. All times are seconds, all sizes bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from parallel_train.hlo import Collective
from parallel_train.topologies import Chip, Topology

# How long a message takes from one chip to the next, however short: about a microsecond (Austin et al. 2025,
# "How to Scale Your Model", chapter 3).
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The terms of one step on one device, and what follows from them."""

    compute_seconds: float
    hbm_seconds: float
    interconnect_seconds: float
    overhead_seconds: float = 0.0  # what does not grow with the batch; known on CPUs alone, by measurement

    @property
    def local_seconds(self) -> float:
        """The step without its exchange: arithmetic and memory traffic overlap."""
        return max(self.compute_seconds, self.hbm_seconds)

    @property
    def step_seconds(self) -> float:
        """The exchange needs the whole gradient, so nothing overlaps with it."""
        return self.local_seconds + self.interconnect_seconds + self.overhead_seconds

    @property
    def efficiency(self) -> float:
        """Of weak scaling: throughput against as many single devices, which exchange nothing.

        On a CPU, whose devices share its cores, that is not what one wants to know: there it is the share of
        the step that grows with the batch.
        """
        return self.local_seconds / self.step_seconds

    @property
    def bound(self) -> str:
        """Which term is the largest: 'compute', 'hbm', 'interconnect' or 'overhead'."""
        terms = {
            'compute': self.compute_seconds,
            'hbm': self.hbm_seconds,
            'interconnect': self.interconnect_seconds,
            'overhead': self.overhead_seconds,
        }
        return max(terms, key=lambda name: terms[name])


def predict(
    chip: Chip, topology: Topology, flops: float, hbm_bytes: float, collectives: Iterable[Collective]
) -> Prediction:
    """Predicts a step from what the compiler counted for one device.

    Args:
      chip: the device.
      topology: how the devices are connected.
      flops: floating-point operations of the device in a step.
      hbm_bytes: bytes it moves between its memory and itself.
      collectives: what it exchanges.
    """
    return Prediction(
        compute_seconds=flops / chip.flops_per_second,
        hbm_seconds=hbm_bytes / chip.hbm_bytes_per_second,
        interconnect_seconds=sum(torus_seconds(c, chip, topology) for c in collectives),
    )


def torus_seconds(collective: Collective, chip: Chip, topology: Topology) -> float:
    """Returns how long collectives of one kind take on a grid or torus of chips.

    An all-reduce is a reduce-scatter and an all-gather; in each, a device sends (N - 1)/N of the data
    (Patarasu & Yuan 2009, for a ring; bucket algorithms reach it on a torus with all links at once). The
    chip with the fewest links is the slowest. Each phase crosses the slice once:

        2 · (N - 1)/N · bytes / (links · link bandwidth) + 2 · hops · 1 µs
    """
    devices = topology.num_devices
    if devices == 1:
        return 0.0
    phases = {'all-reduce': 2, 'collective-permute': 0}.get(collective.kind, 1)
    if not phases:  # to one other chip, over one link at a time
        return collective.bytes / chip.link_bytes_per_second + collective.count * HOP_SECONDS * topology.hops
    sent = phases * (devices - 1) / devices * collective.bytes
    rate = topology.links * chip.link_bytes_per_second
    return sent / rate + collective.count * phases * topology.hops * HOP_SECONDS


def ring_all_reduce_seconds(num_bytes: float, devices: int, bytes_per_second: float) -> float:
    """Returns the bandwidth term alone, 2 · (N - 1)/N · bytes / rate, for NVLink or the DCN."""
    return 2 * (devices - 1) / devices * num_bytes / bytes_per_second


# ---------------------------------------------------------------- a CPU, which has no data sheet


@dataclasses.dataclass(frozen=True)
class CpuModel:
    """A machine on one model: seconds = overhead_seconds + flops / flops_per_second, flops of all devices."""

    overhead_seconds: float
    flops_per_second: float

    def predict(self, flops: float) -> Prediction:
        return Prediction(flops / self.flops_per_second, 0.0, 0.0, self.overhead_seconds)


def fit_cpu(flops: Sequence[float], seconds: Sequence[float]) -> CpuModel:
    """Fits a CPU by the steps of other batch sizes: the line through them, of least relative error.

    Args:
      flops: of a step, all devices together; two or more different ones.
      seconds: that the step took.

    The overhead (update, all-reduce, dispatch: what does not grow with the batch) is at least 0.
    """
    assert len(set(flops)) >= 2, flops
    # Weighted by 1/seconds²: with x = flops / seconds and y = 1 / seconds, 1 = a·y + b·x.
    x = [f / s for f, s in zip(flops, seconds, strict=True)]
    y = [1 / s for s in seconds]
    xx, yy, xy = (math.fsum(p * q for p, q in zip(u, v, strict=True)) for u, v in ((x, x), (y, y), (x, y)))
    sx, sy = math.fsum(x), math.fsum(y)
    determinant = xx * yy - xy * xy
    overhead = (xx * sy - xy * sx) / determinant
    slope = (yy * sx - xy * sy) / determinant
    if overhead < 0 or slope <= 0:
        overhead, slope = 0.0, sx / xx
    return CpuModel(overhead, 1 / slope)


# ---------------------------------------------------------------- checkpoints at scale


def mean_seconds_between_failures(devices: int, device_hours_per_failure: float) -> float:
    """Returns the mean time to the next failure of any device, failures being independent."""
    return device_hours_per_failure * 3600 / devices


def checkpoint_interval_seconds(save_seconds: float, between_failures_seconds: float) -> float:
    """Returns the interval between checkpoints that loses the least time: √(2 · save · MTBF) (Young 1974).

    Daly 2006 adds terms that matter only where saving takes a sizeable part of the time between failures.
    """
    return math.sqrt(2 * save_seconds * between_failures_seconds)


def time_lost_fraction(
    interval_seconds: float, save_seconds: float, between_failures_seconds: float, restart_seconds: float
) -> float:
    """Returns the share of time spent saving, redoing and restarting, to first order (Daly 2006)."""
    redone = interval_seconds / 2 + restart_seconds
    return save_seconds / interval_seconds + redone / between_failures_seconds
