"""How do the processes of a job leave each other word? In the key-value store of JAX's coordinator."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from parallel_train import processes


class NoAnswer(Exception):
    """The store does not answer."""


class Store:
    """A part of the store, under a name of its own. Nothing here waits for a value."""

    def __init__(self, client: Any, root: str):
        self._client, self._root = client, root

    def get(self, key: str) -> str | None:
        """Returns the value, None if there is none yet; raises NoAnswer."""
        try:
            return self._client.key_value_try_get(f'{self._root}/{key}')
        except Exception as error:  # of jaxlib's own kind
            if 'NOT_FOUND' in str(error):
                return None
            raise NoAnswer from error

    def put(self, key: str, value: str, again: bool = False) -> None:
        """Sets a value; the first word stands, but for what may be said `again`. Raises NoAnswer."""
        try:
            self._client.key_value_set(f'{self._root}/{key}', value, allow_overwrite=again)
        except Exception as error:
            if 'ALREADY_EXISTS' not in str(error):
                raise NoAnswer from error


def open_store(root: str) -> Store | None:
    """Returns the job's store; None for a process on its own."""
    client = processes.client()
    return None if client is None else Store(client, root)


def answers(talk: Callable[[], None], seconds: float) -> bool:
    """Whether the store answered all of `talk` in that time; a network that is cut would never."""
    ended, heard = threading.Event(), [False]

    def until_no_answer() -> None:
        with contextlib.suppress(NoAnswer):
            talk()
            heard[0] = True
        ended.set()  # where there is no answer, too: nothing more is to be waited for

    threading.Thread(target=until_no_answer, daemon=True).start()
    ended.wait(seconds)
    return heard[0]
