"""What does RandAugment do to an example? (Cubuk et al. 2020)

The paper's 14 operations, each as likely, are applied one after the other with one magnitude M, in units in
which 10 is AutoAugment's largest. With m = M/10 and a sign ± drawn as well:

    identity, autocontrast, equalize
    rotate         by ±30·m degrees                 posterize    keep the 8 - 4·m highest bits
    shear x, y     by ±0.3·m                        solarize     invert pixels of 256·(1 - m) and more
    translate x, y by ±(150/331)·m of the side      colour, contrast, brightness, sharpness
                                                                 blend by 1 ± 0.9·m, at least 0

The paper gives the list alone; the ranges are AutoAugment's (Cubuk et al. 2019, table 6). Geometry is around
the centre and takes the nearest pixel; what comes from outside is 0. Pixels are uint8 between the operations.

On a device every example runs the same program, so an operation is one of three parts, the others of which do
nothing: a geometric map, a blend with another image, or a table from old pixel values to new ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

OPERATIONS = (
    'identity', 'rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'colour', 'sharpness',
    'autocontrast', 'equalize', 'posterize', 'solarize', 'contrast', 'brightness',
)  # fmt: skip
_VALUES = 256


def rand_augment(images: jax.Array, keys: jax.Array, layers: int, magnitude: float) -> jax.Array:
    """Applies `layers` operations to each image, each drawn anew.

    Args:
      images: uint8 [batch, height, width, channels].
      keys: one for each image.
      layers: the paper's N.
      magnitude: the paper's M.

    Returns:
      Images of the same shape and dtype.
    """

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        for layer in range(layers):
            which, sign = jax.random.split(jax.random.fold_in(key, layer))
            operation = jax.random.randint(which, (), 0, len(OPERATIONS))
            image = apply(image, operation, jnp.where(jax.random.bernoulli(sign), 1.0, -1.0), magnitude)
        return image

    return jax.vmap(one)(images, keys)


def apply(image: jax.Array, operation: jax.Array, sign: jax.Array, magnitude: float) -> jax.Array:
    """Applies the operation of that number in `OPERATIONS`: uint8 [height, width, channels] to the same."""
    image = _move(image, operation, sign * magnitude / 10)
    factor = jnp.maximum(1 + sign * 0.9 * magnitude / 10, 0)
    image = _blend(image, operation, factor)
    tables = jnp.stack(_tables(image, factor, magnitude / 10))
    number = operation - OPERATIONS.index('autocontrast') + 1
    table = tables[jnp.where((number > 0) & (number < len(tables)), number, 0)]
    return jnp.take_along_axis(table, image.reshape(-1, image.shape[-1]).astype(jnp.int32), axis=0).reshape(
        image.shape
    )


def _is(operation: jax.Array, name: str) -> jax.Array:
    return operation == OPERATIONS.index(name)


def _move(image: jax.Array, operation: jax.Array, amount: jax.Array) -> jax.Array:
    """Rotates, shears or translates; `amount` is the signed magnitude in units of the largest."""
    height, width = image.shape[:2]
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - (height - 1) / 2
    x = jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2
    angle = jnp.where(_is(operation, 'rotate'), jnp.deg2rad(30.0) * amount, 0.0)
    shear_x, shear_y = (jnp.where(_is(operation, f'shear_{a}'), 0.3 * amount, 0.0) for a in 'xy')
    shift_x, shift_y = (jnp.where(_is(operation, f'translate_{a}'), 150 / 331 * amount, 0.0) for a in 'xy')
    # Where each pixel of the result comes from.
    from_y = jnp.cos(angle) * y + jnp.sin(angle) * x + shear_y * x + shift_y * height
    from_x = jnp.cos(angle) * x - jnp.sin(angle) * y + shear_x * y + shift_x * width
    rows = jnp.round(from_y + (height - 1) / 2).astype(jnp.int32)
    columns = jnp.round(from_x + (width - 1) / 2).astype(jnp.int32)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    moved = image[jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)]
    return jnp.where(inside[:, :, None], moved, jnp.zeros((), image.dtype))


def _grey(pixels: jax.Array) -> jax.Array:
    """Luma as in ITU-R BT.601 of float [height, width, channels], one channel kept; other channels' mean."""
    if pixels.shape[-1] != 3:
        return jnp.mean(pixels, axis=-1, keepdims=True)
    return (pixels @ jnp.array([0.299, 0.587, 0.114]))[:, :, None]


def _smooth(pixels: jax.Array) -> jax.Array:
    """Neighbours' mean, the pixel itself five times: PIL's filter SMOOTH. The outermost pixels stay."""
    height, width = pixels.shape[:2]
    rows = [pixels[i : i + height - 2, j : j + width - 2] for i in range(3) for j in range(3)]
    middle = (sum(rows) + 4 * pixels[1:-1, 1:-1]) / 13
    return pixels.at[1:-1, 1:-1].set(middle)


def _to_bytes(values: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(values), 0, _VALUES - 1).astype(jnp.uint8)


def _blend(image: jax.Array, operation: jax.Array, factor: jax.Array) -> jax.Array:
    """Colour and sharpness: away from the grey or the smooth image for a factor above 1, towards it below."""
    pixels = image.astype(jnp.float32)
    colour, sharpness = _is(operation, 'colour'), _is(operation, 'sharpness')
    other = jnp.where(colour, _grey(pixels), _smooth(pixels))
    return _to_bytes(jnp.where(colour | sharpness, other + factor * (pixels - other), pixels))


def _tables(image: jax.Array, factor: jax.Array, m: float) -> list[jax.Array]:
    """Returns what a value becomes, uint8 [256, channels]: as it is, then the last six operations."""
    channels = image.shape[-1]
    value = jnp.arange(_VALUES)[:, None]
    same = jnp.broadcast_to(value.astype(jnp.uint8), (_VALUES, channels))
    low = jnp.min(image, axis=(0, 1)).astype(jnp.int32)
    high = jnp.max(image, axis=(0, 1)).astype(jnp.int32)
    stretched = (jnp.clip(value, low, high) - low) * (_VALUES - 1) // jnp.maximum(high - low, 1)
    mean = jnp.round(jnp.mean(_grey(image.astype(jnp.float32))))
    kept = 8 - min(round(4 * m), 7)
    return [
        same,
        jnp.where(high > low, stretched.astype(jnp.uint8), same),
        _equalized(image, same),
        same & jnp.uint8(_VALUES - (1 << (8 - kept))),
        jnp.where(value < max(_VALUES * (1 - m), 0), same, (_VALUES - 1) - same),
        jnp.broadcast_to(_to_bytes(mean + factor * (value - mean)), same.shape),
        jnp.broadcast_to(_to_bytes(factor * value), same.shape),
    ]


def _equalized(image: jax.Array, same: jax.Array) -> jax.Array:
    """Makes the histogram of each channel flat, in whole numbers as PIL's `ImageOps.equalize`."""
    pixels = image.reshape(-1, image.shape[-1]).astype(jnp.int32)
    counts = jax.vmap(lambda x: jnp.bincount(x, length=_VALUES), in_axes=1, out_axes=1)(pixels)
    below = jnp.cumsum(counts, axis=0) - counts
    brightest = jnp.take_along_axis(counts, jnp.max(pixels, axis=0, keepdims=True), axis=0)
    step = (len(pixels) - brightest) // (_VALUES - 1)
    equal = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), _VALUES - 1).astype(jnp.uint8)
    return jnp.where(step > 0, equal, same)
