"""How does a process say where it stood as it ends at once? And what ends one that cannot say anything?"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import sys
import time

_MARGIN = 60.0  # seconds that the lifeline, which knows what to say, has before the timer
_EVERY = 1.0  # seconds between two times that the timer is set: each starts a thread


def say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed pipe must not stop what follows
        print(line, file=sys.stderr, flush=True)


def say_stacks() -> None:
    say('the Python stacks of all threads:')
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        faulthandler.dump_traceback(sys.stderr, all_threads=True)


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
