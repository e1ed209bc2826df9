"""What is one step? Forward, backward, one reduction, one update; and its counterpart for evaluation.

The program of one device, run on all of them by `shard_map`. The global batch is `shards` equal
parts; a device computes its own, together (mapped over the data alone, so that matrix products stay
large) or in turns. What depends on a batch beyond its mean, BatchNorm's statistics and dropout's
masks, belongs to a shard, so the function computed does not depend on the number of devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from parallel_train import augment, batches, reduce
from parallel_train import config as config_lib
from parallel_train.errors import UserError
from parallel_train.mesh import is_cpu
from parallel_train.plan import Plan
from parallel_train.state import (
    KEY_IMPL,
    TrainState,
    abstract_state,
    create_model,
    eval_flags,
    takes_train,
)

Batch = dict[str, jax.Array]
Loss = Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The model and its loss, as the step calls them."""

    apply: Callable[..., Any]
    loss: Loss
    passes_train: bool

    def __call__(
        self, params: Any, batch_stats: Any, batch: Batch, train: bool, dropout_key: Any = None
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        """Returns the weighted losses' sum, sums of 'correct' and 'weight', and new batch statistics."""
        flags = {'train': train} if self.passes_train else {}
        logits, changed = self.apply(
            {'params': params, 'batch_stats': batch_stats} if batch_stats else {'params': params},
            batch['image'],
            rngs=None if dropout_key is None else {'dropout': dropout_key},
            mutable=['batch_stats'] if train else [],
            **flags,
        )
        losses, weights = self.loss(logits, batch)
        if 'weight' in batch:  # 0 for the padding of the last batch of an evaluation
            mask = batch['weight'].reshape(batch['weight'].shape + (1,) * (weights.ndim - 1))
            # A masked loss may be NaN or infinite without harm.
            losses, weights = jnp.where(mask > 0, losses, 0), weights * mask
        correct = (jnp.argmax(logits, axis=-1) == batch['label']).astype(jnp.float32)
        sums = {'correct': jnp.sum(correct * weights), 'weight': jnp.sum(weights)}
        return jnp.sum(losses * weights), sums, changed.get('batch_stats', batch_stats)


def _forward(config: Any, apply_fn: Callable[..., Any]) -> _Forward:
    return _Forward(apply_fn, _import_loss(config), takes_train(create_model(config)))


def check_model_and_loss(config: Any) -> None:
    """Checks, without computing anything, that model and loss give what the step needs.

    Args:
      config: complete, with the dataset's `input_shape` and `num_classes`.

    Raises:
      UserError: the model gives no logits, or fewer than there are classes, or fails in training mode;
        the loss gives no losses and weights for each example.
    """
    template = abstract_state(config, lambda _: 0.0)
    model, loss, examples = create_model(config), _import_loss(config), 5
    batch = {
        'image': jax.ShapeDtypeStruct((examples, *config.input_shape), jnp.float32),
        'label': jax.ShapeDtypeStruct((examples,), jnp.int32),
    }
    variables = {'params': template.params, 'batch_stats': template.batch_stats}

    def logits_of(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, **eval_flags(model))

    logits = _shapes('model', config.model, logits_of, variables, batch['image'])
    shape = getattr(logits, 'shape', type(logits).__name__)
    if len(shape) != 2 or shape[0] != examples:
        raise UserError(
            f'config.model={config.model!r}: must return logits [batch, classes], not {shape} for '
            f'{examples} images'
        )
    if shape[1] < config.num_classes:
        raise UserError(
            f'config.model={config.model!r}: gives {shape[1]} logits, but the labels of '
            f'{config.dataset!r} go up to {config.num_classes - 1}; it must give at least '
            f'{config.num_classes}'
        )
    given = _shapes('loss', config.loss, loss, logits, batch)
    parts = given if isinstance(given, tuple) else (given,)
    shapes = [getattr(part, 'shape', None) for part in parts]
    if len(shapes) != 2 or shapes[0] != shapes[1] or shapes[0] is None or shapes[0][:1] != (examples,):
        raise UserError(
            f'config.loss={config.loss!r}: must return per-example losses and weights of one shape '
            f'[batch, ...], not {shapes} for {examples} examples'
        )
    train = functools.partial(_forward(config, model.apply), train=True)
    key = jax.eval_shape(lambda: jax.random.key(0, impl=KEY_IMPL))
    _shapes(
        'model', config.model, lambda p, s, b, k: train(p, s, b, dropout_key=k),
        template.params, template.batch_stats, batch, key,
    )  # fmt: skip


_CALLED_AS = {
    'model': 'called as model(images, train=...), with a key for dropout alone',
    'loss': "called as loss(logits, batch), labels being batch['label']; see losses.py",
}


def _shapes(field: str, value: str, function: Callable[..., Any], *args: Any) -> Any:
    """Returns the shapes that the user's function gives; what it raises is the user's mistake."""
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:
        raise UserError(
            f'config.{field}={value!r}: cannot be used in training: {type(error).__name__}: {error} '
            f'({_CALLED_AS[field]})'
        ) from error


def _import_loss(config: Any) -> Loss:
    return config_lib.import_object('loss', config_lib.BUILT_IN_LOSSES.get(config.loss, config.loss))


def make_train_step(
    config: Any, plan: Plan, mesh: Mesh, num_steps: int = 1
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns the compiled-on-first-use `train_step(state, data) -> state`.

    Args:
      config: a complete config.
      plan: its plan for this mesh.
      mesh: one axis of devices.
      num_steps: steps in one dispatch; more than one only with the dataset on the devices.

    The state is donated: use the returned one. `data` is what a feed of `batches.py` gives. The gradient is
    that of sum(losses × weights) / sum(weights) over the global batch; loss, accuracy and gradient
    norm are added to `state.sums`; `state.step` counts completed updates.
    """
    forward: _Forward | None = None

    def steps(state: TrainState, data: Batch) -> TrainState:
        nonlocal forward
        forward = forward or _forward(config, state.apply_fn)
        if num_steps == 1:
            return _one_step(state, data, config, plan, forward, unroll=is_cpu(mesh))
        return jax.lax.scan(
            lambda s, _: (_one_step(s, data, config, plan, forward, is_cpu(mesh)), None),
            state,
            length=num_steps,
        )[0]

    def train_step(state: TrainState, data: Batch) -> TrainState:
        mapped = jax.shard_map(steps, mesh=mesh, in_specs=(P(), batches.specs(data)), out_specs=P())
        return mapped(state, data)

    return jax.jit(train_step, donate_argnums=0)


def _one_step(
    state: TrainState, data: Batch, config: Any, plan: Plan, forward: _Forward, unroll: bool
) -> TrainState:
    """One update, as one device computes it."""
    key = jax.random.wrap_key_data(state.key, impl=KEY_IMPL)
    dropout_key, augment_key = jax.random.split(key)
    epoch, row = jnp.divmod(state.step, plan.steps_per_epoch)
    batch = batches.local_batch(data, row)
    batch = _prepare(batch, config, augment_key, epoch)

    local_shards = plan.shards // plan.num_devices
    first = reduce.device_index() * local_shards
    shard_keys = jax.vmap(
        lambda shard: jax.random.fold_in(jax.random.fold_in(dropout_key, state.step), shard)
    )(first + jnp.arange(local_shards))
    batch = {k: v.reshape(local_shards, plan.examples_per_shard, *v.shape[1:]) for k, v in batch.items()}

    def loss_of(params: Any, turn: tuple[Batch, jax.Array]) -> tuple[jax.Array, Any]:
        """Sums over the shards of one turn: the loss, and what else is summed."""

        def shard_loss(shard: Batch, shard_key: jax.Array) -> Any:
            return forward(params, state.batch_stats, shard, True, shard_key)

        loss, sums, batch_stats = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(shard_loss)(*turn))
        return loss, {**sums, 'batch_stats': batch_stats}

    local_params = reduce.to_local(state.params)

    def compute(turn: tuple[Batch, jax.Array]) -> dict[str, Any]:
        (loss, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(local_params, turn)
        return {'loss': loss, 'grads': grads, **sums}

    turns = cpu_turns(plan) if unroll else plan.accumulation_steps
    sums = _over_turns(compute, (batch, shard_keys), turns, unroll)
    sums = reduce.sum_over_devices(sums)

    grads = jax.tree.map(lambda g: g / sums['weight'], sums['grads'])
    state = state.apply_gradients(
        grads=grads, batch_stats=jax.tree.map(lambda s: s / plan.shards, sums['batch_stats'])
    )
    measured = {
        'loss': sums['loss'] / sums['weight'],
        'accuracy': sums['correct'] / sums['weight'],
        'grad_norm': optax.global_norm(grads),
        'updates': jnp.ones((), jnp.float32),
    }
    return state.replace(sums=jax.tree.map(jnp.add, state.sums, measured))


def cpu_turns(plan: Plan) -> int:
    """Returns in how many turns a CPU device computes its shards: whole shards, of about 32 examples.

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
    return next((turns for turns in fitting if examples / turns <= 32), fitting[-1])


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


def _prepare(batch: Batch, config: Any, key: jax.Array, epoch: jax.Array) -> Batch:
    """Returns the batch as the model and the loss take it: augmented, float32 in [0, 1]."""
    images = batch['image']
    if config.random_crop_padding or config.random_flip:
        keys = augment.example_keys(key, epoch, batch['index'])
        images = augment.random_crop_and_flip(images, keys, config.random_crop_padding, config.random_flip)
    return {'image': augment.normalise(images), 'label': batch['label']}


def make_eval_step(
    config: Any, mesh: Mesh, apply_fn: Callable[..., Any]
) -> Callable[[Any, Any, Batch, Any], dict[str, jax.Array]]:
    """Returns `eval_step(params, batch_stats, data, step) -> sums` over batch `step` of the split.

    The sums are float32 scalars over all devices: 'loss' (losses × weights), 'correct', 'weight', and
    'examples', the number of examples that are not padding.
    """
    forward = _forward(config, apply_fn)

    def device_step(params: Any, batch_stats: Any, data: Batch, step: jax.Array) -> Any:
        batch = batches.local_batch(data, step)
        batch = {**batch, 'image': augment.normalise(batch['image'])}
        loss, sums, _ = forward(params, batch_stats, batch, train=False)
        examples = jnp.sum(batch['weight'])
        return reduce.sum_over_devices({'loss': loss, 'examples': examples, **sums})

    def eval_step(params: Any, batch_stats: Any, data: Batch, step: jax.Array) -> Any:
        specs = (P(), P(), batches.specs(data), P())
        return jax.shard_map(device_step, mesh=mesh, in_specs=specs, out_specs=P())(
            params, batch_stats, data, step
        )

    return jax.jit(eval_step)
