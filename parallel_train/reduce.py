"""How do devices exchange what they computed? The one file with collectives in it.

All of it runs inside `shard_map` over the one mesh axis, `DATA_AXIS`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.flatten_util

DATA_AXIS = 'data'
Tree = TypeVar('Tree')


def device_index() -> Any:
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

    One `psum` of the whole tree, so that it compiles to one all-reduce per dtype. Scalars and vectors travel
    as one array: the TPU compiler joins at most 256, and a ResNet-50 has more with its statistics.
    """
    leaves, structure = jax.tree.flatten(tree)
    small = [i for i, leaf in enumerate(leaves) if leaf.ndim <= 1 and leaf.dtype == 'float32']
    vector, unravel = jax.flatten_util.ravel_pytree([leaves[i] for i in small])
    others = {i: leaf for i, leaf in enumerate(leaves) if i not in small}
    vector, others = jax.lax.psum((vector, others), DATA_AXIS)
    summed = {**others, **dict(zip(small, unravel(vector), strict=True))}
    return jax.tree.unflatten(structure, [summed[i] for i in range(len(leaves))])


def add_in_tree(tree: Tree, num_devices: int) -> Tree:
    """Returns the tree summed over the devices, the same on each, added in a fixed binary tree.

    Pairs (i, i^1) exchange and add, then (i, i^2), and so on, so that devices 2k and 2k+1 are added first,
    as neighbouring shards on one device are: the sum's bits depend on the order of the shards alone.
    Addition commutes, so both of a pair get the same bits. The arrays travel as one.

    Args:
      tree: of float32 arrays.
      num_devices: a power of two.
    """
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    assert flat.dtype == 'float32', flat.dtype
    distance = 1
    while distance < num_devices:
        pairs = [(i, i ^ distance) for i in range(num_devices)]
        # The barrier keeps the additions from being merged into something else.
        flat = jax.lax.optimization_barrier(flat + jax.lax.ppermute(flat, DATA_AXIS, pairs))
        distance *= 2
    return unravel(flat)


def gather_from_devices(tree: Tree) -> Tree:
    """Returns each array with an axis more in front, its values on every device: [devices, ...]."""
    return jax.lax.all_gather(tree, DATA_AXIS)
