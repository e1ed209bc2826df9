"""The CNN of Flax's MNIST and learning-rate-schedule guides."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from parallel_train.models.conv import conv_general_dilated
from parallel_train.models.pool import avg_pool_2x2


class CNN(nn.Module):
    """Two convolutions with average pooling, two dense layers: 824,458 parameters for 28×28×1.

    Takes float32 images [batch, height, width, channels], returns float32 logits [batch, num_classes].
    `dtype` is that of the layers before the last; parameters are float32.
    """

    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = functools.partial(
            nn.Conv, kernel_size=(3, 3), dtype=self.dtype, conv_general_dilated=conv_general_dilated
        )
        x = conv(features=32)(x)
        x = nn.relu(x)
        x = avg_pool_2x2(x)
        x = conv(features=64)(x)
        x = nn.relu(x)
        x = avg_pool_2x2(x)
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(features=256, dtype=self.dtype)(x)
        x = nn.relu(x)
        return nn.Dense(features=self.num_classes)(x.astype(jnp.float32))
