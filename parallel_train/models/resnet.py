"""Residual networks for ImageNet (He et al. 2016): ResNet-18, 34, 50 and 101, version 1.5."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from parallel_train.models import layers


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around which the input is added."""

    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.width, 3, self.stride)(x)))
        y = self.conv(self.width, 3)(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        return nn.relu(y + _shortcut(self, x, y))


class BottleneckBlock(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, the last four times as wide. The 3×3 has the stride ("v1.5")."""

    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.width, 1)(x)))
        y = nn.relu(self.norm()(self.conv(self.width, 3, self.stride)(y)))
        y = self.conv(4 * self.width, 1)(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        return nn.relu(y + _shortcut(self, x, y))


def _shortcut(block: BasicBlock | BottleneckBlock, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the block's input, projected by a 1×1 convolution where its shape is not the output's."""
    if x.shape == y.shape:
        return x
    return block.norm()(block.conv(y.shape[-1], 1, block.stride)(x))


class ResNet(nn.Module):
    """A residual network with a 7×7 stem, four stages and an average over places.

    Takes float32 images [batch, height, width, channels], returns float32 logits [batch, num_classes].
    `dtype` is that of convolutions and activations; parameters, batch statistics and logits are
    float32. The last BatchNorm scale of each block starts at zero, so that a block starts as the
    identity (Goyal et al. 2017, section 5.1). Padding is symmetric, as in torchvision. With `remat` the
    backward pass computes each block's activations again.
    """

    block: Callable[..., nn.Module]
    blocks_per_stage: Sequence[int]
    num_classes: int = 1000
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        block = layers.repeated(self.block, self.remat)
        conv = functools.partial(layers.conv, dtype=self.dtype)
        norm = functools.partial(layers.batch_norm, train=train, dtype=self.dtype)
        x = nn.relu(norm()(conv(64, 7, 2)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks_per_stage):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                x = block(64 * 2**stage, stride, conv, norm)(x)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))(x)


class ResNet18(ResNet):
    """11,689,512 parameters at 1,000 classes, as torchvision's."""

    block: Callable[..., nn.Module] = BasicBlock
    blocks_per_stage: Sequence[int] = (2, 2, 2, 2)


class ResNet34(ResNet):
    """21,797,672 parameters at 1,000 classes, as torchvision's."""

    block: Callable[..., nn.Module] = BasicBlock
    blocks_per_stage: Sequence[int] = (3, 4, 6, 3)


class ResNet50(ResNet):
    """25,557,032 parameters at 1,000 classes, as torchvision's."""

    block: Callable[..., nn.Module] = BottleneckBlock
    blocks_per_stage: Sequence[int] = (3, 4, 6, 3)


class ResNet101(ResNet):
    """44,549,160 parameters at 1,000 classes, as torchvision's."""

    block: Callable[..., nn.Module] = BottleneckBlock
    blocks_per_stage: Sequence[int] = (3, 4, 23, 3)
