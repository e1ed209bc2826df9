"""Models, losses, data that the tests name by import path, and a config that is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parallel_train import config as config_lib
from parallel_train.models.resnet import BasicBlock, BottleneckBlock, ResNet
from parallel_train.models.vit import ViT
from parallel_train.models.wide_resnet import WideResNet


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


class DenseNormNet(nn.Module):
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


class NormNet(nn.Module):
    """Convolution and BatchNorm, without dropout: the batch is all that its statistics depend on."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for stride in (2, 2):
            x = nn.Conv(8, (3, 3), strides=(stride, stride))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(x.reshape((x.shape[0], -1)))


def small_resnet(remat: bool = False) -> nn.Module:
    return ResNet(BasicBlock, (1,), num_classes=10, remat=remat)


def small_resnet_again() -> nn.Module:
    return small_resnet(remat=True)


def WideResNetShrunk(num_classes: int = 10, dtype: Any = jnp.float32) -> nn.Module:
    """WRN-28-10 with fewer layers, and narrow."""
    return WideResNet(blocks_per_stage=1, widening=1, num_classes=num_classes, dtype=dtype)


def ResNet50Shrunk(num_classes: int = 10, dtype: Any = jnp.float32) -> nn.Module:
    """ResNet-50 with one block a stage."""
    return ResNet(BottleneckBlock, (1, 1, 1, 1), num_classes=num_classes, dtype=dtype)


def ViTS16Shrunk(num_classes: int = 10, dtype: Any = jnp.float32) -> nn.Module:
    """ViT-S/16 with one block."""
    return ViT(width=384, heads=6, depth=1, num_classes=num_classes, dtype=dtype)


def cifar10(split: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Noise of CIFAR-10's shape."""
    return _colour_noise(split, 10)


def cifar100(split: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    return _colour_noise(split, 100)


def _colour_noise(split: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(split))
    n = 256 if split == 'train' else 64
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % classes
