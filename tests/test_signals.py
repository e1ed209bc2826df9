"""A run that is asked to stop while it evaluates, saves or reports, and goes on, ends as if never stopped."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import (
    NUM_STEPS,
    STEPS_PER_EPOCH,
    Job,
    checkpoint_steps,
    cli,
    make_tiny_job,
    read_rows,
    run_ok,
)
from tests.slow import BATCH, REPORT, STEP
from tests.test_processes import Processes, assert_same_bits, free_port

SAVE_EVERY = 20  # steps
PLAIN = ('parallel_train',)

Launch = Callable[..., Processes]


@pytest.fixture(scope='module')
def job(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, models_dir: Path) -> Job:
    """The tiny model (BatchNorm, dropout), evaluated in 38 batches."""
    return make_tiny_job(
        tmp_path_factory.mktemp('recipe'),
        data_dir,
        models_dir,
        "config.random_flip = True\nconfig.reduction = 'tree'\nconfig.eval_batch_size = 8\n"
        f'config.checkpoint_every_steps = {SAVE_EVERY}',
    )


@pytest.fixture(scope='module')
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    run_ok(*job.train(workdir), env=job.env)
    return workdir


@pytest.fixture
def launch(job: Job, tmp_path: Path) -> Iterator[Launch]:
    """Starts the job in some processes, by `python -m PROGRAM`; what is left of them ends with the test."""
    launched: list[Processes] = []

    def launch(program: tuple[str, ...], processes: int) -> Processes:
        common, flags = job.train(tmp_path / 'run'), [list[str]()]
        if processes > 1:
            where = [f'--coordinator=127.0.0.1:{free_port()}', f'--num_processes={processes}']
            flags = [[*where, f'--process_id={i}'] for i in range(processes)]
        commands = [[sys.executable, '-m', *program, *common, *more] for more in flags]
        launched.append(Processes(tmp_path / f'job{len(launched)}', commands, job.env))
        return launched[-1]

    yield launch
    for processes in launched:
        processes.close()


def stop(running: Processes) -> int:
    """Sends SIGTERM to the last process of a job; returns the step at which all of it stopped."""
    running.all[-1].send_signal(signal.SIGTERM)
    results = running.results()
    assert [result.code for result in results] == [75] * len(results), running.outputs()
    said = [re.findall(rf'stopped at step (\d+) of {NUM_STEPS}, saved', result.stderr) for result in results]
    assert said == [said[0]] * len(results) and len(said[0]) == 1, running.outputs()
    return int(said[0][0])


def go_on(launch: Launch, processes: int, step: int) -> None:
    running = launch(PLAIN, processes)
    results = running.results()
    assert [result.code for result in results] == [0] * len(results), running.outputs()
    assert f'resuming from step {step}' in results[0].stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ('processes', 'step'),
    [(1, STEPS_PER_EPOCH), (1, NUM_STEPS), (2, STEPS_PER_EPOCH)],
    ids=['alone', 'alone, the last evaluation', 'two processes'],
)
def test_a_signal_while_evaluating(
    processes: int, step: int, undisturbed: Path, launch: Launch, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    running = launch(('tests.slow', 'evaluation', str(step)), processes)
    running.wait_until(lambda: running.outputs().count(BATCH) >= 3 * processes)
    assert stop(running) == step == max(checkpoint_steps(workdir))
    assert ('eval', step) not in [(row['split'], row['step']) for row in read_rows(workdir)]  # cut short
    go_on(launch, processes, step)
    assert_same_bits(workdir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2], ids=['alone', 'two processes'])
def test_a_signal_while_a_save_is_under_way(
    processes: int, undisturbed: Path, launch: Launch, tmp_path: Path
) -> None:
    """Both checkpoints are whole afterwards: the one under way, and that of the step of the stop."""
    workdir = tmp_path / 'run'
    running = launch(('tests.slow', 'save', str(SAVE_EVERY)), processes)
    checkpoints = workdir / 'checkpoints'
    running.wait_until(lambda: STEP in running.outputs() and any(checkpoints.glob(f'{SAVE_EVERY}.*tmp*')))
    assert checkpoint_steps(workdir) == []
    step = stop(running)
    assert SAVE_EVERY < step < 2 * SAVE_EVERY and checkpoint_steps(workdir) == [SAVE_EVERY, step]
    assert list(checkpoints.glob('*tmp*')) == []
    go_on(launch, processes, step)
    assert_same_bits(workdir, undisturbed)


SLOW = """
import time

import flax.linen as nn
import jax
import numpy as np


def wait(_):
    print('{begun}', flush=True)
    time.sleep(3.1)
    return np.float32(0)


class Slow(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(10)(x.reshape((x.shape[0], -1)))
        if train == {train}:
            zero = jax.pure_callback(wait, jax.ShapeDtypeStruct((), 'float32'), 0, vmap_method='sequential')
            x = x + jax.lax.stop_gradient(zero)
        return x
"""


@pytest.mark.slow
@pytest.mark.parametrize('train', [True, False], ids=['steps', 'evaluation'])
def test_a_stop_waits_for_the_step_in_flight_alone_where_steps_take_long(
    train: bool, data_dir: Path, tmp_path: Path
) -> None:
    """Once they are known to: after the fourth step, the second batch of an evaluation."""
    begun = 'a long one is begun'
    (tmp_path / 'long_ones.py').write_text(SLOW.format(train=train, begun=begun))
    more = 'config.checkpoint_every_epochs = 0.0\nconfig.log_every_steps = 1000\nconfig.eval_batch_size = 16'
    job = make_tiny_job(tmp_path, data_dir, tmp_path, more)
    flags = ['--config.model=long_ones:Slow', '--config.shards=2']
    running = Processes(tmp_path / 'job', [cli(*job.train(tmp_path / 'run', *flags))], job.env)
    try:
        before = (6 if train else 4) * 2  # each on 2 devices
        running.wait_until(lambda: running.outputs().count(begun) >= before)
        running.all[0].send_signal(signal.SIGTERM)
        [result] = running.results(60)
    finally:
        running.close()
    assert result.code == 75, result
    assert result.stdout.count(begun) <= before + 2, result
    steps = checkpoint_steps(tmp_path / 'run')
    assert steps in ([6], [7]) if train else steps == [STEPS_PER_EPOCH]


@pytest.mark.slow
def test_all_processes_know_that_a_run_is_complete(undisturbed: Path, launch: Launch, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / 'run')
    results = launch(('tests.slow', 'files', '1'), 2).results(120)
    assert [result.code for result in results] == [0, 0], results
    assert f'already complete at step {NUM_STEPS}' in results[0].stdout


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('processes', [1, 2], ids=['alone', 'two processes'])
def test_a_signal_while_the_report_is_written(
    processes: int, number: signal.Signals, undisturbed: Path, launch: Launch, tmp_path: Path
) -> None:
    """To all processes, as launchers send it: the run is complete, so it ends well, and soon."""
    running = launch(('tests.slow', 'report', '2'), processes)
    running.wait_until(lambda: REPORT in running.outputs())
    for process in running.all:
        process.send_signal(number)
    results = running.results(60)
    assert [result.code for result in results] == [0] * processes, running.outputs()
    for result in results:
        assert f'{number.name}: ends once the report is written; again: ends at once' in result.stderr
    assert (tmp_path / 'run' / 'report.html').exists()
    assert_same_bits(tmp_path / 'run', undisturbed)


def test_a_signal_while_the_report_of_a_run_that_had_none_is_written(
    undisturbed: Path, launch: Launch, tmp_path: Path
) -> None:
    """No step is made any more: that is not `before the first step`."""
    shutil.copytree(undisturbed, tmp_path / 'run')
    (tmp_path / 'run' / 'report.html').unlink()
    running = launch(('tests.slow', 'report', '2'), 1)
    running.wait_until(lambda: REPORT in running.outputs())
    running.all[0].send_signal(signal.SIGTERM)
    [result] = running.results(60)
    assert result.code == 0, result
    assert (tmp_path / 'run' / 'report.html').exists()
