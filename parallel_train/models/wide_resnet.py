"""Wide residual networks for small images (Zagoruyko & Komodakis 2016): WRN-28-10 and WRN-40-4."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from parallel_train.models import layers


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU, 3×3 convolution, twice, around which the input is added (He et al. 2016b).

    Where the shape changes, the shortcut is a 1×1 convolution of the activated input.
    """

    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        active = nn.relu(self.norm()(x))
        y = self.conv(self.width, 3, self.stride)(active)
        y = self.conv(self.width, 3)(nn.relu(self.norm()(y)))
        if x.shape != y.shape:
            x = self.conv(self.width, 1, self.stride)(active)
        return x + y


class WideResNet(nn.Module):
    """WRN-d-k: three stages of (d - 4) / 6 blocks, k times as wide as ResNet's first on CIFAR-10.

    Takes float32 images [batch, height, width, channels], returns float32 logits [batch, num_classes].
    `dtype` is that of convolutions and activations; parameters, batch statistics and logits are
    float32. Without dropout, as the paper's main results. With `remat` the backward pass computes each
    block's activations again.
    """

    blocks_per_stage: int
    widening: int
    num_classes: int = 10
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        block = layers.repeated(PreActivationBlock, self.remat)
        conv = functools.partial(layers.conv, dtype=self.dtype)
        norm = functools.partial(layers.batch_norm, train=train, dtype=self.dtype)
        x = conv(16, 3)(x)
        for stage in range(3):
            for i in range(self.blocks_per_stage):
                stride = 2 if stage > 0 and i == 0 else 1
                x = block(16 * 2**stage * self.widening, stride, conv, norm)(x)
        x = nn.relu(norm()(x))
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return nn.Dense(self.num_classes)(x)


class WideResNet16x2(WideResNet):
    """WRN-16-2: 691,386 parameters for Fashion-MNIST."""

    blocks_per_stage: int = 2
    widening: int = 2


class WideResNet28x10(WideResNet):
    """WRN-28-10: 36,479,194 parameters for CIFAR-10; the paper's table 4 says 36.5 million."""

    blocks_per_stage: int = 4
    widening: int = 10


class WideResNet40x4(WideResNet):
    """WRN-40-4: 8,949,210 parameters for CIFAR-10; the paper's table 4 says 8.9 million."""

    blocks_per_stage: int = 6
    widening: int = 4
