"""Models, losses, data that the tests name by import path, and a config that is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parallel_train import config as config_lib


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


class NormNet(nn.Module):
    """Kernels, biases, scales and statistics, in little: quick to compile."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(8)(x[:, ::2, ::2].reshape((x.shape[0], -1)))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.num_classes)(nn.relu(x))


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


def noise(split: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """A dataset by import path: 256 train and 64 eval images of noise."""
    rng = np.random.default_rng(len(split))
    n = 256 if split == 'train' else 64
    return rng.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8), rng.integers(0, 10, n)


def tiny(**fields: Any) -> Any:
    return config_lib.Config({
        'model': 'tests.models_for_tests:Linear', 'dataset': 'tests.models_for_tests:noise',
        'batch_size': 32, 'num_epochs': 3.0, 'warmup_epochs': 1.0, 'learning_rate': 0.01,
        'log_every_steps': 3, 'eval_batch_size': 20, **fields,
    })  # fmt: skip
