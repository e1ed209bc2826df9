"""What is said where a library ends the process by abort()?"""

from __future__ import annotations

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_abort(last_words: Callable[[], None]) -> Iterator[None]:
    """Calls `last_words` where C or C++ code aborts the process, which goes on to abort if that returns.

    Python's own handlers run in the main thread, between two instructions, and so not before the end;
    this one runs in the thread that aborts, whichever that is.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        libc.signal(number, None)  # SIG_DFL: another abort, from within, ends the process
        last_words()

    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)
