"""A network made to be trained quickly on CPUs: fixed filters in front, few places, evaluation by views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parallel_train.models.pool import avg_pool_2x2
from parallel_train.models.resnet_small import ConvNorm

# What evaluation averages besides the image itself: pixels down and right, and the weight (airbench).
_SHIFTS = (((0, 0), 0.5), ((-1, -1), 0.25), ((1, 1), 0.25))


def cosine_filters(size: int) -> np.ndarray:
    """Returns the two-dimensional cosine transform (DCT-II, orthonormal) as convolution kernels.

    For natural images it nearly diagonalises the covariance of patches (Ahmed et al. 1974), so that with
    BatchNorm behind it patches are whitened, without looking at the data.

    Returns:
      float32 [size, size, 1, size²], the last axis frequencies.
    """
    place, frequency = np.arange(size) + 0.5, np.arange(size)[:, None]
    waves = np.cos(np.pi * frequency * place / size) * np.sqrt(2 / size)
    waves[0] /= np.sqrt(2)
    return np.einsum('ai,bj->ijab', waves, waves).reshape(size, size, 1, size * size).astype(np.float32)


class FastNet(nn.Module):
    """A small ResNet on whitened patches: 375,658 parameters for 28×28×1.

    Most of the time of `ResNetSmall` goes where there are most places. Here the first layer, at half the
    resolution, has nothing to learn, so nothing goes back through it: whitened patches of 4×4 pixels and
    their negatives (the idea of airbench, Jordan 2024, whose filters come from the data). Between stages
    stands an average over 2×2 places, since XLA's CPU gradient of a strided convolution takes three times
    as long as that of another; before the head one over 3×3 places, for a dense layer of a fifth of the
    size. There is no dropout: a short training has no need of it. In evaluation the logits are a mean over
    six views (airbench too): the image, weighted a half, and the image moved by a pixel along the
    diagonal, each way a quarter; of each its mirror image as well.

    Takes float32 images [batch, height, width, channels], the channels averaged; returns float32 logits
    [batch, num_classes]. `dtype` is that of the layers before the last; parameters and batch
    statistics are float32.
    """

    num_classes: int = 10
    dtype: Any = jnp.float32
    patch: int = 4
    widths: Sequence[int] = (48, 96)
    head_width: int = 128

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = self._whitened_patches(x if train else jnp.concatenate(_views(x)), train)
        for i, width in enumerate(self.widths):
            x = ConvNorm(width, dtype=self.dtype)(x if i == 0 else avg_pool_2x2(x), train)
            residual = ConvNorm(width, dtype=self.dtype)(x, train)
            x = x + ConvNorm(width, dtype=self.dtype)(residual, train)
        x = nn.avg_pool(x, (3, 3), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(self.head_width, use_bias=False, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
        logits = nn.Dense(self.num_classes)(nn.relu(x).astype(jnp.float32))
        if train:
            return logits
        weights = jnp.asarray([weight / 2 for _, weight in _SHIFTS for _ in range(2)])
        return jnp.sum(weights[:, None, None] * logits.reshape(len(weights), -1, self.num_classes), axis=0)

    def _whitened_patches(self, x: jax.Array, train: bool) -> jax.Array:
        grey = jnp.mean(x, axis=-1, keepdims=True).astype(self.dtype)
        filters = jnp.asarray(cosine_filters(self.patch), self.dtype)
        x = jax.lax.conv_general_dilated(
            grey, filters, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, use_scale=False, use_bias=False, dtype=self.dtype
        )
        x = norm(x)
        return jnp.concatenate([nn.relu(x), nn.relu(-x)], axis=-1)


def _views(x: jax.Array) -> list[jax.Array]:
    """Returns the images [batch, height, width, channels], moved and mirrored, as evaluation sees them."""
    height, width = x.shape[1:3]
    wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='edge')
    moved = [wide[:, 1 - down :, 1 - right :][:, :height, :width] for (down, right), _ in _SHIFTS]
    return [view for image in moved for view in (image, image[:, :, ::-1])]
