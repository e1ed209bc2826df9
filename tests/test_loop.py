"""The loop: never hangs, never compiles twice, never waits, and what is due happens in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax._src.compiler as jax_compiler
import numpy as np
import pytest

from parallel_train import config as config_lib
from parallel_train import train as train_lib
from parallel_train.dataset import Split
from parallel_train.errors import Diverged
from parallel_train.load import load_model
from parallel_train.mesh import make_mesh, start_devices
from parallel_train.metrics import read_rows
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


def test_the_best_checkpoint_is_known_after_a_resume(tmp_path: Path) -> None:
    """Orbax forgets what was saved before it was opened, and would delete the best like any other."""
    from parallel_train.checkpoint import open_checkpoints
    from parallel_train.replicas import digest
    from parallel_train.schedule import create_learning_rate_fn
    from parallel_train.state import initialise

    config = config_lib.with_dataset(config_lib.complete(tiny()), (28, 28, 1), 10)
    state = initialise(config, create_learning_rate_fn(config, 0.1, 8), make_mesh(1))
    for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.7), (4, None), (5, 0.6)]:
        with open_checkpoints(tmp_path, keep=1) as checkpoints:
            assert checkpoints.save(step, state, digest(state), accuracy) and checkpoints.wait()
            kept = checkpoints.steps()
    assert kept == [2, 5]
