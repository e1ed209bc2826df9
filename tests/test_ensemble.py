"""Snapshots at the ends of cycles: made, kept, resumed, evaluated one by one and together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from parallel_train import UserError, load_model, start_devices
from parallel_train import train as train_lib
from parallel_train.checkpoint import open_checkpoints
from parallel_train.ensemble import snapshots
from tests.conftest import checkpoint_steps, read_rows, restore, run_cli, run_ok, without_timing
from tests.models_for_tests import noise, tiny

start_devices(8)

STEPS = [4, 12]  # ends of cycles of 1 and 2 epochs, of 4 steps each


def job(**fields: Any) -> Any:
    """256 examples in batches of 64; each checkpoint but the last and the snapshots is deleted."""
    return tiny(
        schedule='cosine_restarts', restart_epochs=1.0, restart_multiplier=2.0, num_epochs=3.0,
        warmup_epochs=0.0, learning_rate=0.5, batch_size=64, eval_every_epochs=0.5, eval_batch_size=20,
        checkpoint_every_steps=1, keep_checkpoints=1, model='tests.models_for_tests:NormDropoutNet', **fields,
    )  # fmt: skip


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp('restarts') / 'run'
    train_lib.train_and_evaluate(job(ema_decay=0.5, shards=4), workdir, devices=2)
    return workdir


def probabilities(workdir: Path, step: int, **options: Any) -> np.ndarray:
    model, variables = load_model(workdir, step, **options)
    images, _ = noise('test', Path())
    logits = np.asarray(model.apply(variables, images / np.float32(255)), np.float64)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_snapshots_are_planned_evaluated_saved_and_kept(run: Path) -> None:
    assert json.loads((run / 'plan.json').read_text())['snapshot_steps'] == STEPS == snapshots(run)
    evaluated = {row['step']: row['accuracy'] for row in read_rows(run) if row['split'] == 'eval'}
    assert set(evaluated) == {2, 4, 6, 8, 10, 12}
    best = max(evaluated, key=lambda step: (evaluated[step], step))
    # `keep_checkpoints` is 1: of the others, the best alone.
    assert set(checkpoint_steps(run)) == {*STEPS, best}


def test_evaluate_each_and_together(run: Path) -> None:
    """Exactly what the definition gives, by numpy on the probabilities of `load_model`."""
    base = ['evaluate', f'--workdir={run}', '--devices=2', '--json']
    found = json.loads(run_ok(*base, '--ensemble').stdout)
    _, labels = noise('test', Path())
    each = [probabilities(run, step) for step in STEPS]
    for row, step, p in zip(found['snapshots'], STEPS, each, strict=True):
        assert (row['step'], row['num_examples']) == (step, 64)
        assert row['accuracy'] == np.mean(p.argmax(1) == labels)
        assert row['loss'] == pytest.approx(-np.log(p[np.arange(64), labels]).mean(), rel=1e-5)
    mean = np.mean(each, axis=0)
    assert (found['step'], found['num_examples'], found['split']) == (12, 64, 'eval')
    assert found['accuracy'] == np.mean(mean.argmax(1) == labels)
    assert found['loss'] == pytest.approx(-np.log(mean[np.arange(64), labels]).mean(), rel=1e-5)
    # And each is what `evaluate --step` says, and what was logged.
    alone = json.loads(run_ok(*base, '--step=4').stdout)
    assert alone == found['snapshots'][0]
    [logged] = [row for row in read_rows(run) if row['split'] == 'eval' and row['step'] == 4]
    assert logged['accuracy'] == alone['accuracy']
    text = run_ok(*base[:-1], '--ensemble').stdout
    assert text.count('on all 64 examples') == 3 and 'the 2 snapshots together: accuracy' in text


def test_averages_or_the_parameters_themselves(run: Path) -> None:
    base = ['evaluate', f'--workdir={run}', '--devices=2', '--json', '--step=4']
    _, labels = noise('test', Path())
    for flags, averages in (([], True), (['--raw'], False)):
        loss = json.loads(run_ok(*base, *flags).stdout)['loss']
        p = probabilities(run, 4, averages=averages)
        assert loss == pytest.approx(-np.log(p[np.arange(64), labels]).mean(), rel=1e-5)
    arrays = restore(run, 4)
    for averages, prefix in ((True, "['ema']"), (False, '')):
        _, variables = load_model(run, 4, averages=averages)
        for path, leaf in jax.tree.leaves_with_path(variables):
            np.testing.assert_array_equal(leaf, arrays[prefix + jax.tree_util.keystr(path)])


@pytest.mark.parametrize('reduction', ['pmean', 'tree'])
def test_ensembles_with_any_reduction_and_devices(reduction: str, run: Path, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    shutil.copytree(run, workdir)
    config = json.loads((workdir / 'config.json').read_text())
    (workdir / 'config.json').write_text(json.dumps({**config, 'reduction': reduction}))
    results = [
        json.loads(
            run_ok('evaluate', f'--workdir={workdir}', f'--devices={n}', '--ensemble', '--json').stdout
        )
        for n in (1, 4)
    ]
    if reduction == 'tree':
        assert results[0] == results[1]
    assert results[0]['accuracy'] == results[1]['accuracy']
    assert results[0]['loss'] == pytest.approx(results[1]['loss'], rel=1e-5)


def test_resumed_within_a_cycle(run: Path, tmp_path: Path) -> None:
    """From a checkpoint inside the second cycle, on other devices: the same bits, the same snapshots."""
    config = job(reduction='tree', shards=4, ema_decay=0.5)
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    with config.unlocked():
        config.keep_checkpoints = 99
    train_lib.train_and_evaluate(config, whole, devices=1)
    shutil.copytree(whole, resumed)
    (resumed / 'report.html').unlink()
    for step in range(8, 13):
        shutil.rmtree(resumed / 'checkpoints' / str(step))
    with config.unlocked():
        config.keep_checkpoints = 1
    train_lib.train_and_evaluate(config, resumed, devices=4)
    a, b = restore(whole, 12), restore(resumed, 12)
    assert a.keys() == b.keys() and [name for name in a if a[name].tobytes() != b[name].tobytes()] == []
    assert without_timing(read_rows(whole)) == without_timing(read_rows(resumed))
    assert snapshots(resumed) == STEPS and set(STEPS) <= set(checkpoint_steps(resumed))
    assert len(checkpoint_steps(resumed)) <= 3


def test_what_cannot_be_an_ensemble(run: Path, tmp_path: Path) -> None:
    lost, half, other = tmp_path / 'lost', tmp_path / 'half', tmp_path / 'other'
    for workdir in (lost, half):
        shutil.copytree(run, workdir)
    shutil.rmtree(lost / 'checkpoints' / '4')
    with pytest.raises(UserError, match='lost the snapshots of step 4'):
        snapshots(lost)
    for step in checkpoint_steps(half):
        if step > 4:
            shutil.rmtree(half / 'checkpoints' / str(step))
    with pytest.raises(UserError, match='holds 1 snapshots'):
        snapshots(half)
    train_lib.train_and_evaluate(tiny(num_epochs=0.25), other, devices=1)
    for workdir, flags, words in [
        (other, ['--ensemble'], ['holds 0 snapshots', 'cosine_restarts']),
        (run, ['--ensemble', '--step=4'], ['step=4', 'leave out']),
        (run, ['--step=5'], ['step=5', '4']),
    ]:
        result = run_cli('evaluate', f'--workdir={workdir}', '--devices=1', *flags)
        assert (result.code, result.stdout) == (2, ''), result
        assert result.stderr.splitlines()[-1].startswith('error: '), result  # after what libtpu says
        assert all(word in result.stderr for word in words), result.stderr


def test_a_run_of_a_version_without_averages_and_snapshots_goes_on(tmp_path: Path) -> None:
    """Its config and plan lack the fields; its checkpoints hold no averages."""
    workdir, config = tmp_path / 'run', tiny(num_epochs=1.0, checkpoint_every_steps=4, keep_checkpoints=9)
    train_lib.train_and_evaluate(config, workdir, devices=2)
    want = restore(workdir, 8)
    new = ('ema_decay', 'label_smoothing', 'end_learning_rate', 'restart_epochs', 'beta2', 'snapshot_steps')
    for name in ('config.json', 'plan.json'):
        values = json.loads((workdir / name).read_text())
        (workdir / name).write_text(json.dumps({k: v for k, v in values.items() if k not in new}))
    shutil.rmtree(workdir / 'checkpoints' / '8')
    (workdir / 'report.html').unlink()
    changed = tiny(**{**config.to_dict(), 'ema_decay': 0.9})
    with pytest.raises(UserError, match='config.ema_decay was 0.0 and is 0.9'):
        train_lib.train_and_evaluate(changed, workdir, devices=2)
    with pytest.raises(UserError, match='config.ema_decay'):
        train_lib.train_and_evaluate(changed, workdir, devices=2, allow_plan_change=True)
    train_lib.train_and_evaluate(config, workdir, devices=2)
    got = restore(workdir, 8)
    assert [name for name in want if got[name].tobytes() != want[name].tobytes()] == []
    with open_checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.steps() == [4, 8]
