"""A small ResNet for 28×28 images on CPUs: BatchNorm, identity shortcuts, strided convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from parallel_train.models.conv import conv_general_dilated


class ConvNorm(nn.Module):
    """3×3 convolution without bias, BatchNorm, ReLU."""

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(
            self.width,
            (3, 3),
            strides=(self.stride, self.stride),
            use_bias=False,
            dtype=self.dtype,
            conv_general_dilated=conv_general_dilated,
        )(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
        return nn.relu(x)


class ResNetSmall(nn.Module):
    """A stem at full resolution, then stages, each a strided convolution and a residual block.

    The blocks are those of He et al. 2016 (two 3×3 convolutions and the identity) but for the place of
    the last ReLU, which comes before the addition. The head keeps where a feature is, as pictures of
    centred objects deserve: a dense layer instead of an average over places. Takes float32 images
    [batch, height, width, channels], returns float32 logits [batch, num_classes]. `dtype` is that of the
    layers before the last; parameters and batch statistics are float32.
    """

    num_classes: int = 10
    dtype: Any = jnp.float32
    stem_width: int = 24
    widths: Sequence[int] = (48, 96)
    head_width: int = 128
    dropout_rate: float = 0.3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = ConvNorm(self.stem_width, dtype=self.dtype)(x, train)
        for width in self.widths:
            x = ConvNorm(width, stride=2, dtype=self.dtype)(x, train)
            residual = ConvNorm(width, dtype=self.dtype)(x, train)
            x = x + ConvNorm(width, dtype=self.dtype)(residual, train)
        x = x.reshape((x.shape[0], -1))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Dense(self.head_width, use_bias=False, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
        return nn.Dense(self.num_classes)(nn.relu(x).astype(jnp.float32))
