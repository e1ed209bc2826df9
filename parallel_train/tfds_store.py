"""How is a set written in TFDS's form?"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parallel_train.errors import UserError
from parallel_train.folder import ImageFolder
from parallel_train.idx import IdxSet
from parallel_train.known_sets import is_known, tfds_builder
from parallel_train.prepared import CHECKSUMS, parse_name

Examples = Iterable[tuple[Any, dict[str, Any]]]  # key, features

OWN_VERSION = '1.0.0'  # of a set that TFDS does not know


def store_idx(name: str, files: IdxSet, folder: Path) -> None:
    """Writes IDX arrays as the set that TFDS's own builder of that name would write."""
    builder = _standard_builder(
        name, folder, {split: _as_png(*arrays) for split, arrays in files.splits.items()}
    )
    expected = builder.info.features['image'].shape
    actual = (*files.splits['train'][0].shape[1:], 1)
    if actual != expected:
        raise UserError(
            f'{files.source} hold images of {actual[0]}x{actual[1]} pixels; those of {name} have '
            f'{expected[0]}x{expected[1]}'
        )
    _write(builder, files)


def store_folder(name: str, files: ImageFolder, folder: Path) -> None:
    """Writes the images of a folder, the bytes of their files as they are.

    A name that TFDS does not know becomes a set of its own, with image, label and file name. That of a known
    set must have its classes, and is written as TFDS's own builder would.

    Raises:
      UserError: TFDS knows a set of that name, of other classes or features.
    """
    import tensorflow_datasets as tfds

    base, config, version = parse_name(name)
    if is_known(name):
        names = _standard_builder(name, folder, {}).info.features
        labels = _labels_of_known(name, files, names)
        builder = _standard_builder(name, folder, _of_files(files, labels, 'file_name' in names))
    elif config:
        raise UserError(f'config.dataset={name!r}: a set of your own has no configs; use {base!r}')
    else:
        features = {
            'image': tfds.features.Image(shape=(None, None, 3)),
            'label': tfds.features.ClassLabel(names=files.class_names),
            'file_name': tfds.features.Text(),
        }
        builder = tfds.dataset_builders.AdhocBuilder(
            name=base,
            version=version or OWN_VERSION,
            features=tfds.features.FeaturesDict(features),
            split_datasets=_of_files(files, range(len(files.class_names)), True),
            data_dir=folder,
        )
    _write(builder, files)


def _labels_of_known(name: str, files: ImageFolder, features: Any) -> list[int]:
    """The label of each class of the folder in a set that TFDS knows."""
    names = list(features['label'].names or ())
    if set(features) - {'image', 'label', 'file_name'} or set(names) != set(files.class_names):
        raise UserError(
            f'config.dataset={name!r}: is the name of a set that TFDS knows, with {len(names)} classes '
            f'({", ".join(names[:3])}, ...), which are not the {len(files.class_names)} of {files.source} '
            f'({", ".join(files.class_names[:3])}, ...): give the set a name of your own'
        )
    return [names.index(own) for own in files.class_names]


def _of_files(
    files: ImageFolder, labels: Iterable[int], with_names: bool
) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    numbers = list(labels)

    def examples(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for file, number in files.splits[split]:
            key = str(file.relative_to(files.root))
            name = {'file_name': file.name} if with_names else {}
            yield key, {'image': str(file), 'label': numbers[number], **name}

    return {split: examples(split) for split in files.splits}


def _standard_builder(name: str, folder: Path, examples: Mapping[str, Examples]) -> Any:
    """TFDS's builder of that name, with its version, features and class names, but our examples."""
    with tempfile.TemporaryDirectory() as nowhere:
        standard: Any = type(tfds_builder(name, Path(nowhere))[0])

    class Builder(standard, skip_registration=True):  # type: ignore[call-arg]
        __module__ = standard.__module__

        def _split_generators(self, manager: Any) -> Mapping[str, Examples]:
            return examples

    Builder.name = parse_name(name)[0]
    return Builder(data_dir=folder)


def _write(builder: Any, files: IdxSet | ImageFolder) -> None:
    import tensorflow_datasets as tfds

    # TFDS would announce a download, and draw a bar for each of its stages.
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format='array_record')
    finally:
        tfds.enable_progress_bar()
    record = {'source': files.source, 'sha256': files.sha256}
    (Path(builder.data_dir) / CHECKSUMS).write_text(json.dumps(record, indent=2) + '\n')


def _as_png(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    from PIL import Image

    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        png = io.BytesIO()  # given an array, TFDS would import TensorFlow to encode it
        Image.fromarray(image).save(png, 'png')
        png.seek(0)
        yield index, {'image': png, 'label': int(label)}
