"""Models and losses that the tests name by import path."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class NormDropoutNet(nn.Module):
    """A small convolutional net with everything that depends on the batch beyond its mean."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(8, (3, 3), strides=(2, 2))(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu(x)
        x = nn.Dropout(0.25, deterministic=not train)(x)
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(32)(x)
        x = nn.Dropout(0.25, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.num_classes)(x)


class Linear(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes)(x.reshape((x.shape[0], -1)))


def weighted_loss(logits: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy that weighs an example by its label: shards and devices weigh differently."""
    log_probabilities = jax.nn.log_softmax(logits)
    losses = -jnp.take_along_axis(log_probabilities, batch['label'][:, None], axis=1)[:, 0]
    return losses, batch['label'].astype(jnp.float32)
