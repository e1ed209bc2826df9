"""The Vision Transformer (Dosovitskiy et al. 2021) in the plain form of Beyer et al. 2022.

ViT-Ti/16 and ViT-S/16 have the sizes of Touvron et al. 2021 (DeiT, table 1), ViT-B/16 those of Dosovitskiy
et al. 2021 (table 1).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parallel_train.models import layers

_XAVIER = nn.initializers.xavier_uniform()


def sin_cos_positions(height: int, width: int, features: int, temperature: float = 10_000.0) -> np.ndarray:
    """Returns fixed position embeddings, float32 [height × width, features].

    A quarter of the features each: sin and cos of the column, sin and cos of the row, at wavelengths
    from 2π to 2π·temperature (Beyer et al. 2022, section 3, after Chen et al. 2021, MoCo v3).
    """
    assert features % 4 == 0 and features > 4, features
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing='ij')
    rates = temperature ** -(np.arange(features // 4) / (features // 4 - 1))
    parts = [wave(place.reshape(-1, 1) * rates) for place in (columns, rows) for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _attention(query: jax.Array, key: jax.Array, value: jax.Array, **_: Any) -> jax.Array:
    """Attention, all [batch, places, heads, features]; the softmax is float32 whatever the inputs."""
    return jax.nn.dot_product_attention(query, key, value)


class EncoderBlock(nn.Module):
    """Self-attention, then a two-layer perceptron, each on a normalised input and added to it."""

    heads: int
    mlp_width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=self.heads, dtype=self.dtype, kernel_init=_XAVIER, attention_fn=_attention
        )(y)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        bias_init = nn.initializers.normal(1e-6)
        y = nn.Dense(self.mlp_width, dtype=self.dtype, kernel_init=_XAVIER, bias_init=bias_init)(y)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=_XAVIER, bias_init=bias_init)(nn.gelu(y))
        return x + y


class ViT(nn.Module):
    """A Vision Transformer of 12 blocks on patches of 16×16 pixels.

    Beyer et al. 2022: fixed sin-cos positions and an average over places, so neither learned
    positions nor a class token, which in the original at 224×224 pixels, and in timm, are 198 × width
    parameters more. The head is one dense layer that starts at zero. No dropout.

    Takes float32 images [batch, height, width, channels], both sides multiples of 16; returns float32
    logits [batch, num_classes]. `dtype` is that of matrix products and activations; parameters,
    softmax and logits are float32. With `remat` the backward pass computes each block's activations again.
    """

    width: int
    heads: int
    num_classes: int = 1000
    dtype: Any = jnp.float32
    remat: bool = False
    patch: int = 16
    depth: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = layers.repeated(EncoderBlock, self.remat)
        patch = (self.patch, self.patch)
        assert x.shape[1] % self.patch == 0 and x.shape[2] % self.patch == 0, (
            f'sides must be multiples of {self.patch}, not {x.shape[1:3]}'
        )
        x = nn.Conv(self.width, patch, strides=patch, padding='VALID', dtype=self.dtype)(x)
        batch, height, width, features = x.shape
        positions = sin_cos_positions(height, width, features)
        x = x.reshape((batch, height * width, features)) + positions.astype(x.dtype)
        for _ in range(self.depth):
            x = block(self.heads, 4 * self.width, self.dtype)(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        x = jnp.mean(x.astype(jnp.float32), axis=1)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)(x)


class ViTTi16(ViT):
    """ViT-Ti/16: 5,679,400 parameters at 1,000 classes (timm's, with the 198 × 192: 5,717,416)."""

    width: int = 192
    heads: int = 3


class ViTS16(ViT):
    """ViT-S/16: 21,974,632 parameters at 1,000 classes (timm's, with the 198 × 384: 22,050,664)."""

    width: int = 384
    heads: int = 6


class ViTB16(ViT):
    """ViT-B/16: 86,415,592 parameters at 1,000 classes (timm's, with the 198 × 768: 86,567,656)."""

    width: int = 768
    heads: int = 12
