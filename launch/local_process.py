"""What does one process of a local job print, and how does it end?"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

LAST_LINES = 40  # of the error that is shown at the end
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == 'linux' else None


class Output:
    """Our stdout or stderr, written in whole lines; with colours only on a terminal.

    Unbuffered, so that a signal that arrives while we write finds nothing half done.
    """

    def __init__(self, stream: TextIO) -> None:
        self.descriptor = stream.fileno()
        plain = os.environ.get('NO_COLOR') or os.environ.get('TERM') == 'dumb'
        self.colours = stream.isatty() and not plain
        self.reader_gone = False

    def prefix(self, index: int) -> bytes:
        """Returns what stands before the lines of process `index`."""
        return (f'\x1b[{31 + index % 6}m[{index}]\x1b[0m ' if self.colours else f'[{index}] ').encode()

    def write(self, lines: Sequence[bytes], prefix: bytes = b'') -> None:
        """Writes lines, or drops them where that cannot be done: a job does not end for its log."""
        data = b''.join(prefix + line + b'\n' for line in lines)
        while data and not self.reader_gone:
            try:
                data = data[os.write(self.descriptor, data) :]
            except BlockingIOError:  # somebody who shares it made it so
                select.select([], [self.descriptor], [])
            except BrokenPipeError:
                self.reader_gone = True
            except OSError:  # a full disk, a terminal that was closed
                return

    def say(self, text: str) -> None:
        """Writes a line of our own."""
        self.write([f'[local] {text}'.encode()])


class Process:
    """One process of the job, in a process group of its own, with whatever it starts."""

    def __init__(
        self, index: int, command: Sequence[str], env: dict[str, str], outputs: tuple[Output, Output]
    ) -> None:
        self.index = index
        self.code: int | None = None  # None while it runs; then as shells have it: 128 + n for signal n
        self.asked_to_end = False  # because another failed
        self.last_errors: deque[bytes] = deque(maxlen=LAST_LINES)
        self._popen = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # the terminal's Ctrl-C reaches it through us alone
            preexec_fn=_die_with(os.getpid()),
        )
        assert self._popen.stdout and self._popen.stderr
        pipes = self._popen.stdout.fileno(), self._popen.stderr.fileno()
        self.outputs = dict(zip(pipes, outputs, strict=True))  # pipe -> where its lines go
        self._errors = pipes[1]
        self._begun = dict.fromkeys(pipes, b'')  # pipe -> a line without its end
        for pipe in pipes:
            os.set_blocking(pipe, False)

    def read(self, pipe: int) -> int | None:
        """Shows the lines that came by `pipe`; returns how many bytes: 0 at its end, None if none came."""
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return None
        *lines, self._begun[pipe] = (self._begun[pipe] + data).split(b'\n')
        self._show(pipe, lines)
        return len(data)

    def _show(self, pipe: int, lines: list[bytes]) -> None:
        if pipe == self._errors:
            self.last_errors.extend(lines)
        output = self.outputs[pipe]
        output.write(lines, output.prefix(self.index))

    def send(self, number: int) -> None:
        """Signals the process and what it started; does nothing once it is reaped."""
        if self.code is None:
            try:
                os.killpg(self._popen.pid, number)
            except (ProcessLookupError, PermissionError):  # it has just ended (macOS: PermissionError)
                pass

    def has_ended(self) -> bool:
        return self.code is None and self._popen.poll() is not None

    def reap(self) -> None:
        """Ends what it left behind, shows its last words and takes its exit code."""
        self.send(signal.SIGKILL)
        for pipe in self.outputs:
            for _ in range(64):  # a pipe holds less; somebody who left the group may write for ever
                if not self.read(pipe):
                    break
            if self._begun[pipe]:
                self._show(pipe, [self._begun[pipe]])
        code = self._popen.wait()
        self.code = code if code >= 0 else 128 - code
        for stream in (self._popen.stdout, self._popen.stderr):
            assert stream
            stream.close()

    def how_it_ended(self) -> str:
        assert self.code is not None
        number = self.code - 128
        if number <= 0:
            return f'process {self.index} ended with exit code {self.code}'
        known = number in set(signal.Signals)
        name = signal.Signals(number).name if known else f'signal {number}'
        return f'process {self.index} was killed by {name}'


def _die_with(supervisor: int) -> Callable[[], None] | None:
    """Returns what a new process does before it becomes the program: tie its life to ours.

    So a SIGKILL to us ends it too. Linux alone has that; elsewhere it ends when it next writes a line.
    """
    if _libc is None:
        return None
    prctl = _libc.prctl  # looked up before the fork

    def set_death_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # we were gone before that line
            os.kill(os.getpid(), signal.SIGKILL)

    return set_death_signal
