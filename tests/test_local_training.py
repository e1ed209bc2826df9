"""Training jobs under launch/local.py: to their end, through the death of a process, Ctrl-C, mistakes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import NUM_STEPS, ROOT, Job, Result, checkpoint_steps
from tests.test_processes import (  # noqa: F401, fixtures
    HEARTBEAT,
    alone,
    assert_same_bits,
    long_job,
    saved,
    tree_job,
)

# ruff: noqa: F811, fixtures again
PATIENCE = 300  # seconds for anything, on a machine that does other work too


# Runs local.py's own `main`, with a module and its first arguments in the place of `parallel_train`.
WITH_PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT / 'launch')!r})
import local
cut = sys.argv.index('WITH')
sys.exit(local.main(sys.argv[1:cut], [sys.executable, '-m', *sys.argv[cut + 1 :]]))
"""


class Supervisor:
    """A job of 2 processes with 2 devices each; of `program`, if that is given."""

    def __init__(
        self,
        folder: Path,
        job: Job,
        workdir: Path,
        *more: str,
        restarts: int = 0,
        program: Sequence[str] = (),
    ):
        folder.mkdir(exist_ok=True)
        self._outputs = folder / 'stdout', folder / 'stderr'
        arguments = [argument for argument in job.train(workdir) if not argument.startswith('--devices')]
        local = ['-c', WITH_PROGRAM] if program else [ROOT / 'launch' / 'local.py']
        flags = ['--processes=2', '--devices_per_process=2', f'--max_restarts={restarts}']
        instead = ['WITH', *program] if program else []
        self.popen = subprocess.Popen(
            [sys.executable, *local, *flags, '--', *arguments, *more, *instead],
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

    def supervise(job: Job, workdir: Path, *more: str, **options: Any) -> Supervisor:
        folder = tmp_path / f'supervisor{len(started)}'
        started.append(Supervisor(folder, job, workdir, *more, **options))
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


def resumed_from(result: Result) -> int:
    """Returns the step that the second start went on from; there was none but that."""
    assert result.code == 0, result
    assert result.stderr.count('starting again') == 1 and result.stdout.count('found by flags') == 2, result
    [step] = re.findall(rf'\[0\] resuming from step (\d+) of {NUM_STEPS}', result.stdout)
    return int(step)


@pytest.mark.slow
def test_a_drift_is_started_again_from_the_last_checkpoint_before_it(
    tree_job: Job, alone: Path, supervise: Start, tmp_path: Path
) -> None:
    workdir, step = tmp_path / 'run', 33
    drifting = ['tests.once', str(tmp_path), 'tests.flip', str(step), '2']  # the first device of process 1
    result = supervise(tree_job, workdir, restarts=1, program=drifting).result()
    assert 'the devices hold different states: ' in result.stderr and '(cpu, process 1)' in result.stderr
    assert re.search(r'\[local\] process [01] ended with exit code 1; starting again', result.stderr), result
    assert resumed_from(result) == 30, result  # a checkpoint every 6 steps; none of what came after 33
    assert_same_bits(workdir, alone)


@pytest.mark.slow
def test_a_loader_that_hangs_is_started_again(
    tree_job: Job, alone: Path, supervise: Start, tmp_path: Path
) -> None:
    workdir, flags = tmp_path / 'run', ['--config.data_placement=host', '--stall_timeout=8']
    hanging = ['tests.once', str(tmp_path), 'tests.stuck_loader', '30', '1']
    result = supervise(tree_job, workdir, *flags, restarts=1, program=hanging).result()
    assert re.search(r'error: process 1 \(.*\) hangs: no step for', result.stderr), result
    assert re.search(r'\[local\] process [01] ended with exit code 1; starting again', result.stderr), result
    assert resumed_from(result) in (18, 24, 30), result
    assert_same_bits(workdir, alone)


@pytest.mark.slow
def test_a_port_that_is_taken_before_process_0_binds_it_is_a_reason_to_start_again(
    tree_job: Job, supervise: Start, tmp_path: Path
) -> None:
    taking = ['tests.once', str(tmp_path), 'tests.taken_port', '-', '-']
    result = supervise(tree_job, tmp_path / 'run', restarts=1, program=taking).result()
    assert result.code == 0, result
    assert 'another program listens there' in result.stderr, result
    assert '[local] process 0 ended with exit code 1; starting again: 0 restarts left' in result.stderr
    assert result.stdout.count('found by flags') == 1


@pytest.mark.long
@pytest.mark.slow
def test_a_coordinator_that_hangs_is_ended_and_the_job_started_again(
    tree_job: Job, alone: Path, supervise: Start, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    supervisor = supervise(tree_job, workdir, f'--heartbeat_timeout={HEARTBEAT}', restarts=1)
    supervisor.wait_until(saved(workdir, 12))
    hanging = supervisor.processes()[0]
    hanging.suspend()
    result = supervisor.result()
    assert 'error: process 0, the coordinator, is gone or hangs' in result.stderr, result
    assert '[local] process 1 ended with exit code 1; starting again' in result.stderr, result
    assert not hanging.is_running()
    assert resumed_from(result) >= 12
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
