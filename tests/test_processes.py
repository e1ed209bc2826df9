"""Jobs of several processes, for real: gloo between processes of this machine, real signals, real deaths."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel_train import config as config_lib
from parallel_train import preflight
from parallel_train import processes as processes_lib
from parallel_train.dataset import Split
from parallel_train.errors import Late
from parallel_train.mesh import start_devices
from tests.conftest import (
    NUM_STEPS,
    ROOT,
    STEPS_PER_EPOCH,
    Job,
    Result,
    checkpoint_steps,
    cli,
    environment,
    make_tiny_job,
    read_rows,
    restore,
    run_cli,
    run_ok,
    without_timing,
)

HEARTBEAT = 8  # seconds; a busy machine may stop a process for some of them


class Processes:
    """The processes of one job, each with its output in files."""

    def __init__(self, folder: Path, commands: list[list[str]], env: dict[str, str]):
        folder.mkdir(parents=True)
        self._files = [(folder / f'stdout{i}', folder / f'stderr{i}') for i in range(len(commands))]
        self.all = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=open(out, 'w'),
                stderr=open(err, 'w'),
            )
            for command, (out, err) in zip(commands, self._files, strict=True)
        ]

    def wait_until(self, came: Callable[[], bool], seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not came():
            assert time.monotonic() < deadline, self.outputs()
            assert all(process.poll() is None for process in self.all), self.outputs()
            time.sleep(0.01)

    def results(self, seconds: float = 200) -> list[Result]:
        deadline = time.monotonic() + seconds
        for process in self.all:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(self.outputs()) from None
        return [
            Result(process.returncode, out.read_text(), err.read_text())
            for process, (out, err) in zip(self.all, self._files, strict=True)
        ]

    def outputs(self) -> str:
        return '\n'.join(f'--- {file}\n{file.read_text()}' for files in self._files for file in files)

    def close(self) -> None:
        for process in self.all:
            if process.poll() is None:
                process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


Start = Callable[..., Processes]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a job of several processes; whatever is left of it ends with the test."""
    started: list[Processes] = []

    def start(job: Job, workdir: Path, processes: int, devices: int, *more: str) -> Processes:
        port = free_port()
        of_all = [*job.train(workdir, devices=devices), f'--num_processes={processes}']
        commands = [
            cli(*of_all, f'--coordinator=127.0.0.1:{port}', f'--process_id={i}',
                f'--heartbeat_timeout={HEARTBEAT}', *more)
            for i in range(processes)
        ]  # fmt: skip
        started.append(Processes(tmp_path / f'job{len(started)}', commands, job.env))
        return started[-1]

    yield start
    for processes in started:
        processes.close()


@pytest.fixture(scope='module')
def tree_job(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, models_dir: Path) -> Job:
    """The tiny model (BatchNorm, dropout) with augmentation, `reduction='tree'`, 8 shards."""
    return make_tiny_job(
        tmp_path_factory.mktemp('recipe'),
        data_dir,
        models_dir,
        "config.random_flip = True\nconfig.reduction = 'tree'\nconfig.divergence_check_steps = 5",
    )


@pytest.fixture(scope='module')
def long_job(tree_job: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same for so long that it is still running when something is done to it."""
    path = tmp_path_factory.mktemp('recipe') / 'long.py'
    text = tree_job.recipe.read_text()
    path.write_text(text.replace('    return config', '    config.num_epochs = 400.0\n    return config'))
    return Job(path, tree_job.data_dir, tree_job.env)


@pytest.fixture(scope='module')
def alone(tree_job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with one device, never interrupted."""
    workdir = tmp_path_factory.mktemp('alone') / 'run'
    run_ok(*tree_job.train(workdir, devices=1), env=tree_job.env)
    return workdir


def assert_same_bits(workdir: Path, reference: Path) -> None:
    assert without_timing(read_rows(workdir)) == without_timing(read_rows(reference))
    got, want = restore(workdir, NUM_STEPS), restore(reference, NUM_STEPS)
    assert got.keys() == want.keys()
    assert not [name for name in want if got[name].tobytes() != want[name].tobytes()]


def saved(workdir: Path, step: int) -> Callable[[], bool]:
    return lambda: max(checkpoint_steps(workdir), default=0) >= step


# ---------------------------------------------------------------- the same bits

GLOO_PIECES = (
    r'\[Gloo\] Rank ',
    'is connected to ',
    'Expected number of connected peer ranks is : ',
    r'peer ranks\. ',
    r'\d+',
    r'\s',
)


def test_two_processes_compute_what_one_does(
    tree_job: Job, alone: Path, start: Start, tmp_path: Path
) -> None:
    first, second = start(tree_job, tmp_path / 'run', 2, 4).results()
    assert (first.code, second.code) == (0, 0), (first, second)
    assert_same_bits(tmp_path / 'run', alone)
    assert '2 processes, found by flags' in first.stdout and 'sha256 of the parameters' in first.stdout
    # Process 0 alone speaks, but for what gloo prints: piece by piece, from several threads at once.
    assert not re.sub('|'.join(GLOO_PIECES), '', second.stdout), second.stdout


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('model', ['cnn', 'own_models:Tiny'])
def test_200_steps_on_all_device_and_process_counts(
    model: str, tree_job: Job, start: Start, tmp_path: Path
) -> None:
    """1, 2, 4 and 8 devices × 1, 2 and 4 processes, as far as each has a device."""
    more = [f'--config.model={model}', '--config.num_epochs=8', '--config.checkpoint_every_epochs=0']
    digests, rows = set(), []
    for processes, devices in [(p, d) for p in (1, 2, 4) for d in (1, 2, 4, 8) if d >= p]:
        workdir = tmp_path / f'{processes}x{devices}'
        results = start(tree_job, workdir, processes, devices, *more).results(400)
        assert [result.code for result in results] == [0] * processes, results
        state = restore(workdir, 8 * STEPS_PER_EPOCH)
        digests.add(hashlib.sha256(b''.join(state[name].tobytes() for name in sorted(state))).hexdigest())
        rows.append(without_timing(read_rows(workdir)))
    assert len(rows) == 9 and len(digests) == 1
    assert all(other == rows[0] for other in rows)


# ---------------------------------------------------------------- stopping and going on elsewhere


@pytest.mark.slow
@pytest.mark.parametrize(
    ('number', 'victim'),
    [
        (signal.SIGTERM, 1),
        (signal.SIGINT, 0),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_stops_all_at_one_step_and_another_hardware_goes_on(
    number: signal.Signals, victim: int, tree_job: Job, alone: Path, start: Start, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    job = start(tree_job, workdir, 2, 2)
    job.wait_until(saved(workdir, 6))
    job.all[victim].send_signal(number)
    results = job.results()
    assert [result.code for result in results] == [75, 75], results
    [step] = {line for r in results for line in r.stderr.splitlines() if 'stopped at step' in line}
    assert f'stopped at step {max(checkpoint_steps(workdir))} of {NUM_STEPS}' in step
    assert all('stopped at step' in result.stderr for result in results), results
    assert f'{number.name}: saves after' in results[victim].stderr, results
    assert number.name not in results[1 - victim].stderr, results
    run_ok(*tree_job.train(workdir, devices=8), env=tree_job.env)
    assert_same_bits(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_process_on_its_own(
    number: signal.Signals, tree_job: Job, alone: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    job = Processes(tmp_path / 'job', [cli(*tree_job.train(workdir, devices=2))], tree_job.env)
    job.wait_until(saved(workdir, 6))
    job.all[0].send_signal(number)
    [result] = job.results()
    assert result.code == 75, result
    assert f'{number.name}: saves after the step in flight' in result.stderr
    assert f'stopped at step {max(checkpoint_steps(workdir))}' in result.stderr
    run_ok(*tree_job.train(workdir, devices=4), env=tree_job.env)
    assert_same_bits(workdir, alone)


def test_a_second_signal_to_one_of_two_ends_it_at_once_and_the_other_soon(
    long_job: Job, start: Start, tmp_path: Path
) -> None:
    job = start(long_job, tmp_path / 'run', 2, 2)
    job.wait_until(saved(tmp_path / 'run', 6))
    for what in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        os.kill(job.all[1].pid, what)
    since = time.monotonic()
    first, second = job.results()
    assert second.code in (128 + signal.SIGINT, 128 + signal.SIGTERM), second
    assert first.code == 1 and 'process 1' in first.stderr.splitlines()[-1], first
    assert time.monotonic() - since < HEARTBEAT + 3


def test_a_second_signal_ends_at_once(long_job: Job, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    job = Processes(tmp_path / 'job', [cli(*long_job.train(workdir, devices=2))], long_job.env)
    job.wait_until(saved(workdir, 6))
    os.kill(job.all[0].pid, signal.SIGSTOP)  # so that both arrive before anything is done about the first
    os.kill(job.all[0].pid, signal.SIGTERM)
    os.kill(job.all[0].pid, signal.SIGINT)
    os.kill(job.all[0].pid, signal.SIGCONT)
    [result] = job.results()
    assert result.code in (128 + signal.SIGINT, 128 + signal.SIGTERM), result
    assert 'ends at once' in result.stderr


def test_a_signal_before_the_first_step_ends_all_at_once(long_job: Job, start: Start, tmp_path: Path) -> None:
    job = start(long_job, tmp_path / 'run', 2, 2)
    job.wait_until(lambda: 'Plan' in job.outputs())  # then the first step is compiled
    job.all[0].send_signal(signal.SIGTERM)
    for result in job.results(60):
        assert result.code == 75, job.outputs()


# ---------------------------------------------------------------- faults


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_the_job_goes_on_elsewhere(
    tree_job: Job, alone: Path, start: Start, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    job = start(tree_job, workdir, 2, 2)
    job.wait_until(saved(workdir, 12))
    job.all[1].kill()
    since = time.monotonic()
    first, second = job.results()
    assert second.code == -signal.SIGKILL and first.code == 1, first
    assert f'process 1 ({socket.gethostname()}) is gone or hangs' in first.stderr
    assert 'last completed step' in first.stderr and 'train.py' in first.stderr  # where it stood
    assert time.monotonic() - since < HEARTBEAT + 3
    run_ok(*tree_job.train(workdir, devices=1), env=tree_job.env)
    assert_same_bits(workdir, alone)


@pytest.mark.slow
def test_slow_imports_of_a_process_that_has_joined_are_no_silence(tree_job: Job, tmp_path: Path) -> None:
    line = [*tree_job.train(tmp_path / 'run'), '--heartbeat_timeout=5', '--num_processes=2']
    line = [
        sys.executable,
        '-m',
        'tests.slow',
        'imports',
        '15',
        *line,
        f'--coordinator=127.0.0.1:{free_port()}',
    ]
    job = Processes(tmp_path / 'job', [[*line, f'--process_id={i}'] for i in range(2)], tree_job.env)
    try:
        assert [result.code for result in job.results()] == [0, 0], job.outputs()
    finally:
        job.close()


@pytest.mark.slow
def test_the_death_of_the_coordinator_is_named(long_job: Job, start: Start, tmp_path: Path) -> None:
    job = start(long_job, tmp_path / 'run', 2, 2)
    job.wait_until(saved(tmp_path / 'run', 6))
    job.all[0].kill()
    _, second = job.results()
    assert second.code == 1, second
    last = second.stderr.splitlines()[-1]
    assert last.startswith('error: process 0, the coordinator, is gone') and 'last completed step' in last


def test_a_process_that_a_library_aborts_is_named_at_once(
    long_job: Job, start: Start, tmp_path: Path
) -> None:
    job = start(long_job, tmp_path / 'run', 2, 2)
    job.wait_until(saved(tmp_path / 'run', 6))
    job.all[1].send_signal(signal.SIGABRT)
    first, second = job.results(HEARTBEAT)
    assert second.code in (1, -signal.SIGABRT) and first.code == 1, (first, second)
    assert f'error: process 1 ({socket.gethostname()}) was aborted' in first.stderr


@pytest.mark.slow
def test_a_process_that_hangs_is_named(long_job: Job, start: Start, tmp_path: Path) -> None:
    job = start(long_job, tmp_path / 'run', 2, 2)
    job.wait_until(saved(tmp_path / 'run', 6))
    job.all[1].send_signal(signal.SIGSTOP)
    job.all[0].wait(HEARTBEAT + 60)
    job.all[1].kill()
    first, _ = job.results()
    assert first.code == 1 and 'process 1' in first.stderr and 'is gone or hangs' in first.stderr, first


@pytest.mark.slow
def test_a_coordinator_that_hangs_is_named_and_does_not_go_on_alone(
    tree_job: Job, alone: Path, start: Start, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    job = start(tree_job, workdir, 2, 2)
    job.wait_until(saved(workdir, 12))
    job.all[0].send_signal(signal.SIGSTOP)
    since = time.monotonic()
    job.all[1].wait(HEARTBEAT + 60)
    assert time.monotonic() - since < HEARTBEAT + 3, job.outputs()
    kept = checkpoint_steps(workdir)
    job.all[0].send_signal(signal.SIGCONT)  # it wakes up, and nobody is left
    first, second = job.results(HEARTBEAT + 60)
    assert second.code == 1, second
    assert 'error: process 0, the coordinator, is gone or hangs: no answer for' in second.stderr, second
    assert 'last completed step' in second.stderr and 'train.py' in second.stderr  # where it stood
    assert first.code == 1 and first.stderr.splitlines()[-1].startswith('error: '), first
    assert max(checkpoint_steps(workdir)) <= max(kept) + 6  # at most the save that was under way
    run_ok(*tree_job.train(workdir, devices=1), env=tree_job.env)
    assert_same_bits(workdir, alone)


STUCK = """
import time

import flax.linen as nn
import jax
import numpy as np

calls = 0


def wait(x):
    global calls
    calls += 1
    if calls > {calls}:
        time.sleep(10_000)
    return np.float32(0)


class Stuck(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(10)(x.reshape((x.shape[0], -1)))
        if train == {train}:
            zero = jax.pure_callback(wait, jax.ShapeDtypeStruct((), 'float32'), 0, vmap_method='sequential')
            x = x + jax.lax.stop_gradient(zero)
        return x
"""


@pytest.mark.parametrize(
    ('train', 'calls', 'flags'),
    [
        (True, 30, []),
        (False, 5, []),
        (True, 3, []),
        (True, 3, ['--profile_steps=4:8', '--config.checkpoint_every_epochs=0']),
    ],
    ids=['step', 'second evaluation', 'before the first save', 'before a trace'],
)
def test_what_never_ends_is_noticed(
    train: bool, calls: int, flags: list[str], job: Job, tmp_path: Path
) -> None:
    (tmp_path / 'stuck.py').write_text(STUCK.format(train=train, calls=calls))
    env = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    more = ['--config.model=stuck:Stuck', '--config.shards=0', '--stall_timeout=6']
    result = run_cli(*job.train(tmp_path / 'run', *more, *flags, devices=1), env=env, timeout=120)
    assert result.code == 1, result
    assert 'hangs: no step for' in result.stderr and 'last completed step' in result.stderr
    assert 'in wait' in result.stderr and 'train.py' in result.stderr  # the stacks of all threads


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_for_all(
    tree_job: Job, alone: Path, start: Start, tmp_path: Path
) -> None:
    workdir = Path(shutil.copytree(alone, tmp_path / 'run'))
    (workdir / 'report.html').unlink()
    bad = max(checkpoint_steps(workdir))
    largest = max((workdir / 'checkpoints' / str(bad)).rglob('*'), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    first, second = start(tree_job, workdir, 2, 4).results()
    assert (first.code, second.code) == (0, 0), (first, second)
    assert f'warning: checkpoint {bad} is damaged (' in first.stdout
    assert f'resuming from step {checkpoint_steps(alone)[-2]} of' in first.stdout
    assert (workdir / 'damaged' / str(bad)).is_dir()
    assert_same_bits(workdir, alone)


# ---------------------------------------------------------------- what does not fit together


@pytest.fixture(scope='module')
def checked_job(small_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> preflight.Job:
    """A job as each process checks it by itself."""
    start_devices(8)  # as every test that uses JAX in this process: the first one decides
    config = config_lib.Config({'dataset': 'mnist', 'batch_size': 40})
    return preflight.check_job(config, tmp_path_factory.mktemp('checked') / 'run', small_mnist, 2, False)


def told(job: preflight.Job, **changed: Any) -> dict[str, Any]:
    """What a process with this job tells of itself, as it arrives at process 0."""
    facts = {**preflight.facts(job), **changed}
    return json.loads(json.dumps({'facts': facts, 'address': ('host', '10.0.0.1')}))


TRAIN, EVAL = (f"{split} split of 'mnist' (shape, digests)" for split in ('train', 'eval'))


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('code of parallel_train', '0123456789ab'),
        *[(package, '0.0.1') for package in ('jax', 'jaxlib', 'flax', 'optax')],
        ('devices', 4),
        ('devices', None),
        ('config.learning_rate', 0.25),
        (TRAIN, '(200, 28, 28, 1), 00000000, 00000000'),
        (EVAL, '(50, 28, 28, 1), 00000000, 00000000'),
    ],
)
def test_each_difference_names_process_and_field(field: str, value: Any, checked_job: preflight.Job) -> None:
    same = told(checked_job)
    has = same['facts'][field]
    assert processes_lib.differences([same, same, same]) == ''
    message = processes_lib.differences([same, same, told(checked_job, **{field: value})])
    assert message.startswith(f'process 2: {field} is {value!r}, process 0 has {has!r}; start all processes')


@pytest.mark.parametrize('split', ['train', 'eval'])
@pytest.mark.parametrize('part', ['images', 'labels'])
def test_data_that_differ_in_one_label_or_pixel(split: str, part: str, checked_job: preflight.Job) -> None:
    """As many examples of the same shape: the digest alone tells."""
    mine: Split = getattr(checked_job, f'{split}_split')
    other = np.array(getattr(mine, part))
    other.reshape(-1)[-1 if part == 'labels' else 0] ^= 1
    changed = dataclasses.replace(mine, **{part: other})
    other_job = dataclasses.replace(checked_job, **{f'{split}_split': changed})
    message = processes_lib.differences([told(checked_job), told(other_job)])
    assert message.startswith(f"process 1: {split} split of 'mnist' (shape, digests) is '({len(mine)}, 28, ")


def test_an_error_of_one_process_comes_before_differences(checked_job: preflight.Job) -> None:
    same, other = told(checked_job), told(checked_job, devices=4)
    assert processes_lib.differences([same, other, {'error': 'no data here'}]) == 'process 2: no data here'
    assert processes_lib.differences([{'error': 'no data here'}, other]) == 'no data here'


def test_a_host_that_others_cannot_reach_is_named(checked_job: preflight.Job) -> None:
    """Its name means itself there; that matters to jobs of several hosts alone."""
    here, there = ({**told(checked_job), 'address': [name, '127.0.1.1']} for name in ('here', 'there'))
    assert processes_lib.differences([here, here]) == ''
    assert processes_lib.differences([told(checked_job), there]).startswith(
        "process 1: its host name 'there' means 127.0.1.1 there"
    )


def test_processes_that_differ_are_refused_by_name(tree_job: Job, start: Start, tmp_path: Path) -> None:
    port, common = free_port(), [*tree_job.train(tmp_path / 'run', devices=2), '--num_processes=2']
    commands = [
        cli(*common, f'--coordinator=127.0.0.1:{port}', f'--process_id={i}', f'--config.seed={i}')
        for i in range(2)
    ]
    for result in Processes(tmp_path / 'job', commands, tree_job.env).results():
        assert result.code == 2, result
        assert 'error: process 1: config.seed is 1, process 0 has 0' in result.stderr
    assert not (tmp_path / 'run').exists()


def test_an_older_model_of_ones_own_is_refused_by_name(
    tree_job: Job, models_dir: Path, tmp_path: Path
) -> None:
    older = tmp_path / 'older'
    older.mkdir()
    text = (models_dir / 'own_models.py').read_text()
    (older / 'own_models.py').write_text(text.replace('momentum=0.9', 'momentum=0.99'))
    port, common = free_port(), [*tree_job.train(tmp_path / 'run', devices=2), '--num_processes=2']
    commands = [
        ['env', f'PYTHONPATH={ROOT}{os.pathsep}{models}']
        + cli(*common, f'--coordinator=127.0.0.1:{port}', f'--process_id={i}')
        for i, models in enumerate([models_dir, older])
    ]
    for result in Processes(tmp_path / 'job', commands, tree_job.env).results():
        assert result.code == 2, result
        assert 'error: process 1: code of own_models is ' in result.stderr
        assert 'start all processes with the same code' in result.stderr
    assert not (tmp_path / 'run').exists()


def test_the_code_that_a_config_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that is imported from the same package; this program has a digest of its own."""
    package = tmp_path / 'named_package'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / 'layers.py').write_text('width = 1')
    (package / 'models.py').write_text('from named_package import layers')
    (package / 'unused.py').write_text('')
    (tmp_path / 'named_loss.py').write_text('')
    (tmp_path / 'named_data.py').write_text('')
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ('named_package.models', 'named_loss', 'named_data'):
        importlib.import_module(name)
    paths = {'model': 'named_package.models:M', 'loss': 'named_loss:loss', 'dataset': 'named_data:data'}
    config = config_lib.complete(config_lib.Config(paths))
    names = ['named_data', 'named_loss', 'named_package', 'named_package.layers', 'named_package.models']
    before = preflight.own_code(config)
    assert list(before) == [f'code of {name}' for name in names]
    (package / 'layers.py').write_text('width = 2')
    after = preflight.own_code(config)
    assert [name for name in before if before[name] != after[name]] == ['code of named_package.layers']
    assert preflight.own_code(config_lib.default_config()) == {}


@pytest.mark.slow
def test_processes_that_see_different_disks_are_refused(tree_job: Job, start: Start, tmp_path: Path) -> None:
    port = free_port()
    commands = [
        cli(
            *tree_job.train(tmp_path / f'run{i}', devices=2),
            *[f'--coordinator=127.0.0.1:{port}', '--num_processes=2', f'--process_id={i}'],
        )
        for i in range(2)
    ]
    for result in Processes(tmp_path / 'job', commands, tree_job.env).results():
        assert result.code == 2, result
        assert 'process 1 does not see there what process 0 writes' in result.stderr
    assert not (tmp_path / 'run0').exists() and not (tmp_path / 'run1').exists()


def test_a_process_that_does_not_come_is_waited_for_only_so_long(tree_job: Job, tmp_path: Path) -> None:
    flags = [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2', '--start_timeout=6']
    for process in (0, 1):
        result = run_cli(
            *tree_job.train(tmp_path / 'run', *flags, f'--process_id={process}'), env=tree_job.env
        )
        assert result.code == 1, result  # a launcher may start the job again: then all may come
        assert 'error: coordinator=' in result.stderr and 'within 6 s' in result.stderr, result
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_process_that_joins_and_never_comes_to_its_check_ends_with_the_others(
    tree_job: Job, tmp_path: Path
) -> None:
    where = [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2', '--start_timeout=10']
    line = [sys.executable, '-m', 'tests.slow', 'check', '1', *tree_job.train(tmp_path / 'run', *where)]
    job = Processes(tmp_path / 'job', [[*line, f'--process_id={i}'] for i in range(2)], tree_job.env)
    since = time.monotonic()
    try:
        first, second = job.results(120)
    finally:
        job.close()
    assert time.monotonic() - since < 40, (first, second)
    assert (first.code, second.code) == (1, 1), (first, second)
    words = 'process 1: did not come within 10 s; see its own output'
    assert first.stderr.splitlines()[-1] == f'error: {words}'
    assert words in second.stderr.splitlines()[-1], second
    assert 'in dead_check' in second.stderr or 'in check' in second.stderr, second  # where it stood
    assert not (tmp_path / 'run').exists()


class Silence:
    """The store of a job whose other process has joined, and says nothing."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        self.said[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key not in self.said:
            raise RuntimeError(f'DEADLINE_EXCEEDED: {key} after {milliseconds} ms')
        return self.said[key]


@pytest.mark.parametrize('index', [0, 1])
def test_who_does_not_answer_in_time_is_no_mistake(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Silence()
    for name, value in {'client': store, 'count': 2, 'index': index}.items():
        monkeypatch.setattr(processes_lib, name, lambda value=value: value)
    other = 1 - index
    with pytest.raises(Late, match=rf'^process {other}: did not answer \(where\) within 300 s'):
        processes_lib.gather('where', 'here')
    with pytest.raises(Late, match=f'^process {other}: did not ') as late:
        processes_lib.agree(lambda: 'checked', lambda checked: {'is': checked}, 5)
    assert late.value.exit_code == 1
    if index == 1:
        with pytest.raises(Late, match='^process 0: did not answer'):
            processes_lib.share(lambda: 'never asked')


def test_a_port_that_another_program_took_is_no_mistake(tree_job: Job, tmp_path: Path) -> None:
    with socket.create_server(('127.0.0.1', 0)) as taken:
        where = f'--coordinator=127.0.0.1:{taken.getsockname()[1]}'
        flags = [where, '--num_processes=2', '--process_id=0', '--start_timeout=20']
        result = run_cli(*tree_job.train(tmp_path / 'run', *flags), env=tree_job.env)
    assert result.code == 1 and 'another program listens there' in result.stderr, result
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--num_processes=2'], 'coordinator: is missing'),
        (
            ['--coordinator=here', '--num_processes=2', '--process_id=0'],
            "coordinator='here': must be HOST:PORT",
        ),
        (['--coordinator=a:1', '--num_processes=2', '--process_id=2'], 'process_id=2: must be from 0 to'),
        (['--coordinator=a:1', '--num_processes=0', '--process_id=0'], 'num_processes=0: must be at least 1'),
        (['--heartbeat_timeout=1'], 'heartbeat_timeout=1: must be'),
        (['--skip_nonfinite=-1'], 'skip_nonfinite=-1: must be at least 0'),
    ],
)
def test_flags_that_are_wrong(flags: list[str], words: str, job: Job, tmp_path: Path) -> None:
    result = run_cli(*job.train(tmp_path / 'run', *flags))
    assert result.code == 2 and words in result.stderr, result
    assert not (tmp_path / 'run').exists()


def test_two_jobs_in_one_workdir(long_job: Job, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    first = Processes(tmp_path / 'job', [cli(*long_job.train(workdir, devices=1))], long_job.env)
    try:
        first.wait_until(saved(workdir, 6))
        result = run_cli(*long_job.train(workdir, devices=1), env=long_job.env)
        assert result.code == 2 and f'another job runs there (process {first.all[0].pid} on' in result.stderr
        first.all[0].send_signal(signal.SIGTERM)
        assert first.results()[0].code == 75
    finally:
        first.close()


def test_restored_state_is_what_was_saved(alone: Path) -> None:
    """(The comparisons above can fail: other steps have other bits.)"""
    steps = checkpoint_steps(alone)
    a, b = restore(alone, steps[0]), restore(alone, steps[-1])
    assert [name for name in a if not np.array_equal(a[name], b[name])]
