"""How do devices exchange what they computed? The one file with collectives in it.

All of it runs inside `shard_map` over the one mesh axis, `DATA_AXIS`.
"""

from __future__ import annotations

from typing import TypeVar

import jax

DATA_AXIS = 'data'
Tree = TypeVar('Tree')


def device_index() -> jax.Array:
    """Returns this device's place on the axis: int32 scalar."""
    return jax.lax.axis_index(DATA_AXIS)


def to_local(tree: Tree) -> Tree:
    """Marks a replicated tree as each device's own copy.

    A gradient with respect to a *replicated* value is summed over the devices by `shard_map` itself, once
    for each time it is taken. With respect to a local copy it stays local, so that any number of
    micro-batches are added up before the one explicit reduction.
    """
    return jax.lax.pcast(tree, (DATA_AXIS,), to='varying')


def sum_over_devices(tree: Tree) -> Tree:
    """Returns the tree summed over the devices, the same on each.

    One `psum` of the whole tree, so that it compiles to one all-reduce per dtype.
    """
    return jax.lax.psum(tree, DATA_AXIS)
