"""How large is the dataset? With its data, or without."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from parallel_train import stream
from parallel_train.dataset import call_function, is_import_path
from parallel_train.decode import image_shape, open_source, reading
from parallel_train.decoded import find_decoded
from parallel_train.errors import NoData, UserError
from parallel_train.known_sets import stated_sizes
from parallel_train.prepared import Prepared, find_prepared


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


def find_sizes(config: Any, data_dir: Path | None) -> Sizes:
    """Sizes from the prepared set, else from TFDS's metadata, else from the config's own fields.

    Those of a function from what it returns; where it fails, as without its data, from the config's fields
    if all are given.

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
        known, source = _sizes_of_prepared(config, prepared)
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


def _sizes_of_prepared(config: Any, prepared: Prepared) -> tuple[dict[str, Any], str]:
    train = _ranges(prepared, config, 'train_split')
    evaluation = _ranges(prepared, config, 'eval_split')
    num_classes = prepared.features.num_classes
    if num_classes is None and config.image_size:
        num_classes = stream.given_classes(config)
    if num_classes is None:  # plain integers: the labels themselves tell
        num_classes = _classes_of_labels(prepared, {named for named, _, _ in train + evaluation})
    known = {
        'num_train_examples': sum(stop - start for _, start, stop in train),
        'num_eval_examples': sum(stop - start for _, start, stop in evaluation),
        'input_shape': () if config.image_size else image_shape(prepared, train[0][0]),
        'num_classes': num_classes,
    }
    return known, f'the prepared set {prepared.path}'


def _classes_of_labels(prepared: Prepared, splits: Iterable[str]) -> int:
    """How many classes the labels of whole named splits name. UserError if some are no labels.

    Decodes no image and writes nothing: `plan` asks this too.
    """
    most = 0
    for split in splits:
        decoded = find_decoded(prepared, split)
        labels = _stored_labels(prepared, split) if decoded is None else decoded[1]
        if labels.min() < 0:
            raise UserError(
                f'config.dataset={prepared.name!r}: {split!r} has label {labels.min()}: this split has no '
                'labels; choose another'
            )
        most = max(most, int(labels.max()))
    return 1 + most


def _stored_labels(prepared: Prepared, split: str) -> np.ndarray:
    """The labels of a named split, int [n], from its records."""
    from tensorflow_datasets.core.decode import SkipDecoding

    count = sum(prepared.shard_lengths[split])
    source = open_source(prepared.path, split, decoders={'image': SkipDecoding()})
    with reading(prepared.path, split):
        return np.array([source[i]['label'] for i in range(count)])


def _ranges(prepared: Prepared, config: Any, field: str) -> list[tuple[str, int, int]]:
    try:
        return prepared.ranges(getattr(config, field))
    except UserError as error:
        raise UserError(f'config.{field}={getattr(config, field)!r}: {error}') from error


def _sizes_of_function(config: Any, data_dir: Path | None, must_know: bool) -> tuple[dict[str, Any], str]:
    try:
        train, evaluation = (
            call_function(config.dataset, split, data_dir)
            for split in (config.train_split, config.eval_split)
        )
    except NoData:  # whoever trains will be told
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
