"""How does a step give the same bits on any number of devices? `reduction='tree'`.

Floating-point sums depend on their order, and XLA compiles a program of another shape into other
arithmetic. So everything that computes numbers is a program whose shapes the config alone fixes:

1. the sums of one shard, called once for each of a device's shards;
2. an addition, by which they become one as in a binary tree over the shards;
3. the exchange, by which the tree goes on over the devices (`reduce.add_in_tree`);
4. the update, the same on each device.

As one program the update would be fused with what stands before it, which is not the same on one
device as on two. Evaluation likewise: chunks of examples whose size the config fixes, whose sums are
added on the host, in their order. EasyScale (Li et al., SC 2023) and VirtualFlow (Or et al. 2022) keep
results alike over device counts in related ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from parallel_train import batches, reduce
from parallel_train.forward import Batch, make_forward
from parallel_train.mesh import is_cpu, put_whole
from parallel_train.plan import Plan
from parallel_train.shards import Sums, eval_sums, sums_of_shards, take_shards
from parallel_train.state import TrainState
from parallel_train.update import apply_update

_EACH = P(reduce.DATA_AXIS)  # an array with an axis in front, on which each device holds its own value


def make_train_step(
    config: Any, plan: Plan, mesh: Mesh, skip_nonfinite: int, exchange: bool = True
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns `train_step(state, data) -> state`; see `step.make_train_step`."""
    per_device = plan.shards // plan.num_devices
    turns = [put_whole(mesh, np.array(i, np.int32)) for i in range(per_device)]

    def shard_sums(state: TrainState, data: Batch, turn: jax.Array) -> Sums:
        forward = make_forward(config, state.apply_fn)
        number = reduce.device_index() * per_device + turn
        shard = take_shards(state.step, state.key, data, config, plan, number, 1, part=(turn, per_device))
        sums = sums_of_shards(forward, state.params, state.batch_stats, shard, is_cpu(mesh))
        return _as_own(sums)

    def update(state: TrainState, sums: Sums) -> TrainState:
        return apply_update(state, sums, plan, skip_nonfinite)

    shard_program = _program(
        mesh, shard_sums, lambda state, data, turn: (P(), batches.specs(data), P()), _EACH
    )
    add_program = _program(
        mesh, lambda a, b: jax.tree.map(jnp.add, a, b), lambda a, b: (_EACH, _EACH), _EACH, donate=0
    )
    exchange_program = _program(
        mesh,
        lambda s: reduce.add_in_tree(_own(s), mesh.size if exchange else 1),
        lambda _: (_EACH,),
        P(),
        donate=0,
    )
    update_program = _program(mesh, update, lambda state, sums: (P(), P()), P(), donate=0)

    def train_step(state: TrainState, data: Batch) -> TrainState:
        needed = state.replace(opt_state=None, sums=None, skipped=None, ema=None)
        sums = add_as_tree((shard_program(needed, data, turn) for turn in turns), add_program)
        return update_program(state, exchange_program(sums))

    return train_step


def make_eval_step(config: Any, mesh: Mesh, apply_fn: Callable[..., Any]) -> Callable[..., Sums]:
    """Returns `eval_step(params, batch_stats, data, step) -> sums`; see `step.make_eval_step`.

    A batch is `shards` chunks, the same on any number of devices. The sums are those of each
    chunk, float32 [shards], in the order of the examples.
    """
    per_device = config.shards // mesh.size
    turns = [put_whole(mesh, np.array(i, np.int32)) for i in range(per_device)]
    forward = make_forward(config, apply_fn)

    def chunk_sums(params: Any, batch_stats: Any, data: Batch, step: jax.Array, turn: jax.Array) -> Sums:
        batch = batches.local_batch(data, step, (turn, per_device))
        return reduce.gather_from_devices(eval_sums(forward, params, batch_stats, batch))

    program = _program(
        mesh,
        chunk_sums,
        lambda params, stats, data, step, turn: (P(), P(), batches.specs(data), P(), P()),
        P(),
    )

    @jax.jit
    def in_order(chunks: list[Sums]) -> Sums:
        # [turns][devices] to [devices × turns]: a device's chunks follow one another.
        return jax.tree.map(lambda *sums: jnp.stack(sums, axis=1).reshape(-1), *chunks)

    return lambda params, batch_stats, data, step: in_order(
        [program(params, batch_stats, data, step, turn) for turn in turns]
    )


def add_as_tree(parts: Iterable[Any], add: Callable[[Any, Any], Any]) -> Any:
    """Returns the sum of 2**k parts, added as neighbours, then neighbouring pairs, and so on.

    At most k + 1 of the parts and sums are held at a time.
    """
    held: list[Any] = []
    for i, part in enumerate(parts):
        while i & 1:  # as many sums are complete as `i` ends in ones
            part = add(held.pop(), part)
            i >>= 1
        held.append(part)
    assert len(held) == 1, len(held)
    return held[0]


def _as_own(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _own(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _program(
    mesh: Mesh, function: Callable[..., Any], in_specs: Callable[..., Any], out_specs: Any, donate: Any = ()
) -> Callable[..., Any]:
    """Returns `function`, which one device runs, as a program of all of them."""

    def program(*args: Any) -> Any:
        # That values are the same on all devices cannot be told from sums over pairs, so it is not checked.
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs(*args), out_specs=out_specs, check_vma=False
        )(*args)

    return jax.jit(program, donate_argnums=donate)
