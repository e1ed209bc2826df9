"""A small ResNet for 28×28 images on CPUs: BatchNorm, identity shortcuts, strided convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from parallel_train.models.conv import conv_general_dilated


class ConvNorm(nn.Module):
    """3×3 convolution without bias, BatchNorm, ReLU."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        strides = (self.stride, self.stride)
        x = nn.Conv(self.width, (3, 3), strides, use_bias=False, conv_general_dilated=conv_general_dilated)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.relu(x)


class ResNetSmall(nn.Module):
    """A stem at full resolution, then stages, each a strided convolution and a residual block.

    The blocks are those of He et al. 2016 (two 3×3 convolutions and the identity) but for the place of
    the last ReLU, which comes before the addition. The head keeps where a feature is, as pictures of
    centred objects deserve: a dense layer instead of an average over places. Takes float32 images
    [batch, height, width, channels], returns logits [batch, num_classes].
    """

    num_classes: int = 10
    stem_width: int = 24
    widths: Sequence[int] = (48, 96)
    head_width: int = 128
    dropout_rate: float = 0.3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = ConvNorm(self.stem_width)(x, train)
        for width in self.widths:
            x = ConvNorm(width, stride=2)(x, train)
            residual = ConvNorm(width)(x, train)
            x = x + ConvNorm(width)(residual, train)
        x = x.reshape((x.shape[0], -1))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Dense(self.head_width, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(x)
