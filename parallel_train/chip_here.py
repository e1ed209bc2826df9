"""Which chip does this machine have, and how long should a step take on it?"""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import Mesh

from parallel_train import roofline
from parallel_train.compiled import compile_step
from parallel_train.plan import Plan
from parallel_train.sizes import Sizes
from parallel_train.topologies import CHIPS, TPU_SHAPES, Topology, parse

# What JAX calls a device (`device_kind`), in lower case -> what it is called in topologies.py.
_KINDS = (
    ('tpu v5 lite', 'v5e'), ('tpu v5e', 'v5e'), ('tpu v6 lite', 'v6e'), ('tpu v6e', 'v6e'),
    ('tpu v5p', 'v5p'), ('tpu v5', 'v5p'), ('tpu v4', 'v4'),
    ('h100', 'h100'), ('h200', 'h200'), ('a100', 'a100'),
)  # fmt: skip


def chip_name(device_kind: str) -> str | None:
    """Returns the name in `topologies.CHIPS` of what JAX calls a device; None if it is not there."""
    return next((name for part, name in _KINDS if part in device_kind.lower()), None)


def topology_of(chip: str, num_devices: int) -> Topology | None:
    """Returns the slice of so many TPU chips, or so many GPUs joined by NVLink; None if there is none."""
    if num_devices == 1 or chip not in TPU_SHAPES:
        return Topology(f'{chip}:{num_devices}', CHIPS[chip], (num_devices,))
    shapes = [s for s in TPU_SHAPES[chip] if math.prod(map(int, s.split('x'))) == num_devices]
    return parse(f'{chip}:{shapes[0]}') if shapes else None


def predicted_step_seconds(config: Any, sizes: Sizes, plan: Plan, mesh: Mesh) -> tuple[float | None, str]:
    """Returns the roofline's prediction for the chips of `mesh`; or None, and why there is none.

    As in docs/foresight.md. For GPUs, which have no memory like VMEM, all bytes that XLA counts pass through
    the HBM.
    """
    kind = mesh.devices.flat[0].device_kind
    chip = chip_name(kind)
    if chip is None:
        return None, f'the peaks of {kind} are not known'
    if config.reduction != 'pmean':
        return None, f'with reduction={config.reduction!r} a step is several programs'
    topology = topology_of(chip, mesh.size)
    if topology is None:
        return None, f'no slice of {chip} has {mesh.size} chips'
    compiled = compile_step(config, sizes, plan, mesh, CHIPS[chip].hbm_limit_bytes)
    if compiled.program is None:
        return None, 'the compiler refuses the step'
    moved = compiled.hbm_bytes if chip in TPU_SHAPES else compiled.bytes_accessed
    predicted = roofline.predict(CHIPS[chip], topology, compiled.flops, moved, compiled.collectives)
    return predicted.step_seconds, ''
