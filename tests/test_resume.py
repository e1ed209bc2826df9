"""A run that is killed, at whatever moment, and started again ends as if it had never been killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel_train import workdir as workdir_lib
from parallel_train.config_fields import RUN_FIELDS
from parallel_train.plan import make_plan
from tests.conftest import (
    EVAL_EXAMPLES,
    NUM_STEPS,
    ROOT,
    STEPS_PER_EPOCH,
    TRAIN_EXAMPLES,
    Job,
    checkpoint_steps,
    cli,
    make_tiny_job,
    read_rows,
    restore,
    run_cli,
    run_ok,
    snapshot,
    without_timing,
)
from tests.test_idx import write_set

Moment = Callable[[Path], bool]


# ---------------------------------------------------------------- moments to be killed at


def last_row_step(workdir: Path) -> int:
    try:
        lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return max((json.loads(line)['step'] for line in lines if line.endswith('\n')), default=0)


def checkpoint_appeared(step: int) -> Moment:
    return lambda workdir: any(there >= step for there in checkpoint_steps(workdir))


def row_written(step: int) -> Moment:
    return lambda workdir: last_row_step(workdir) >= step


def both(first: Moment, second: Moment) -> Moment:
    return lambda workdir: first(workdir) and second(workdir)


def saving(step: int) -> Moment:
    """While a checkpoint from `step` on is half-written; soon after, should that be too quick to be seen."""

    def reached(workdir: Path) -> bool:
        names = [path.name for path in (workdir / 'checkpoints').glob('*tmp*')]
        return any(int(name.split('.')[0]) >= step for name in names) or last_row_step(workdir) >= step + 12

    return reached


def kill_at(moment: Moment, arguments: list[str], workdir: Path, env: dict[str, str]) -> None:
    """Starts a run and kills it, with no chance to clean up, as soon as `moment` has come."""
    process = subprocess.Popen(
        cli(*arguments), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not moment(workdir) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.003)
    came = moment(workdir)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    _, stderr = process.communicate()
    assert came, stderr
    assert process.returncode == -signal.SIGKILL, f'it ended before it could be killed\n{stderr}'


# ---------------------------------------------------------------- comparing


def assert_same_run(resumed: Path, reference: Path) -> None:
    """Everything that the two runs computed is equal, to the last bit."""
    assert without_timing(read_rows(resumed)) == without_timing(read_rows(reference))
    assert checkpoint_steps(resumed) == checkpoint_steps(reference)
    for step in checkpoint_steps(reference):
        got, want = restore(resumed, step), restore(reference, step)
        assert got.keys() == want.keys()
        different = [name for name in want if not np.array_equal(got[name], want[name])]
        assert not different, (step, different)
        assert got["['step']"] == step
    for name in ('config.json', 'plan.json'):
        assert (resumed / name).read_text() == (reference / name).read_text()


def assert_nearly_same_end(resumed: Path, reference: Path, step: int = NUM_STEPS) -> None:
    """What follows from config and plan is equal, what is computed but for sums in another order.

    As over 4 devices instead of 2: that moves the last bits of a float32 gradient (2**-24, 6e-8); some 30
    updates with momentum carry that on, and a ReLU that flips adds to it.
    """
    got, want = restore(resumed, step), restore(reference, step)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    rows, expected = without_timing(read_rows(resumed)), without_timing(read_rows(reference))
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        exact = {k: v for k, v in row.items() if k not in ('loss', 'accuracy', 'grad_norm')}
        assert exact == {k: other[k] for k in exact}
        assert row['loss'] == pytest.approx(other['loss'], rel=1e-3)
        assert row['accuracy'] == pytest.approx(other['accuracy'], abs=0.011)  # at most 2 of 192 examples


def copy(workdir: Path, to: Path) -> Path:
    return Path(shutil.copytree(workdir, to))


# ---------------------------------------------------------------- the runs


@pytest.fixture(scope='module')
def tiny_job(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, models_dir: Path) -> Job:
    """The tiny model (BatchNorm, dropout), with augmentation."""
    return make_tiny_job(
        tmp_path_factory.mktemp('recipe'),
        data_dir,
        models_dir,
        'config.random_crop_padding = 2\nconfig.random_flip = True\nconfig.weight_decay = 1e-4',
    )


@pytest.fixture(scope='module')
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_job: Job) -> Path:
    """A run of the tiny model that was never interrupted."""
    workdir = tmp_path_factory.mktemp('reference') / 'run'
    run_ok(*tiny_job.train(workdir), env=tiny_job.env)
    return workdir


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory: pytest.TempPathFactory, tiny_job: Job) -> Path:
    """A run of the tiny model killed early, and again once checkpoint 18 was there. Only to be copied."""
    workdir = tmp_path_factory.mktemp('interrupted') / 'run'
    kill_at(row_written(4), tiny_job.train(workdir), workdir, tiny_job.env)  # no checkpoint yet, or hardly
    kill_at(checkpoint_appeared(18), tiny_job.train(workdir), workdir, tiny_job.env)
    assert 18 <= max(checkpoint_steps(workdir)) < NUM_STEPS
    return workdir


# ---------------------------------------------------------------- as if never killed


@pytest.mark.slow
def test_killed_twice_cnn(trained: Path, job: Job, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    arguments = job.train(workdir)
    kill_at(checkpoint_appeared(6), arguments, workdir, job.env)
    assert not (workdir / 'report.html').exists()
    mid_epoch = both(row_written(32), checkpoint_appeared(30))
    kill_at(mid_epoch, arguments, workdir, job.env)
    latest = max(checkpoint_steps(workdir))
    assert STEPS_PER_EPOCH < latest < NUM_STEPS
    result = run_ok(*arguments)
    assert f'resuming from step {latest}' in result.stdout
    assert_same_run(workdir, trained)
    assert (workdir / 'report.html').exists()


@pytest.mark.slow
def test_killed_while_saving_and_before_the_report(
    tiny_job: Job, reference: Path, interrupted: Path, tmp_path: Path
) -> None:
    """With BatchNorm, dropout and augmentation; a row cut off by the crash is put right as well."""
    workdir = copy(interrupted, tmp_path / 'run')
    with open(workdir / 'metrics.jsonl', 'a') as file:
        file.write('{"split": "train", "st')
    arguments = tiny_job.train(workdir)
    kill_at(saving(24), arguments, workdir, tiny_job.env)
    kill_at(row_written(NUM_STEPS), arguments, workdir, tiny_job.env)
    result = run_ok(*arguments, env=tiny_job.env)
    assert 'resuming from step' in result.stdout
    assert_same_run(workdir, reference)
    assert list((workdir / 'checkpoints').glob('*tmp*')) == []


def test_a_second_run_of_the_same_config_is_the_same_run(
    tiny_job: Job, reference: Path, interrupted: Path
) -> None:
    """Up to where it was killed. (Rows of different runs can be compared at all.)"""
    rows = without_timing(read_rows(interrupted))
    assert rows == without_timing(read_rows(reference))[: len(rows)]


def test_resume_on_another_device_count(
    tiny_job: Job, reference: Path, interrupted: Path, tmp_path: Path
) -> None:
    workdir = copy(interrupted, tmp_path / 'run')
    run_ok(*tiny_job.train(workdir, devices=4), env=tiny_job.env)
    plans = [json.loads((path / 'plan.json').read_text()) for path in (workdir, reference)]
    assert [plan.pop('num_devices') for plan in plans] == [4, 2]
    assert [plan.pop('per_device_batch_size') for plan in plans] == [12, 24]
    assert plans[0] == plans[1]
    assert_nearly_same_end(workdir, reference)


# ---------------------------------------------------------------- what a resume may change

RUN_FIELD_CHANGES: dict[str, Any] = {
    'data_placement': 'host',
    'steps_per_dispatch': 3,
    'keep_checkpoints': 1,
    'checkpoint_every_minutes': 5.0,
    'divergence_check_steps': 7,
    'max_corrupt_examples': 2,
}


def test_all_fields_of_the_run_change_at_once(
    tiny_job: Job, reference: Path, interrupted: Path, tmp_path: Path
) -> None:
    workdir = copy(interrupted, tmp_path / 'run')
    before = json.loads((workdir / 'config.json').read_text())
    assert RUN_FIELD_CHANGES.keys() == set(RUN_FIELDS)
    assert not [field for field, value in RUN_FIELD_CHANGES.items() if before[field] == value]
    flags = [f'--config.{field}={value}' for field, value in RUN_FIELD_CHANGES.items()]
    result = run_ok(*tiny_job.train(workdir, *flags), env=tiny_job.env)
    assert f'resuming from step {max(checkpoint_steps(interrupted))}' in result.stdout
    assert json.loads((workdir / 'config.json').read_text()) == {**before, **RUN_FIELD_CHANGES}
    assert json.loads((workdir / 'plan.json').read_text())['divergence_check_steps'] == 7
    assert_nearly_same_end(workdir, reference)
    assert len(checkpoint_steps(workdir)) <= 2  # the last, and the best where that is another


def run_half(job: Job, workdir: Path, *flags: str) -> list[str]:
    """Trains 12 steps, of which the last 6 are then lost; returns the command."""
    arguments = job.train(workdir, '--config.num_epochs=0.5', *flags)
    run_ok(*arguments, env=job.env)
    shutil.rmtree(workdir / 'checkpoints' / '12')
    (workdir / 'report.html').unlink()
    assert checkpoint_steps(workdir) == [6]
    return arguments


def warnings_of(workdir: Path, devices: int, environment: dict[str, str]) -> list[str]:
    """What a resume on so many devices in this environment is told."""
    config = workdir_lib.read_config(workdir)
    plan = make_plan(config, TRAIN_EXAMPLES, EVAL_EXAMPLES, devices)
    return workdir_lib.changes(workdir, config, plan, environment)


@pytest.mark.slow
def test_other_shards_are_said_where_the_config_fixes_none(tiny_job: Job, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    arguments = run_half(tiny_job, workdir, '--config.shards=0')
    was = json.loads((workdir / 'environment.json').read_text())
    assert warnings_of(workdir, 2, was) == []
    result = run_ok(*arguments, '--devices=4', env=tiny_job.env)
    assert (
        'warning: with config.shards=0 there are now 4 shards, not 2: groups of BatchNorm and keys of '
        'dropout change; set config.shards to keep them\n'
    ) in result.stdout
    assert 'resuming from step 6' in result.stdout and checkpoint_steps(workdir)[-1] == 12


@pytest.mark.slow
def test_what_numbers_depend_on_is_said_where_it_changes(tiny_job: Job, tmp_path: Path) -> None:
    workdir, name = tmp_path / 'run', 'threads of XLA (CPU)'
    arguments = run_half(tiny_job, workdir, '--config.reduction=tree')
    was = json.loads((workdir / 'environment.json').read_text())
    assert warnings_of(workdir, 4, {**was, 'processes': '2'}) == []  # these change no bit
    other = '(150, 28, 28, 1), 01234567, 89abcdef'
    (workdir / 'environment.json').write_text(json.dumps({**was, name: '999', 'eval split': other}))
    result = run_ok(*arguments, env=tiny_job.env)
    assert (
        'warning: the last bits may not be those of a run that went on as it began: '
        f'{name} was 999, is {was[name]}\n'
        'warning: the eval split is not the one that this job last started with: (shape, digests) '
        f'was {other}, is {was["eval split"]}; what is saved and logged so far is of that one\n'
    ) in result.stdout
    assert json.loads((workdir / 'environment.json').read_text()) == was  # of the last start


def test_no_update_counts_in_two_rows(tiny_job: Job, tmp_path: Path) -> None:
    """Killed after a resume that logs at other steps than before: a row was written, its sums were saved."""
    once, twice = tmp_path / 'once', tmp_path / 'twice'
    run_half(tiny_job, once)
    other = ['--config.num_epochs=0.5', '--config.log_every_steps=3', '--allow_plan_change']
    copy(once, twice)
    for workdir, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            shutil.rmtree(workdir / 'checkpoints' / '12', ignore_errors=True)
            (workdir / 'report.html').unlink(missing_ok=True)
            result = run_ok(*tiny_job.train(workdir, *other), env=tiny_job.env)
            assert 'resuming from step 6' in result.stdout
    rows = without_timing(read_rows(twice))
    assert [row['step'] for row in rows if row['split'] == 'train'] == [4, 6, 9, 12]
    assert rows == without_timing(read_rows(once))


@pytest.mark.slow
def test_shards_that_are_no_power_of_two_go_on_on_any_devices_that_divide_them(
    tiny_job: Job, tmp_path: Path
) -> None:
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    arguments = run_half(tiny_job, half, '--config.shards=12')
    assert 'resuming from step 6' in run_ok(*arguments, '--devices=3', env=tiny_job.env).stdout
    run_ok(*tiny_job.train(whole, '--config.shards=12', '--config.num_epochs=0.5'), env=tiny_job.env)
    assert_nearly_same_end(half, whole, 12)


# ---------------------------------------------------------------- another job in the same workdir

CHANGES: dict[str, tuple[list[str], list[str]]] = {
    'batch size': (['--config.batch_size=96'], ['config.batch_size', '48', '96']),
    'rate': (['--config.learning_rate=0.1'], ['config.learning_rate', '0.05', '0.1']),
    'epochs': (['--config.num_epochs=3'], ['config.num_epochs', '2.0', '3.0']),
    'model': (['--config.model=cnn'], ['config.model', 'own_models:Tiny', 'cnn']),
    'seed': (['--config.seed=7'], ['config.seed', '0', '7']),
    'split': (['--config.train_split=train[:1150]'], ['config.train_split', 'train[:1150]']),
    'two': (['--config.seed=7', '--config.shards=4'], ['config.seed', 'config.shards']),
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_job_is_refused(tiny_job: Job, interrupted: Path, change: str) -> None:
    flags, words = CHANGES[change]
    before = snapshot(interrupted)
    result = run_cli(*tiny_job.train(interrupted, *flags), env=tiny_job.env)
    assert (result.code, result.stdout) == (2, ''), result
    assert result.stderr.startswith('error: ') and 'Traceback' not in result.stderr
    for word in [*words, str(interrupted), '--allow_plan_change']:
        assert word in result.stderr
    assert snapshot(interrupted) == before


def test_other_data_under_the_same_name_is_refused(tiny_job: Job, interrupted: Path, tmp_path: Path) -> None:
    source = write_set(tmp_path / 'idx', train=960, test=300)
    run_ok(*tiny_job.line('prepare', f'--data_dir={tmp_path / "d"}', f'--from={source}'))
    before = snapshot(interrupted)
    arguments = [*tiny_job.train(interrupted), f'--data_dir={tmp_path / "d"}']
    result = run_cli(*arguments, env=tiny_job.env)
    assert result.code == 2
    assert 'num_train_examples was 1200 and is 960' in result.stderr
    assert snapshot(interrupted) == before


def test_allowed_change_goes_on_from_the_checkpoint(tiny_job: Job, interrupted: Path, tmp_path: Path) -> None:
    workdir = copy(interrupted, tmp_path / 'run')
    latest = max(checkpoint_steps(workdir))
    flags = ['--config.num_epochs=2.2', '--config.learning_rate=0.02', '--allow_plan_change']
    result = run_ok(*tiny_job.train(workdir, *flags), env=tiny_job.env)
    assert f'resuming from step {latest}' in result.stdout
    rows, old = read_rows(workdir), read_rows(interrupted)
    kept = [row for row in old if row['step'] <= latest]
    assert rows[: len(kept)] == kept and rows[-1]['step'] == 55
    assert max(row['learning_rate'] for row in rows[len(kept) :] if 'learning_rate' in row) <= 0.02
    assert json.loads((workdir / 'config.json').read_text())['learning_rate'] == 0.02
    assert json.loads((workdir / 'plan.json').read_text())['num_steps'] == 55
    assert restore(workdir, 55)["['step']"] == 55


def test_allowed_change_of_the_model_loses_nothing(tiny_job: Job, interrupted: Path, tmp_path: Path) -> None:
    """Another model cannot go on from these arrays, allowed or not."""
    workdir = copy(interrupted, tmp_path / 'run')
    before = contents(workdir)
    arguments = tiny_job.train(workdir, '--config.model=cnn', '--allow_plan_change')
    result = run_cli(*arguments, env=tiny_job.env)
    assert (result.code, result.stdout) == (2, '') and 'Traceback' not in result.stderr
    assert contents(workdir) == before
    assert result.stderr.startswith('error: ') and 'config.model' in result.stderr


def test_allowed_change_to_fewer_steps_than_are_trained(tiny_job: Job, interrupted: Path) -> None:
    before = contents(interrupted)
    arguments = tiny_job.train(interrupted, '--config.num_epochs=0.6', '--allow_plan_change')
    result = run_cli(*arguments, env=tiny_job.env)
    assert (result.code, result.stdout) == (2, ''), result  # no plan of what will not happen
    assert 'config.num_epochs=0.6' in result.stderr and 'trained already' in result.stderr
    assert contents(interrupted) == before


def test_job_of_a_version_that_had_fewer_fields(
    tiny_job: Job, reference: Path, interrupted: Path, tmp_path: Path
) -> None:
    """What it does not say has its default; another value than that is a change like any other."""
    workdir = copy(interrupted, tmp_path / 'run')
    config = json.loads((workdir / 'config.json').read_text())
    del config['nesterov'], config['reduction']
    (workdir / 'config.json').write_text(json.dumps(config))
    changed = run_cli(*tiny_job.train(workdir, '--config.nesterov=True'), env=tiny_job.env)
    assert changed.code == 2 and 'config.nesterov was False and is True' in changed.stderr
    run_ok(*tiny_job.train(workdir), env=tiny_job.env)
    assert_same_run(workdir, reference)


def contents(workdir: Path) -> dict[str, Any]:
    """Files and what they hold, but for who holds it, and checkpoints that a killed run left half-written."""
    held = snapshot(workdir).items()
    return {name: data for name, (_, data) in held if 'tmp' not in name and name != '.lock'}
