"""A loader that hangs, from the first batch on or later: noticed, and its process named by all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import Job
from tests.test_processes import Processes, free_port


@pytest.mark.slow
@pytest.mark.parametrize(('processes', 'batch'), [(1, 0), (1, 30), (2, 0), (2, 30)])
def test_a_loader_that_hangs_is_noticed(processes: int, batch: int, job: Job, tmp_path: Path) -> None:
    culprit = processes - 1
    flags = ['--config.data_placement=host', '--stall_timeout=8', '--heartbeat_timeout=30']
    if processes > 1:
        flags += [f'--num_processes={processes}', f'--coordinator=127.0.0.1:{free_port()}']
    train = job.train(tmp_path / 'run', *flags, devices=2)
    commands = [
        [sys.executable, '-m', 'tests.stuck_loader', str(batch), str(culprit), *map(str, train)]
        + ([f'--process_id={i}'] if processes > 1 else [])
        for i in range(processes)
    ]
    started = Processes(tmp_path / 'job', commands, job.env)
    try:
        results = started.results(120)
    finally:
        started.close()
    for result in results:
        assert result.code == 1, result
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f'error: process {culprit} ') and 'hangs: no step for' in last, result
        assert 'last completed step' in last
    assert 'in sleep_in_loader' in results[culprit].stderr  # the stacks of all threads
