"""What does a shard's model see of two examples at once? Mixup and CutMix.

Partners are examples of the same shard, and a shard has one coefficient, as a batch has in the papers. Both
are a function of (seed, step, shard): the same on any number of devices, and after a resume.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from parallel_train.augment import box

Batch = dict[str, jax.Array]


def mix_shards(batch: Batch, keys: jax.Array, config: Any) -> Batch:
    """Mixes the images of each shard with those of its examples in another order.

    An image becomes m·image + (1 - m)·partner, with one m for all pixels in mixup (Zhang et al. 2018),
    and 0 in a box, 1 outside of it in CutMix (Yun et al. 2019). If both are on, a shard takes either
    with probability 1/2. With probability 1 - `mix_probability` it is left as it is.

    Args:
      batch: 'image', float32 [shards, examples, height, width, channels], and 'label', int [shards,
        examples, ...].
      keys: [shards].
      config: complete.

    Returns:
      The batch with mixed images, the partners' labels as 'mixed_label', and 'mix', float32 [shards,
      examples]: the share of an image's own label. The loss is mix·loss(label) + (1 - mix)·loss(mixed_label).
    """

    def one(image: jax.Array, label: jax.Array, key: jax.Array) -> Batch:
        order_key, map_key = jax.random.split(key)
        partner = jax.random.permutation(order_key, len(image))
        own = pixel_shares(map_key, image.shape[1:3], config)
        mixed = own[:, :, None] * image + (1 - own[:, :, None]) * image[partner]
        # In CutMix the share of pixels in the box as it was cut, not as it was drawn.
        return {
            'image': mixed,
            'label': label,
            'mixed_label': label[partner],
            'mix': jnp.broadcast_to(jnp.mean(own), len(image)),
        }

    return jax.vmap(one)(batch['image'], batch['label'], keys)


def pixel_shares(key: jax.Array, shape: tuple[int, ...], config: Any) -> jax.Array:
    """Returns how much of each pixel is the image's own, float32 [height, width]."""
    height, width = shape
    want_key, kind_key, mixup_key, cutmix_key, place_key = jax.random.split(key, 5)
    shares = jnp.ones(shape)
    if config.mixup_alpha:
        shares = jnp.full(shape, jax.random.beta(mixup_key, config.mixup_alpha, config.mixup_alpha))
    if config.cutmix_alpha:
        share = jax.random.beta(cutmix_key, config.cutmix_alpha, config.cutmix_alpha)
        # Equation 2: sides √(1 - λ) of the image's, a centre that is any pixel alike, clipped.
        tall, wide = (jnp.sqrt(1 - share) * jnp.array([height, width])).astype(jnp.int32)
        row, column = jax.random.randint(place_key, (2,), 0, jnp.array([height, width]))
        outside = 1.0 - box(row - tall // 2, column - wide // 2, tall, wide, shape)
        take_box = jax.random.bernoulli(kind_key) if config.mixup_alpha else True
        shares = jnp.where(take_box, outside, shares)
    return jnp.where(jax.random.bernoulli(want_key, config.mix_probability), shares, 1.0)
