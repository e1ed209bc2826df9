"""What does a shard of the batch compute? Its examples, its keys, and the sums that it adds to the step's.

The global batch is `shards` equal parts, fixed by the config. What depends on a batch beyond its mean,
BatchNorm's statistics, dropout's masks and who is mixed with whom, belongs to a shard, so the function
computed does not depend on the number of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from parallel_train import augment, batches, mix
from parallel_train.batch_fit import mixes
from parallel_train.forward import Batch, Forward
from parallel_train.models import conv
from parallel_train.plan import Plan
from parallel_train.reduce import SHARD_AXIS
from parallel_train.state import KEY_IMPL

Sums = dict[str, Any]

_MIX = 2  # the stream of the run's key that mixing has; splitting it takes 0 and 1


def take_shards(
    step: Any,
    key: jax.Array,
    data: Batch,
    config: Any,
    plan: Plan,
    first: Any,
    count: int,
    part: tuple[jax.Array, int] | None = None,
) -> tuple[Batch, jax.Array]:
    """Returns shards as the model takes them, and a dropout key for each.

    Args:
      step: completed updates, int32.
      key: of the run, raw data.
      data: this device's part of what a feed gave.
      config: complete.
      plan: its plan.
      first: the number of the first shard, among all shards of the global batch.
      count: how many shards.
      part: (i, n): they are the i-th of n equal parts of `data`; all of it if None.

    Returns:
      A batch with arrays [count, examples per shard, ...]; keys [count].
    """
    run_key = jax.random.wrap_key_data(key, impl=KEY_IMPL)
    dropout_key, augment_key = jax.random.split(run_key)
    epoch, row = jnp.divmod(step, plan.steps_per_epoch)
    batch = _prepare(batches.local_batch(data, row, part), config, augment_key, epoch)

    def of_shards(key: jax.Array) -> jax.Array:
        of_step = jax.random.fold_in(key, step)
        return jax.vmap(lambda shard: jax.random.fold_in(of_step, shard))(first + jnp.arange(count))

    shape = (count, plan.examples_per_shard)
    shards = {k: v.reshape(*shape, *v.shape[1:]) for k, v in batch.items()}
    if mixes(config):
        shards = mix.mix_shards(shards, of_shards(jax.random.fold_in(run_key, _MIX)), config)
    return shards, of_shards(dropout_key)


def sums_of_shards(
    forward: Forward, params: Any, batch_stats: Any, shards: tuple[Batch, jax.Array], on_cpu: bool = False
) -> Sums:
    """Returns sums over the given shards: 'loss', 'grads' (of it), 'correct', 'weight', 'batch_stats'.

    All shards are mapped over the data alone, so that matrix products stay large.
    """

    def loss_of(params: Any) -> tuple[jax.Array, Sums]:
        def shard_loss(shard: Batch, shard_key: jax.Array) -> Any:
            return forward(params, batch_stats, shard, True, shard_key)

        loss, sums, stats = jax.tree.map(
            lambda x: jnp.sum(x, axis=0), jax.vmap(shard_loss, axis_name=SHARD_AXIS)(*shards)
        )
        return loss, {**sums, 'batch_stats': stats}

    with conv.for_cpu(on_cpu):
        (loss, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return {'loss': loss, 'grads': grads, **sums}


def eval_sums(forward: Forward, params: Any, batch_stats: Any, batch: Batch) -> Sums:
    """Returns sums over a batch in evaluation, float32 scalars.

    'loss' (losses × weights), 'correct', 'weight', and 'examples', how many are not padding.
    """
    loss, sums, _ = forward(params, batch_stats, _as_model_takes(batch, *forward.pixels), train=False)
    return {'loss': loss, 'examples': jnp.sum(batch['weight']), **sums}


def _prepare(batch: Batch, config: Any, key: jax.Array, epoch: jax.Array) -> Batch:
    """Returns the batch as the model and the loss take it, images augmented."""
    images = augment.augment(batch['image'], key, epoch, batch['index'], config)
    taken = {'image': images, 'label': batch['label']}
    return _as_model_takes(taken, config.pixel_mean, config.pixel_std)


def _as_model_takes(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> Batch:
    """Returns the batch with images as float32, normalised, or with tokens as int32."""
    if batch['image'].ndim > 2:
        return {**batch, 'image': augment.normalise(batch['image'], mean, std)}
    return {**batch, 'image': batch['image'].astype(jnp.int32), 'label': batch['label'].astype(jnp.int32)}
