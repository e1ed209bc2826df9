"""Which topologies are known, and what can their chips do?

Figures are the vendors' peaks, per chip: Cloud TPU's pages on v4, v5e, v5p and v6e
(cloud.google.com/tpu/docs/v5e and so on), NVIDIA's data sheets of H100 SXM, H200 SXM and A100 SXM 80 GB.
"""

from __future__ import annotations

import dataclasses
import math
import re

from parallel_train.config_fields import nearest
from parallel_train.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as the roofline sees it.

    Attributes:
      flops_per_second: bfloat16 products; on TPUs those of float32 as well, which XLA computes from
        bfloat16 parts unless a higher precision is asked for.
      hbm_bytes_per_second: between memory and chip.
      hbm_limit_bytes: what the compiler lets a program use, from its own message about one too large.
      link_bytes_per_second: of one interconnect link, one way. TPUs: half the bidirectional bandwidth
        over the number of ports (v4: the pod's all-reduce bandwidth of 1.1 PB/s over 4,096 × 6 links).
        GPUs: all of NVLink, one way.
      dcn_bytes_per_second: a chip's share of the data-centre network, one way.
      chips_per_host: at most.
    """

    flops_per_second: float
    hbm_bytes_per_second: float
    hbm_limit_bytes: int
    link_bytes_per_second: float
    dcn_bytes_per_second: float
    chips_per_host: int


CHIPS = {
    'v4': Chip(275e12, 1228e9, int(30.75 * GIB), 45e9, 6.25e9, 4),
    'v5e': Chip(197e12, 819e9, int(15.75 * GIB), 50e9, 3.125e9, 8),
    'v5p': Chip(459e12, 2765e9, int(95.74 * GIB), 100e9, 6.25e9, 4),
    'v6e': Chip(918e12, 1640e9, int(31.25 * GIB), 100e9, 12.5e9, 8),
    'h100': Chip(989e12, 3350e9, 80 * 10**9, 450e9, 50e9, 8),
    'h200': Chip(989e12, 4800e9, 141 * 10**9, 450e9, 50e9, 8),
    'a100': Chip(312e12, 2039e9, 80 * 10**9, 300e9, 25e9, 8),
}

# The slices that Cloud TPU's pages list.
_FLAT = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SOLID = (
    '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16',
)  # fmt: skip
TPU_SHAPES = {'v4': _SOLID[:-1], 'v5e': _FLAT, 'v5p': (*_SOLID, '16x16x24'), 'v6e': _FLAT}
MAX_CPU_DEVICES = 64


@dataclasses.dataclass(frozen=True)
class Topology:
    """A named arrangement of devices: TPU chips in a grid, or XLA's devices on this CPU."""

    name: str  # 'v5e:2x4', 'cpu:8'
    chip: Chip | None  # None: this machine's CPU
    shape: tuple[int, ...]  # devices along each axis

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    @property
    def is_cpu(self) -> bool:
        return self.chip is None

    @property
    def links(self) -> int:
        """Links that lead out of the chip that has the fewest: two along a ring, one along a line.

        Flat slices close where an axis has the pod's 16 chips, solid ones where they consist of whole
        cubes of 4×4×4.
        """
        if len(self.shape) == 3:
            rings = [all(size % 4 == 0 for size in self.shape)] * 3
        else:
            rings = [size == 16 for size in self.shape]
        return sum(0 if size == 1 else 1 + ring for size, ring in zip(self.shape, rings, strict=True))

    @property
    def hops(self) -> int:
        """Links between the two chips farthest apart, rings taken as lines: an upper bound."""
        return sum(size - 1 for size in self.shape)


def parse(name: str) -> Topology:
    """Returns the topology of that name: 'v5e:16x16', or 'cpu:8' for so many XLA devices of this machine.

    Raises:
      UserError: it is not known; the message lists those that are.
    """
    kind, _, size = name.partition(':')
    if kind in TPU_SHAPES and size in TPU_SHAPES[kind]:
        return Topology(name, CHIPS[kind], tuple(map(int, size.split('x'))))
    if kind == 'cpu' and re.fullmatch(r'[1-9]\d*', size) and int(size) <= MAX_CPU_DEVICES:
        return Topology(name, None, (int(size),))
    raise UserError(f'topology={name!r}: is not known{nearest(name, known())}; known: {_listing()}')


def known() -> list[str]:
    """Returns the names of all TPU topologies."""
    return [f'{kind}:{shape}' for kind, shapes in TPU_SHAPES.items() for shape in shapes]


def _listing() -> str:
    tpus = [f'{kind}:{{{",".join(shapes)}}}' for kind, shapes in TPU_SHAPES.items()]
    return ', '.join([*tpus, f'cpu:N (N at most {MAX_CPU_DEVICES})'])
