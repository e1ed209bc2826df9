"""Which signals came? Heard at once, also while the main thread is inside XLA."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

_HEARD = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Takes SIGTERM and Ctrl-C over, from `open` to `close`; opened in another thread than the main, none."""

    def open(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # Python's own handlers run in the main thread, between two instructions; the byte in the pipe is
            # written by C code.
            self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in _HEARD:
                self._handlers[number] = signal.signal(number, lambda *_: None)

    def received(self) -> list[int]:
        """Returns the numbers of those that came since the last call; in any thread."""
        try:
            return [number for number in os.read(self._read, 16) if number in self._handlers]
        except BlockingIOError:
            return []

    def close(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            signal.set_wakeup_fd(self._old_fd)
        os.close(self._read)
        os.close(self._write)
