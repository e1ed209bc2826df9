"""Where did a number that is not finite come from?

The state is frozen as it was before the step (update.py), so the step can be looked at again: shard by
shard, on one device, without any exchange (with `batch_norm='global'` too: by the shard's statistics).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parallel_train import order
from parallel_train.damage import first_line
from parallel_train.dataset import AnySplit
from parallel_train.forward import Batch, Forward, make_forward
from parallel_train.plan import Plan
from parallel_train.shards import sums_of_shards, take_shards
from parallel_train.state import TrainState, abstract_state, create_model

_EXAMPLES_NAMED = 8


def diagnose(state: TrainState, config: Any, plan: Plan, split: AnySplit) -> str:
    """Says which step, which of its examples and which tensor first was not finite; or why it cannot.

    A second copy of the state and every layer's output may be more than the device's memory holds.

    Args:
      state: frozen before that step.
      config: complete.
      plan: of the run.
      split: the train split.
    """
    try:
        return _find(state, config, plan, split)
    except Exception as error:
        return f'where it came from could not be found ({type(error).__name__}: {first_line(error)})'


def _find(state: TrainState, config: Any, plan: Plan, split: AnySplit) -> str:
    step = int(state.step)
    epoch, row = divmod(step, plan.steps_per_epoch)
    examples = order.epoch_batches(config.seed, epoch, plan.num_train_examples, plan.batch_size)[row]
    state = _without_remat(jax.tree.map(jnp.asarray, jax.device_get(state)), config)
    where = f'step {step + 1} (rate {plan.rate(step):.6g})'
    before = _first_bad({'params': state.params, 'batch_stats': state.batch_stats})
    if before:
        return f'{where}: {before} is not finite before it'
    suspects, tensor = [], ''
    for shard, mine in enumerate(examples.reshape(plan.shards, -1)):
        images, labels = split.read(mine, epoch)
        data = {'image': images, 'label': labels, 'index': mine}
        bad, rows = _look_at(state, config, plan, {k: jnp.asarray(v) for k, v in data.items()}, shard)
        if bad:
            tensor = tensor or bad
            suspects += mine[rows].tolist()
    if not suspects:
        return f'{where}: each shard is finite by itself, so their sum is not'
    named = ', '.join(map(str, suspects[:_EXAMPLES_NAMED]))
    more = f' and {len(suspects) - _EXAMPLES_NAMED} more' if len(suspects) > _EXAMPLES_NAMED else ''
    return f'{where}: first not finite is {tensor}, for examples {named}{more} of {config.train_split!r}'


def _without_remat(state: TrainState, config: Any) -> TrainState:
    """Returns the state with a model that can be looked into, where its blocks keep their names."""
    if not config.remat:
        return state
    plain = config.copy_and_resolve_references().unlock()
    plain.remat = False
    names = [path for path, _ in jax.tree.leaves_with_path(state.params)]
    template = abstract_state(plain, lambda _: 0.0).params
    alike = names == [path for path, _ in jax.tree.leaves_with_path(template)]
    return state.replace(apply_fn=create_model(plain).apply) if alike else state


def _look_at(
    state: TrainState, config: Any, plan: Plan, data: dict[str, jax.Array], shard: int
) -> tuple[str, np.ndarray]:
    """Looks at a shard's forward and backward pass.

    Returns:
      The first tensor that is not finite, '' if all are; and which of the shard's examples it comes from,
      bool [examples]: all where that cannot be told.
    """
    forward = make_forward(config, state.apply_fn, alone=True)
    shards = take_shards(state.step, state.key, data, config, plan, shard, 1)
    outputs: list[tuple[str, Any]] = []

    def watching(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        # In a model's own `nn.remat` there are no values to look at.
        if context.method_name == '__call__' and not isinstance(output, jax.core.Tracer):
            outputs.append(('/'.join(context.module.path) or 'the model', output))
        return output

    batch, key = jax.tree.map(lambda x: x[0], shards)
    with nn.intercept_methods(watching):
        loss, _, stats = forward(state.params, state.batch_stats, batch, True, key)
    everyone = np.ones(plan.examples_per_shard, bool)
    for name, output in outputs:
        if isinstance(output, jax.Array) and not bool(jnp.all(jnp.isfinite(output))):
            return f'the output of {name}', _bad_rows(output) if len(output) == len(everyone) else everyone
    if not bool(jnp.isfinite(loss)):
        return 'the loss', _bad_rows(forward.measure(outputs[-1][1], batch, True)[0])
    grads = jax.jit(lambda s: sums_of_shards(forward, s.params, s.batch_stats, shards))(state)['grads']
    if bad := _first_bad(grads):
        return f'the gradient of {bad}', _bad_alone(forward, state, batch, key)
    return _first_bad({'batch_stats': stats}), everyone


def _bad_rows(values: jax.Array) -> np.ndarray:
    finite = np.asarray(jnp.isfinite(values))
    return np.asarray(~finite.reshape(len(finite), -1).all(axis=1))


def _bad_alone(forward: Forward, state: TrainState, batch: Batch, key: jax.Array) -> np.ndarray:
    """Returns of which examples by themselves the gradient is not finite; all, if it is of none."""

    def bad(example: Batch) -> jax.Array:
        one = jax.tree.map(lambda x: x[None], example)
        grads = jax.grad(lambda params: forward(params, state.batch_stats, one, True, key)[0])(state.params)
        return ~jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))

    rows = np.asarray(jax.jit(lambda batch: jax.lax.map(bad, batch))(batch))
    return rows if rows.any() else np.ones_like(rows)


def _first_bad(tree: Any) -> str:
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.all(jnp.isfinite(leaf))):
            return jax.tree_util.keystr(path, simple=True, separator='/') or 'it'
    return ''
