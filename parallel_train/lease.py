"""Who may write to a workdir in an object store, which has no locks? The holder of its latest lease.

A lease is an object with a number, created only if it is absent, so that of two that want the next one gets
it. Its holder rewrites it every few seconds; once it was not for a term, by the store's own clock, the next
number may be taken. Leases are never deleted: a number that came twice could be held twice.

What that cannot promise: a holder that was suspended for longer than a term may still write for up to a
second after it wakes, before it notices that its lease is void and ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parallel_train.errors import UserError
from parallel_train.paths import store_of

_TERM = 60.0  # seconds after the last renewal from when on a lease is void
_RENEW = 10.0  # seconds between two renewals
_LOOK = 1.0  # seconds between two looks: of who waits, and of the holder at its own clock
_RELEASED = 'released '


@contextlib.contextmanager
def held(folder: Path, lost: Callable[[str], None]) -> Iterator[str]:
    """Takes the next lease in `folder` and renews it until the end; yields who holds it, in words.

    Waits for one whose holder shows no sign of life until it is void, for up to a term.

    Args:
      folder: of the leases.
      lost: ends the process, with a message; called in a thread once the lease is, or may be, another's.

    Raises:
      UserError: the latest is another's, who renews it.
    """
    store = store_of(folder)
    owner = f'process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}\n'
    since = [time.monotonic()]
    mine = _take(store, str(folder), owner, since)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_RENEW):
            start = time.monotonic()
            try:
                latest = _leases(store, str(folder))[-1]
                taken_by = '' if latest == mine else _content(store, latest).strip()
                if latest == mine:
                    store.pipe_file(mine, owner.encode())
                    since[0] = start
            except Exception:  # no answer: `watch` ends the run if that lasts
                continue
            if taken_by:
                lost(f'workdir: its lease was taken by {taken_by}')
                return

    def watch() -> None:
        while not ended.wait(_LOOK):
            silent = time.monotonic() - since[0]
            if silent > _TERM - _RENEW:
                lost(f'workdir: its lease was not renewed for {silent:.0f} s, so another job may have it')
                return

    threads = [threading.Thread(target=work, name='lease', daemon=True) for work in (renew, watch)]
    for thread in threads:
        thread.start()
    try:
        yield owner
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=_RENEW)
        with contextlib.suppress(Exception):  # void after a term
            store.pipe_file(mine, (_RELEASED + owner).encode())


def _take(store: Any, folder: str, owner: str, since: list[float]) -> str:
    """Returns the name of the lease that `owner` now holds, since the time `since`."""
    while True:
        leases, number = _leases(store, folder), 1
        if leases:
            _wait_until_void(store, folder, leases[-1])
            number += int(leases[-1].rpartition('/')[2])
        mine = f'{folder}/{number:06}'
        since[0] = time.monotonic()
        try:
            store.pipe_file(mine, owner.encode(), mode='create')
        except FileExistsError:
            if _content(store, mine) != owner:  # which it is where the answer to a first try was lost
                continue  # another was faster
        return mine


def _wait_until_void(store: Any, folder: str, lease: str) -> None:
    renewed, told = store.modified(lease), False
    while True:
        content, last = _content(store, lease), store.modified(lease)
        if content.startswith(_RELEASED):
            return
        if last != renewed:
            raise UserError(
                f'workdir={folder.rpartition("/")[0]!r}: another job runs there ({content.strip()}); wait '
                'for it, stop it, or name another workdir'
            )
        left = _TERM - (_now(store, folder) - last).total_seconds()
        if left < 0:
            return
        if not told:
            logging.getLogger(__name__).info(
                'the workdir is held by %s; waiting up to %.0f s for a sign of life', content.strip(), left
            )
            told = True
        time.sleep(_LOOK)


def _leases(store: Any, folder: str) -> list[str]:
    """Returns the names of all leases, the latest last."""
    try:
        names = store.ls(folder, detail=False)
    except FileNotFoundError:
        return []
    names = [name.rpartition('/')[2] for name in names]
    return [f'{folder}/{name}' for name in sorted(name for name in names if name.isdigit())]


def _content(store: Any, lease: str) -> str:
    return bytes(store.cat_file(lease)).decode()


def _now(store: Any, folder: str) -> Any:
    """Returns the time by the store's clock: nothing depends on those of the hosts."""
    clock = f'{folder}/clock-{uuid.uuid4().hex}'
    store.pipe_file(clock, b'')
    try:
        return store.modified(clock)
    finally:
        store.rm_file(clock)
