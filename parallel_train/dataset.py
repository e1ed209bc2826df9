"""What is in the dataset, as arrays?

`find_sizes` tells how much, with or without the data; `open_split` gives the examples. The images
of a prepared set are decoded once, into memory-mapped files (decoded.py), or where `config.image_size`
is set, each when it is wanted (stream.py).
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
from parallel_train.decode import image_shape
from parallel_train.decoded import load_decoded
from parallel_train.errors import UserError
from parallel_train.examples import tokens_of
from parallel_train.known_sets import check_known, stated_sizes
from parallel_train.paths import opened
from parallel_train.prepared import Prepared, find_prepared

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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many examples there are and what they look like; `source` says in words who says so."""

    num_train_examples: int
    num_eval_examples: int
    input_shape: tuple[int, ...]
    num_classes: int
    source: str


# The fields of Sizes that a config may give as well.
_SIZE_FIELDS = ('num_train_examples', 'num_eval_examples', 'input_shape', 'num_classes')


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
        return _call(name, split, data_dir)
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


def find_sizes(config: Any, data_dir: Path | None) -> Sizes:
    """Sizes from the prepared set, else from TFDS's metadata, else from the config's own fields.

    Args:
      config: ConfigDict with `dataset`, `train_split`, `eval_split` and the fields
        `num_train_examples`, `num_eval_examples` (both after slicing), `input_shape` and
        `num_classes`, where 0 and () stand for "not given".
      data_dir: where prepared sets lie; None: nowhere.

    Raises UserError if a given shape or number of classes contradicts the data, a given count the
    split as sliced, or if a size stays unknown.
    """
    given = {field: getattr(config, field) for field in _SIZE_FIELDS if getattr(config, field)}
    if 'input_shape' in given:
        given['input_shape'] = tuple(given['input_shape'])
    known: dict[str, Any]
    stream.check_fields(config, of_function=is_import_path(config.dataset))
    if is_import_path(config.dataset):
        known, source = _sizes_of_function(config, data_dir, must_know=len(given) < len(_SIZE_FIELDS))
    elif data_dir is not None and (prepared := find_prepared(config.dataset, data_dir)):
        known, source = _sizes_of_prepared(config, data_dir, prepared)
    else:
        for field, split in [
            ('num_train_examples', config.train_split),
            ('num_eval_examples', config.eval_split),
        ]:
            match = re.fullmatch(r'[\w-]+\[(\d*):(\d+)\]', split)
            if match and field in given:
                length = int(match[2]) - int(match[1] or 0)
                _compare(field, given[field], length, f'the split {split!r}')
        known, source = stated_sizes(config.dataset, must_know=len(given) < len(_SIZE_FIELDS))
    if config.image_size:  # whatever the set's own images are
        given.pop('input_shape', None)
        known['input_shape'] = stream.shape_of(config)
    for field in ('input_shape', 'num_classes'):  # counts are fallbacks: the data knows better
        if field in known and field in given:
            _compare(field, given[field], known[field], source)
    missing = [field for field in _SIZE_FIELDS if field not in known and field not in given]
    if missing:
        raise UserError(
            f'dataset={config.dataset!r} is not prepared in data_dir={data_dir} and TFDS has no '
            'record of its sizes: run `prepare`, or set ' + ', '.join(f'config.{field}' for field in missing)
        )
    from_config = [f'config.{field}' for field in _SIZE_FIELDS if field not in known]
    sources = ([source] if source else []) + from_config
    return Sizes(**{**given, **known}, source=', '.join(sources))


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


def _sizes_of_prepared(config: Any, data_dir: Path, prepared: Prepared) -> tuple[dict[str, Any], str]:
    train = _ranges(prepared, config, 'train_split')
    evaluation = _ranges(prepared, config, 'eval_split')
    num_classes = prepared.features.num_classes
    if num_classes is None and config.image_size:
        num_classes = stream.given_classes(config)
    if num_classes is None:  # plain integers: the labels themselves tell
        splits = (config.train_split, config.eval_split)
        num_classes = max(load_split(config.dataset, s, data_dir).num_classes for s in splits)
    known = {
        'num_train_examples': sum(stop - start for _, start, stop in train),
        'num_eval_examples': sum(stop - start for _, start, stop in evaluation),
        'input_shape': () if config.image_size else image_shape(prepared, train[0][0]),
        'num_classes': num_classes,
    }
    return known, f'the prepared set {prepared.path}'


def _ranges(prepared: Prepared, config: Any, field: str) -> list[tuple[str, int, int]]:
    try:
        return prepared.ranges(getattr(config, field))
    except UserError as error:
        raise UserError(f'config.{field}={getattr(config, field)!r}: {error}') from error


def _sizes_of_function(
    config: Any, data_dir: Path | None, must_know: bool
) -> tuple[dict[str, Any], str]:  # fmt: skip
    import_object('dataset', config.dataset)
    try:
        train, evaluation = (
            _call(config.dataset, split, data_dir) for split in (config.train_split, config.eval_split)
        )
    except UserError:  # its data are not here; whoever trains will be told
        if must_know:
            raise
        return {}, ''
    shapes = train.images.shape[1:], evaluation.images.shape[1:]
    if shapes[0] != shapes[1]:
        raise UserError(
            f'config.dataset={config.dataset!r}: examples of the train split are {shapes[0]} and those of '
            f'the eval split {shapes[1]}; they must be of one shape'
        )
    known = {
        'num_train_examples': len(train.images),
        'num_eval_examples': len(evaluation.images),
        'input_shape': train.images.shape[1:],
        'num_classes': max(train.num_classes, evaluation.num_classes),
    }
    return known, f'the function {config.dataset}'


def _compare(field: str, given: Any, actual: Any, source: str) -> None:
    if given != actual:
        raise UserError(
            f'config.{field}={given} contradicts {source}, which gives {actual}: '
            f'set config.{field}={actual}, or leave it out'
        )


@functools.lru_cache(maxsize=2)  # its sizes are asked for first, then its examples
def _call(name: str, split: str, data_dir: Path | None) -> Split:
    function = import_object('dataset', name)
    if not callable(function):
        raise UserError(f'config.dataset={name!r}: must name a function')
    try:
        result = function(split, data_dir)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
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
