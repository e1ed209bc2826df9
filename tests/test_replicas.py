"""A bit that flips in one device's copy of the state: found, named, never saved."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from parallel_train import config as config_lib
from parallel_train import start_devices
from parallel_train.errors import ReplicasDiffer
from parallel_train.mesh import make_mesh
from parallel_train.replicas import Replicas, difference, digest
from parallel_train.state import TrainState, initialise
from tests.conftest import Job, Result, checkpoint_steps, make_tiny_job, run_ok
from tests.flip import flip_bit
from tests.models_for_tests import tiny
from tests.test_processes import Processes, free_port
from tests.test_resume import assert_same_run

start_devices(8)
JAX_IDS_APART = 2048  # how JAX numbers the CPU devices of processes


@pytest.fixture(scope='module')
def state() -> TrainState:
    config = config_lib.with_dataset(
        config_lib.complete(tiny(model='tests.models_for_tests:NormDropoutNet')), (28, 28, 1), 10
    )
    return initialise(config, 0.1, make_mesh(4))


def with_flip(state: TrainState, leaf: int, device: int, word: int = 0, bit: int = 0) -> TrainState:
    leaves, tree = jax.tree.flatten(state)
    leaves[leaf] = flip_bit(leaves[leaf], device, word, bit)
    return jax.tree.unflatten(tree, leaves)


def test_equal_copies_are_equal(state: TrainState) -> None:
    replicas = Replicas(make_mesh(4))
    replicas.check(state, 1)
    replicas.settle()


@pytest.mark.parametrize('bit', [0, 22, 31])
def test_any_bit_of_any_array_is_found_and_named(state: TrainState, bit: int) -> None:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    for leaf, path in enumerate(paths):
        array = jax.tree.leaves(state)[leaf]
        replicas = Replicas(make_mesh(4))
        replicas.check(with_flip(state, leaf, 2, word=array.size - 1, bit=bit), 7)
        with pytest.raises(ReplicasDiffer) as found:
            replicas.settle()
        message = str(found.value)
        assert message.startswith('at step 7 the devices hold different states: device 2 (cpu, process 0) ')
        name = path.replace('.', '', 1).split('[')[0].split('.')[0]  # the field of the state
        assert f"differs from the others in ['{name}']" in message, (path, message)


def test_what_a_checkpoint_keeps_shows_any_bit(state: TrainState) -> None:
    before = digest(state)
    for leaf in range(len(jax.tree.leaves(state))):
        changed = digest(with_flip(state, leaf, 0, bit=30))  # on the device that is read
        assert sum(before[name] != changed[name] for name in before) == 1


def test_exchanged_words_are_found() -> None:
    one, other = (np.arange(2048, dtype=np.float32) for _ in range(2))
    other[[3, 4]] = other[[4, 3]]
    from parallel_train.replicas import fingerprint

    assert int(fingerprint([one])[0]) != int(fingerprint([other])[0])


def test_who_differs() -> None:
    rows, devices = np.array([[1, 2], [1, 2], [1, 3], [4, 2]], np.uint32), list('abcd')
    assert difference(rows[:2], ['x', 'y'], devices) == ''
    assert difference(rows[:3], ['x', 'y'], devices) == 'c differs from the others in y'
    assert difference(rows, ['x', 'y'], devices) == 'c, d differ from the others in x, y'
    assert 'no copy is that of most of b, c' in difference(rows[1:3], ['x', 'y'], devices[1:3])


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope='module')
def drift_job(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, models_dir: Path) -> Job:
    return make_tiny_job(
        tmp_path_factory.mktemp('recipe'),
        data_dir,
        models_dir,
        "config.random_flip = True\nconfig.reduction = 'tree'\nconfig.divergence_check_steps = 4",
    )


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory, drift_job: Job) -> Path:
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    run_ok(*drift_job.train(workdir, devices=4), env=drift_job.env)
    return workdir


def run_with_flip(
    job: Job, workdir: Path, folder: Path, processes: int, step: int, device: int, flag: str
) -> list[Result]:
    """Runs the command line; a bit of one device's copy of the parameters flips after `step` steps."""
    flags = [
        f'--num_processes={processes}',
        f'--coordinator=127.0.0.1:{free_port()}',
        '--heartbeat_timeout=60',
    ]
    commands = [
        [
            sys.executable, '-m', 'tests.flip', str(step), str(device), *job.train(workdir, flag, devices=4),
            *([*flags, f'--process_id={i}'] if processes > 1 else []),
        ]
        for i in range(processes)
    ]  # fmt: skip
    started = Processes(folder, commands, job.env)
    try:
        return started.results()
    finally:
        started.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('processes', 'step', 'device', 'every'), [(1, 20, 1, 1), (1, 17, 3, 4), (2, 31, 2, 4)]
)
def test_a_run_whose_copies_drift_ends_and_goes_on_from_before(
    processes: int, step: int, device: int, every: int, drift_job: Job, undisturbed: Path, tmp_path: Path
) -> None:
    workdir, flag = tmp_path / 'run', f'--config.divergence_check_steps={every}'
    results = run_with_flip(drift_job, workdir, tmp_path / 'job', processes, step, device, flag)
    assert [result.code for result in results] == [1] * processes, results
    for result in results:
        last = result.stderr.splitlines()[-1]
        process, local = divmod(device, 4 // processes)
        where = f'device {JAX_IDS_APART * process + local} (cpu, process {process})'
        assert f'the devices hold different states: {where} differs from the others in' in last, result
        found = int(last.split('at step ')[1].split()[0])
        dispatched = int(
            [line for line in result.stdout.splitlines() if 'dispatched' in line][-1].split()[-1]
        )
        assert step < found <= dispatched <= step + every, (found, dispatched)
    assert max(checkpoint_steps(workdir)) <= step
    run_ok(*drift_job.train(workdir, devices=4), env=drift_job.env)
    assert_same_run(workdir, undisturbed)
