"""IDX files, the form in which MNIST and its relatives are published: parse and check.

A file is a big-endian header (a magic number that names type and rank, then each dimension) and the
raw bytes. Source: http://yann.lecun.com/exdb/mnist, "File formats for the MNIST database".
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from parallel_train.errors import UserError

NUM_CLASSES = 10
_RANK = {'images': 3, 'labels': 1}
# Published names: `train-images-idx3-ubyte`, after some tools `train-images.idx3-ubyte`.
_STEMS = {'train': 'train', 'test': 't10k'}


@dataclasses.dataclass(frozen=True)
class IdxSet:
    """Four IDX files, checked.

    Attributes:
      source: where they come from, in words.
      splits: 'train' and 'test' -> (images uint8 [n, h, w], labels uint8 [n] in 0..9).
      sha256: published file name (no .gz) -> hex digest of the decompressed content, which
        stays the same however the file was compressed.
    """

    source: str
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    sha256: dict[str, str]


def load(folder: Path) -> IdxSet | None:
    """Reads and checks the four files of `folder`; None if it holds none of them.

    Raises UserError, which names the file, if some are missing or any is not what it should be.
    """
    files = find_files(folder)
    if files is None:
        return None
    splits, sha256 = {}, {}
    for split in _STEMS:
        arrays = {}
        for kind in _RANK:
            path = files[split, kind]
            content = _read(path)
            arrays[kind] = parse(content, kind, path)
            sha256[_names(split, kind)[0]] = hashlib.sha256(content).hexdigest()
        images, labels = arrays['images'], arrays['labels']
        if len(images) != len(labels):
            raise UserError(
                f'{files[split, "images"]} holds {len(images)} images but '
                f'{files[split, "labels"]} holds {len(labels)} labels: take both from one set'
            )
        splits[split] = (images, labels)
    shapes = {split: images.shape[1:] for split, (images, _) in splits.items()}
    if shapes['train'] != shapes['test']:
        raise UserError(
            f'{folder}: train images are {shapes["train"]} pixels and test images '
            f'{shapes["test"]}: take all four files from one set'
        )
    return IdxSet(f'IDX files in {folder}', splits, sha256)


def find_files(folder: Path) -> dict[tuple[str, str], Path] | None:
    """(split, 'images' | 'labels') -> file, for the four of them; None if there is none of them.

    Raises UserError that names the missing ones if there are some but not all.
    """
    found: dict[tuple[str, str], Path] = {}
    missing = []
    for split in _STEMS:
        for kind in _RANK:
            names = _names(split, kind)
            paths = [folder / (name + end) for name in names for end in ('', '.gz')]
            path = next((path for path in paths if path.is_file()), None)
            if path is None:
                missing.append(f'{names[0]}[.gz]')
            else:
                found[split, kind] = path
    if not found:
        return None
    if missing:
        raise UserError(f'{folder} holds only some of the four IDX files; missing: {", ".join(missing)}')
    return found


def parse(content: bytes, kind: str, path: Path) -> np.ndarray:
    """Decompressed IDX content to uint8 [n, h, w] (kind 'images') or uint8 [n] (kind 'labels').

    `path` is for messages. Raises UserError if the content is something else, truncated or too
    long, empty, or holds a label outside 0..9.
    """
    rank = _RANK[kind]
    header = 4 + 4 * rank
    if len(content) < 4:
        raise UserError(f'{path} is truncated: {len(content)} bytes are not even an IDX header')
    magic = struct.unpack('>I', content[:4])[0]
    if magic != _magic(kind):
        other = next((k for k in _RANK if magic == _magic(k)), None)
        what = f'holds {other}' if other else 'is not an IDX file of bytes'
        hint = '; are images and labels swapped?' if other else ''
        raise UserError(
            f'{path} {what} (magic number {magic}), where {kind} ({_magic(kind)}) are expected' + hint
        )
    if len(content) < header:
        raise UserError(f'{path} is truncated within its header: copy or download it again')
    shape = struct.unpack(f'>{rank}I', content[4:header])
    if math.prod(shape) == 0:
        raise UserError(f'{path} is empty: its header says {shape}')
    expected, actual = header + math.prod(shape), len(content)
    if actual != expected:
        fault = 'is truncated' if actual < expected else 'has trailing bytes'
        raise UserError(
            f'{path} {fault}: {actual} bytes where its header {shape} needs {expected}; '
            'copy or download it again'
        )
    array = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    if kind == 'labels' and array.max() >= NUM_CLASSES:
        at = int(np.argmax(array >= NUM_CLASSES))
        raise UserError(f'{path}: label {array[at]} of example {at} is outside 0..{NUM_CLASSES - 1}')
    return array


def _magic(kind: str) -> int:
    return 0x0800 + _RANK[kind]  # 0x08: unsigned bytes


def _names(split: str, kind: str) -> tuple[str, str]:
    stem, end = f'{_STEMS[split]}-{kind}', f'idx{_RANK[kind]}-ubyte'
    return f'{stem}-{end}', f'{stem}.{end}'


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    if path.suffix != '.gz':
        return content
    if content[:2] != b'\x1f\x8b':
        raise UserError(f'{path} is not gzip-compressed: rename it without .gz, or get it again')
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise UserError(f'{path} is truncated (gzip): copy or download it again') from error
    except (OSError, zlib.error) as error:
        raise UserError(f'{path} is damaged (gzip: {error}): copy or download it again') from error
