"""How do the records of a prepared set become arrays, and where are those kept?

In the folder `decoded/` of the set, one subfolder a split, keyed by the set's fingerprint.

Small images are bound by Python's own work, which threads do not share out, so several processes
each decode a run of examples into one memory-mapped file. They are started as `python -m
parallel_train.decode`, since `multiprocessing` would import the caller's main module again.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from parallel_train.errors import UserError
from parallel_train.machine import cores
from parallel_train.prepared import Prepared, exclusive, sync

_EXAMPLES_PER_WORKER = 5_000  # below this, starting a process costs more than it saves
_MAX_WORKERS = 64
_CHUNK = 500
_log = logging.getLogger(__name__)


def load_decoded(prepared: Prepared, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, h, w, c] and labels int32 [n] of a named split, decoded now if never before.

    The images are memory-mapped; in memory, with a line in the log, where the set's folder cannot
    be written. Raises UserError as `decode_to_files`, or if the disk has no room.
    """
    root = prepared.path / 'decoded'
    folder = root / f'{split}-{prepared.fingerprint}'
    if not folder.is_dir():
        try:
            root.mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()  # finds out whether it can be written
        except OSError as error:
            _log.warning('%s cannot be written (%s): decoding in memory', root, error.strerror)
            return _decode_in_memory(prepared, split)
        with exclusive(root / f'.{split}.lock') as alone:
            if not folder.is_dir():
                _decode_to(folder, prepared, split, alone)
    return np.load(folder / 'images.npy', mmap_mode='r'), np.load(folder / 'labels.npy')


def _decode_to(folder: Path, prepared: Prepared, split: str, alone: bool) -> None:
    shape = (sum(prepared.shard_lengths[split]), *image_shape(prepared, split))
    root = folder.parent
    if alone:  # then these are stale, or left by a process that was killed
        for old in (*root.glob(f'.{split}-*.part'), *root.glob(f'{split}-' + '[0-9a-f]' * 12)):
            shutil.rmtree(old, ignore_errors=True)
    needed, free = int(np.prod(shape)) + 4 * shape[0], shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f'decoding {prepared.name} {split!r} needs {needed / 1e9:.1f} GB in {root}, where '
            f'{free / 1e9:.1f} GB are free: make room or choose another --data_dir'
        )
    _log.info('decoding %s %r, once: %d images into %s', prepared.name, split, shape[0], folder)
    part = Path(tempfile.mkdtemp(prefix=f'.{split}-', suffix='.part', dir=root))
    try:
        images, labels = part / 'images.npy', part / 'labels.npy'
        _create(images, np.uint8, shape)
        _create(labels, np.int32, shape[:1])
        decode_to_files(prepared.path, split, images, labels)
        for path in (images, labels):
            sync(path)
        part.chmod(0o755)
        part.rename(folder)
        sync(root)
    except OSError:
        if not folder.is_dir():  # else another process was faster, where locks do not work
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def image_shape(prepared: Prepared, split: str) -> tuple[int, ...]:
    """(h, w, c), that of the first example where the metadata leave it open."""
    shape = prepared.features.image_shape
    if None not in shape:
        return tuple(int(size or 0) for size in shape)
    return tuple(open_source(prepared.path, split)[0]['image'].shape)


def decode_to_files(set_path: Path, split: str, images: Path, labels: Path) -> None:
    """Fills the existing .npy files `images` uint8 [n, h, w, c] and `labels` int32 [n].

    `set_path` is the folder of the set's version. Raises UserError if an example has another shape
    or its label is negative.
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
        for index, example in zip(indices, source.__getitems__(indices), strict=True):
            image, label = example['image'], int(example['label'])
            if image.shape != images.shape[1:]:
                raise UserError(
                    f'{set_path.parent.name}: image {index} of {split!r} has shape {image.shape} '
                    f'and the first {images.shape[1:]}: images must all have one shape; resize '
                    "them in a function of your own, config.dataset='package.module:function'"
                )
            if label < 0:
                raise UserError(
                    f'{set_path.parent.name}: example {index} of {split!r} has label {label}: '
                    'this split has no labels; choose another'
                )
            images[index] = image
            labels[index] = label


def open_source(set_path: Path, split: str) -> Any:
    """The examples of a named split, by index, as dicts with 'image' [h, w, c] and 'label'."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS would rather have OpenCV, and says so each time
    try:
        source = tfds.builder_from_directory(set_path).as_data_source(split)
        source[0]
    finally:
        logging.set_verbosity(verbosity)
    return source


def _create(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    np.lib.format.open_memmap(path, 'w+', dtype, shape).flush()
    with open(path, 'r+b') as file:
        # Without this a full disk would be met as SIGBUS, in the middle of a write to the mapping.
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _decode_in_memory(prepared: Prepared, split: str) -> tuple[np.ndarray, np.ndarray]:
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
