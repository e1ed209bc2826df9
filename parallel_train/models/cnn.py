"""The CNN of Flax's MNIST and learning-rate-schedule guides."""

from __future__ import annotations

import flax.linen as nn
import jax

from parallel_train.models.conv import conv_general_dilated


class CNN(nn.Module):
    """Two convolutions with average pooling, two dense layers: 824,458 parameters for 28×28×1.

    Takes float32 images [batch, height, width, channels], returns logits [batch, num_classes].
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(features=32, kernel_size=(3, 3), conv_general_dilated=conv_general_dilated)(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=64, kernel_size=(3, 3), conv_general_dilated=conv_general_dilated)(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(features=256)(x)
        x = nn.relu(x)
        return nn.Dense(features=self.num_classes)(x)
