"""What may a path be? A folder that this machine's file systems know, or objects under gs://BUCKET/NAME."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any, cast

from parallel_train.errors import UserError

# Orbax and TensorStore write checkpoints to this one, which also can create an object only if it is absent.
_SCHEME = 'gs'
_NAME = re.compile(r'gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[^*?\[\]#\x00-\x1f]*)?$')


def opened(field: str, path: str | os.PathLike[str]) -> Path:
    """Returns the path that a flag gives: a `Path`, or for `gs://` what `etils.epath` makes of it.

    That has the methods of a `Path`; what an object store does otherwise, objects.py knows.

    Raises:
      UserError: another store, a name that is none, no such home, or `gcsfs` is missing; `field` is the flag.
    """
    text = os.fspath(path)
    scheme = re.match(r'([A-Za-z][\w+.-]+)://', text)
    if not scheme:
        if text.startswith(f'{_SCHEME}:/'):
            raise UserError(
                f'{field}={text!r}: is not gs://BUCKET/NAME (pathlib makes one slash of two: give a string)'
            )
        return expanded(field, text)
    if scheme[1] != _SCHEME:
        raise UserError(
            f'{field}={text!r}: {scheme[1]}:// is not a store that a run can rely on; use gs://BUCKET/NAME, '
            'or a folder'
        )
    if not _NAME.match(text) or '..' in text.split('/'):
        raise UserError(f'{field}={text!r}: is not gs://BUCKET/NAME')
    if importlib.util.find_spec('gcsfs') is None:
        raise UserError(f"{field}={text!r}: needs gcsfs; pip install 'parallel-train[gcs]'")
    return _remote(text)


def opened_here(field: str, path: str | os.PathLike[str]) -> Path:
    """Like `opened`, for what must be a folder; raises UserError for anything else."""
    folder = opened(field, path)
    if is_remote(folder):
        raise UserError(f'{field}={str(folder)!r}: must be a folder here; name one')
    return folder


def expanded(field: str, path: str | os.PathLike[str]) -> Path:
    """Returns the local path that a flag gives; shells leave the `~` of `--workdir=~/run` to the program.

    Raises:
      UserError: there is no such home; `field` is the flag's name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f'{field}={str(path)!r}: there is no such home folder; write the path in full'
        ) from error


def is_remote(path: Path) -> bool:
    """Whether `path` names objects of a store."""
    return not isinstance(path, Path)


def absolute(path: Path) -> Path:
    """Returns `path` as it is found from anywhere."""
    return path if is_remote(path) else path.resolve()


def store_of(path: Path) -> Any:
    """Returns the `fsspec` file system of a remote path."""
    import fsspec

    return fsspec.filesystem(str(path).partition(':')[0])


def _remote(text: str) -> Path:
    # Else epath, in Orbax too, would use TensorFlow's file system, which takes seconds to import.
    os.environ.setdefault('EPATH_USE_TF', 'false')
    from etils import epath
    from fsspec.config import conf

    # What another process has written is seen at once, not when a listing expires.
    conf.setdefault('gcs', {}).setdefault('use_listings_cache', False)
    return cast(Path, epath.Path(text))
