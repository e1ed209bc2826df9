"""How does text become rows of bytes? A dataset: `config.dataset = 'parallel_train.text:folder'`."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from parallel_train.errors import UserError
from parallel_train.paths import opened_here

LENGTH = 128  # bytes in a row of `folder`
_TEST_PART = 10  # one file in so many is for evaluation
_log = logging.getLogger(__name__)


def folder(split: str, data_dir: Path) -> dict[str, np.ndarray]:
    """The text files under `data_dir`, in rows of 128 bytes; see `rows_of_folder`."""
    return {'tokens': rows_of_folder(opened_here('data_dir', data_dir), split, LENGTH)}


def rows_of_folder(root: Path | str, split: str, length: int) -> np.ndarray:
    """Returns the bytes of the text files under a folder, uint8 [n, length], file after file by name.

    If `root/train` and `root/test` are folders, they are the splits. Otherwise a file belongs to the split
    'test' if the CRC-32 of its path below `root` is divisible by 10, else to 'train'. Files that hold a zero
    byte are no text: left out, with a line in the log.

    Raises:
      UserError: there is no such folder, split, or text in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f'data_dir={str(root)!r}: is no folder; name one with text files')
    if split not in ('train', 'test'):
        raise UserError(f'split {split!r}: a folder of text files has the splits train and test, whole')
    given = all((root / name).is_dir() for name in ('train', 'test'))
    texts: list[tuple[str, bytes]] = []
    others: list[tuple[str, bytes]] = []
    for path in sorted(path for path in (root / split if given else root).rglob('*') if path.is_file()):
        name = path.relative_to(root).as_posix()
        if given or (zlib.crc32(name.encode()) % _TEST_PART == 0) == (split == 'test'):
            text = path.read_bytes()
            (others if 0 in text else texts).append((name, text))
    if others:
        _log.warning(
            '%s: %d files of %r hold a zero byte, so they are no text and are left out, such as %s',
            root, len(others), split, others[0][0],
        )  # fmt: skip
    if not any(text for _, text in texts):
        raise UserError(f'data_dir={str(root)!r}: holds no text for the split {split!r}')
    return rows_of(length, (text for _, text in texts))


def rows_of(length: int, texts: Iterable[bytes]) -> np.ndarray:
    """Returns texts, one after the other, in rows: uint8 [n, length]. Zeros fill the last row."""
    joined = np.frombuffer(b'\n'.join(texts), np.uint8)
    return np.pad(joined, (0, -len(joined) % length)).reshape(-1, length)
