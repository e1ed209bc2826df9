"""How is the model called, and its loss? And do they give what a step needs?"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from parallel_train import batch_norm, config_fields
from parallel_train import config as config_lib
from parallel_train.augment_fit import check_augmentation
from parallel_train.errors import UserError
from parallel_train.examples import is_tokens, kind
from parallel_train.state import KEY_IMPL, abstract_state, create_model, eval_flags, takes_train

Batch = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, jax.Array]]  # (logits, batch), perhaps label_smoothing


@dataclasses.dataclass(frozen=True)
class Forward:
    """The model and its loss, as the step calls them."""

    apply: Callable[..., Any]
    loss: Loss
    passes_train: bool
    norm_over_batch: bool  # BatchNorm over the global batch; needs the axes of the train step
    label_smoothing: float = 0.0  # passed to the loss in training, unless it is 0
    pixels: tuple[Sequence[float], Sequence[float]] = ((), ())  # mean and standard deviation

    def __call__(
        self, params: Any, batch_stats: Any, batch: Batch, train: bool, dropout_key: Any = None
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        """Returns the weighted losses' sum, sums of 'correct' and 'weight', and new batch statistics."""
        flags = {'train': train} if self.passes_train else {}
        with batch_norm.over_global_batch(train and self.norm_over_batch):
            logits, changed = self.apply(
                {'params': params, 'batch_stats': batch_stats} if batch_stats else {'params': params},
                batch['image'],
                rngs=None if dropout_key is None else {'dropout': dropout_key},
                mutable=['batch_stats'] if train else [],
                **flags,
            )
        losses, weights, correct = self.measure(logits, batch, train)
        sums = {'correct': jnp.sum(correct), 'weight': jnp.sum(weights)}
        return jnp.sum(losses), sums, changed.get('batch_stats', batch_stats)

    def measure(self, logits: jax.Array, batch: Batch, train: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns each example's weighted loss, its weight, and the weight again where it is correct.

        A mixed example (mix.py) counts as two, one for each of its labels, with the shares of their
        pixels as weights, whatever the loss is.
        """
        if 'mix' not in batch:
            return self._measure_labels(logits, batch, train)
        own = {**batch, 'weight': batch['mix']}
        other = {**batch, 'label': batch['mixed_label'], 'weight': 1 - batch['mix']}
        parts = (self._measure_labels(logits, labelled, train) for labelled in (own, other))
        losses, weights, correct = (a + b for a, b in zip(*parts, strict=True))
        return losses, weights, correct

    def _measure_labels(
        self, logits: jax.Array, batch: Batch, train: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        smoothing = {'label_smoothing': self.label_smoothing} if train and self.label_smoothing else {}
        losses, weights = self.loss(logits, batch, **smoothing)
        if 'weight' in batch:  # 0 for the padding of the last batch of an evaluation
            mask = batch['weight'].reshape(batch['weight'].shape + (1,) * (weights.ndim - 1))
            # A masked loss may be NaN or infinite without harm.
            losses, weights = jnp.where(mask > 0, losses, 0), weights * mask
        correct = (jnp.argmax(logits, axis=-1) == batch['label']).astype(jnp.float32)  # of each prediction
        return losses * weights, weights, correct * weights


def make_forward(config: Any, apply_fn: Callable[..., Any], alone: bool = False) -> Forward:
    """Returns the config's model and loss; `alone`: of one shard by itself, outside a train step."""
    return Forward(
        apply_fn,
        import_loss(config),
        takes_train(create_model(config)),
        norm_over_batch=config.batch_norm == 'global' and not alone,
        label_smoothing=config.label_smoothing,
        pixels=(config.pixel_mean, config.pixel_std),
    )


def check_model_and_loss(config: Any) -> None:
    """Checks, without computing anything, that model and loss give what the step needs.

    Args:
      config: complete, with the dataset's `input_shape` and `num_classes`.

    Raises:
      UserError: the model gives no logits, or fewer than there are classes, or fails in training mode;
        the loss gives no losses and weights for each example; or an augmentation is not for such examples.
    """
    check_augmentation(config)
    template = abstract_state(config, lambda _: 0.0)
    model, loss, examples = create_model(config), import_loss(config), 5
    tokens = is_tokens(config.input_shape)
    image = jax.ShapeDtypeStruct((examples, *config.input_shape), jnp.int32 if tokens else jnp.float32)
    batch = {'image': image, 'label': image if tokens else jax.ShapeDtypeStruct((examples,), jnp.int32)}
    variables = {'params': template.params, 'batch_stats': template.batch_stats}

    def logits_of(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, **eval_flags(model))

    logits = _shapes('model', config.model, logits_of, variables, batch['image'])
    shape = getattr(logits, 'shape', type(logits).__name__)
    if len(shape) < 2 or shape[:-1] != batch['label'].shape:
        wanted = '[batch, length, classes]' if tokens else '[batch, classes]'
        raise UserError(
            f'config.model={config.model!r}: must return logits {wanted}, not {shape} for {examples} '
            f'{kind(config.input_shape)}'
        )
    if shape[-1] < config.num_classes:
        raise UserError(
            f'config.model={config.model!r}: gives {shape[-1]} logits, but the labels of '
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
    train = functools.partial(make_forward(config, model.apply, alone=True), train=True)
    key = jax.eval_shape(lambda: jax.random.key(0, impl=KEY_IMPL))
    with batch_norm.counted() as found:
        _shapes(
            'model', config.model, lambda p, s, b, k: train(p, s, b, dropout_key=k),
            template.params, template.batch_stats, batch, key,
        )  # fmt: skip
    if config.batch_norm == 'global' and not found:
        raise UserError(
            f"config.batch_norm='global': {config.model} calls no flax.linen.BatchNorm in training; use shard"
        )


_CALLED_AS = {
    'model': 'called as model(examples, train=...), with a key for dropout alone',
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


def import_loss(config: Any) -> Loss:
    """Returns the loss that the config names.

    Raises:
      UserError: it cannot be imported, or is to smooth labels and cannot.
    """
    loss = config_lib.import_object('loss', config_fields.BUILT_IN_LOSSES.get(config.loss, config.loss))
    if config.label_smoothing and 'label_smoothing' not in inspect.signature(loss).parameters:
        raise UserError(
            f'config.label_smoothing={config.label_smoothing:g}: config.loss={config.loss!r} takes no '
            'argument label_smoothing; use 0, or give it one'
        )
    return loss
