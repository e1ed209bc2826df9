"""The loop: never hangs, never compiles twice, never waits, and what is due happens in order."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax._src.compiler as jax_compiler
import jax.numpy as jnp
import numpy as np
import pytest

from parallel_train import config as config_lib
from parallel_train import run as run_lib
from parallel_train import train as train_lib
from parallel_train.batches import HostFeed, ResidentFeed
from parallel_train.dataset import Split
from parallel_train.errors import Diverged
from parallel_train.load import load_model
from parallel_train.mesh import make_mesh, start_devices
from parallel_train.metrics import read_rows
from parallel_train.plan import make_plan
from parallel_train.profiling import Profiler, Steps
from tests.conftest import without_timing
from tests.models_for_tests import noise, tiny

start_devices(8)


def test_no_program_is_compiled_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging, evaluating, saving, new epochs and a resume leave the compiled steps as they are.

    Every program that has the model in it is counted when it is compiled.
    """
    compiled: list[str] = []
    real = jax_compiler.backend_compile_and_load

    def counting(backend: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(module.operation.attributes['sym_name'].value)
        return real(backend, module, *args, **kwargs)

    monkeypatch.setattr(jax_compiler, 'backend_compile_and_load', counting)
    for placement in ('device', 'host'):
        config, workdir = tiny(data_placement=placement), tmp_path / placement
        for again in range(2):
            compiled.clear()
            state = train_lib.train_and_evaluate(config, workdir, devices=4)
            assert int(state.step) == 24
            steps = [name for name in compiled if name in ('jit_train_step', 'jit_eval_step')]
            assert sorted(steps) == ([] if again else ['jit_eval_step', 'jit_train_step']), compiled


@pytest.mark.slow
@pytest.mark.parametrize(('log_every', 'steps'), [(1, 24), (3, 8), (7, 4), (100, 1)])
def test_train_rows_cover_every_update_once(tmp_path: Path, log_every: int, steps: int) -> None:
    train_lib.train_and_evaluate(tiny(log_every_steps=log_every), tmp_path, devices=1)
    rows = [row for row in read_rows(tmp_path) if row['split'] == 'train']
    assert len(rows) == steps and rows[-1]['step'] == 24
    assert [row['step'] for row in rows] == sorted({*range(log_every, 25, log_every), 24})
    evals = [row['step'] for row in read_rows(tmp_path) if row['split'] == 'eval']
    assert evals == [8, 16, 24]
    assert all(row['examples_per_second'] > 0 and row['data_wait_fraction'] == 0 for row in rows)


def test_rows_are_means_over_the_updates_since_the_row_before(tmp_path: Path) -> None:
    train_lib.train_and_evaluate(tiny(log_every_steps=1), tmp_path / 'each', devices=2)
    train_lib.train_and_evaluate(tiny(log_every_steps=5), tmp_path / 'five', devices=2)
    each = [row for row in read_rows(tmp_path / 'each') if row['split'] == 'train']
    five = [row for row in read_rows(tmp_path / 'five') if row['split'] == 'train']
    begin = 0
    for row in five:
        part = each[begin : row['step']]
        for name in ('loss', 'accuracy', 'grad_norm'):
            assert row[name] == pytest.approx(np.mean([r[name] for r in part]), rel=1e-5)
        assert row['learning_rate'] == part[-1]['learning_rate']
        begin = row['step']


def test_train_is_evaluated_on_the_very_last_parameters(tmp_path: Path) -> None:
    """The last eval row is of the state returned: the loop does not end a step early or late."""
    from parallel_train.evaluate import Evaluator
    from parallel_train.mesh import make_mesh

    state = train_lib.train_and_evaluate(tiny(), tmp_path, devices=2)
    split = Split(*noise('test', tmp_path), tuple(map(str, range(10))))
    config = config_lib.with_dataset(config_lib.complete(tiny()), (28, 28, 1), 10)
    result = Evaluator(split, config, make_mesh(2), state)(state)
    last = read_rows(tmp_path)[-1]
    assert last['split'] == 'eval' and last['step'] == int(state.step) == 24
    assert {name: last[name] for name in result} == result


def test_divergence_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match='not finite') as diverged:
        # The first update of the warmup has rate 0; the next ones leave float32.
        train_lib.train_and_evaluate(
            tiny(learning_rate=1e38, checkpoint_every_epochs=0.125, num_epochs=4.0), tmp_path, devices=1
        )
    saved = max(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
    assert f'the checkpoint of step {saved} stands' in str(diverged.value)
    assert saved < 32 and all(row['step'] <= saved + 1 for row in read_rows(tmp_path))
    _, variables = load_model(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_divergence_in_the_last_step_is_no_success(tmp_path: Path) -> None:
    """One step in all: the loss before the update is fine, the state after it is not."""
    config = tiny(batch_size=256, num_epochs=1.0, schedule='constant', warmup_epochs=0.0, learning_rate=1e38)
    with pytest.raises(Diverged, match=r'not finite.*no checkpoint was made yet'):
        train_lib.train_and_evaluate(config, tmp_path, devices=1)
    assert not list((tmp_path / 'checkpoints').iterdir())
    assert all(row['split'] == 'train' for row in read_rows(tmp_path))


def test_the_latest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    fields = {'num_epochs': 6.0, 'learning_rate': 0.3, 'schedule': 'constant', 'warmup_epochs': 0.0}
    train_lib.train_and_evaluate(tiny(keep_checkpoints=2, **fields), tmp_path, devices=1)
    accuracy = {row['step']: row['accuracy'] for row in read_rows(tmp_path) if row['split'] == 'eval'}
    saved = {int(path.name) for path in (tmp_path / 'checkpoints').iterdir()}
    assert {40, 48} <= saved and len(saved) <= 3
    assert max(accuracy[step] for step in saved) == max(accuracy.values())


SOAK = """
import sys
from pathlib import Path
from parallel_train import start_devices
start_devices({devices})
from tests.models_for_tests import tiny
from parallel_train.train import train_and_evaluate
config = tiny(model='cnn', num_epochs={epochs}, log_every_steps=1000, data_placement='host',
              eval_every_epochs=0.0, checkpoint_every_epochs=0.0)
state = train_and_evaluate(config, sys.argv[1], devices={devices})
names = [p.read_text() for p in Path('/proc/self/task').glob('*/comm')]
print('pool', sum('XLAEigen' in name for name in names), 'step', int(state.step))
"""


@pytest.mark.parametrize('devices', [2, 8])
def test_fresh_batches_on_many_cpu_devices_never_hang(tmp_path: Path, devices: int) -> None:
    """400 steps with a batch put on the devices at each, far ahead of them, with no wait in between.

    Without what `start_devices` sets, this hangs within the first hundred steps, and XLA aborts the
    process after 40 seconds.
    """
    program = SOAK.format(devices=devices, epochs=50.0)
    done = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = done.stdout.split()
    assert words[-1] == '400'
    assert int(words[words.index('pool') + 1]) >= 2 * devices


@pytest.mark.parametrize('told', ['before the save', 'after it'])
def test_the_best_checkpoint_is_known_after_a_resume(told: str, tmp_path: Path) -> None:
    """Orbax forgets what was saved before it was opened, and would delete the best like any other.

    A run that is stopped in the middle of an evaluation has saved before it: the resume tells.
    """
    from parallel_train.checkpoint import open_checkpoints
    from parallel_train.replicas import digest
    from parallel_train.schedule import create_learning_rate_fn
    from parallel_train.state import initialise

    config = config_lib.with_dataset(config_lib.complete(tiny()), (28, 28, 1), 10)
    state = initialise(config, create_learning_rate_fn(config, 0.1, 8), make_mesh(1))
    accuracies = {1: 0.5, 2: 0.9, 3: 0.7, 5: 0.6}
    for step in range(1, 6):
        with open_checkpoints(tmp_path, keep=1) as checkpoints:
            for before in range(1, step + (told == 'before the save')):
                if before in accuracies:
                    checkpoints.evaluated(before, accuracies[before])
            assert checkpoints.save(step, state, digest(state)) and checkpoints.wait()
            kept = checkpoints.steps()
    assert kept == [2, 5]


def test_a_resume_learns_from_the_rows_which_checkpoint_is_the_best(tmp_path: Path) -> None:
    train_lib.train_and_evaluate(tiny(), tmp_path, devices=1)
    rows = read_rows(tmp_path)
    for row in rows:
        if row['split'] == 'eval':
            row['accuracy'] = {8: 0.99, 16: 0.2}.get(row['step'], 0.1)
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path / 'report.html').unlink()
    shutil.rmtree(tmp_path / 'checkpoints' / '24')
    train_lib.train_and_evaluate(tiny(keep_checkpoints=1), tmp_path, devices=1)
    assert {int(path.name) for path in (tmp_path / 'checkpoints').iterdir()} == {8, 24}


# ---------------------------------------------------------------- ahead of the devices

GATE = threading.Event()
OPENED: list[bool] = []  # of each wait at the gate: whether it was opened, or the patience was at its end


def wait_at_gate() -> np.float32:
    OPENED.append(GATE.wait(timeout=20))
    GATE.set()  # patience ends once
    return np.float32(0)


class Gated(nn.Module):
    """A linear model whose step in training is not complete on any device before the gate is opened."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if train:
            x = x + jax.pure_callback(wait_at_gate, jax.ShapeDtypeStruct((), jnp.float32))
        return nn.Dense(10)(x.reshape((x.shape[0], -1)))


@pytest.mark.parametrize('placement', ['device', 'host'])
def test_the_host_is_steps_ahead_of_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    """Three steps are dispatched, and the row after them is asked for, before the first is complete.

    A loop that waited for any of these would wait until the gate's patience is at its end.
    """
    GATE.clear()
    OPENED.clear()
    complete: list[bool] = []
    do_what_is_due = train_lib.do_what_is_due

    def opening(state: Any, run: Any) -> Any:
        state = do_what_is_due(state, run)
        if run.step == 3:
            complete.append(state.step.is_ready())
            GATE.set()
        return state

    monkeypatch.setattr(train_lib, 'do_what_is_due', opening)
    config = tiny(model=f'{__name__}:Gated', log_every_steps=3, data_placement=placement)
    state = train_lib.train_and_evaluate(config, tmp_path, devices=2)
    assert complete == [False]
    assert int(state.step) == 24 and OPENED == [True] * 2 * 24


def test_a_row_is_fetched_while_the_steps_after_it_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written when the next one is due, so that nobody waits for its numbers; at the end all are."""
    written: dict[int, list[int]] = {}
    do_what_is_due = train_lib.do_what_is_due

    def noting(state: Any, run: Any) -> Any:
        state = do_what_is_due(state, run)
        written[run.step] = [row['step'] for row in read_rows(tmp_path)]
        return state

    monkeypatch.setattr(train_lib, 'do_what_is_due', noting)
    # An evaluation or a save writes what waits: they come at the end alone.
    config = tiny(log_every_steps=3, eval_every_epochs=0.0, checkpoint_every_epochs=0.0)
    train_lib.train_and_evaluate(config, tmp_path, devices=2)
    assert sorted(written) == list(range(1, 25))
    for step in range(1, 24):
        last_due = step // 3 * 3
        assert written[step] == list(range(3, last_due, 3)), step
    assert [row['step'] for row in read_rows(tmp_path) if row['split'] == 'train'] == list(range(3, 25, 3))


# ---------------------------------------------------------------- several steps in one dispatch


def complete_config(**fields: Any) -> Any:
    return config_lib.with_dataset(config_lib.complete(tiny(**fields)), (28, 28, 1), 10)


@pytest.mark.parametrize(
    ('on_cpu', 'kind', 'reduction', 'count'),
    [
        (False, ResidentFeed, 'pmean', 5),
        (True, ResidentFeed, 'pmean', 1),
        (False, HostFeed, 'pmean', 1),
        (False, ResidentFeed, 'tree', 1),
    ],
)
def test_steps_in_one_dispatch_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool, kind: Any, reduction: str, count: int
) -> None:
    if not on_cpu:
        monkeypatch.setattr(run_lib, 'mesh_lib', SimpleNamespace(is_cpu=lambda mesh: False))
    config, mesh = complete_config(steps_per_dispatch=5, reduction=reduction, shards=4), make_mesh(2)
    split = Split(*noise('train', tmp_path), tuple(map(str, range(10))))
    feed = kind(split, config, make_plan(config, 256, 64, 2), mesh)
    assert run_lib.steps_per_dispatch(config, mesh, feed) == count
    feed.close()


# By hand, for 8 steps an epoch: after which steps the host has something to do.
WALKS: dict[str, tuple[int, dict[str, Any], Steps | None, list[int]]] = {
    'one at a time': (1, {'log_every_steps': 100}, None, list(range(1, 25))),
    'epochs end': (3, {'log_every_steps': 100}, None, [3, 6, 7, 8, 11, 14, 15, 16, 19, 22, 23, 24]),
    'whole epochs': (8, {'log_every_steps': 100}, None, [8, 16, 24]),
    'more than an epoch': (9, {'log_every_steps': 100}, None, list(range(1, 25))),
    'half an epoch at the end': (
        8,
        {'log_every_steps': 100, 'num_epochs': 2.5},
        None,
        [8, 16, 17, 18, 19, 20],
    ),
    'rows': (3, {'log_every_steps': 3}, None, [3, 6, 7, 8, 9, 12, 15, 16, 17, 18, 21, 24]),
    'checkpoints': (
        4,
        {'log_every_steps': 100, 'checkpoint_every_steps': 6},
        None,
        [4, 5, 6, 7, 8, 12, 16, 17, 18, 22, 23, 24],
    ),
    'comparisons of the devices': (
        4,
        {'log_every_steps': 100, 'divergence_check_steps': 10},  # every 5
        None,
        [4, 5, 6, 7, 8, 9, 10, 14, 15, 16, 20, 24],
    ),
    'a trace': (4, {'log_every_steps': 100}, Steps(5, 14), [4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 20, 24]),
}


@pytest.mark.parametrize('case', WALKS)
def test_no_dispatch_passes_what_is_due_nor_the_end_of_an_epoch(tmp_path: Path, case: str) -> None:
    largest, fields, profiled, expected = WALKS[case]
    plan = make_plan(complete_config(**fields), 256, 64, 2)
    run: Any = SimpleNamespace(
        step=0, plan=plan, profiler=Profiler(profiled, tmp_path, 0), train_steps={1: None, largest: None}
    )
    steps = []
    while run.step < plan.num_steps:
        end = min((run.step // plan.steps_per_epoch + 1) * plan.steps_per_epoch, plan.num_steps)
        run.step += train_lib.next_dispatch(run, end)
        steps.append(run.step)
    assert steps == expected


def test_a_run_with_several_steps_in_one_dispatch_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_lib.train_and_evaluate(tiny(), tmp_path / 'one', devices=2)
    # The loop alone takes these devices for others than CPUs, which get one step at a time.
    monkeypatch.setattr(run_lib, 'mesh_lib', SimpleNamespace(is_cpu=lambda mesh: False))
    counts: list[int] = []
    next_dispatch = train_lib.next_dispatch

    def noting(run: Any, end: int) -> int:
        counts.append(next_dispatch(run, end))
        return counts[-1]

    monkeypatch.setattr(train_lib, 'next_dispatch', noting)
    state = train_lib.train_and_evaluate(tiny(steps_per_dispatch=3), tmp_path / 'three', devices=2)
    assert counts == [3, 3, 1, 1, 1, 3, 3, 1, 1, 1, 3, 3] and int(state.step) == 24
    one, three = (without_timing(read_rows(tmp_path / name)) for name in ('one', 'three'))
    assert [row['step'] for row in three] == [row['step'] for row in one]
    for row, same in zip(three, one, strict=True):
        assert row.pop('split') == same.pop('split')
        assert row == pytest.approx(same, rel=1e-4)
