"""Training jobs under launch/local.py: to their end, through the death of a process, Ctrl-C, mistakes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import NUM_STEPS, ROOT, Job, Result, checkpoint_steps
from tests.test_processes import alone, assert_same_bits, long_job, saved, tree_job  # noqa: F401, fixtures

# ruff: noqa: F811, fixtures again
PATIENCE = 300  # seconds for anything, on a machine that does other work too


class Supervisor:
    """A job of 2 processes with 2 devices each."""

    def __init__(self, folder: Path, job: Job, workdir: Path, *more: str, restarts: int = 0):
        folder.mkdir(exist_ok=True)
        self._outputs = folder / 'stdout', folder / 'stderr'
        arguments = [argument for argument in job.train(workdir) if not argument.startswith('--devices')]
        flags = ['--processes=2', '--devices_per_process=2', f'--max_restarts={restarts}']
        self.popen = subprocess.Popen(
            [sys.executable, ROOT / 'launch' / 'local.py', *flags, '--', *arguments, *more],
            env=job.env,
            stdin=subprocess.DEVNULL,
            stdout=open(self._outputs[0], 'w'),
            stderr=open(self._outputs[1], 'w'),
            start_new_session=True,
        )

    def wait_until(self, came: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not came():
            assert time.monotonic() < deadline and self.popen.poll() is None, self.result(running=True)
            time.sleep(0.01)

    def processes(self) -> dict[int, psutil.Process]:
        """Returns the job's processes by their number."""
        found = {}
        for child in psutil.Process(self.popen.pid).children():
            number = re.search(r'--process_id=(\d)', ' '.join(child.cmdline()))
            if number:
                found[int(number[1])] = child
        return found

    def result(self, running: bool = False) -> Result:
        code = 0 if running else self.popen.wait(PATIENCE)
        return Result(code, *(output.read_text() for output in self._outputs))


Start = Callable[..., Supervisor]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Start]:
    """Starts a job under the supervisor; its processes end with it, and it with the test."""
    started: list[Supervisor] = []

    def supervise(job: Job, workdir: Path, *more: str, restarts: int = 0) -> Supervisor:
        folder = tmp_path / f'supervisor{len(started)}'
        started.append(Supervisor(folder, job, workdir, *more, restarts=restarts))
        return started[-1]

    yield supervise
    for supervisor in started:
        if supervisor.popen.poll() is None:
            supervisor.popen.kill()
        supervisor.popen.wait()


@pytest.mark.slow
def test_a_death_and_a_restart_change_no_bit(
    tree_job: Job, alone: Path, supervise: Start, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    supervisor = supervise(tree_job, workdir, restarts=1)
    supervisor.wait_until(saved(workdir, 12))
    supervisor.processes()[1].kill()
    result = supervisor.result()
    assert result.code == 0, result
    assert '[local] process 1 was killed by SIGKILL; starting again: 0 restarts left' in result.stderr
    resumed = re.search(rf'\[0\] resuming from step (\d+) of {NUM_STEPS}', result.stdout)
    assert resumed and int(resumed[1]) >= 12, result
    assert '[0] 2 processes, found by flags' in result.stdout
    assert_same_bits(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])  # with the coordinator, and without
def test_a_death_ends_the_rest_at_once(victim: int, long_job: Job, supervise: Start, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    supervisor = supervise(long_job, workdir)
    supervisor.wait_until(saved(workdir, 6))
    processes = supervisor.processes()
    processes[victim].kill()
    since = time.monotonic()
    result = supervisor.result()
    seconds = time.monotonic() - since
    assert result.code == 128 + signal.SIGKILL, result
    assert seconds < 30, seconds  # without the supervisor: --heartbeat_timeout, 60 s
    assert not any(process.is_running() for process in processes.values())
    last = result.stderr[result.stderr.rindex('[local]') :]
    assert last.startswith(f'[local] process {victim} was killed by SIGKILL'), last
    assert 'starting again' not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_is_no_reason_to_start_again(
    number: signal.Signals, long_job: Job, supervise: Start, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    supervisor = supervise(long_job, workdir, restarts=3)
    supervisor.wait_until(saved(workdir, 6))
    processes = supervisor.processes()
    supervisor.popen.send_signal(number)
    result = supervisor.result()
    assert result.code == 75, result
    assert not any(process.is_running() for process in processes.values())
    step = max(checkpoint_steps(workdir))
    for index in (0, 1):
        assert f'[{index}] stopped at step {step:,} of' in result.stderr, result.stderr
    assert 'starting again' not in result.stderr and result.stdout.count('found by flags') == 1


@pytest.mark.slow
def test_divergence_is_no_reason_to_start_again(tree_job: Job, supervise: Start, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    result = supervise(tree_job, workdir, '--config.learning_rate=1e30', restarts=3).result()
    assert result.code == 3, result
    assert 'starting again' not in result.stderr
    assert 'diverged' in result.stderr[result.stderr.rindex('[local]') :], result.stderr


def test_a_mistake_is_no_reason_to_start_again(tree_job: Job, supervise: Start, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    result = supervise(tree_job, workdir, '--config.batch_size=44', restarts=3).result()
    assert result.code == 2, result
    assert 'starting again' not in result.stderr
    assert 'error: config.batch_size=44' in result.stderr[result.stderr.rindex('[local]') :], result.stderr
    assert not workdir.exists()
