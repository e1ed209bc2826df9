"""A loader or a disk that hangs is noticed, and its process named by all; a disk that is slow is no fault."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import NUM_STEPS, STEPS_PER_EPOCH, Job, Result, checkpoint_steps, run_ok
from tests.test_processes import Processes, free_port


@pytest.mark.slow
@pytest.mark.parametrize(('processes', 'batch', 'save_every'), [(1, 0, 6), (1, 30, 6), (2, 0, 6), (4, 30, 1)])
def test_a_loader_that_hangs_is_noticed(
    processes: int, batch: int, save_every: int, job: Job, tmp_path: Path
) -> None:
    """Also where all wait for its process at a save."""
    culprit = processes - 1
    flags = ['--config.data_placement=host', '--stall_timeout=8', '--heartbeat_timeout=30']
    more = f'--config.checkpoint_every_steps={save_every}'
    train = job.train(tmp_path / 'run', *flags, more, devices=max(processes, 2))
    line = [sys.executable, '-m', 'tests.stuck_loader', str(batch), str(culprit), *map(str, train)]
    results = run_all(line, processes, job, tmp_path)
    for result in results:
        assert result.code == 1, result
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f'error: process {culprit} ') and 'hangs: no step for' in last, result
        assert 'last completed step' in last
        assert 'the Python stacks of all threads' in result.stderr and 'train.py' in result.stderr
    assert 'in sleep_in_loader' in results[culprit].stderr  # the stacks of all threads


@pytest.mark.slow
def test_a_run_that_hangs_after_a_resume_says_how_far_it_was(job: Job, tmp_path: Path) -> None:
    """And does not look complete, though the end of fewer epochs was."""
    workdir = tmp_path / 'run'
    run_ok(*job.train(workdir, '--config.num_epochs=1', devices=2), env=job.env)
    assert (workdir / 'report.html').exists()
    flags = ['--config.data_placement=host', '--stall_timeout=8', '--allow_plan_change']
    train = job.train(workdir, *flags, devices=2)
    [result] = run_all(
        [sys.executable, '-m', 'tests.stuck_loader', '0', '0', *map(str, train)], 1, job, tmp_path
    )
    assert result.code == 1, result
    assert result.stderr.splitlines()[-1].endswith(f'known here is {STEPS_PER_EPOCH}'), result
    assert not (workdir / 'report.html').exists()


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_save_may_take_longer_than_a_step(processes: int, job: Job, tmp_path: Path) -> None:
    for result in run_slow('disk', processes, job, tmp_path):
        assert result.code == 0, result
    assert max(checkpoint_steps(tmp_path / 'run')) == NUM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_save_that_never_ends_is_noticed(processes: int, job: Job, tmp_path: Path) -> None:
    for result in run_slow('dead_disk', processes, job, tmp_path):
        assert result.code == 1, result
        last = result.stderr.splitlines()[-1]
        assert last.startswith('error: process 0 ') and 'hangs: no end of the save for' in last, result


@pytest.mark.slow
def test_a_restore_that_never_ends_is_noticed(job: Job, tmp_path: Path) -> None:
    [result] = run_slow('dead_restore', 1, job, tmp_path)
    assert result.code == 1, result
    assert 'error: process 0 ' in result.stderr and 'hangs: no end of the restore for' in result.stderr
    assert 'train.py' in result.stderr  # where it stood


@pytest.mark.slow
def test_a_loader_that_hangs_with_pythons_lock_is_noticed(job: Job, tmp_path: Path) -> None:
    """No thread of Python runs any more: nothing is said but the stacks."""
    train = job.train(tmp_path / 'run', '--config.data_placement=host', '--stall_timeout=6', devices=2)
    line = [sys.executable, '-m', 'tests.slow', 'lock', '30', *map(str, train)]
    [result] = run_all(line, 1, job, tmp_path)
    assert result.code == 1 and 'Timeout (' in result.stderr, result
    assert 'in gather_or_keep_the_lock' in result.stderr


def run_slow(place: str, processes: int, job: Job, tmp_path: Path) -> list[Result]:
    """Runs the job with steps that may take 8 seconds, and a disk on which the first save takes longer."""
    train = job.train(tmp_path / 'run', '--stall_timeout=8', devices=2)
    line = [sys.executable, '-m', 'tests.slow', place, '6', *map(str, train)]
    return run_all(line, processes, job, tmp_path)


def run_all(line: list[str], processes: int, job: Job, tmp_path: Path) -> list[Result]:
    where = [f'--num_processes={processes}', f'--coordinator=127.0.0.1:{free_port()}'] * (processes > 1)
    numbers = [[f'--process_id={i}'] * (processes > 1) for i in range(processes)]
    started = Processes(tmp_path / 'job', [[*line, *where, *number] for number in numbers], job.env)
    try:
        return started.results(120)
    finally:
        started.close()
