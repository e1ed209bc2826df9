"""Models, a loss and data of which one example is not finite: in value, or in gradient alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parallel_train import order
from parallel_train.losses import softmax_cross_entropy
from tests.models_for_tests import noise, tiny

BATCH, EXAMPLES, EPOCH, EPOCHS = 32, 256, 8, 3  # 8 steps an epoch
BAD = int(order.epoch_batches(0, 0, EXAMPLES, BATCH)[5, 7])  # an example of step 6, and once in each epoch
BAD_STEPS = [
    EPOCH * epoch + int(np.argwhere(order.epoch_batches(0, epoch, EXAMPLES, BATCH) == BAD)[0, 0]) + 1
    for epoch in range(EPOCHS)
]


def marked_noise(split: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The noise, where one train example is marked by its first pixel."""
    images, labels = noise(split, data_dir)
    images[:, 0, 0] = 0
    if split == 'train':
        images[BAD, 0, 0] = 255
    return images, labels


def is_marked(images: jax.Array) -> jax.Array:
    return images[:, 0, 0, 0] > 0.99


@jax.custom_vjp
def explode(x: jax.Array, marked: jax.Array) -> jax.Array:
    """The identity, whose gradient is infinite for marked examples."""
    return x


explode.defvjp(
    lambda x, marked: (x, marked), lambda marked, g: (jnp.where(marked[:, None], jnp.inf, g), None)
)


class Spoil(nn.Module):
    """Spoils marked examples: their value, or their gradient alone."""

    how: str

    @nn.compact
    def __call__(self, x: jax.Array, marked: jax.Array) -> jax.Array:
        if self.how == 'value':
            return jnp.where(marked[:, None], jnp.nan, x)
        return explode(x, marked) if self.how == 'gradient' else x


class Net(nn.Module):
    """With BatchNorm one spoilt example spoils all of its shard."""

    how: str
    norm: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(12, name='first')(images.reshape((images.shape[0], -1)))
        x = Spoil(self.how, name='spoil')(x, is_marked(images))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(10, name='last')(nn.relu(x))


def bad_value() -> Net:
    return Net('value')


def bad_value_without_norm() -> Net:
    return Net('value', norm=False)


def bad_gradient() -> Net:
    return Net('gradient')


def plain() -> Net:
    return Net('none')


def bad_loss(logits: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    losses, weights = softmax_cross_entropy(logits, batch)
    return jnp.where(is_marked(batch['image']), jnp.inf, losses), weights


def job(model: str, **fields: Any) -> Any:
    here = 'tests.faulty_models'
    common = {'shards': 4, 'checkpoint_every_epochs': 0.25, 'log_every_steps': 2, 'keep_checkpoints': 9}
    return tiny(**{'model': f'{here}:{model}', 'dataset': f'{here}:marked_noise', **common, **fields})
