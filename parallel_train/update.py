"""How do the sums of a batch become an update? And what if they are not finite?

A loss or gradient that is NaN or infinite is never applied. Up to `skip_nonfinite` such steps are skipped:
they count as steps, so that data, schedule and the optimizer's counts go on, while parameters, moments
and statistics stay. One more, and the state is frozen as it was before that step: whatever the host has
dispatched meanwhile changes nothing, until it sees `state.skipped` and stops.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from parallel_train.plan import Plan
from parallel_train.shards import Sums
from parallel_train.state import TrainState


def apply_update(state: TrainState, sums: Sums, plan: Plan, skip_nonfinite: int) -> TrainState:
    """Returns the state after one update from the sums over all shards of the global batch.

    The gradient is sums['grads'] / sums['weight']; new batch statistics are the shards' mean; loss,
    accuracy and gradient norm are added to `state.sums`; the moving averages follow.
    """
    weight = sums['weight']
    measured = {
        'loss': sums['loss'] / weight,
        'accuracy': sums['correct'] / weight,
        'grad_norm': optax.global_norm(sums['grads']) / weight,
        'updates': jnp.ones((), jnp.float32),
    }
    finite = all_finite((measured, sums['batch_stats']))
    frozen = state.skipped > skip_nonfinite
    skipped = state.skipped + jnp.where(finite | frozen, 0, 1)
    goes_on = skipped <= skip_nonfinite

    def take(carry: tuple[jax.Array, TrainState]) -> tuple[jax.Array, TrainState]:
        weight, state = carry
        new = state.apply_gradients(
            grads=jax.tree.map(lambda g: g / weight, sums['grads']),
            batch_stats=jax.tree.map(lambda s: s / plan.shards, sums['batch_stats']),
        )
        new = new.replace(sums=jax.tree.map(jnp.add, state.sums, measured), ema=_averages(state, new))
        return jnp.zeros_like(weight), new

    def counted(old: jax.Array, new: jax.Array, taken: jax.Array) -> jax.Array:
        is_count = jnp.issubdtype(new.dtype, jnp.integer)  # the step's and the optimizer's
        return jnp.where(goes_on, new, old) if is_count else taken

    # A loop of one turn or none changes the state in place. `where` over both states would read and write
    # every array once more in each good step; the branches of `cond` measured a little slower. The divisor
    # changes with the turn, as XLA would move a division by what does not in front of the loop, which is
    # one more pass over the gradient.
    to_apply = jnp.where(finite & goes_on, weight, 0)
    _, taken = jax.lax.while_loop(lambda carry: carry[0] != 0, take, (to_apply, state))
    new = state.apply_gradients(grads=sums['grads'])  # of which only the counts are computed
    return jax.tree.map(counted, state, new, taken).replace(skipped=skipped)


def _averages(state: TrainState, new: TrainState) -> Any:
    """Returns the moving averages with what this step made, None if there are none.

    Their decay is min(ema_decay, (1 + n) / (10 + n)) after n steps, so that the beginnings are forgotten in
    short runs too (TensorFlow's ExponentialMovingAverage with `num_updates`).
    """
    if state.ema is None:
        return None
    n = jnp.asarray(state.step, jnp.float32)
    decay = jnp.minimum(state.ema_decay, (1 + n) / (10 + n))
    latest = {'params': new.params, 'batch_stats': new.batch_stats}
    return jax.tree.map(lambda average, x: decay * average + (1 - decay) * x, state.ema, latest)


def all_finite(tree: Any) -> jax.Array:
    """Returns whether every floating-point number in the tree is finite, a bool scalar."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
