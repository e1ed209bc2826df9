"""What is in the dataset, as arrays?

The images of a prepared set are decoded once, into memory-mapped files (decoded.py), or where
`config.image_size` is set, each when it is wanted (stream.py). How many there are, also without the
data: sizes.py.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shlex
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from parallel_train import stream
from parallel_train.config import import_object
from parallel_train.decoded import load_decoded
from parallel_train.errors import NoData, UserError
from parallel_train.examples import tokens_of
from parallel_train.known_sets import check_known
from parallel_train.paths import opened
from parallel_train.prepared import find_prepared

_IMPORT_PATH = re.compile(r'[A-Za-z_][\w.]*:[A-Za-z_]\w*$')


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of a split.

    Attributes:
      images: uint8 [n, h, w, c], memory-mapped where they come from a prepared set; read-only. Or rows of
        tokens, [n, length]: see examples.py.
      labels: int32 [n], each in 0..num_classes - 1. Of tokens, they themselves.
      class_names: one a class; the numbers themselves where the set has no names.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def read(self, examples: np.ndarray, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns images and labels of the given examples, int32 [n]; the same in every epoch."""
        del epoch
        return self.images[examples], self.labels[examples]


AnySplit: TypeAlias = Split | stream.StreamedSplit


def open_split(config: Any, split: str, data_dir: Path, training: bool = False) -> AnySplit:
    """Opens a split as the config wants its images: all decoded, or each when it is wanted.

    Args:
      config: complete, with the dataset's `num_classes`.
      split: as for `load_split`.
      data_dir: where `prepare` put the set.
      training: crops at random, if the config says so; else the centre.

    Raises UserError as `load_split`.
    """
    if not config.image_size:
        return load_split(config.dataset, split, data_dir)
    prepared = find_prepared(config.dataset, data_dir)
    if prepared is None:
        raise not_prepared(config.dataset, data_dir)
    return stream.StreamedSplit(prepared, split, config, training)


def load_split(name: str, split: str, data_dir: Path) -> Split:
    """Loads a TFDS split, slices too, of a TFDS set or of a function.

    Args:
      name: `name[/config][:version]` of a set prepared in `data_dir`, or an import path
        `package.module:function`. The function is called as `function(split, data_dir)` and returns
        {'image': uint8 [n, h, w(, c)], 'label': int [n]}, optionally with 'class_names' (a list),
        or the pair (images, labels), or {'tokens': ...}: see `examples.tokens_of`.
      split: such as 'train', 'train[:55000]', 'train[10%:]'; to a function it goes as it stands.
      data_dir: where `prepare` put the set.

    Raises:
      UserError: not prepared, unknown split, no examples, examples that are not uint8 images of one
        shape with an integer label, or no room for the decoded images.
    """
    if is_import_path(name):
        return call_function(name, split, data_dir)
    prepared = find_prepared(name, data_dir)
    if prepared is None:
        raise not_prepared(name, data_dir)
    ranges = prepared.ranges(split)
    whole = {named: load_decoded(prepared, named) for named, _, _ in ranges}
    images = [whole[named][0][start:stop] for named, start, stop in ranges]
    labels = [whole[named][1][start:stop] for named, start, stop in ranges]
    # Joining copies; a single range stays a view of the file.
    joined = (images[0], labels[0]) if len(ranges) == 1 else map(np.concatenate, (images, labels))
    all_images, all_labels = joined
    num_classes = prepared.features.num_classes or 1 + max(int(whole[named][1].max()) for named in whole)
    _check_labels(name, split, all_labels, num_classes)
    names = prepared.class_names or tuple(map(str, range(num_classes)))
    return Split(all_images, all_labels, names)


def is_import_path(name: str) -> bool:
    """Whether a dataset is named by import path, `package.module:function`."""
    return bool(_IMPORT_PATH.match(name))


def not_prepared(name: str, data_dir: Path) -> UserError:
    """The error for a set that is not there: an unknown name, or the command that gets it."""
    check_known(name)
    return UserError(
        f'dataset={name!r} is not prepared in data_dir={data_dir}: run '
        f'`python -m parallel_train prepare --config=... --data_dir={shlex.quote(str(data_dir))}`'
    )


@functools.lru_cache(maxsize=2)  # its sizes are asked for first, then its examples
def call_function(name: str, split: str, data_dir: Path | None) -> Split:
    """Returns what a function that stands for a dataset gives. UserError: not what it must be."""
    function = import_object('dataset', name)
    if not callable(function):
        raise UserError(f'config.dataset={name!r}: must name a function')
    try:
        result = function(split, data_dir)
    except UserError as error:
        raise NoData(str(error)) from error
    except Exception as error:
        raise NoData(
            f'config.dataset={name!r}: fails when called as function({split!r}, {str(data_dir)!r}): '
            f'{type(error).__name__}: {error}'
        ) from error
    if isinstance(result, dict) and 'tokens' in result:
        tokens, num_classes = tokens_of(name, split, result)
        return Split(tokens, tokens, tuple(map(str, range(num_classes))))
    names: tuple[str, ...] = ()
    if isinstance(result, tuple | list) and len(result) == 2:
        images, labels = result
    elif isinstance(result, dict) and {'image', 'label'} <= result.keys():
        images, labels = result['image'], result['label']
        names = tuple(result.get('class_names', ()))
    else:
        raise UserError(
            f'dataset={name!r} returned {type(result).__name__}, not '
            "{'image': ..., 'label': ...} nor (images, labels) nor {'tokens': ...}"
        )
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(
            f'dataset={name!r}: images are {images.dtype} {list(images.shape)}; they must be uint8 '
            '[n, h, w, c] or [n, h, w], all of one shape'
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f'dataset={name!r}: labels are {labels.dtype} {list(labels.shape)}; they must be integers [n]'
        )
    if len(images) != len(labels):
        raise UserError(f'dataset={name!r}: {len(images)} images but {len(labels)} labels')
    if not images.size:
        raise UserError(f'dataset={name!r}: split {split!r} is empty')
    num_classes = len(names) or int(labels.max()) + 1
    _check_labels(name, split, labels, num_classes)
    if images.ndim == 3:
        images = images[..., None]
    return Split(images, labels.astype(np.int32), names or tuple(map(str, range(num_classes))))


def _check_labels(name: str, split: str, labels: np.ndarray, num_classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f'dataset={name!r}: split {split!r} has labels {low}..{high}, outside 0..{num_classes - 1}'
        )


def default_data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    """Returns `data_dir`, or where TFDS keeps datasets by default if it is None."""
    return opened('data_dir', data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
