"""Do all devices hold the same state? And does a checkpoint hold what was saved?

Both are answered by fingerprints: of each array a number of 32 bits, made on the device in the time that it
takes to read the array. Integer arithmetic, so it is exact, whatever the device, the layout or the order.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from parallel_train import reduce
from parallel_train.errors import ReplicasDiffer
from parallel_train.state import TrainState, saved_parts


def fingerprint(tree: Any) -> jax.Array:
    """Returns a number for each array: uint32 [arrays], the sum of its words, each mixed with its place.

    Word i plus i · 2654435761 (Knuth, The Art of Computer Programming 3, section 6.4) goes through the
    finalizer of MurmurHash3 (Appleby 2011), a bijection: a single changed word always shows, several do
    but for one case in 2**32.
    """
    return jnp.stack([_of_array(x) for x in jax.tree.leaves(tree)])


def _of_array(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        words = x.astype(jnp.uint32)
    else:
        word = jnp.uint32 if x.dtype.itemsize >= 4 else jnp.dtype(f'uint{8 * x.dtype.itemsize}')
        words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    words = words.reshape(-1)
    mixed = words + jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(2654435761)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


_fingerprint = jax.jit(lambda parts: fingerprint(parts))


def digest(state: TrainState) -> dict[str, int]:
    """Returns the fingerprint of every array of the state, by name: what a checkpoint keeps beside them."""
    parts = saved_parts(state)
    return dict(zip(_names(parts), map(int, jax.device_get(_fingerprint(parts))), strict=True))


def _names(parts: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(parts)]


@functools.cache
def _on_each_device(mesh: Mesh) -> Callable[[Any], jax.Array]:
    """Returns a program that gives the fingerprints of every device's copy: uint32 [devices, arrays]."""

    def program(parts: Any) -> jax.Array:
        return jax.shard_map(
            lambda parts: reduce.gather_from_devices(fingerprint(parts)),
            mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False,
        )(parts)  # fmt: skip

    return jax.jit(program)


class Replicas:
    """Compares the devices' copies of the state, without making the host wait for it."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._pending: tuple[int, list[str], jax.Array] | None = None

    def check(self, state: TrainState, step: int) -> None:
        """Starts to compare the copies after `step` steps; what was started before is settled first."""
        self.settle()
        parts = saved_parts(state)
        self._pending = step, _names(parts), _on_each_device(self._mesh)(parts)

    def settle(self) -> dict[str, int]:
        """Waits for the comparison under way, if there is one.

        Returns:
          What `digest` would of the state compared, which need not be read again; {} if none was.

        Raises:
          ReplicasDiffer: names the devices whose copy is not that of most, their processes, and arrays.
        """
        if self._pending is None:
            return {}
        step, names, fetched = self._pending
        self._pending = None
        rows = np.asarray(fetched)
        message = difference(rows, names, [_name(d) for d in self._mesh.devices.flat])
        if message:
            raise ReplicasDiffer(
                f'at step {step} the devices hold different states: {message}. A bit has flipped, or a '
                'program differs; no checkpoint is written from it. Start again to go on from the last one'
            )
        return dict(zip(names, rows[0].tolist(), strict=True))


def difference(rows: np.ndarray, names: list[str], devices: list[str]) -> str:
    """Returns which devices differ from most, and in which arrays: '' if none does.

    Args:
      rows: uint32 [devices, arrays].
      names: of the arrays.
      devices: their names.
    """
    copies = [tuple(row) for row in rows.tolist()]
    (usual, count), *others = collections.Counter(copies).most_common()
    if not others:
        return ''
    if others[0][1] == count:
        return f'no copy is that of most of {", ".join(devices)}; they differ in {_differing(copies, names)}'
    odd = [i for i, copy in enumerate(copies) if copy != usual]
    who = ', '.join(devices[i] for i in odd)
    return f'{who} differ{"s" if len(odd) == 1 else ""} from the others in {_differing(copies, names)}'


def _differing(copies: list[tuple[int, ...]], names: list[str]) -> str:
    found = [
        name for name, column in zip(names, zip(*copies, strict=True), strict=True) if len(set(column)) > 1
    ]
    return ', '.join(found[:3]) + (f' and {len(found) - 3} more arrays' if len(found) > 3 else '')


def _name(device: jax.Device) -> str:
    return f'device {device.id} ({device.device_kind}, process {device.process_index})'
