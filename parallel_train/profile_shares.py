"""What does a trace say: which share of the devices' time is compute, collectives, data, host?"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from parallel_train.hlo import KINDS

Interval = tuple[float, float]  # begin and end, seconds

_COLLECTIVE = re.compile(rf'({"|".join(KINDS)}|psum|ppermute)')
# Operations that hold others, which are told of by themselves.
_CONTAINER = re.compile(r'(while|call)[.\d]*$')


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something that a device did: the name of its HLO instruction, and when, in seconds of the trace."""

    device: str
    name: str
    begin: float
    end: float

    @property
    def is_collective(self) -> bool:
        return _COLLECTIVE.match(self.name) is not None


@dataclasses.dataclass(frozen=True)
class Shares:
    """Shares of the devices' time, in all 1; means over the devices of one process.

    Attributes:
      compute: in an operation that is no collective.
      collectives: in collectives alone, which includes waiting for the slowest device.
      data: idle, as far as the host waited for data.
      host: idle otherwise: nothing was dispatched in time, or the machine did something else.
    """

    compute: float
    collectives: float
    data: float
    host: float

    def text(self) -> str:
        return ', '.join(f'{name} {share:.1%}' for name, share in dataclasses.asdict(self).items())


def shares(operations: Sequence[Operation], seconds: float, waited_seconds: float) -> Shares | None:
    """Returns the shares of `seconds` of wall time; None if the trace knows of no operation.

    Args:
      operations: of all devices of a process.
      seconds: that the traced steps took.
      waited_seconds: how long the host waited for data meanwhile.
    """
    devices = sorted({operation.device for operation in operations})
    if not devices:
        return None
    compute = exchange = idle = 0.0
    for device in devices:
        mine = [operation for operation in operations if operation.device == device]
        busy = covered([(o.begin, o.end) for o in mine])
        computing = covered([(o.begin, o.end) for o in mine if not o.is_collective])
        seconds = max(seconds, busy)
        compute += computing / len(devices)
        exchange += (busy - computing) / len(devices)
        idle += (seconds - busy) / len(devices)
    data = min(waited_seconds, idle)
    return Shares(compute / seconds, exchange / seconds, data / seconds, (idle - data) / seconds)


def covered(intervals: Sequence[Interval]) -> float:
    """Returns how much time the intervals cover together."""
    total, reached = 0.0, float('-inf')
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def read_operations(trace: Path) -> list[Operation]:
    """Returns what the devices of a process did, from its `.xplane.pb`.

    XLA notes the HLO instruction of each: of a CPU's devices on the threads that run them, of a GPU's on its
    streams. A TPU has a line of them.
    """
    from jax.profiler import ProfileData

    found = []
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            if plane.name.startswith('/device:TPU') and line.name != 'XLA Ops':
                continue
            for event in line.events:
                name, device = event.name, plane.name
                if not plane.name.startswith('/device:TPU'):
                    if name.startswith(('ThreadpoolListener', 'end: ')):
                        continue
                    stats = dict(event.stats)
                    if 'hlo_op' not in stats:
                        continue
                    name = str(stats['hlo_op'])
                    device = f'{plane.name} {stats.get("device_ordinal", "")}'
                if not _CONTAINER.match(name):
                    begin = event.start_ns / 1e9
                    found.append(Operation(device, name, begin, begin + event.duration_ns / 1e9))
    return found
