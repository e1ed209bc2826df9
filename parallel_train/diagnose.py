"""Where did a number that is not finite come from?

The state is frozen as it was before the step (update.py), so the step can be looked at again: shard by
shard, on one device, without any exchange.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parallel_train import order
from parallel_train.dataset import Split
from parallel_train.forward import make_forward
from parallel_train.plan import Plan
from parallel_train.shards import sums_of_shards, take_shards
from parallel_train.state import TrainState

_EXAMPLES_NAMED = 8


def diagnose(state: TrainState, config: Any, plan: Plan, split: Split) -> str:
    """Says which step, which of its examples and which tensor first was not finite.

    Args:
      state: frozen before that step.
      config: complete.
      plan: of the run.
      split: the train split.
    """
    step = int(state.step)
    epoch, row = divmod(step, plan.steps_per_epoch)
    examples = order.epoch_batches(config.seed, epoch, plan.num_train_examples, plan.batch_size)[row]
    state = jax.tree.map(jnp.asarray, jax.device_get(state))
    where = f'step {step + 1} (rate {plan.rate(step):.6g})'
    before = _first_bad({'params': state.params, 'batch_stats': state.batch_stats})
    if before:
        return f'{where}: {before} is not finite before it'
    suspects, tensor = [], ''
    for shard, mine in enumerate(examples.reshape(plan.shards, -1)):
        data = {'image': split.images[mine], 'label': split.labels[mine], 'index': mine}
        bad, rows = _look_at(state, config, plan, {k: jnp.asarray(v) for k, v in data.items()}, shard)
        if bad:
            tensor = tensor or bad
            suspects += mine[rows].tolist()
    if not suspects:
        return f'{where}: each shard is finite by itself, so their sum is not'
    named = ', '.join(map(str, suspects[:_EXAMPLES_NAMED]))
    more = f' and {len(suspects) - _EXAMPLES_NAMED} more' if len(suspects) > _EXAMPLES_NAMED else ''
    return f'{where}: first not finite is {tensor}, for examples {named}{more} of {config.train_split!r}'


def _look_at(
    state: TrainState, config: Any, plan: Plan, data: dict[str, jax.Array], shard: int
) -> tuple[str, np.ndarray]:
    """Looks at a shard's forward and backward pass.

    Returns:
      The first tensor that is not finite, '' if all are; and for which of the shard's examples it is, bool
      [examples]: all where it does not belong to examples.
    """
    forward = make_forward(config, state.apply_fn)
    shards = jax.jit(lambda s: take_shards(s.step, s.key, data, config, plan, shard, 1))(state)
    outputs: list[tuple[str, Any]] = []

    def watching(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == '__call__':
            outputs.append(('/'.join(context.module.path) or 'the model', output))
        return output

    batch, keys = jax.tree.map(lambda x: x[0], shards)
    with nn.intercept_methods(watching):
        loss, _, stats = forward(state.params, state.batch_stats, batch, True, keys)
    everyone = np.ones(plan.examples_per_shard, bool)
    for name, output in outputs:
        if isinstance(output, jax.Array) and not bool(jnp.all(jnp.isfinite(output))):
            finite = np.asarray(jnp.isfinite(output))
            by_example = len(finite) == len(everyone)
            rows = ~finite.reshape(len(finite), -1).all(axis=1) if by_example else everyone
            return f'the output of {name}', np.asarray(rows)
    if not bool(jnp.isfinite(loss)):
        return 'the loss', everyone
    grads = jax.jit(lambda s: sums_of_shards(forward, s.params, s.batch_stats, shards))(state)['grads']
    bad = _first_bad(grads)
    return (f'the gradient of {bad}' if bad else _first_bad({'batch_stats': stats})), everyone


def _first_bad(tree: Any) -> str:
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.all(jnp.isfinite(leaf))):
            return jax.tree_util.keystr(path, simple=True, separator='/') or 'it'
    return ''
