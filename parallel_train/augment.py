"""What does the model see of an example?

Runs on the device, inside the step, for a whole batch at once. What is random is a function of
(seed, epoch, example): the same on any number of devices, and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from parallel_train.randaugment import rand_augment

_TRIES = 10  # boxes that random erasing draws for an image

# Each kind has a stream of its own, whichever others are on. (Crop and flip split the key itself: 0 and 1.)
_RAND_AUGMENT, _CUTOUT, _ERASING = 2, 3, 4


def example_keys(key: jax.Array, epoch: jax.Array, examples: jax.Array) -> jax.Array:
    """Returns one key for each example: keys [batch] from a key, an int32 and int32 [batch]."""
    epoch_key = jax.random.fold_in(key, epoch)
    return jax.vmap(lambda example: jax.random.fold_in(epoch_key, example))(examples)


def augment(
    images: jax.Array, key: jax.Array, epoch: jax.Array, examples: jax.Array, config: Any
) -> jax.Array:
    """Returns the images as the config augments them.

    Args:
      images: uint8 [batch, height, width, channels].
      key: of the run.
      epoch: int32 scalar.
      examples: int32 [batch], which examples of the split they are.
      config: complete.
    """
    keys = example_keys(key, epoch, examples)

    def stream(number: int) -> jax.Array:
        return jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)

    if config.random_crop_padding or config.random_flip:
        images = random_crop_and_flip(images, keys, config.random_crop_padding, config.random_flip)
    if config.randaugment_layers:
        images = rand_augment(
            images, stream(_RAND_AUGMENT), config.randaugment_layers, config.randaugment_magnitude
        )
    if config.cutout_size:
        images = cutout(images, stream(_CUTOUT), config.cutout_size)
    if config.random_erasing:
        images = random_erasing(images, stream(_ERASING), config.random_erasing)
    return images


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


def cutout(images: jax.Array, keys: jax.Array, size: int) -> jax.Array:
    """Blanks a square of each image (DeVries & Taylor 2017).

    Its centre is any pixel alike, so parts of it may lie outside. The paper fills with zeros after
    normalisation, which is the data's mean; here it is the mean of the image's own pixels.

    Args:
      images: uint8 [batch, height, width, channels].
      keys: one for each image.
      size: side of the square in pixels.
    """

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, jnp.array(image.shape[:2]))
        hole = box(row - size // 2, column - size // 2, size, size, image.shape)
        mean = jnp.round(jnp.mean(image.astype(jnp.float32), axis=(0, 1))).astype(image.dtype)
        return jnp.where(hole[:, :, None], mean, image)

    return jax.vmap(one)(images, keys)


def random_erasing(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Replaces a box of an image by noise, with the given probability (Zhong et al. 2017, algorithm 1).

    The box has an area uniform in [0.02, 0.4] of the image's, a ratio of height to width uniform in
    [0.3, 1/0.3], and lies inside. The paper draws until it fits, here at most 10 times; an image for
    which none does stays as it is. Each pixel of the box is uniform in 0 to 255.

    Args:
      images: uint8 [batch, height, width, channels].
      keys: one for each image.
      probability: of an image to be changed.
    """
    height, width = images.shape[1:3]

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        wanted, areas, ratios, places, noise = jax.random.split(key, 5)
        area = jax.random.uniform(areas, (_TRIES,), minval=0.02, maxval=0.4) * height * width
        ratio = jax.random.uniform(ratios, (_TRIES,), minval=0.3, maxval=1 / 0.3)
        tall = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
        wide = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
        fits = (tall < height) & (wide < width)
        first = jnp.argmax(fits)
        rest = jnp.array([height, width]) - jnp.stack([tall[first], wide[first]])
        top, left = jax.random.randint(places, (2,), 0, jnp.maximum(rest, 0) + 1)
        hole = box(top, left, tall[first], wide[first], image.shape)
        erase = hole & fits[first] & jax.random.bernoulli(wanted, probability)
        return jnp.where(erase[:, :, None], jax.random.bits(noise, image.shape, jnp.uint8), image)

    return jax.vmap(one)(images, keys)


def box(top: Any, left: Any, height: Any, width: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns which pixels lie in a box, bool [shape[0], shape[1]]; the box may reach beyond."""
    rows, columns = jnp.arange(shape[0]), jnp.arange(shape[1])
    inside_rows = (rows >= top) & (rows < top + height)
    return inside_rows[:, None] & (columns >= left) & (columns < left + width)


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
