"""What does the model see of an example?

Runs on the device, inside the step, for a whole batch at once. What is random is a function of
(seed, epoch, example): the same on any number of devices, and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def example_keys(key: jax.Array, epoch: jax.Array, examples: jax.Array) -> jax.Array:
    """Returns one key for each example: keys [batch] from a key, an int32 and int32 [batch]."""
    epoch_key = jax.random.fold_in(key, epoch)
    return jax.vmap(lambda example: jax.random.fold_in(epoch_key, example))(examples)


def random_crop_and_flip(images: jax.Array, keys: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Crops each image out of itself padded with zeros, and mirrors it with probability 1/2.

    Args:
      images: [batch, height, width, channels].
      keys: one for each image.
      padding: pixels of zeros on every side; 0 for no crop.
      flip: whether to mirror at all.

    Returns:
      Images of the same shape and dtype.
    """
    height, width = images.shape[1:3]

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        shift_key, flip_key = jax.random.split(key)
        if not padding:  # no gather
            return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image) if flip else image
        down, right = jax.random.randint(shift_key, (2,), -padding, padding + 1)
        rows = jnp.arange(height) + down
        columns = jnp.arange(width) + right
        if flip:
            columns = jnp.where(jax.random.bernoulli(flip_key), columns[::-1], columns)
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        # One gather for both: clipped where outside, then blanked.
        moved = image[jnp.clip(rows, 0, height - 1)[:, None], jnp.clip(columns, 0, width - 1)]
        return jnp.where(inside[:, :, None], moved, jnp.zeros((), image.dtype))

    return jax.vmap(one)(images, keys)


def normalise(images: jax.Array, mean: Sequence[float] = (), std: Sequence[float] = ()) -> jax.Array:
    """uint8 pixels to float32 in [0, 1], then (pixels - mean) / std; other dtypes to float32 as they are.

    Args:
      images: [..., channels].
      mean, std: one number a channel, or one for all; () for 0 and 1.
    """
    if images.dtype != jnp.uint8:
        return images.astype(jnp.float32)
    pixels = images.astype(jnp.float32) / 255.0
    if len(mean):
        pixels -= jnp.asarray(mean, jnp.float32)
    if len(std):
        pixels /= jnp.asarray(std, jnp.float32)
    return pixels
