"""How does a stored image become the pixels that the model sees?

Decoding, cropping and resizing by TensorFlow's kernels, fused: of a JPEG only the crop is decoded, at
the smallest of the scales 1, 1/2, 1/4 and 1/8 that still has the pixels. Everything that is random is a
function of (seed, epoch, example). The only file that computes with TensorFlow.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

import numpy as np

from parallel_train.machine import cores

# Of a random-resized crop (Szegedy et al. 2015, "Going deeper with convolutions", section 6).
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10


class Corrupt(Exception):
    """An image that cannot be decoded."""


@dataclasses.dataclass(frozen=True)
class View:
    """What is seen of an image.

    Attributes:
      size: height and width of the result, in pixels.
      crop_fraction: of the shorter side: the square at the centre that is seen where nothing is random.
      seed: of the random-resized crops; None for none.
    """

    size: int
    crop_fraction: float
    seed: int | None = None


class Decoder:
    """Turns records into pixels, a batch at a time, in one thread a core: `tf.data`'s, not Python's."""

    def __init__(self, view: View):
        tf = _tensorflow()
        self._tf, self._view = tf, view
        text, numbers = tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int64)

        as_it_is = tf.autograph.experimental.do_not_convert  # there is no Python `if` in it to look for

        def decode(records: Any, examples: Any, epoch: Any) -> Any:
            images = tf.data.Dataset.from_tensor_slices((records, examples)).map(
                as_it_is(lambda record, example: pixels_and_label(tf, view, record, example, epoch)),
                num_parallel_calls=cores(),
                deterministic=True,
            )
            return images.batch(tf.size(records, tf.int64)).with_options(options).get_single_element()

        options = tf.data.Options()
        options.autotune.enabled = False  # all there is to choose is chosen
        function = tf.function(as_it_is(decode), input_signature=[text, numbers, tf.TensorSpec([], tf.int64)])
        self._decode = function.get_concrete_function()

    def __call__(
        self, records: list[bytes], examples: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns images, uint8 [n, size, size, 3], and labels, int64 [n].

        Args:
          records: `tf.train.Example`s with 'image' and 'label', serialised.
          examples: of which example of the split each one is; decides with `epoch` what is random.
          epoch: from 0.

        Raises:
          Corrupt: one of them cannot be decoded.
        """
        tf = self._tf
        try:
            images, labels = self._decode(
                tf.constant(records), tf.constant(examples.astype(np.int64)), tf.constant(epoch, tf.int64)
            )
        except tf.errors.InvalidArgumentError:
            raise Corrupt from None
        return np.asarray(images), np.asarray(labels)  # views

    def explain(self, record: bytes) -> tuple[int | None, str]:
        """Returns the label of a record whose image does not decode, None if it has none; and the reason."""
        tf, label = self._tf, None
        try:
            parsed = tf.io.parse_single_example(record, _features(tf))
            label = int(parsed['label'])
            tf.io.decode_image(parsed['image'], channels=3, expand_animations=False)
        except tf.errors.InvalidArgumentError as error:  # '{{where}} reason [Op:what] name:'
            return label, re.sub(r'\{\{.*?\}\} | ?\[Op:.*', '', error.message.splitlines()[0])[:200]
        return label, 'what the crop needs of it'


def pixels_and_label(tf: Any, view: View, record: Any, example: Any, epoch: Any) -> Any:
    """Returns the pixels of one record, uint8 [size, size, 3], and its label, as tensors."""
    parsed = tf.io.parse_single_example(record, _features(tf))
    data = parsed['image']
    image = tf.cond(
        tf.io.is_jpeg(data),
        lambda: _crop_of_jpeg(tf, view, data, example, epoch),
        lambda: _crop_of_other(tf, view, data, example, epoch),
    )
    image.set_shape([None, None, 3])
    resized = tf.image.resize(image, (view.size, view.size))  # bilinear
    return tf.cast(resized + 0.5, tf.uint8), parsed['label']


def _features(tf: Any) -> dict[str, Any]:
    return {'image': tf.io.FixedLenFeature((), tf.string), 'label': tf.io.FixedLenFeature((), tf.int64)}


def _crop_of_jpeg(tf: Any, view: View, data: Any, example: Any, epoch: Any) -> Any:
    shape = tf.io.extract_jpeg_shape(data)
    window = window_of(tf, view, shape[0], shape[1], example, epoch)

    def at_scale(scale: int) -> Any:
        # Of libjpeg: the inverse transform gives fewer pixels, each the mean of those that it stands for.
        return lambda: tf.io.decode_and_crop_jpeg(data, window // scale, channels=3, ratio=scale)

    enough = tf.reduce_min(window[2:]) // view.size
    smaller = sum(tf.cast(enough >= scale, tf.int32) for scale in (2, 4, 8))
    return tf.switch_case(smaller, [at_scale(scale) for scale in (1, 2, 4, 8)])


def _crop_of_other(tf: Any, view: View, data: Any, example: Any, epoch: Any) -> Any:
    image = tf.io.decode_image(data, channels=3, expand_animations=False)
    shape = tf.shape(image)
    top, left, height, width = tf.unstack(window_of(tf, view, shape[0], shape[1], example, epoch))
    return image[top : top + height, left : left + width]


def window_of(tf: Any, view: View, height: Any, width: Any, example: Any, epoch: Any) -> Any:
    """Returns which part of an image is seen: int32 (top, left, height, width), in its pixels.

    Random-resized crop: a share of the area, uniform in `AREA`; a ratio of the sides, log-uniform in `RATIO`;
    the first of `TRIES` that lies within the image, at a place that is uniform too. Where none does, and
    where nothing is random: the square at the centre whose side is `crop_fraction` of the shorter one, which
    is what resizing the shorter side to size / crop_fraction and cutting out the centre gives.
    """
    sides = tf.stack([height, width])
    side = tf.cast(tf.round(view.crop_fraction * tf.cast(tf.minimum(height, width), tf.float32)), tf.int32)
    square = tf.maximum(tf.stack([side, side]), 1)
    centred = tf.concat([(sides - square) // 2, square], 0)
    if view.seed is None:
        return centred
    key = tf.stack([tf.constant(view.seed << 31, tf.int64) + epoch, example])
    draws = tf.random.stateless_uniform([TRIES, 4], key, alg='philox')
    area = AREA[0] + (AREA[1] - AREA[0]) * draws[:, 0]
    low, high = (math.log(ratio) for ratio in RATIO)
    ratio = tf.exp(low + (high - low) * draws[:, 1])
    pixels = area * tf.cast(height, tf.float32) * tf.cast(width, tf.float32)
    sizes = tf.cast(tf.round(tf.sqrt(tf.stack([pixels / ratio, pixels * ratio], axis=1))), tf.int32)
    fits = tf.reduce_all((sizes >= 1) & (sizes <= sides), axis=1)
    first = tf.argmax(tf.cast(fits, tf.int32))  # the first of the largest
    size = sizes[first]
    corner = tf.cast(draws[first, 2:] * tf.cast(sides - size + 1, tf.float32), tf.int32)
    corner = tf.minimum(corner, sides - size)  # a draw just below 1 is rounded up
    return tf.where(fits[first], tf.concat([corner, size], 0), centred)


def _tensorflow() -> Any:
    """TensorFlow, kept away from the accelerators, and in no more threads than there are cores."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # no lines on what this machine has not
    import tensorflow as tf

    try:
        for kind in ('GPU', 'TPU'):
            tf.config.set_visible_devices([], kind)
        tf.config.threading.set_inter_op_parallelism_threads(cores())
        tf.config.threading.set_intra_op_parallelism_threads(1)  # an image is one thread's work
    except RuntimeError:  # whoever uses TensorFlow besides has started it
        pass
    return tf
