"""Every command as a person types it: what it prints, what it writes, with which code it ends."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel_train import cli as cli_lib
from parallel_train import commands, events
from tests.conftest import (
    BATCH_SIZE,
    CHECKPOINT_EVERY,
    EPOCHS,
    EVAL_EXAMPLES,
    LOG_EVERY,
    NUM_STEPS,
    PEAK_RATE,
    ROOT,
    STEPS_PER_EPOCH,
    TRAIN_EXAMPLES,
    WARMUP_EPOCHS,
    Job,
    checkpoint_steps,
    cli,
    environment,
    on_read_only,
    read_rows,
    restore,
    run_cli,
    run_ok,
    snapshot,
)

HARDWARE_FIELDS = {'num_devices', 'num_processes', 'per_device_batch_size'}
PLAN_FIELDS = HARDWARE_FIELDS | {
    'num_train_examples', 'num_eval_examples', 'batch_size', 'accumulation_steps', 'shards',
    'steps_per_epoch', 'dropped_examples_per_epoch', 'num_steps', 'warmup_steps', 'decay_steps',
    'boundaries', 'peak_learning_rate', 'final_learning_rate', 'learning_rate_at', 'eval_steps',
}  # fmt: skip
BOTH_FIELDS = {'split', 'step', 'epoch', 'loss', 'accuracy'}
TRAIN_FIELDS = BOTH_FIELDS | {'learning_rate', 'grad_norm', 'examples_per_second', 'data_wait_fraction'}
EVAL_FIELDS = BOTH_FIELDS | {'num_examples'}


def hand_rate(completed: int) -> float:
    """The guide's schedule, written down once more: the rate of the update after `completed` ones."""
    warmup = WARMUP_EPOCHS * STEPS_PER_EPOCH
    if completed < warmup:
        return PEAK_RATE * completed / warmup
    done = (completed - warmup) / ((EPOCHS - WARMUP_EPOCHS) * STEPS_PER_EPOCH)
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


def of_split(workdir: Path, split: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(workdir) if row['split'] == split]


# ---------------------------------------------------------------- prepare


def test_prepare_a_second_time_says_that_it_is_there(job: Job) -> None:
    before = snapshot(job.data_dir)
    result = run_ok(*job.line('prepare'))
    assert 'already prepared' in result.stdout
    assert re.search(rf'train\D+{TRAIN_EXAMPLES:,} examples', result.stdout)
    assert re.search(rf'test\D+{EVAL_EXAMPLES} examples', result.stdout)
    assert snapshot(job.data_dir) == before


# ---------------------------------------------------------------- plan


def plan_json(job: Job, *flags: str, cwd: Path | None = None) -> dict[str, Any]:
    return json.loads(run_ok(*job.line('plan', '--json', *flags), cwd=cwd).stdout)


def test_plan_is_shown_as_a_table(job: Job) -> None:
    out = run_ok(*job.line('plan', '--devices=4')).stdout
    assert re.search(r'48 = 4 devices × 12 examples × 1', out)
    assert re.search(rf'steps in all +{NUM_STEPS}\b', out)
    assert '8 of 6 examples' in out and f'{TRAIN_EXAMPLES:,}' in out and 'WARNING' not in out


def test_plan_on_a_terminal_that_knows_no_unicode(job: Job) -> None:
    out = run_ok(*job.line('plan', '--devices=4'), env={**job.env, 'PYTHONIOENCODING': 'ascii'}).stdout
    assert r'48 = 4 devices \xd7 12 examples' in out


def test_plan_json_is_the_same_on_any_device_count(job: Job) -> None:
    plans = {n: plan_json(job, f'--devices={n}') for n in (1, 2, 4, 8)}
    for devices, plan in plans.items():
        assert set(plan) >= PLAN_FIELDS
        assert (plan['num_devices'], plan['num_processes']) == (devices, 1)
        assert plan['per_device_batch_size'] * devices == BATCH_SIZE
        common = {k: v for k, v in plan.items() if k not in HARDWARE_FIELDS}
        assert common == {k: v for k, v in plans[1].items() if k not in HARDWARE_FIELDS}
    plan = plans[1]
    assert (plan['num_train_examples'], plan['num_eval_examples']) == (TRAIN_EXAMPLES, EVAL_EXAMPLES)
    assert (plan['steps_per_epoch'], plan['num_steps']) == (STEPS_PER_EPOCH, NUM_STEPS)
    assert (plan['batch_size'], plan['shards']) == (BATCH_SIZE, 8)
    assert plan['dropped_examples_per_epoch'] == 0
    assert plan['eval_steps'] == math.ceil(EVAL_EXAMPLES / 128)
    assert (
        plan['boundaries'] == [13] and plan['warmup_steps'] == 13
    )  # 12.5, and update 13 is the first past it
    assert plan['peak_learning_rate'] == PEAK_RATE
    assert plan['final_learning_rate'] == pytest.approx(hand_rate(NUM_STEPS - 1), rel=1e-9)
    for step, rate in plan['learning_rate_at'].items():
        assert rate == pytest.approx(hand_rate(int(step)), rel=1e-9, abs=1e-12)


def test_plan_says_that_the_number_of_devices_is_an_estimate(job: Job, tmp_path: Path) -> None:
    """Where nothing was measured, and nothing is: the plan writes nothing."""
    env = {**job.env, 'XDG_CACHE_HOME': str(tmp_path / 'cache'), 'JAX_PLATFORMS': 'cpu'}
    flags = ['--config.batch_size=1024', '--config.shards=0']  # several numbers fit, however many the cores
    out = run_ok(*job.line('plan', *flags), env=env).stdout
    [note] = [line for line in out.splitlines() if line.startswith('devices: ')]
    count = json.loads(run_ok(*job.line('plan', '--json', *flags), env=env).stdout)['num_devices']
    assert note.startswith(f'devices: {count} is an estimate')
    assert f'1024 = {count} device' in out
    given = run_ok(*job.line('plan', *flags, '--devices=2'), env=env).stdout
    assert '1024 = 2 devices' in given and 'estimate' not in given
    assert list(tmp_path.iterdir()) == []


def test_plan_for_hardware_that_is_not_here_writes_nothing(job: Job, tmp_path: Path) -> None:
    data = snapshot(job.data_dir)
    flags = ['--devices=256', '--config.batch_size=512', '--config.shards=0', '--workdir=run']
    plan = plan_json(job, *flags, cwd=tmp_path)
    assert (plan['num_devices'], plan['per_device_batch_size'], plan['shards']) == (256, 2, 256)
    assert list(tmp_path.iterdir()) == []
    assert snapshot(job.data_dir) == data


def test_plan_without_data_takes_the_sizes_of_the_config(tmp_path: Path) -> None:
    sizes = {'num_train_examples': 60000, 'num_eval_examples': 10000, 'batch_size': 256}
    given = [f'--config.{key}={value}' for key, value in sizes.items()]
    default = Job(ROOT / 'configs/default.py', tmp_path / 'none', environment())
    plan = plan_json(default, '--devices=8', *given, cwd=tmp_path)
    assert (plan['steps_per_epoch'], plan['dropped_examples_per_epoch']) == (234, 96)
    assert plan['num_steps'] == 2340
    assert list(tmp_path.iterdir()) == []


def test_plan_warns_loudly_of_an_unfinished_decay(job: Job) -> None:
    flags = ['--devices=2', '--config.num_epochs=1', '--config.warmup_epochs=0.5']
    out = run_ok(*job.line('plan', *flags)).stdout
    assert 'THE DECAY WILL NOT BE FINISHED' in out


# ---------------------------------------------------------------- train


def test_train_leaves_a_whole_workdir(trained: Path) -> None:
    assert {path.name for path in trained.iterdir() if not path.name.startswith('events.')} == {
        'config.json', 'plan.json', 'environment.json', 'metrics.jsonl', 'checkpoints', 'report.html',
        'plots', '.lock',
    }  # fmt: skip
    assert [p.stat().st_size > 0 for p in trained.glob('events.*')] == [True]
    config = json.loads((trained / 'config.json').read_text())
    assert (config['model'], config['batch_size'], config['num_classes']) == ('cnn', BATCH_SIZE, 10)
    assert config['input_shape'] == [28, 28, 1] and config['momentum'] == 0.9
    assert checkpoint_steps(trained) == [42, 48, 50]  # of every 6 steps and the end, the last 3
    report = (trained / 'report.html').read_text()
    assert len(report) > 10_000 and '</html>' in report and 'src="http' not in report
    assert '--config=' in report  # the command that made it
    plots = list((trained / 'plots').glob('*.png'))
    assert len(plots) >= 3
    assert all(path.read_bytes().startswith(b'\x89PNG\r\n') for path in plots)


def test_train_follows_the_plan_that_was_shown(trained: Path, job: Job) -> None:
    plan = json.loads((trained / 'plan.json').read_text())
    assert plan == plan_json(job, '--devices=2')
    out = (trained.parent / 'stdout').read_text()
    assert out.startswith('Plan\n') or '\nPlan\n' in out
    assert out.index('Plan\n') < out.index('epoch ')
    last = of_split(trained, 'eval')[-1]
    assert f'{last["accuracy"]:.4f}' in out and str(trained / 'report.html') in out


def test_last_lines_say_how_fast_it_was_and_where_the_time_went(trained: Path) -> None:
    out = (trained.parent / 'stdout').read_text()
    [speed] = re.findall(r'^images/s: ([\d,]+)$', out, re.MULTILINE)
    rates = [row['examples_per_second'] for row in of_split(trained, 'train')]
    assert min(rates) - 1 <= int(speed.replace(',', '')) <= max(rates) + 1  # it is their mean
    [line] = re.findall(r'^time: (.+)$', out, re.MULTILINE)
    parts = re.findall(r'([a-z][a-z -]*) (\d+\.\d) s(?:, |$)', line)
    assert line == ', '.join(f'{name} {seconds} s' for name, seconds in parts)
    assert sorted(name for name, _ in parts) == ['compile', 'data wait', 'eval', 'save', 'start-up', 'step']
    seconds = [float(text) for _, text in parts]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > 0


def test_report_shows_test_images_with_what_the_model_says(trained: Path, data_dir: Path) -> None:
    images = (trained / 'report.html').read_text().partition('<h2>Test images</h2>')[2]
    images = images.partition('</section>')[0]
    last = of_split(trained, 'eval')[-1]
    wrong = min(round((1 - last['accuracy']) * EVAL_EXAMPLES), 8)  # of those that there are, so many
    assert images.count('src="data:image/png;base64,') == 24
    assert images.count('class="wrong"') == images.count('✗') == wrong
    assert f'{24 - wrong} of these 24 are right' in images
    names = (data_dir / 'fashion_mnist/3.0.1/label.labels.txt').read_text().splitlines()
    shown = re.findall(r'alt="([^"]+)"', images)
    assert len(shown) == 24 and set(shown) <= set(names) and len(set(shown)) > 1
    assert (trained / 'plots/samples.png').read_bytes().startswith(b'\x89PNG\r\n')


def test_tensorboard_is_told_what_the_rows_hold(trained: Path) -> None:
    [path] = trained.glob('events.*')
    version, start, *told = events.read(path)
    assert version.file_version == 'brain.Event:2'
    assert start.session_log.status == start.session_log.START and start.step == 1
    rows = read_rows(trained)
    assert [event.step for event in told] == [row['step'] for row in rows]
    for event, row in zip(told, rows, strict=True):
        values = {value.tag: value.simple_value for value in event.summary.value}
        named = {f'{row["split"]}/{name}': value for name, value in row.items() if name != 'split'}
        del named[f'{row["split"]}/step']
        assert values == pytest.approx(named, rel=1e-6)  # kept as float32


def test_train_writes_nothing_to_stderr(trained: Path) -> None:
    assert (trained.parent / 'stderr').read_text() == ''


def test_rows_hold_what_the_contract_says(trained: Path) -> None:
    train, evaluations = of_split(trained, 'train'), of_split(trained, 'eval')
    assert all(set(row) == TRAIN_FIELDS for row in train)
    assert all(set(row) == EVAL_FIELDS for row in evaluations)
    assert [row['step'] for row in train] == [*range(LOG_EVERY, NUM_STEPS, LOG_EVERY), NUM_STEPS]
    assert [row['step'] for row in evaluations] == [STEPS_PER_EPOCH, NUM_STEPS]
    for row in [*train, *evaluations]:
        assert row['epoch'] == row['step'] / STEPS_PER_EPOCH
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
        assert 0 <= row['accuracy'] <= 1
    for row in train:
        assert row['examples_per_second'] > 0 and 0 <= row['data_wait_fraction'] <= 1
        assert row['grad_norm'] > 0
    assert all(row['num_examples'] == EVAL_EXAMPLES for row in evaluations)
    steps = [row['step'] for row in read_rows(trained)]
    assert steps == sorted(steps)


def test_rate_of_each_row_is_that_of_the_update_that_completed_it(trained: Path) -> None:
    for row in of_split(trained, 'train'):
        assert row['learning_rate'] == pytest.approx(hand_rate(row['step'] - 1), rel=1e-6)


def test_it_learns(trained: Path) -> None:
    train, evaluations = of_split(trained, 'train'), of_split(trained, 'eval')
    assert train[0]['loss'] > 2  # near ln 10 = 2.3, chance
    assert train[-1]['loss'] < 0.3
    assert evaluations[-1]['loss'] < evaluations[0]['loss']
    assert evaluations[-1]['accuracy'] > 0.95


def test_checkpoints_are_labelled_by_completed_steps(trained: Path) -> None:
    for step in checkpoint_steps(trained):
        assert step % CHECKPOINT_EVERY == 0 or step == NUM_STEPS
        assert restore(trained, step)["['step']"] == step


def test_training_again_in_a_finished_workdir_changes_no_result(
    trained: Path, job: Job, tmp_path: Path
) -> None:
    workdir = Path(shutil.copytree(trained, tmp_path / 'run'))
    result = run_ok(*job.train(workdir))
    for name in ('metrics.jsonl', 'config.json', 'plan.json'):
        assert (workdir / name).read_bytes() == (trained / name).read_bytes()
    assert snapshot(workdir / 'checkpoints') == snapshot(trained / 'checkpoints')
    assert 'accuracy' in result.stdout


def test_divergence_has_its_own_exit_code(job: Job, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    result = run_cli(*job.train(workdir, '--config.learning_rate=1e30'))
    assert result.code == 3, result
    assert result.stderr.startswith('error: ') and 'Traceback' not in result.stderr
    assert 'diverged' in result.stderr and 'config.learning_rate' in result.stderr
    saved = checkpoint_steps(workdir)
    said = f'the checkpoint of step {max(saved)} stands' if saved else 'no checkpoint was made yet'
    assert said in result.stderr, saved
    for step in saved:
        assert all(np.isfinite(x).all() for x in restore(workdir, step).values())
    for line in (workdir / 'metrics.jsonl').read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))


@pytest.mark.slow
def test_train_from_a_read_only_data_dir(job: Job, data_dir: Path, tmp_path: Path) -> None:
    """Prepared, but never decoded: the arrays go into the user's cache, and later runs find them there."""
    ignore = shutil.ignore_patterns('decoded')
    data = Path(shutil.copytree(data_dir, tmp_path / 'data', ignore=ignore))
    before, env = snapshot(data), {**job.env, 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    outputs = []
    for run in ('first', 'second'):
        flags = [f'--data_dir={data}', '--config.num_epochs=0.2', '--config.warmup_epochs=0.1']
        command = on_read_only(data, cli(*job.train(tmp_path / run, *flags)))
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append([line for line in done.stdout.splitlines() if 'decod' in line])
    assert snapshot(data) == before
    assert [len(lines) for lines in outputs] == [2, 0], outputs  # one line a split, once
    assert all(f'{data}' in line and f'{tmp_path / "cache"}' in line for line in outputs[0]), outputs


# ---------------------------------------------------------------- evaluate


def evaluate(workdir: Path, data_dir: Path, *flags: str) -> dict[str, Any]:
    """Without --config, unless `flags` give one: the workdir knows it."""
    result = run_ok('evaluate', f'--workdir={workdir}', f'--data_dir={data_dir}', '--json', *flags)
    return json.loads(result.stdout)


def test_evaluate_gives_the_last_row(trained: Path, data_dir: Path) -> None:
    row = of_split(trained, 'eval')[-1]
    checkpoints = snapshot(trained)
    found = evaluate(trained, data_dir)  # without --config, on the devices that the run used
    assert (found['step'], found['num_examples']) == (NUM_STEPS, EVAL_EXAMPLES)
    assert (found['accuracy'], found['loss']) == (row['accuracy'], row['loss'])
    assert snapshot(trained) == checkpoints


def test_evaluate_on_other_devices_in_other_batches(trained: Path, data_dir: Path, recipe: Path) -> None:
    row = of_split(trained, 'eval')[-1]
    flags = ['--devices=3', f'--config={recipe}', '--config.eval_batch_size=7']
    found = evaluate(trained, data_dir, *flags)
    assert (found['accuracy'], found['num_examples']) == (row['accuracy'], EVAL_EXAMPLES)
    # 300 losses of about 1, added in another order: a relative 1e-5 is far above float32 rounding.
    assert found['loss'] == pytest.approx(row['loss'], rel=1e-5, abs=1e-6)


def test_evaluate_takes_the_overrides_of_the_run(trained: Path, job: Job) -> None:
    """The words of `train` may be said again; others that change nothing are refused (test_bad_input)."""
    given = [
        '--config.batch_size=48',
        '--config.num_epochs=2',
        '--noconfig.nesterov',
        '--config.eval_split=train',
    ]
    found = evaluate(trained, job.data_dir, f'--config={job.recipe}', *given)
    assert found['num_examples'] == TRAIN_EXAMPLES


def test_evaluate_an_earlier_checkpoint(trained: Path, data_dir: Path) -> None:
    step = NUM_STEPS - 8
    found = evaluate(trained, data_dir, f'--step={step}')
    assert found['step'] == step
    assert found['loss'] != of_split(trained, 'eval')[-1]['loss']


# ---------------------------------------------------------------- the trained model elsewhere


def test_loaded_model_has_the_accuracy_of_the_last_row(trained: Path, idx_dir: Path) -> None:
    code = f"""
import numpy as np, jax
from pathlib import Path
from parallel_train import idx, load_model
model, variables = load_model({str(trained)!r})
images, labels = idx.load(Path({str(idx_dir)!r})).splits['test']
logits = model.apply(variables, images[..., None].astype(np.float32) / 255)
assert {{d.id for x in jax.tree.leaves(variables) for d in x.devices()}} == {{0}}
print(float((np.asarray(logits).argmax(-1) == labels).mean()))
"""
    accuracy = float(run_python(code).splitlines()[-1])
    assert accuracy == pytest.approx(of_split(trained, 'eval')[-1]['accuracy'], abs=1e-6)


def test_loaded_model_takes_images_that_are_normalised_as_in_its_run(
    job: Job, idx_dir: Path, tmp_path: Path
) -> None:
    from parallel_train import idx, load_model, start_devices

    mean, std = 0.25, 0.5
    fields = {'model': 'tests.models_for_tests:Linear', 'num_epochs': 1.0}
    fields |= {'pixel_mean': f'({mean},)', 'pixel_std': f'({std},)'}
    run_ok(*job.train(tmp_path / 'run', *(f'--config.{name}={value}' for name, value in fields.items())))
    row = of_split(tmp_path / 'run', 'eval')[-1]
    start_devices(8)  # as every test that uses JAX in this process: the first one decides
    model, variables = load_model(tmp_path / 'run')
    files = idx.load(idx_dir)
    assert files is not None
    pixels, labels = files.splits['test']
    images = ((pixels[..., None] / 255 - mean) / std).astype(np.float32)
    logits = np.asarray(model.apply(variables, images), np.float64)
    assert np.mean(logits.argmax(-1) == labels) == pytest.approx(row['accuracy'], abs=1e-6)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]
    assert losses.mean() == pytest.approx(row['loss'], rel=1e-4)


# ---------------------------------------------------------------- help, entry point, imports


def run_python(code: str, *args: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, '-c', code, *args],
        cwd=cwd or ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('words', [['--help'], ['help'], ['train', '--help']])
def test_help(words: list[str]) -> None:
    out = run_ok(*words).stdout
    for word in ('prepare', 'plan', 'train', 'evaluate', '--config', '--workdir', '--data_dir', '--devices'):
        assert word in out


def test_no_command_shows_the_usage_and_is_an_error() -> None:
    done = subprocess.run(cli(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'COMMAND' in done.stdout + done.stderr


@pytest.mark.parametrize(
    ('words', 'value'),
    [
        (['--config.random_flip'], True),
        (['--config.random_flip=True'], True),
        (['--config.random_flip=false'], False),
        (['--noconfig.random_flip'], False),
        (['--config.random_flip', '--noconfig.random_flip'], False),
    ],
)
def test_booleans_are_given_as_absl_takes_them(recipe: Path, words: list[str], value: bool) -> None:
    argv = ['parallel_train', 'train', f'--config={recipe}', *words]
    _, config = cli_lib._parse(argv, commands.COMMANDS['train'].flags)
    assert config.random_flip is value


def test_entry_point(job: Job, tmp_path: Path) -> None:
    code = 'import sys; from parallel_train.cli import console; sys.exit(console())'
    arguments = job.line('plan', '--devices=2', '--json')
    assert json.loads(run_python(code, *arguments, cwd=tmp_path)) == plan_json(job, '--devices=2')
    setup = (ROOT / 'setup.cfg').read_text()
    assert 'parallel-train = parallel_train.cli:console' in setup


IMPORTED = """
import sys
from parallel_train.cli import main
code = main(['parallel_train', *sys.argv[1:]])
names = ('jax', 'tensorflow', 'tensorflow_datasets', 'flax', 'matplotlib')
print('IMPORTED', *(name for name in names if name in sys.modules))
sys.exit(code)
"""


def imported_by(*args: str | Path) -> set[str]:
    out = run_python(IMPORTED, *map(str, args))
    return set(out[out.index('IMPORTED') :].split()[1:])


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, parallel_train; print(*(m for m in ('jax', 'tensorflow') if m in sys.modules))"
    assert run_python(code).split() == []


def test_a_plan_waits_for_neither_jax_nor_tensorflow(job: Job) -> None:
    assert imported_by(*job.line('plan', '--devices=4')) == set()


def test_training_imports_no_tensorflow(trained: Path) -> None:
    """Nor TFDS, the set being prepared: the run met modules of these names that note their import."""
    assert not (trained.parent / 'imported').exists(), (trained.parent / 'imported').read_text()


def test_nobody_reads_the_output(job: Job) -> None:
    """A reader that goes away, as `| head -0` does, is no fault of the program: no traceback."""
    command = cli(*job.line('plan', '--devices=4'))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, 'w') as stdout:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert 'Traceback' not in done.stderr
