"""How do the records of a prepared set become arrays?

Small images are bound by Python's own work, which threads do not share out, so several processes
each decode a run of examples into one memory-mapped file. They are started as `python -m
parallel_train.decode`, since `multiprocessing` would import the caller's main module again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from parallel_train.errors import UserError
from parallel_train.machine import cores
from parallel_train.prepared import Prepared, unreadable

_EXAMPLES_PER_WORKER = 5_000  # below this, starting a process costs more than it saves
_MAX_WORKERS = 64
_CHUNK = 500


def image_shape(prepared: Prepared, split: str) -> tuple[int, ...]:
    """(h, w, c), that of the first example where the metadata leave it open."""
    shape = prepared.features.image_shape
    if None not in shape:
        return tuple(int(size or 0) for size in shape)
    return tuple(open_source(prepared.path, split)[0]['image'].shape)


def decode_to_files(set_path: Path, split: str, images: Path, labels: Path) -> None:
    """Fills the existing .npy files `images` uint8 [n, h, w, c] and `labels` int32 [n].

    `set_path` is the folder of the set's version. Raises UserError if a record is damaged, an example
    has another shape or its label is negative.
    """
    num_examples = len(np.load(labels, mmap_mode='r'))
    num_workers = min(cores(), _MAX_WORKERS, max(1, num_examples // _EXAMPLES_PER_WORKER))
    if num_workers == 1:
        return _decode_files(set_path, split, images, labels, 0, num_examples)
    bounds = [num_examples * k // num_workers for k in range(num_workers + 1)]
    package_parent = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get('PYTHONPATH')]))
    files = [str(set_path), split, str(images), str(labels)]
    workers = [
        subprocess.Popen(
            [sys.executable, '-m', 'parallel_train.decode', *files, str(start), str(stop)],
            env={**os.environ, 'PYTHONPATH': path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    try:
        outputs = [worker.communicate()[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        if worker.returncode == 2:
            raise UserError(output.strip().splitlines()[-1])
        if worker.returncode != 0:
            raise RuntimeError(f'decoding {set_path} failed ({worker.returncode}):\n{output}')


def decode_into(
    set_path: Path, split: str, images: np.ndarray, labels: np.ndarray, start: int, stop: int
) -> None:
    """Decodes examples start..stop of a named split into the same rows of both arrays."""
    source = open_source(set_path, split)
    for first in range(start, stop, _CHUNK):
        indices = range(first, min(first + _CHUNK, stop))
        with reading(set_path, split):
            examples = source.__getitems__(indices)
        for index, example in zip(indices, examples, strict=True):
            image, label = example['image'], int(example['label'])
            if image.shape != images.shape[1:]:
                raise UserError(
                    f'{set_path.parent.name}: image {index} of {split!r} has shape {image.shape} '
                    f'and the first {images.shape[1:]}: images must all have one shape, or be cropped to '
                    'one: set config.image_size (docs/data.md)'
                )
            if label < 0:
                raise UserError(
                    f'{set_path.parent.name}: example {index} of {split!r} has label {label}: '
                    'this split has no labels; choose another'
                )
            images[index] = image
            labels[index] = label


def open_source(set_path: Path, split: str, **options: Any) -> Any:
    """The examples of a named split, by index, as dicts with 'image' [h, w, c] and 'label'."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS would rather have OpenCV, and says so each time
    try:
        with reading(set_path, split):
            source = tfds.builder_from_directory(set_path).as_data_source(split, **options)
            source[0]
    finally:
        logging.set_verbosity(verbosity)
    return source


def open_records(set_path: Path, split: str) -> Any:
    """The examples of a named split, by index, as they are stored: serialised `tf.train.Example`s."""
    from tensorflow_datasets.core.decode import DeserializeMethod

    source = open_source(set_path, split, deserialize_method=DeserializeMethod.RAW_BYTES)
    if not isinstance(source[0], bytes):
        raise UserError(
            f'{set_path}: {split!r} is not stored as ArrayRecord, from which alone single images are read '
            '(config.image_size): prepare the set again, or set config.image_size=0'
        )
    return source


@contextlib.contextmanager
def reading(set_path: Path, split: str) -> Iterator[None]:
    """Tells the user of damaged records, for which TFDS and its readers raise many kinds of errors."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise unreadable(set_path, f'a record of {split!r}', error) from error


def decode_in_memory(prepared: Prepared, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, h, w, c] and labels int32 [n] of a named split, in this process."""
    count = sum(prepared.shard_lengths[split])
    images = np.empty((count, *image_shape(prepared, split)), np.uint8)
    labels = np.empty(count, np.int32)
    decode_into(prepared.path, split, images, labels, 0, count)
    return images, labels


def _decode_files(set_path: Path, split: str, images: Path, labels: Path, start: int, stop: int) -> None:
    image_rows = np.load(images, mmap_mode='r+')
    label_rows = np.load(labels, mmap_mode='r+')
    # Plain views: writing single rows through a memmap object takes a quarter longer.
    decode_into(set_path, split, np.asarray(image_rows), np.asarray(label_rows), start, stop)
    image_rows.flush()
    label_rows.flush()


if __name__ == '__main__':
    try:
        _decode_files(
            Path(sys.argv[1]),
            sys.argv[2],
            Path(sys.argv[3]),
            Path(sys.argv[4]),
            int(sys.argv[5]),
            int(sys.argv[6]),
        )
    except UserError as error:
        print(error)
        sys.exit(2)
