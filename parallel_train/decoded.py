"""Where are the decoded arrays of a prepared set kept, and are they those of its records?

In the folder `decoded/` of the set, or in the user's cache where that cannot be written: one subfolder
a split, whose name says what it was made from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

from parallel_train import machine
from parallel_train.decode import decode_in_memory, decode_to_files, image_shape
from parallel_train.files import check_room, exclusive, sync
from parallel_train.prepared import Prepared, unreadable

_EDGE = 2**17  # bytes: two blocks of an ArrayRecord file, which ends with where its records lie
_log = logging.getLogger(__name__)

Arrays = tuple[np.ndarray, np.ndarray]


def load_decoded(prepared: Prepared, split: str) -> Arrays:
    """Images uint8 [n, h, w, c] and labels int32 [n] of a named split, decoded now if never before.

    The images are memory-mapped and read-only. Arrays that are damaged, or were made from other
    records, are made again. With a line in the log they go into the user's cache where the set's folder
    cannot be written, and stay in memory where neither can.

    Raises UserError as `decode_to_files`, or if the set's folder can be written but has no room.
    """
    if arrays := find_decoded(prepared, split):
        return arrays
    own, cache = _roots(prepared)
    name = f'{split}-{_key(prepared, split)}'
    shape = sum(prepared.shard_lengths[split]), *image_shape(prepared, split)
    needed = int(np.prod(shape)) + shape[0] * np.int32().nbytes
    reason = _obstacle(own)
    if not reason:
        check_room(f'decoding {prepared.name} {split!r}', own, needed)
        return _decode_once(own / name, prepared, split, shape, '')
    if not _obstacle(cache) and needed < shutil.disk_usage(cache).free:
        return _decode_once(cache / name, prepared, split, shape, f', as {reason}')
    _log.warning('%s: decoding in memory', reason)
    return decode_in_memory(prepared, split)


def find_decoded(prepared: Prepared, split: str) -> Arrays | None:
    """What `load_decoded` returns, if that was decoded before; writes nothing."""
    name = f'{split}-{_key(prepared, split)}'
    for root in _roots(prepared):
        if arrays := _open(root / name, prepared, split):
            return arrays
    return None


def _roots(prepared: Prepared) -> tuple[Path, Path]:
    """Where decoded arrays may lie: in the set's own folder, or in the user's cache."""
    cache = machine.cache_dir() / 'decoded' / re.sub(r'\W+', '-', prepared.name)
    return prepared.path / 'decoded', cache


def _key(prepared: Prepared, split: str) -> str:
    """Changes with the metadata of the set, and with the sizes and both ends of the split's files.

    Without reading all of them, that is as much as can be known of whether they are the same.
    """
    digest = hashlib.sha256(prepared.fingerprint.encode())
    paths = sorted(prepared.path.glob(f'*-{split}.*'))
    try:
        sizes = {path.name: path.stat().st_size for path in paths}
        digest.update(str(sizes).encode())
        for path in paths[:1] + paths[1:][-1:]:  # of thousands of files, the first and the last
            with open(path, 'rb') as file:
                digest.update(file.read(_EDGE))
                file.seek(max(sizes[path.name] - _EDGE, 0))
                digest.update(file.read())
    except OSError as error:
        raise unreadable(prepared.path, f'the records of {split!r}', error) from error
    return digest.hexdigest()[:12]


def _open(folder: Path, prepared: Prepared, split: str) -> Arrays | None:
    """The arrays in `folder`, None if they are not there, or not whole."""
    try:
        images, labels = (
            np.lib.format.open_memmap(folder / name, mode='r') for name in ('images.npy', 'labels.npy')
        )
        for path, array in ((folder / 'images.npy', images), (folder / 'labels.npy', labels)):
            if path.stat().st_size != array.offset + array.nbytes or not array.flags.c_contiguous:
                return None
    except (OSError, ValueError, OverflowError):
        return None
    count = sum(prepared.shard_lengths[split])
    wanted = (count, *prepared.features.image_shape)
    fits = len(images.shape) == len(wanted) and all(
        want in (None, size) for want, size in zip(wanted, images.shape, strict=True)
    )
    if not fits or images.dtype != np.uint8 or labels.dtype != np.int32 or labels.shape != (count,):
        return None
    return images, np.array(labels)


def _obstacle(root: Path) -> str:
    """Makes the folder `root`; returns in words why it cannot be written, '' if it can."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        return f'{root} cannot be written ({error.strerror})'
    return ''


def _decode_once(
    folder: Path, prepared: Prepared, split: str, shape: tuple[int, ...], why_here: str
) -> Arrays:
    """Decodes into `folder`, or waits for the process that does."""
    with exclusive(folder.parent / f'.{split}.lock') as alone:
        arrays = _open(folder, prepared, split)
        if arrays is None:
            again = 'again, as the arrays there are damaged' if folder.exists() else 'once'
            _log.info(
                'decoding %s %r, %s: %d images into %s%s',
                prepared.name, split, again, shape[0], folder, why_here,
            )  # fmt: skip
            _decode_to(folder, prepared, split, shape, alone)
            arrays = _open(folder, prepared, split)
    assert arrays is not None, folder
    return arrays


def _decode_to(folder: Path, prepared: Prepared, split: str, shape: tuple[int, ...], alone: bool) -> None:
    root, stale = folder.parent, [folder]
    if alone:  # then these were made from other records, or left by a process that was killed
        stale += [*root.glob(f'.{split}-*.part'), *root.glob(f'{split}-' + '[0-9a-f]' * 12)]
    for old in stale:
        shutil.rmtree(old, ignore_errors=True)
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


def _create(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    np.lib.format.open_memmap(path, 'w+', dtype, shape).flush()
    with open(path, 'r+b') as file:
        # Without this a full disk would be met as SIGBUS, in the middle of a write to the mapping.
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
