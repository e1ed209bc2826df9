"""How does a prepared set come from an object store to this machine? Copied whole, once.

Records are read by index and decoded arrays are memory-mapped, which takes local files. The copy lies in the
user's cache, in a folder whose name follows from the objects' names, sizes and checksums: objects that
change make another copy.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from parallel_train import machine
from parallel_train.errors import UserError
from parallel_train.files import check_room, exclusive
from parallel_train.objects import reason
from parallel_train.paths import store_of

_log = logging.getLogger(__name__)


def fetch(base: str, data_dir: Path) -> Path:
    """Returns a local data_dir with the set `base` of a remote one, copied now if it never was.

    Raises:
      UserError: the store cannot be read, what came is not what lies there, or there is no room.
    """
    source = f'{data_dir}/{base}'
    try:
        found = store_of(data_dir).find(source, detail=True)
    except Exception as error:  # of many kinds
        raise _unreadable(data_dir, reason(error)) from error
    objects = {
        name: info for name, info in sorted(found.items()) if '/decoded/' not in name and info['size'] > 0
    }
    known = [(name, info['size'], info.get('crc32c')) for name, info in objects.items()]
    root = machine.cache_dir() / 'fetched'
    folder = root / f'{base}-{hashlib.sha256(repr(known).encode()).hexdigest()[:12]}'
    if not objects:
        return folder  # which is not there: nothing is prepared
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f'.{folder.name}.lock') as alone:
        for leftover in root.glob(f'.{folder.name}-*.part') if alone else ():
            shutil.rmtree(leftover, ignore_errors=True)
        if not folder.is_dir():
            size = sum(info['size'] for info in objects.values())
            check_room(f'the copy of {source}', root, size)
            _log.info('copying %s, once: %.1f MB into %s', source, size / 1e6, folder)
            _copy(data_dir, objects, folder)
    return folder


def _copy(data_dir: Path, objects: dict[str, Any], folder: Path) -> None:
    store, top = store_of(data_dir), str(data_dir).partition('://')[2].rstrip('/')
    part = Path(tempfile.mkdtemp(prefix=f'.{folder.name}-', suffix='.part', dir=folder.parent))
    try:
        for name, info in objects.items():
            target = part / name.removeprefix(f'{top}/')
            if not target.is_relative_to(part) or '..' in target.parts:
                raise _unreadable(data_dir, f'{name} is not a name for a file')
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                store.get_file(name, str(target))
            except Exception as error:
                raise _unreadable(data_dir, f'{name}: {reason(error)}') from error
            if target.stat().st_size != info['size'] or _crc32c(target) != info.get('crc32c'):
                raise _unreadable(data_dir, f'{name} did not arrive as it lies there')
        part.chmod(0o755)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _crc32c(path: Path) -> str:
    """Returns the checksum that the store keeps of every object: base64 of CRC-32C, big-endian."""
    import google_crc32c

    checksum = google_crc32c.Checksum()
    with open(path, 'rb') as file:
        while block := file.read(2**20):
            checksum.update(block)
    return base64.b64encode(checksum.digest()).decode()


def _unreadable(data_dir: Path, why: str) -> UserError:
    return UserError(
        f'data_dir={str(data_dir)!r}: cannot be read ({why}); name another, or see to the credentials: '
        '`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS'
    )
