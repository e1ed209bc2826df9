#!/usr/bin/env python3
"""How does a job of several processes run on this machine: started, watched, ended, started again?

    python launch/local.py --processes=P --devices_per_process=D [--max_restarts=N] -- COMMAND [flags]

Starts P times `python -m parallel_train COMMAND ...`, which meet on a free local port. Every line that they
write is prefixed by the process. If one fails the others are ended, its error is shown last and its exit code
is ours. Ctrl-C and SIGTERM are passed on, each process saves and exits 75; a second one kills. With
--max_restarts the job is started again after a fault or a preemption, never after a signal to us, wrong input
or divergence.
"""

from __future__ import annotations

import dataclasses
import os
import re
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from local_process import Output, Process

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (sys.executable, '-m', 'parallel_train')

OK, FAULT, USER_ERROR, DIVERGED, DOES_NOT_FIT, PREEMPTED = 0, 1, 2, 3, 4, 75
FINAL = (USER_ERROR, DIVERGED, DOES_NOT_FIT)  # the same would come of another start
FOLLOWS = (FAULT, 128 + signal.SIGABRT)  # what a process ends with when another one is gone
TOLD = re.compile(rb'error: process (\d+) .*\bfailed: ')  # the last line of one that another has told to end
GRACE = 5.0  # seconds from SIGTERM to SIGKILL for the others, once one has failed
STRAGGLE = 60.0  # seconds that the others have to end, once one has saved and gone
NUMBERS = {'processes': 1, 'devices_per_process': 1, 'max_restarts': 0}  # flag -> least value
OURS = ('coordinator', 'num_processes', 'process_id', 'devices')  # flags of the program that we give


class InputError(ValueError):
    """A mistake in the command line, said in one line."""


@dataclasses.dataclass(frozen=True)
class Options:
    processes: int
    devices_per_process: int
    max_restarts: int
    arguments: tuple[str, ...]  # the program's: its command and flags


def parse(argv: Sequence[str]) -> Options:
    """Returns what the command line `argv` (without our name) asks for; raises InputError."""
    argv = list(argv)
    if '--' not in argv:
        raise InputError('--: is missing; it stands between the flags of local.py and the command')
    cut = argv.index('--')
    numbers = {'max_restarts': 0}
    for argument in argv[:cut]:
        name, _, value = argument.removeprefix('--').partition('=')
        if not argument.startswith('--') or name not in NUMBERS:
            flags = ', '.join(f'--{known}' for known in NUMBERS)
            raise InputError(
                f'{argument}: there is no such flag here; flags: {flags}; the command follows after --'
            )
        if not (value.isascii() and value.isdigit()):
            raise InputError(f'{name}={value!r}: must be a whole number, at least {NUMBERS[name]}')
        if int(value) < NUMBERS[name]:
            raise InputError(f'{name}={value}: must be at least {NUMBERS[name]}')
        numbers[name] = int(value)
    for name in NUMBERS:
        if name not in numbers:
            raise InputError(f'{name}: is missing; give --{name}=N')
    arguments = tuple(argv[cut + 1 :])
    if not arguments or arguments[0].startswith('-'):
        raise InputError('command: is missing after --, as in: -- train --config=FILE --workdir=DIR')
    for argument in arguments:
        if argument.startswith('-') and argument.lstrip('-').partition('=')[0] in OURS:
            raise InputError(f'{argument}: follows from --processes and --devices_per_process; leave it out')
    return Options(arguments=arguments, **numbers)


def command_lines(options: Options, program: Sequence[str]) -> list[list[str]]:
    """Returns the command line of each process; they meet on a port that is free now."""
    count = options.processes
    common = [*program, *options.arguments, f'--devices={count * options.devices_per_process}']
    if count == 1:
        return [common]
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    common += [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}']
    return [[*common, f'--process_id={index}'] for index in range(count)]


def environment(options: Options, index: int) -> dict[str, str]:
    """Returns the environment of process `index`: this checkout's package, unbuffered, its share of GPUs."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    result = {**os.environ, 'PYTHONPATH': path, 'PYTHONUNBUFFERED': '1'}
    each, gpus = options.devices_per_process, visible_gpus()
    if options.processes > 1 and len(gpus) >= options.processes * each:
        result['CUDA_VISIBLE_DEVICES'] = ','.join(gpus[index * each : (index + 1) * each])
    return result


def visible_gpus() -> list[str]:
    """Returns the names of the NVIDIA GPUs that JAX may use: none if it is told to use the CPU."""
    if os.environ.get('JAX_PLATFORMS', '').startswith('cpu'):
        return []
    chosen = os.environ.get('CUDA_VISIBLE_DEVICES')
    if chosen is not None:
        return [name for name in chosen.split(',') if name]
    folder = Path('/proc/driver/nvidia/gpus')
    return [str(index) for index in range(len(list(folder.iterdir())) if folder.is_dir() else 0)]


class Supervisor:
    """Runs one start of the job after another, in one thread that waits for output, exits and signals."""

    def __init__(self) -> None:
        self.outputs = Output(sys.stdout), Output(sys.stderr)
        self.signals: list[int] = []  # that we got ourselves
        self._passed_on = 0  # how many of them
        self.processes: list[Process] = []
        self.ended: list[Process] = []  # in the order in which they did
        self.failed_at: float | None = None  # when the first ended that did not end well; monotonic seconds
        self.kill_at: float | None = None
        self._selector = selectors.DefaultSelector()
        self._wake, wakes = socket.socketpair()
        for end in (self._wake, wakes):
            end.setblocking(False)
        self._wakes = wakes  # Python writes the number of every signal to it, and keeps no reference
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes us, no more
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` leaves it
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None = None) -> None:
        self.signals.append(number)
        self._pass_on()  # from here, for the loop may be waiting for somebody to read what it writes

    def _pass_on(self) -> None:
        """Sends our first signal to all processes, once; kills them if there was another."""
        if self.processes and self._passed_on < len(self.signals):
            self._passed_on = len(self.signals)
            first = signal.SIGTERM if self.signals[0] == signal.SIGHUP else self.signals[0]
            for process in self.processes:
                process.send(first if len(self.signals) == 1 else signal.SIGKILL)

    def start(self, options: Options, program: Sequence[str]) -> None:
        """Starts all processes. Raises OSError if the system has no room for them, and leaves none."""
        self.processes, self.ended = [], []
        self._passed_on = 0
        self.failed_at = self.kill_at = None
        started: list[Process] = []
        try:
            for index, line in enumerate(command_lines(options, program)):
                started.append(Process(index, line, environment(options, index), self.outputs))
        except OSError:
            for process in started:
                process.send(signal.SIGKILL)
                process.reap()
            raise
        for process in started:
            for pipe in process.outputs:
                self._selector.register(pipe, selectors.EVENT_READ, process)
        self.processes = started
        self._pass_on()  # what came meanwhile

    def wait(self) -> Process | None:
        """Waits until all processes have ended; returns the one that decided how, None if all ended well."""
        told = False
        while len(self.ended) < len(self.processes):
            self._read(None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic()))
            self._reap()
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                self._end_others(signal.SIGKILL)
                self.kill_at = None
            if any(output.reader_gone for output in self.outputs) and not self.signals:
                self._on_signal(signal.SIGTERM)  # nobody watches any more
            if self.signals and not told:
                told = True
                name = signal.Signals(self.signals[0]).name
                self.outputs[1].say(f'{name}: passed on to all processes; a second one kills them')
        return self._cause()

    def _read(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                self._wake.recv(4096)
            elif key.data.read(key.fd) == 0:
                self._selector.unregister(key.fd)

    def _reap(self) -> None:
        ended = [process for process in self.processes if process.has_ended()]
        for process in ended:
            for pipe in process.outputs:
                if pipe in self._selector.get_map():
                    self._selector.unregister(pipe)
            process.reap()
        # Of those that ended between two looks, the ones that may have followed another come last.
        for process in sorted(ended, key=lambda process: process.code in FOLLOWS):
            self.ended.append(process)
            if process.code != OK:
                self._end_soon(STRAGGLE if process.code == PREEMPTED else GRACE)

    def _end_soon(self, seconds: float) -> None:
        """Lets the others go on for `seconds` at most; tells them, unless they are saving."""
        now = time.monotonic()
        if self.failed_at is None:
            self.failed_at = now
        if seconds == GRACE:
            self._end_others(signal.SIGTERM)
        self.kill_at = min(self.kill_at or now + seconds, now + seconds)

    def _end_others(self, number: int) -> None:
        for process in self.processes:
            if process.code is None and not (process.asked_to_end and number == signal.SIGTERM):
                process.asked_to_end = True
                process.send(number)

    def _cause(self) -> Process | None:
        """Returns the process whose end was no consequence of another's.

        Exit codes of `FINAL` are a process's own verdict, however late it comes. A process that ends because
        it was told of another's failure may be quicker than that one, but says so.
        """
        final = [process for process in self.ended if process.code in FINAL]
        faults = [p for p in self.ended if p.code not in (OK, PREEMPTED) and not p.asked_to_end]
        preempted = [process for process in self.ended if process.code == PREEMPTED]
        first = next(iter(final + faults + preempted), None)
        told = TOLD.match(first.last_errors[-1]) if first and first.last_errors else None
        if told and int(told[1]) < len(self.processes):
            other = self.processes[int(told[1])]
            if other.code in (FAULT, *FINAL):
                return other
        return first


def supervise(options: Options, program: Sequence[str]) -> int:
    """Runs the job to its end, through the restarts that it may have; returns the exit code."""
    supervisor = Supervisor()
    say = supervisor.outputs[1].say
    left = options.max_restarts
    while True:
        supervisor.start(options, program)
        cause = supervisor.wait()
        if len(supervisor.signals) > 1:
            return 128 + supervisor.signals[-1]
        if cause is None:
            return OK
        assert cause.code is not None and supervisor.failed_at is not None
        if supervisor.signals or cause.code in FINAL or not left:
            _show(cause, supervisor)
            return cause.code
        left -= 1
        lost = time.monotonic() - supervisor.failed_at
        more = f'{left} restart{"" if left == 1 else "s"} left'
        say(f'{cause.how_it_ended()}; starting again: {more}, {lost:.1f} s lost since it ended')


def _show(cause: Process, supervisor: Supervisor) -> None:
    """Says who ended the job, and shows its error last."""
    output = supervisor.outputs[1]
    stopped = (
        {128 + number for number in (*supervisor.signals, signal.SIGTERM)} if supervisor.signals else set()
    )
    if cause.code == PREEMPTED or cause.code in stopped:
        output.say(f'{cause.how_it_ended()}; the same command continues from the last checkpoint, if any')
    elif not cause.last_errors:
        output.say(f'{cause.how_it_ended()}; it wrote nothing to stderr')
    else:
        output.say(f'{cause.how_it_ended()}; the last lines of its stderr:')
        output.write(list(cause.last_errors))


def main(argv: Sequence[str], program: Sequence[str] = PROGRAM) -> int:
    """Runs the command line `argv` (without our name), returns the exit code; tests give another program."""
    if not argv or argv[0] in ('--help', '-h'):
        print(__doc__, end='')
        return OK if argv else USER_ERROR
    try:
        return supervise(parse(argv), program)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f'error: cannot start {program[0]}: {error}', file=sys.stderr)
        return FAULT


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
