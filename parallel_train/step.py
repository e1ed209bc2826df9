"""What is one step? Forward, backward, one reduction, one update; and its counterpart for evaluation.

The program of one device, run on all of them by `shard_map`: it computes the sums of its shards,
together or in turns, exchanges them once, and makes the same update as every other device. With
`reduction='tree'` a step is several such programs: see tree.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from parallel_train import batches, reduce, tree
from parallel_train.forward import Batch, Forward, make_forward
from parallel_train.mesh import is_cpu
from parallel_train.plan import Plan
from parallel_train.shards import eval_sums, sums_of_shards, take_shards
from parallel_train.state import TrainState
from parallel_train.update import apply_update

TrainStep = Callable[[TrainState, Batch], TrainState]


def make_train_step(
    config: Any, plan: Plan, mesh: Mesh, num_steps: int = 1, skip_nonfinite: int = 0, exchange: bool = True
) -> TrainStep:
    """Returns the compiled-on-first-use `train_step(state, data) -> state`.

    Args:
      config: a complete config.
      plan: its plan for this mesh.
      mesh: one axis of devices.
      num_steps: steps in one dispatch; more than one only with the dataset on the devices, and
        `reduction='pmean'`.
      skip_nonfinite: how many steps whose loss or gradient is not finite are skipped; one more freezes
        the state (update.py).
      exchange: False leaves out the exchange between devices, each of which then trains by itself: to measure
        what it costs (scale_child.py).

    The state is donated: use the returned one. `data` is what a feed of `batches.py` gives. The gradient is
    that of sum(losses × weights) / sum(weights) over the global batch; loss, accuracy and gradient
    norm are added to `state.sums`; `state.step` counts completed updates.
    """
    if config.reduction == 'tree':
        assert num_steps == 1, num_steps
        return tree.make_train_step(config, plan, mesh, skip_nonfinite, exchange)

    def steps(state: TrainState, data: Batch) -> TrainState:
        forward = make_forward(config, state.apply_fn)

        def one(state: TrainState) -> TrainState:
            sums = _local_sums(state, data, config, plan, forward, is_cpu(mesh))
            if exchange:
                sums = reduce.sum_step(sums, config.gradient_dtype)
            return apply_update(state, sums, plan, skip_nonfinite)

        if num_steps == 1:
            return one(state)
        return jax.lax.scan(lambda s, _: (one(s), None), state, length=num_steps)[0]

    def train_step(state: TrainState, data: Batch) -> TrainState:
        # JAX does not check a sum over mapped shards and devices at once, as BatchNorm's is (batch_norm.py).
        checked = exchange and config.batch_norm != 'global'
        in_specs = (P(), batches.specs(data))
        return jax.shard_map(steps, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=checked)(
            state, data
        )

    return jax.jit(train_step, donate_argnums=0)


def _local_sums(
    state: TrainState, data: Batch, config: Any, plan: Plan, forward: Forward, on_cpu: bool
) -> dict[str, Any]:
    """Returns the sums over a device's shards."""
    count = plan.shards // plan.num_devices
    first = reduce.device_index() * count
    shards = take_shards(state.step, state.key, data, config, plan, first, count)
    params = reduce.to_local(state.params)
    turns = plan.accumulation_steps
    if on_cpu and not forward.norm_over_batch:  # which takes all shards at once
        turns = cpu_turns(plan)
    return _over_turns(
        lambda turn: sums_of_shards(forward, params, state.batch_stats, turn, on_cpu), shards, turns, on_cpu
    )


def cpu_turns(plan: Plan) -> int:
    """Returns in how many turns a CPU device computes its shards: whole shards, of about 64 examples.

    So many examples stay in cache. At least `accumulation_steps`; more than 8 compile long.
    """
    local_shards = plan.shards // plan.num_devices
    most = max(plan.accumulation_steps, 8)
    fitting = [
        turns
        for turns in range(plan.accumulation_steps, most + 1, plan.accumulation_steps)
        if local_shards % turns == 0
    ]
    examples = local_shards * plan.examples_per_shard
    return next((turns for turns in fitting if examples / turns <= 64), fitting[-1])


def _over_turns(compute: Callable[[Any], Any], data: Any, turns: int, unroll: bool) -> Any:
    """Sums `compute` over equal parts of a device's shards, one part after the other.

    `lax.scan` keeps one part's activations at a time and the program small. On CPU, where XLA's
    convolutions are tens of times slower inside loops, the parts are unrolled, each held back until
    the one before is done.
    """
    if turns == 1:
        return compute(data)
    parts = jax.tree.map(lambda x: x.reshape(turns, x.shape[0] // turns, *x.shape[1:]), data)

    def part(i: int) -> Any:
        return jax.tree.map(lambda x: x[i], parts)

    total = compute(part(0))
    if unroll:
        for i in range(1, turns):
            next_part, total = jax.lax.optimization_barrier((part(i), total))
            total = jax.tree.map(jnp.add, total, compute(next_part))
        return total
    rest = jax.tree.map(lambda x: x[1:], parts)
    add = lambda total, turn: (jax.tree.map(jnp.add, total, compute(turn)), None)  # noqa: E731
    return jax.lax.scan(add, total, rest)[0]


def make_eval_step(
    config: Any, mesh: Mesh, apply_fn: Callable[..., Any]
) -> Callable[[Any, Any, Batch, Any], dict[str, jax.Array]]:
    """Returns `eval_step(params, batch_stats, data, step) -> sums` over batch `step` of the split.

    The sums are those of `shards.eval_sums` over all devices, with `reduction='tree'` of each chunk.
    """
    if config.reduction == 'tree':
        return tree.make_eval_step(config, mesh, apply_fn)
    forward = make_forward(config, apply_fn)

    def device_step(params: Any, batch_stats: Any, data: Batch, step: jax.Array) -> Any:
        batch = batches.local_batch(data, step)
        return reduce.sum_over_devices(eval_sums(forward, params, batch_stats, batch))

    def eval_step(params: Any, batch_stats: Any, data: Batch, step: jax.Array) -> Any:
        specs = (P(), P(), batches.specs(data), P())
        return jax.shard_map(device_step, mesh=mesh, in_specs=specs, out_specs=P())(
            params, batch_stats, data, step
        )

    return jax.jit(eval_step)
