"""A decoder-only transformer on rows of tokens, such as the bytes of a text (Radford et al. 2019, GPT-2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from parallel_train.models import layers

_INIT = nn.initializers.normal(0.02)


class DecoderBlock(nn.Module):
    """Attention to itself and what came before, then a two-layer perceptron, each on a normalised input.

    `residual_init` is that of the two layers whose results are added to the input.
    """

    heads: int
    residual_init: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x)
        y = nn.Dense(3 * width, dtype=self.dtype, kernel_init=_INIT)(y)
        query, key, value = jnp.split(y.reshape((*y.shape[:2], 3 * self.heads, -1)), 3, axis=2)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)  # its softmax is float32
        x = x + nn.Dense(width, dtype=self.dtype, kernel_init=self.residual_init)(y.reshape(x.shape))
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, kernel_init=_INIT)(y))
        return x + nn.Dense(width, dtype=self.dtype, kernel_init=self.residual_init)(y)


class TransformerSmall(nn.Module):
    """4 blocks of width 128 with 4 heads, the sizes of nanoGPT's recipe for CPUs (its README).

    842,496 parameters for rows of 128 bytes. Takes rows of tokens, int32 [batch, length], all as long as
    those that it was initialised with, and returns float32 logits [batch, length, num_classes]: those at a
    place are of the token there, and follow from the tokens before it alone. At the first place that is
    none, so that every token of a row is predicted once. Learned positions; the embedding is also the last
    layer (Press & Wolf 2017). GPT-2's initialisation: normal(0.02), by √(2 × depth) smaller where a layer's
    result is added. No dropout.

    `dtype` is that of matrix products and activations; parameters, softmax and logits are float32. With
    `remat` the backward pass computes each block's activations again.
    """

    num_classes: int = 256
    dtype: Any = jnp.float32
    remat: bool = False
    width: int = 128
    depth: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embedding = self.param('embedding', _INIT, (self.num_classes, self.width))
        positions = self.param('positions', _INIT, (tokens.shape[1], self.width))
        before = jnp.pad(embedding[tokens[:, :-1]], ((0, 0), (1, 0), (0, 0)))  # zeros before the first
        x = (before + positions).astype(self.dtype)
        block = layers.repeated(DecoderBlock, self.remat)
        residual_init = nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5)
        for _ in range(self.depth):
            x = block(self.heads, residual_init, self.dtype)(x)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x)
        return x.astype(jnp.float32) @ embedding.T
