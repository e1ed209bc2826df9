"""Where may files be written, and how, so that nobody meets half of them?

Paths of an object store are taken too, where the answer is that of objects.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from parallel_train import objects
from parallel_train.errors import UserError
from parallel_train.paths import is_remote

# What a file system without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def check_writable(field: str, folder: Path) -> None:
    """Checks that `folder` can be written, or made where it is not there yet. Leaves nothing behind.

    Raises:
      UserError: it cannot; `field` is the flag that names it.
    """
    if is_remote(folder):
        return objects.check_store(field, folder)
    try:
        existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        if existing.is_dir():
            tempfile.TemporaryFile(dir=existing).close()
            return None
        reason = f'{existing} is not a folder'
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(f'{field}={str(folder)!r}: cannot be written ({reason}); name another')


def check_room(what: str, folder: Path, needed: int) -> None:
    """Raises UserError if the disk of `folder` has fewer free bytes than the `needed` ones."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f'{what} needs {needed / 1e6:,.1f} MB in {folder}, where {free / 1e6:,.1f} MB are free: '
            'make room or choose another --data_dir'
        )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that readers see the old content or the new one, whatever happens."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        return objects.write(path, data)
    handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def move_folder(path: Path, target: Path) -> None:
    """Moves a folder to `target`, in place of what is there."""
    if is_remote(path):
        return objects.move(path, target)
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(path, target)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Holds the lock file `path`; the kernel lets go of it however the process ends.

    Yields True, or False on a file system without locks, where nobody may assume to be alone. The
    file is gone afterwards.

    Raises:
      UserError: it is a link.
    """
    while True:
        with open_lock(path, str(path)) as file:
            held = _wait_for_lock(file.fileno(), path)
            if held and not _is_current(file.fileno(), path):
                continue  # the holder before us removed the file: wait at the new one
            try:
                yield held
            finally:
                if held:
                    path.unlink(missing_ok=True)
            return


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Growing:
    """A file that is appended to. What the disk does not take is kept in memory and tried again later.

    Kept until it is on the disk itself: where an fsync fails, the kernel forgets what it could not write, and
    the next one succeeds without it (Rebello et al. 2020, "Can applications recover from fsync failures?").
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, 'ab', buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)  # of what is whole
        self._synced = self._size  # of what is on the disk itself
        self._kept: list[bytes] = []  # what comes after it
        self._written = 0  # how much of that is in the file

    def append(self, data: bytes) -> str:
        """Writes `data` after what waits; returns why the disk does not take it, '' if it does.

        Raises:
          FileNotFoundError: the file was removed.
        """
        self._kept.append(data)
        return self.flush()

    def flush(self) -> str:
        """Writes what waits; see `append`."""
        if not self._path.exists():  # else it would go where nobody finds it
            raise FileNotFoundError(f'{self._path} was removed during the run')
        try:
            if self._file.seek(0, os.SEEK_END) > self._size:
                self._file.truncate(self._size)
            data = b''.join(self._kept[self._written :])
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)  # half a line, or record
            return error.strerror or str(error)
        self._size = self._file.seek(0, os.SEEK_END)
        self._written = len(self._kept)
        return ''

    def sync(self) -> str:
        """Returns once all is on the disk itself; see `append`."""
        problem = self.flush()
        if problem:
            return problem
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._size, self._written = self._synced, 0
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            return error.strerror or str(error)
        self._synced, self._written = self._size, 0
        self._kept.clear()
        return ''

    def close(self) -> None:
        """Closes the file, with whatever the disk takes."""
        with contextlib.suppress(OSError):
            self.sync()
        self._file.close()


def growing(path: Path) -> Growing | objects.Rewritten:
    """Opens what is appended to; made if need be."""
    return objects.Rewritten(path) if is_remote(path) else Growing(path)


def open_lock(path: Path, name: str) -> TextIO:
    """Opens a lock file, made if need be; not through a link, whose target may be anybody's.

    Raises:
      UserError: it is one; `name` is what the message calls it.
    """

    def no_link(file: str, flags: int) -> int:
        return os.open(file, flags | getattr(os, 'O_NOFOLLOW', 0), 0o666)

    try:
        return open(path, 'a+', opener=no_link)
    except OSError as error:
        if not path.is_symlink():
            raise
        raise UserError(
            f'{name} is a link, which this program neither makes nor follows; remove it, or name another '
            'folder'
        ) from error


def lock(descriptor: int, wait: bool = False) -> bool:
    """Locks an open file for this process; False on a file system without locks.

    Raises:
      BlockingIOError: another process holds it, and we are not to `wait`.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _wait_for_lock(descriptor: int, path: Path) -> bool:
    try:
        return lock(descriptor)
    except BlockingIOError:
        logging.getLogger(__name__).info('waiting for another process that holds %s', path)
        return lock(descriptor, wait=True)


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
