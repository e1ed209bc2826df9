"""How does a process end? What says where it stood, and what ends one that cannot say anything?"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import math
import os
import sys
import time
from typing import NoReturn

from parallel_train.errors import FAULT, OK

_MARGIN = 60.0  # seconds that the lifeline, which knows what to say, has before the timer
_EVERY = 1.0  # seconds between two times that the timer is set: each starts a thread


def say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed pipe must not stop what follows
        print(line, file=sys.stderr, flush=True)


def say_stacks() -> None:
    say('the Python stacks of all threads:')
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        faulthandler.dump_traceback(sys.stderr, all_threads=True)


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code, all being done; FAULT where OK cannot be, as output was lost.

    No thread is waited for: of a save whose folder could not be made, Orbax's wait for it for ten minutes.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream and not stream.closed:
                stream.flush()
        except OSError:
            code = FAULT if code == OK else code
    os._exit(code)


class Timer:
    """Ends the process, with the stacks of its threads and exit code 1, where nobody sets it again in time.

    C code that hangs and keeps Python's lock (the GIL) stops every thread that could notice; this timer is
    C code too and needs no lock. It cannot tell a process that was stopped (SIGSTOP) from one that hangs.
    """

    def __init__(self) -> None:
        self._next = 0.0

    def set(self, seconds: float) -> None:
        """To be called again within so many seconds, and a margin; for 0 and infinity, whenever one likes."""
        if not 0 < seconds < math.inf:
            self.stop()
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            faulthandler.dump_traceback_later(seconds + _MARGIN, exit=True, file=2)

    def stop(self) -> None:
        self._next = 0.0
        faulthandler.cancel_dump_traceback_later()
