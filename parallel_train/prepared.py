"""Where does a prepared dataset lie, and what does its metadata say?

Reads the JSON files of TFDS's standard form, `data_dir/name[/config]/version/`, without importing
TFDS, so that a start with a prepared set costs milliseconds.
"""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from parallel_train.errors import UserError
from parallel_train.fetched import fetch
from parallel_train.paths import is_remote

CHECKSUMS = 'idx_checksums.json'  # of the files that a set was prepared from, IDX or others
# The forms that TFDS reads by index.
READABLE_FORMATS = ('array_record', 'parquet')
_NAME = re.compile(r'(?P<name>\w+)(/(?P<config>[\w+\-][\w+\-.]*))?(:(?P<version>[\d*]+\.[\d*]+\.[\d*]+))?$')
_VERSION = re.compile(r'\d+\.\d+\.\d+$')
_SPLIT = re.compile(r'[\w-]+')
_SIMPLE_SPLIT = re.compile(
    r'(?P<name>[\w-]+)(\[((?P<start>-?\d+)(?P<u1>%?))?:((?P<stop>-?\d+)(?P<u2>%?))?\])?$'
)


@dataclasses.dataclass(frozen=True)
class Features:
    """What the examples of an image-classification set are.

    Attributes:
      image_shape: (h, w, c), None where examples may differ.
      num_classes: None if labels are plain integers, so that only the labels themselves tell.
    """

    image_shape: tuple[int | None, ...]
    num_classes: int | None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dataset that lies on disk in TFDS form.

    Attributes:
      name: as the config gives it, `name[/config][:version]`.
      path: the folder of its version.
      shard_lengths: split -> examples of each shard.
      features: see `Features`.
      class_names: empty if there are none.
      fingerprint: changes whenever the set was written anew with other content.
    """

    name: str
    path: Path
    shard_lengths: Mapping[str, tuple[int, ...]]
    features: Features
    class_names: tuple[str, ...]
    fingerprint: str

    def num_examples(self, split: str) -> int:
        """Examples of a TFDS split spec, slices too. Raises UserError if there are none."""
        return sum(stop - start for _, start, stop in self.ranges(split))

    def ranges(self, split: str) -> list[tuple[str, int, int]]:
        """The (named split, start, stop) that a spec such as `train[:90%]+test` joins, none empty.

        Raises UserError for a spec that TFDS does not take, an unknown split, a slice beyond its
        end, and a spec of no examples.
        """
        counts = {name: sum(lengths) for name, lengths in self.shard_lengths.items()}
        match = _SIMPLE_SPLIT.match(split)
        if match and match['name'] in counts:
            ranges = [_simple_range(split, match, counts[match['name']])]
        else:
            ranges = _tfds_ranges(split, self.shard_lengths)
        ranges = [(name, start, stop) for name, start, stop in ranges if start < stop]
        if not ranges:
            raise UserError(f'split {split!r} of {self.name} holds no examples; {_list(counts)}')
        return ranges


def parse_name(name: str) -> tuple[str, str | None, str | None]:
    """`name[/config][:version]` to (name, config, version). Raises UserError for another form."""
    match = _NAME.match(name)
    if not match:
        raise UserError(
            f"dataset={name!r} is neither a TFDS name, 'name[/config][:version]', "
            "nor an import path, 'package.module:function'"
        )
    return match['name'], match['config'], match['version']


def find_prepared(name: str, data_dir: Path) -> Prepared | None:
    """The set of that name in `data_dir`, the newest version that fits; None if there is none.

    Of one in an object store, the local copy.

    Raises UserError if its examples are not an image with a label, if it is stored in a form that
    cannot be read by index, or if its metadata are damaged.
    """
    base, config, version = parse_name(name)
    if is_remote(data_dir):
        data_dir = fetch(base, data_dir)
    folder = data_dir / base / (config or '')
    try:
        versions = _versions(folder, version)
        if not versions and not config:
            # TFDS notes here which config a bare name means.
            note = folder / '.config' / 'metadata.json'
            if note.is_file():
                default = json.loads(note.read_text()).get('default_config_name') or ''
                if default:
                    parse_name(f'{base}/{default}')  # no path out of the folder
                    versions = _versions(folder / default, version)
        if not versions:
            return None
        folder = max(versions, key=lambda path: [int(part) for part in path.name.split('.')])
        return _read(name, folder)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise unreadable(folder, 'its metadata', error) from error


def unreadable(path: Path, what: str, error: Exception) -> UserError:
    """The error for a prepared set of which a part is not what was written; it names the remedy."""
    reason = ' '.join(str(error).split())[:200]
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):  # no access, no such path, ...
        return UserError(f'{path}: {what} cannot be read ({reason}): choose another --data_dir')
    return UserError(
        f'{path}: {what} cannot be read ({type(error).__name__}: {reason}), so the prepared set is damaged: '
        'delete this folder and run `prepare` again'
    )


def _read(name: str, path: Path) -> Prepared:
    """Reads the metadata of the set whose version lies in `path`; raises many kinds if it is damaged."""
    info_text = (path / 'dataset_info.json').read_text()
    features_text = (path / 'features.json').read_text()
    info, features = json.loads(info_text), json.loads(features_text, object_hook=_only_of_tfds)
    formats = {info.get('fileFormat', 'tfrecord'), *info.get('alternativeFileFormats', [])}
    if not formats & set(READABLE_FORMATS):
        raise UserError(
            f'{path} is stored as {"/".join(sorted(formats))}, which cannot be read by index: '
            'remove that folder or choose another --data_dir, then run `prepare` again'
        )
    for split in info.get('splits', []):
        if not _SPLIT.fullmatch(split['name']):  # names of files are made from it
            raise UserError(
                f'{path}: its dataset_info.json names a split {split["name"]!r}, and such a name is of '
                'letters, digits, _ and - alone: delete this folder and run `prepare` again'
            )
    names = path / 'label.labels.txt'
    checksums = path / CHECKSUMS
    content = info_text + features_text + (checksums.read_text() if checksums.is_file() else '')
    return Prepared(
        name=name,
        path=path,
        shard_lengths={
            split['name']: tuple(int(n) for n in split.get('shardLengths', []))
            for split in info.get('splits', [])
        },
        features=parse_features(name, features['featuresDict']['features']),
        class_names=tuple(names.read_text().splitlines()) if names.is_file() else (),
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:12],
    )


def _only_of_tfds(part: dict[str, Any]) -> dict[str, Any]:
    """Returns an object in features.json, if no class is named there but TFDS's own.

    TFDS imports the module of whatever class is named: data would choose what is executed.
    """
    for key in ('pythonClassName', 'python_class_name', 'type'):  # `type` in its old form
        named = part.get(key)
        if isinstance(named, str) and not named.startswith('tensorflow_datasets.'):
            raise UserError(
                f'dataset: its features.json names the class {named!r}, whose module would be imported: only '
                'features of TFDS itself are read; prepare the set without it, or read it by a function of '
                "your own, config.dataset='package.module:function'"
            )
    return part


def parse_features(name: str, features: Mapping[str, Any]) -> Features:
    """Reads the `features` of TFDS's features.json. UserError if they are not image and label."""
    missing = [key for key in ('image', 'label') if key not in features]
    if missing:
        raise UserError(
            f'dataset={name!r} has no {" and no ".join(map(repr, missing))} (it has: '
            f'{", ".join(sorted(features))}): only image-classification sets can be trained on'
        )
    image, label = features['image'].get('image'), features['label']
    if image is None or image.get('dtype', 'uint8') != 'uint8':
        raise UserError(f"dataset={name!r}: 'image' is not an image of uint8: {features['image']}")
    number = label.get('tensor') or label.get('scalar', {}).get('tensor') or {}
    is_integer = 'int' in number.get('dtype', '') and not number.get('shape')
    if 'classLabel' not in label and not is_integer:
        raise UserError(f"dataset={name!r}: 'label' is not one integer an example: {label}")
    dimensions = [int(size) for size in image.get('shape', {}).get('dimensions', [])]
    num_classes = int(label.get('classLabel', {}).get('numClasses', 0))
    return Features(
        image_shape=tuple(size if size > 0 else None for size in dimensions) or (None, None, 3),
        num_classes=num_classes or None,
    )


def _versions(folder: Path, version: str | None) -> list[Path]:
    if not folder.is_dir():
        return []
    return [
        path
        for path in folder.iterdir()
        if _VERSION.match(path.name)
        and fnmatch.fnmatch(path.name, version or '*')
        and (path / 'dataset_info.json').is_file()
        and (path / 'features.json').is_file()
    ]


def _simple_range(split: str, match: re.Match[str], count: int) -> tuple[str, int, int]:
    """`name`, `name[a:b]`, `name[a%:b%]`, with TFDS's rounding."""
    is_percent = '%' in (match['u1'], match['u2'])

    def boundary(text: str | None, default: int) -> int:
        if text is None:
            return default
        value = round(int(text) * count / 100) if is_percent else int(text)
        if abs(value) > count:
            raise UserError(f'split {split!r} goes beyond the {count} examples that there are')
        return value + count if value < 0 else value

    return match['name'], boundary(match['start'], 0), boundary(match['stop'], count)


def _tfds_ranges(split: str, shard_lengths: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int, int]]:
    import tensorflow_datasets as tfds

    infos = {
        name: SimpleNamespace(num_examples=sum(lengths), shard_lengths=list(lengths))
        for name, lengths in shard_lengths.items()
    }
    counts = {name: info.num_examples for name, info in infos.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except Exception as error:  # TFDS raises several kinds for a spec that it cannot read
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f'split {split!r} is not valid ({reason}); {_list(counts)}') from error
    return [
        (part.splitname, part.from_ or 0, counts[part.splitname] if part.to is None else part.to)
        for part in parts
    ]


def _list(counts: Mapping[str, int]) -> str:
    return 'splits: ' + ', '.join(f'{name} ({count})' for name, count in counts.items())
