"""How are the processes of one size started, asked and ended? What they run: scale_child.py."""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from parallel_train.errors import Diverged, UserError

_LAST = 4000  # characters of the log that are shown of a process that failed
_SECONDS_TO_END = 30.0


class Group:
    """The processes of one size; all are told the same, and process 0 answers for them.

    Args:
      request: what each is to do; see `scale_child.main`.
      num_processes: how many.
      environments: of each, where it differs from ours.
    """

    def __init__(
        self,
        request: dict[str, Any],
        num_processes: int = 1,
        environments: tuple[dict[str, str], ...] = (),
    ):
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs = [tempfile.TemporaryFile('w+', errors='replace') for _ in range(num_processes)]
        self._begun = [b''] * num_processes  # an answer without its end
        request = {**request, 'num_processes': num_processes, 'coordinator': _free_address()}
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH')]))
        for index, log in enumerate(self._logs):
            own = environments[index] if environments else {}
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, '-m', 'parallel_train.scale_child'],
                    env={**os.environ, 'PYTHONPATH': path, 'TF_CPP_MIN_LOG_LEVEL': '2', **own},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                )
            )
            self._tell(index, {**request, 'process_id': index})

    def ready(self) -> dict[str, Any]:
        """Returns what they say once they are compiled and warm.

        Raises:
          UserError, Diverged: theirs.
        """
        return self._answer('ready')

    def turn(self, backwards: bool) -> dict[str, Any]:
        """Returns what they measure now."""
        for index in range(len(self._processes)):
            self._tell(index, {'backwards': backwards})
        return self._answer('turn')

    def __enter__(self) -> Group:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Lets the processes end well, or ends them at once if something went wrong."""
        self._kill() if error else self._close()

    def _close(self) -> None:
        """Lets them end, and ends them."""
        for process in self._processes:
            assert process.stdin
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._drop()

    def _kill(self) -> None:
        """Ends them at once: nobody is left behind when something went wrong."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._drop()

    def _drop(self) -> None:
        for process in self._processes:
            assert process.stdin and process.stdout
            process.stdin.close()
            process.stdout.close()
        for log in self._logs:
            log.close()

    def _tell(self, index: int, message: dict[str, Any]) -> None:
        stdin = self._processes[index].stdin
        assert stdin
        try:
            stdin.write(json.dumps(message).encode() + b'\n')
        except BrokenPipeError:
            self._fail(index)

    def _answer(self, what: str) -> dict[str, Any]:
        """Waits for all of them, so that one that ends is noticed while the others wait for it."""
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for index, process in enumerate(self._processes):
                assert process.stdout
                selector.register(process.stdout, selectors.EVENT_READ, index)
            while len(answers) < len(self._processes):
                for key, _ in selector.select():
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        self._fail(key.data)
                    self._begun[key.data] += data
                    line, end, rest = self._begun[key.data].partition(b'\n')
                    if end:
                        self._begun[key.data] = rest
                        answers[key.data] = json.loads(line)
                        selector.unregister(key.fileobj)
                        _raise(answers[key.data])
        return answers[0][what]

    def _fail(self, index: int) -> None:
        code = self._processes[index].wait()
        self._logs[index].seek(0)
        raise RuntimeError(
            f'process {index} that measures ended with code {code}:\n{self._logs[index].read()[-_LAST:]}'
        )


def _raise(answer: dict[str, Any]) -> None:
    for kind, error in (('error', UserError), ('diverged', Diverged)):
        if kind in answer:
            raise error(answer[kind])


def gpus_of_each(num_processes: int, num_devices: int) -> tuple[dict[str, str], ...]:
    """Returns the environments in which each process sees its share of this machine's NVIDIA GPUs."""
    named = os.environ.get('CUDA_VISIBLE_DEVICES')
    names = [n for n in named.split(',') if n] if named else [str(i) for i in range(num_devices)]
    each = num_devices // num_processes
    return tuple(
        {'CUDA_VISIBLE_DEVICES': ','.join(names[i * each : (i + 1) * each])} for i in range(num_processes)
    )


def _free_address() -> str:
    with socket.create_server(('127.0.0.1', 0)) as server:
        return f'127.0.0.1:{server.getsockname()[1]}'
