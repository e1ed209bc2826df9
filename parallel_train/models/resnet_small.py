"""A small pre-activation-free ResNet for 28×28 images on CPUs: BatchNorm, identity shortcuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class ResNetSmall(nn.Module):
    """A stem, then one residual block a stage, each stage after a 2×2 max pool (He et al. 2016).

    Takes float32 images [batch, height, width, channels], returns logits [batch, num_classes].
    """

    num_classes: int = 10
    widths: Sequence[int] = (32, 64, 128)
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = ConvNorm(self.widths[0], norm)(x)
        for width in self.widths[1:]:
            x = ConvNorm(width, norm)(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            shortcut = x
            x = ConvNorm(width, norm)(x)
            x = ConvNorm(width, norm)(x)
            x = x + shortcut
        x = jnp.max(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


class ConvNorm(nn.Module):
    """3×3 convolution without bias, BatchNorm, ReLU."""

    width: int
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        return nn.relu(self.norm()(x))
