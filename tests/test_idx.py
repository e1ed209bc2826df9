"""IDX files: what is read, and which message each kind of wrong file gives."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from parallel_train import idx
from parallel_train.errors import UserError

NAMES = {
    ('train', 'images'): 'train-images-idx3-ubyte',
    ('train', 'labels'): 'train-labels-idx1-ubyte',
    ('test', 'images'): 't10k-images-idx3-ubyte',
    ('test', 'labels'): 't10k-labels-idx1-ubyte',
}


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f'>I{array.ndim}I', 0x0800 + array.ndim, *array.shape) + array.tobytes()


def pattern(count: int, start: int = 0, size: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Images that all differ, and labels that follow from them."""
    pixels = np.arange(size * size).reshape(size, size)
    numbers = np.arange(start, start + count)
    images = (pixels * (numbers[:, None, None] % 7 + 1) + numbers[:, None, None] * 13) % 256
    return images.astype(np.uint8), (numbers % 10).astype(np.uint8)


def pairs(images: np.ndarray, labels: np.ndarray) -> set[tuple[bytes, int]]:
    """What does not change with the order, which is TFDS's own in a prepared set."""
    return {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


def write_set(folder: Path, train: int = 40, test: int = 20, compress: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in {'train': pattern(train), 'test': pattern(test, 1000)}.items():
        for kind, array in (('images', images), ('labels', labels)):
            content = idx_bytes(array)
            name = NAMES[split, kind]
            if compress:
                (folder / f'{name}.gz').write_bytes(gzip.compress(content, 1))
            else:
                (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize('compress', [True, False])
def test_reads_what_was_written(tmp_path: Path, compress: bool) -> None:
    files = idx.load(write_set(tmp_path, compress=compress))
    assert files is not None
    for split, (images, labels) in {'train': pattern(40), 'test': pattern(20, 1000)}.items():
        np.testing.assert_array_equal(files.splits[split][0], images)
        np.testing.assert_array_equal(files.splits[split][1], labels)
        assert files.splits[split][0].dtype == files.splits[split][1].dtype == np.uint8


def test_checksums_are_of_the_content_not_of_its_compression(tmp_path: Path) -> None:
    packed = idx.load(write_set(tmp_path / 'gz'))
    plain = idx.load(write_set(tmp_path / 'plain', compress=False))
    assert packed is not None and plain is not None
    assert packed.sha256 == plain.sha256
    expected = hashlib.sha256(idx_bytes(pattern(40)[0])).hexdigest()
    assert packed.sha256['train-images-idx3-ubyte'] == expected
    assert sorted(packed.sha256) == sorted(NAMES.values())


def test_other_spelling_of_the_names(tmp_path: Path) -> None:
    write_set(tmp_path, compress=False)
    for name in NAMES.values():
        (tmp_path / name).rename(tmp_path / name.replace('-idx', '.idx'))
    files = idx.load(tmp_path)
    assert files is not None and len(files.splits['train'][0]) == 40


def test_no_file_at_all_is_no_set(tmp_path: Path) -> None:
    (tmp_path / 'readme.txt').write_text('nothing here')
    assert idx.load(tmp_path) is None


def test_missing_file_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / 't10k-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(UserError, match='missing: t10k-labels-idx1-ubyte'):
        idx.load(tmp_path)


IMAGES = idx_bytes(pattern(40)[0])
LABELS = idx_bytes(pattern(40)[1])
BAD = {
    'truncated': ('images', gzip.compress(IMAGES[:-5]), 'is truncated'),
    'trailing': ('images', gzip.compress(IMAGES + b'x'), 'trailing bytes'),
    'cut header': ('images', gzip.compress(IMAGES[:9]), 'truncated within its header'),
    'no header': ('labels', gzip.compress(b'ab'), 'truncated'),
    'swapped images': ('images', gzip.compress(LABELS), 'holds labels .* swapped'),
    'swapped labels': ('labels', gzip.compress(IMAGES), 'holds images .* swapped'),
    'other type': ('images', gzip.compress(b'\0\0\x0d\3' + IMAGES[4:]), 'is not an IDX file'),
    'not gzip': ('images', IMAGES, 'is not gzip'),
    'cut gzip': ('images', gzip.compress(IMAGES)[:-100], r'is truncated \(gzip\)'),
    'bad gzip': ('images', gzip.compress(IMAGES)[:20] + b'\xff' * 300, 'is damaged|truncated'),
    'label 10': (
        'labels',
        gzip.compress(idx_bytes(np.array([1] * 39 + [10], np.uint8))),
        r'label 10 of example 39 is outside 0\.\.9',
    ),
    'empty': ('labels', gzip.compress(idx_bytes(np.zeros(0, np.uint8))), 'is empty'),
    'unequal': ('labels', gzip.compress(idx_bytes(pattern(39)[1])), '40 images .* 39 labels'),
    'other size': ('images', gzip.compress(idx_bytes(pattern(40, size=32)[0])), '32, 32.*28, 28'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_file(tmp_path: Path, case: str) -> None:
    kind, content, message = BAD[case]
    write_set(tmp_path)
    path = tmp_path / f'{NAMES["train", kind]}.gz'
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        idx.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
