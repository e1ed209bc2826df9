"""Is a checkpoint damaged, or can it not be read just now?

Damage is what checksums or parsing show, or that something is not there. Where files cannot be opened, memory
is short, or a disk or a store does not answer, nothing is known of what was saved. And what does an error
say, in a line?
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax

Content = TypeVar('Content')
_PAUSE = 1.0  # seconds before the second try; TensorStore by itself tries a store for longer
_NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_RESOURCES = (MemoryError, ImportError, jax.errors.JaxRuntimeError)
# How the messages of TensorStore's errors begin, which are all of one type; UNKNOWN stands for EIO too.
_STATUS = re.compile(
    r'(ABORTED|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|'
    r'UNKNOWN)\b'
)
# What follows in them is of use to those alone who debug TensorStore.
_FOR_DEBUGGING = re.compile(r'\. See full TensorStore| \[(?:tensorstore_spec|source locations)(?:\[\d+\])?=')
_CLIENTS = ('aiohttp', 'gcsfs', 'google', 'requests', 'urllib3')  # of object stores


class Damaged(Exception):
    """A checkpoint that cannot be read, or does not hold what was saved."""


def read(what: str, reading: Callable[[], Content]) -> Content:
    """Returns what `reading` gives; tried once more where that may help.

    Raises:
      Damaged: it cannot, whenever it is tried.
      OSError: it could not, twice, which says nothing of `what`.
    """
    for last in (False, True):
        try:
            return reading()
        except Exception as error:  # of many kinds, from Orbax and TensorStore
            if not _may_pass(error):
                raise Damaged(first_line(error)) from error
            if last:
                raise OSError(
                    f'{what} cannot be read ({first_line(error)}), which does not mean that it is damaged: '
                    'it is left as it is. The same command tries again'
                ) from error
            time.sleep(_PAUSE)
    raise AssertionError


def _may_pass(failure: BaseException) -> bool:
    """Whether an error, or what led to it, is one of resources, input or output, not of what is read."""
    for error in _led_to(failure):
        if isinstance(error, OSError) and not isinstance(error, _NOT_THERE):
            return True
        if isinstance(error, _RESOURCES) or _STATUS.match(str(error)):
            return True
        if type(error).__module__.partition('.')[0] in _CLIENTS and getattr(error, 'code', None) != 404:
            return True
    return False


def _led_to(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what led to it, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def full_disk(failure: BaseException, folder: Path) -> str:
    """Returns that the disk of `folder` has no room, if that is what an error of writing says; else ''."""
    for error in _led_to(failure):
        no_space = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if no_space or os.strerror(errno.ENOSPC) in str(error):
            return f'the disk of {folder} has no room left'
    return ''


def first_line(error: Exception) -> str:
    """Returns an error's message in a line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _FOR_DEBUGGING.split(line)[0][:300]
