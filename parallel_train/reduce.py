"""How do devices exchange what they computed? The one file with collectives in it.

All of it runs inside `shard_map` over the one mesh axis, `DATA_AXIS`. (One exchange has another author: with
`batch_norm='global'` Flax's BatchNorm averages its statistics over `BATCH_AXES`; see batch_norm.py.)
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.flatten_util
import jax.numpy as jnp

DATA_AXIS = 'data'
SHARD_AXIS = 'shard'  # along which the shards of one device are mapped, in shards.py
BATCH_AXES = (SHARD_AXIS, DATA_AXIS)  # all shards of the global batch
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


def sum_over_devices(tree: Tree, groups: list[list[int]] | None = None) -> Tree:
    """Returns the tree summed over the devices, the same on each; with `groups`, over each group of them.

    One `psum` of the whole tree, so that it compiles to one all-reduce per dtype. Scalars and vectors of
    a dtype travel as one array: the TPU compiler joins at most 256, and a ResNet-50 has more with its
    statistics.
    """
    leaves, structure = jax.tree.flatten(tree)
    small = {
        dtype: [i for i, leaf in enumerate(leaves) if leaf.ndim <= 1 and leaf.dtype.name == dtype]
        for dtype in ('float32', 'bfloat16')
    }
    joined = {d: jax.flatten_util.ravel_pytree([leaves[i] for i in small[d]]) for d in small if small[d]}
    others = {i: leaf for i, leaf in enumerate(leaves) if not any(i in which for which in small.values())}
    vectors, summed = jax.lax.psum(
        ({d: vector for d, (vector, _) in joined.items()}, others), DATA_AXIS, axis_index_groups=groups
    )
    for dtype, (_, unravel) in joined.items():
        summed.update(zip(small[dtype], unravel(vectors[dtype]), strict=True))
    return jax.tree.unflatten(structure, [summed[i] for i in range(len(leaves))])


def sum_step(sums: dict[str, Any], gradient_dtype: str) -> dict[str, Any]:
    """Returns a step's sums over the devices; the gradients, sums['grads'], travel as `gradient_dtype`.

    As bfloat16 each device's part is rounded once to 8 significant bits, and so is the sum, which comes back
    as float32: an error of 2⁻⁹ at most each, relative to the parts' sizes. All else stays float32.
    """
    if gradient_dtype == 'float32':
        return sum_over_devices(sums)
    assert gradient_dtype == 'bfloat16', gradient_dtype

    def rounded(gradient: jax.Array) -> jax.Array:
        # By itself, a conversion there and back may be left out by XLA, as on CPUs, which sum in float32.
        return jax.lax.reduce_precision(gradient, exponent_bits=8, mantissa_bits=7)

    narrow = jax.tree.map(lambda g: rounded(g).astype(jnp.bfloat16), sums['grads'])
    total = sum_over_devices({**sums, 'grads': narrow})
    return {**total, 'grads': jax.tree.map(lambda g: rounded(g.astype(jnp.float32)), total['grads'])}


def add_in_tree(tree: Tree, num_devices: int) -> Tree:
    """Returns the tree summed over the devices, the same on each, added in a fixed binary tree.

    Pairs (i, i^1) add theirs, then (i, i^2), and so on, so that devices 2k and 2k+1 are added first, as
    neighbouring shards on one device are: the sum's bits depend on the order of the shards alone, as a sum of
    two does not depend on who adds (but for the sign of a zero that is the sum of two negative ones).

    Args:
      tree: of float32 arrays.
      num_devices: a power of two.
    """
    distance = 1
    while distance < num_devices:
        pairs = [[i, i ^ distance] for i in range(num_devices) if not i & distance]
        # Without the barrier XLA might make one sum, in an order of its own, out of several.
        tree = jax.lax.optimization_barrier(sum_over_devices(tree, pairs))
        distance *= 2
    return tree


def gather_from_devices(tree: Tree) -> Tree:
    """Returns each array with an axis more in front, its values on every device: [devices, ...]."""
    return jax.lax.all_gather(tree, DATA_AXIS)
