"""How is a line told, wherever it goes? A run outlives its log, on a full disk or a terminal that is gone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def surviving() -> Iterator[None]:
    """What is printed within is lost where the output does not take it, and ends nothing.

    Raises:
      BrokenPipeError: whoever read it went away, as `| head` does.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass


def print_flushed(line: str, stream: TextIO | None = None) -> None:
    """Prints a line, on stdout if no `stream` is given; see `surviving`."""
    with surviving():
        print(line, file=stream, flush=True)


def drop_what_waits() -> None:
    """Gives up what stdout and stderr did not take, for which Python would exit with code 120, its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream and not stream.closed:
                stream.flush()
        except BrokenPipeError:
            pass
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
