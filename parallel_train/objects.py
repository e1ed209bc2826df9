"""How is an object store written, which has no appends and no renames?

An object appears whole or not at all; what a file would be appended to is written anew.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from pathlib import Path

from parallel_train.errors import UserError
from parallel_train.paths import store_of

_EVERY = 30.0  # seconds between two writings of a growing object; a store takes about one a second


def check_store(field: str, folder: Path) -> None:
    """Proves, with an object that it deletes again, that the store does what a run relies on.

    Raises:
      UserError: it cannot be read or written, or gives no more than the semblance of a lock.
    """
    store, probe = store_of(folder), f'{folder}/.probe-{uuid.uuid4().hex}'
    try:
        _check_bucket(str(folder).split('/')[2])
        store.pipe_file(probe, b'first', mode='create')
        try:
            with contextlib.suppress(FileExistsError):
                store.pipe_file(probe, b'second', mode='create')
            kept = store.cat_file(probe) == b'first'
            seen = probe.partition('://')[2] in store.ls(str(folder), detail=False)
        finally:
            store.rm_file(probe)
    except Exception as error:  # of many kinds
        raise UserError(
            f'{field}={str(folder)!r}: cannot be read and written ({reason(error)}); name another, or see to '
            'the credentials: `gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS'
        ) from error
    if not kept or not seen:
        lacking = 'shows what was just written' if kept else 'keeps an object from being created twice'
        raise UserError(f'{field}={str(folder)!r}: not certain that its store {lacking}; name another')


def _check_bucket(name: str) -> None:
    """Asks for the bucket's metadata, as Orbax does; needs the right storage.buckets.get."""
    from google.cloud import storage

    storage.Client().get_bucket(name)


def write(path: Path, data: bytes) -> None:
    """Writes an object: readers see the old content or the new one."""
    store_of(path).pipe_file(str(path), data)


def move(path: Path, target: Path) -> None:
    """Moves all objects under `path`, replacing those under `target`: copies, then deletes."""
    store = store_of(path)
    with contextlib.suppress(FileNotFoundError):
        store.rm(str(target), recursive=True)
    store.copy(str(path), str(target), recursive=True)
    store.rm(str(path), recursive=True)


class Rewritten:
    """An object in place of a file that is appended to: kept in memory, written anew now and then.

    See files.Growing, whose methods these are.
    """

    def __init__(self, path: Path):
        self._path, self._store = str(path), store_of(path)
        self._content, self._tried = bytearray(), 0.0
        with contextlib.suppress(FileNotFoundError):
            self._content += self._store.cat_file(self._path)
        self._written = len(self._content)

    def append(self, data: bytes) -> str:
        self._content += data
        return self.sync() if time.monotonic() - self._tried > _EVERY else ''

    def sync(self) -> str:
        """Returns once all is in the store; else why the store does not take it."""
        self._tried = time.monotonic()
        if self._written == len(self._content):
            return ''
        try:
            self._store.pipe_file(self._path, bytes(self._content))
        except Exception as error:
            return reason(error)
        self._written = len(self._content)
        return ''

    def close(self) -> None:
        self.sync()


def reason(error: Exception) -> str:
    """Returns in a line what a store's client says is wrong."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
