"""How does a stored image become the pixels that the model sees?

Decoding, cropping and resizing by TensorFlow's kernels, fused: of a JPEG only the crop is decoded, at
the smallest of the scales 1, 1/2, 1/4 and 1/8 that still has the pixels. Everything that is random is a
function of (seed, epoch, example). The only file that computes with TensorFlow.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
from typing import Any

import numpy as np

from parallel_train.machine import cores

# Of a random-resized crop (Szegedy et al. 2015, "Going deeper with convolutions", section 6).
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10

# Of JPEG (ITU-T T.81, table B.1): the markers after which height and width stand.
_START_OF_IMAGE = b'\xff\xd8'
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


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
    """Turns records into pixels, a batch at a time.

    Where to crop is chosen in the caller's thread; `tf.data` decodes and crops.

    Args:
      view: what is seen.
      at_once: how many images of a batch are decoded at the same time.
    """

    def __init__(self, view: View, at_once: int):
        tf = load_tensorflow()
        self._tf, self._view = tf, view
        specs = [tf.TensorSpec([None], tf.string), tf.TensorSpec([None, 4], tf.int32)]

        as_it_is = tf.autograph.experimental.do_not_convert  # there is no Python `if` in it to look for

        def decode(images: Any, windows: Any) -> Any:
            pixels = tf.data.Dataset.from_tensor_slices((images, windows)).map(
                as_it_is(lambda image, window: pixels_of(tf, view, image, window)),
                num_parallel_calls=at_once if at_once > 1 else None,
                deterministic=True if at_once > 1 else None,
            )
            return pixels.batch(tf.size(images, tf.int64)).with_options(options).get_single_element()

        options = tf.data.Options()
        options.autotune.enabled = False  # all there is to choose is chosen
        self._decode = tf.function(as_it_is(decode), input_signature=specs).get_concrete_function()

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
        images, labels = zip(*map(self._parsed, records), strict=True)
        sides = np.array([sides_of(image) for image in images])
        windows = windows_of(self._view, sides, examples, epoch)
        try:
            pixels = self._decode(tf.constant(images), tf.constant(windows, tf.int32))
        except tf.errors.InvalidArgumentError:
            raise Corrupt from None
        return np.asarray(pixels), np.array(labels)  # the pixels a view

    def _parsed(self, record: bytes) -> tuple[bytes, int]:
        from google.protobuf.message import DecodeError

        try:
            features = self._tf.train.Example.FromString(record).features.feature
            return features['image'].bytes_list.value[0], features['label'].int64_list.value[0]
        except (DecodeError, IndexError):
            raise Corrupt from None

    def explain(self, record: bytes) -> tuple[int | None, str, str]:
        """Why does the image of a record not decode?

        Returns its label, None if it has none; the name of the file that it was, '' if none is stored; and
        the reason.
        """
        tf, label, name = self._tf, None, ''
        text, number = (tf.io.FixedLenFeature((), kind) for kind in (tf.string, tf.int64))
        features = {'image': text, 'label': number, 'file_name': tf.io.FixedLenFeature((), tf.string, '')}
        try:
            parsed = tf.io.parse_single_example(record, features)
            label = int(parsed['label'])
            name = parsed['file_name'].numpy().decode(errors='replace')
            tf.io.decode_image(parsed['image'], channels=3, expand_animations=False)
        except tf.errors.InvalidArgumentError as error:  # '{{where}} reason [Op:what] name:'
            return label, name, re.sub(r'\{\{.*?\}\} | ?\[Op:.*', '', error.message.splitlines()[0])[:200]
        try:
            sides_of(parsed['image'].numpy())
        except Corrupt as error:
            return label, name, str(error)
        return label, name, 'what the crop needs of it'


def pixels_of(tf: Any, view: View, image: Any, window: Any) -> Any:
    """Returns the pixels of a stored image within a window, uint8 [size, size, 3], as tensors."""
    crop = tf.cond(
        tf.io.is_jpeg(image),
        lambda: _crop_of_jpeg(tf, view, image, window),
        lambda: _crop_of_other(tf, image, window),
    )
    crop.set_shape([None, None, 3])
    resized = tf.image.resize(crop, (view.size, view.size))  # bilinear
    return tf.cast(resized + 0.5, tf.uint8)


def _crop_of_jpeg(tf: Any, view: View, image: Any, window: Any) -> Any:
    def at_scale(scale: int) -> Any:
        # Of libjpeg: the inverse transform gives fewer pixels, each the mean of those that it stands for.
        return lambda: tf.io.decode_and_crop_jpeg(image, window // scale, channels=3, ratio=scale)

    enough = tf.reduce_min(window[2:]) // view.size
    smaller = sum(tf.cast(enough >= scale, tf.int32) for scale in (2, 4, 8))
    return tf.switch_case(smaller, [at_scale(scale) for scale in (1, 2, 4, 8)])


def _crop_of_other(tf: Any, image: Any, window: Any) -> Any:
    pixels = tf.io.decode_image(image, channels=3, expand_animations=False)
    top, left, height, width = tf.unstack(window)
    return pixels[top : top + height, left : left + width]


def sides_of(image: bytes) -> tuple[int, int]:
    """Returns height and width of a stored image, by its header. Corrupt: it has none."""
    sides = _sides_of_jpeg(image)  # a tenth of the time that Pillow takes, which counts for every image
    if sides:
        return sides
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as header:
            return header.height, header.width
    except Exception as error:  # Pillow's parsers raise many kinds
        raise Corrupt(f'{type(error).__name__}: {error}') from None


def _sides_of_jpeg(image: bytes) -> tuple[int, int] | None:
    """Returns height and width by the frame header of a JPEG file (ITU-T T.81, B.2.2), where found."""
    at, end = 2, len(image) - 9
    if image[:2] != _START_OF_IMAGE:
        return None
    while at <= end and image[at] == 0xFF and 0xC0 <= image[at + 1] < 0xFF:
        if image[at + 1] in _FRAME_HEADERS:
            height, width = image[at + 5] << 8 | image[at + 6], image[at + 7] << 8 | image[at + 8]
            return (height, width) if height and width else None
        at += 2 + (image[at + 2] << 8 | image[at + 3])
    return None


def windows_of(view: View, sides: np.ndarray, examples: np.ndarray, epoch: int) -> np.ndarray:
    """Returns which part of each image is seen: int32 [n, 4] of (top, left, height, width), in its pixels.

    Random-resized crop: a share of the area, uniform in `AREA`; a ratio of the sides, log-uniform in `RATIO`;
    the first of `TRIES` that lies within the image, at a place that is uniform too. Where none does, and
    where nothing is random: the square at the centre whose side is `crop_fraction` of the shorter one, which
    is what resizing the shorter side to size / crop_fraction and cutting out the centre gives.

    Args:
      view: what is seen.
      sides: int [n, 2], height and width of each image.
      examples: int [n], which decide with `epoch` and the view's seed what is random.
      epoch: from 0.
    """
    squares = np.maximum(np.rint(view.crop_fraction * sides.min(axis=1, keepdims=True)), 1).astype(np.int32)
    centred = np.concatenate([(sides - squares) // 2, squares, squares], axis=1).astype(np.int32)
    if view.seed is None:
        return centred
    area, ratio, *place = np.moveaxis(_draws(view.seed, epoch, examples), -1, 0)  # each [n, TRIES]
    pixels = (AREA[0] + (AREA[1] - AREA[0]) * area) * sides.prod(axis=1, keepdims=True)
    low, high = np.log(RATIO)
    ratio = np.exp(low + (high - low) * ratio)
    sizes = np.rint(np.sqrt(np.stack([pixels / ratio, pixels * ratio], axis=-1))).astype(np.int32)
    room = sides[:, None] - sizes  # [n, TRIES, 2]
    fits = ((sizes >= 1) & (room >= 0)).all(axis=-1)
    corners = (np.stack(place, axis=-1) * (room + 1)).astype(np.int32)
    chosen = np.arange(len(sides)), fits.argmax(axis=1)
    tried = np.concatenate([corners, sizes], axis=-1)[chosen]
    return np.where(fits[chosen][:, None], tried, centred)


def _draws(seed: int, epoch: int, examples: np.ndarray) -> np.ndarray:
    """Returns numbers uniform in [0, 1), float64 [n, TRIES, 4], those of an example a function of its own.

    The stream of Philox (Salmon et al. 2011), whose words NumPy promises not to change.
    """
    keys = (((seed << 31) + epoch, int(example)) for example in examples)
    words = [np.random.Philox(key=key).random_raw(4 * TRIES) for key in keys]
    return (np.array(words).reshape(-1, TRIES, 4) >> np.uint64(11)) * 2.0**-53


def load_tensorflow() -> Any:
    """TensorFlow, kept away from the accelerators, and in no more threads than there are cores."""
    # No lines on what this machine has not, nor on each crop of an image that does not decode. What the
    # variable says is mostly JAX's own doing ('1'), but for the value that asks for everything.
    if os.environ.get('TF_CPP_MIN_LOG_LEVEL') != '0':
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    import tensorflow as tf

    try:
        for kind in ('GPU', 'TPU'):
            tf.config.set_visible_devices([], kind)
        tf.config.threading.set_inter_op_parallelism_threads(cores())
        tf.config.threading.set_intra_op_parallelism_threads(1)  # an image is one thread's work
    except RuntimeError:  # whoever uses TensorFlow besides has started it
        pass
    return tf
