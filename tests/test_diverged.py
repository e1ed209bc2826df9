"""A loss or gradient that is not finite: never applied, never saved, and told where it came from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from parallel_train import config as config_lib
from parallel_train import order, start_devices
from parallel_train import train as train_lib
from parallel_train.batches import make_feed
from parallel_train.dataset import Split
from parallel_train.errors import Diverged
from parallel_train.mesh import make_mesh
from parallel_train.plan import make_plan
from parallel_train.schedule import create_learning_rate_fn
from parallel_train.state import initialise
from parallel_train.step import make_train_step
from tests.conftest import Result, checkpoint_steps, cli, environment, read_rows, restore, without_timing
from tests.faulty_models import BAD, BAD_STEPS, BATCH, EPOCH, EXAMPLES, job, marked_noise
from tests.test_processes import Processes, free_port

start_devices(8)

# ---------------------------------------------------------------- where it came from

FOUND = {
    'bad_value': 'the output of spoil',
    'bad_value_without_norm': 'the output of spoil',
    'bad_gradient': 'the gradient of first/bias',
    'bad_loss': 'the loss',
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('what', 'reduction', 'devices'),
    [*((what, 'pmean', 4) for what in FOUND), ('bad_value', 'pmean', 1), ('bad_gradient', 'tree', 4)],
)
def test_step_example_and_tensor_are_named(what: str, reduction: str, devices: int, tmp_path: Path) -> None:
    loss = {'loss': 'tests.faulty_models:bad_loss'} if what == 'bad_loss' else {}
    config = job('plain' if loss else what, reduction=reduction, **loss)
    with pytest.raises(Diverged) as diverged:
        train_lib.train_and_evaluate(config, tmp_path, devices=devices)
    message = str(diverged.value)
    assert message.startswith('training diverged: loss or gradient is not finite; step 6 (rate '), message
    assert f": first not finite is {FOUND[what]}, for examples {BAD} of 'train'" in message
    assert 'the checkpoint of step 4 stands' in message and '--skip_nonfinite=N' in message
    assert checkpoint_steps(tmp_path) == [2, 4]
    rows = read_rows(tmp_path)
    assert [row['step'] for row in rows] == [2, 4] and all(np.isfinite(row['loss']) for row in rows)


def test_the_host_may_be_far_ahead(tmp_path: Path) -> None:
    """It looks after the last step alone; the state is still that of before step 6."""
    config = job('bad_value', log_every_steps=999, checkpoint_every_epochs=0, eval_every_epochs=0)
    with pytest.raises(Diverged, match=r'; step 6 \(rate .* no checkpoint was made yet'):
        train_lib.train_and_evaluate(config, tmp_path, devices=2)
    assert checkpoint_steps(tmp_path) == [] and read_rows_or_none(tmp_path) == []


def read_rows_or_none(workdir: Path) -> list[dict[str, Any]]:
    return read_rows(workdir) if (workdir / 'metrics.jsonl').read_text() else []


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_exit_code(processes: int, tmp_path: Path) -> None:
    """And what every process says: a launcher may show the last words of any."""
    recipe = tmp_path / 'recipe.py'
    recipe.write_text(
        'from tests.faulty_models import job\n\ndef get_config():\n    from parallel_train import config\n'
        "    return config.complete(job('bad_value'))\n"
    )
    train = ['train', f'--config={recipe}', f'--workdir={tmp_path / "run"}', '--devices=2']
    for result in run_in(processes, train, tmp_path / 'first'):
        assert result.code == 3, result
        last = result.stderr.splitlines()[-1]
        assert re.match(r'error: training diverged: .*; step 6 \(rate .*, for examples ' + str(BAD), last)
    # And it goes on from the checkpoint.
    results = run_in(processes, [*train, '--skip_nonfinite=3'], tmp_path / 'second')
    assert [result.code for result in results] == [0] * processes, results
    assert 'resuming from step 4' in results[0].stdout
    assert 'warning: 3 of at most 3 steps skipped' in results[0].stdout + results[0].stderr


def run_in(processes: int, line: list[str], folder: Path) -> list[Result]:
    where = [f'--coordinator=127.0.0.1:{free_port()}', f'--num_processes={processes}'] * (processes > 1)
    numbers = [[f'--process_id={i}'] * (processes > 1) for i in range(processes)]
    started = Processes(folder, [cli(*line, *where, *number) for number in numbers], environment())
    try:
        return started.results()
    finally:
        started.close()


# ---------------------------------------------------------------- steps that are skipped


def linear_steps(skip: list[int]) -> dict[str, np.ndarray]:
    """Adam on a linear model in float64, by hand (Kingma & Ba 2015, algorithm 1), some steps skipped."""
    images, labels = marked_noise('train', Path())
    x, y = images.reshape(EXAMPLES, -1) / 255.0, np.eye(10)[labels]
    config = config_lib.with_dataset(config_lib.complete(linear_job()), (28, 28, 1), 10)
    plan = make_plan(config, EXAMPLES, 64, 1)
    params = initialise(config, 0.0, make_mesh(1)).params['Dense_0']
    theta = {name: np.array(params[name], np.float64) for name in ('kernel', 'bias')}
    m, v = ({name: np.zeros_like(p) for name, p in theta.items()} for _ in range(2))
    for step in range(plan.num_steps):
        if step + 1 in skip:
            continue  # but for the counts below, which `step` gives
        mine = order.epoch_batches(0, step // EPOCH, EXAMPLES, BATCH)[step % EPOCH]
        logits = x[mine] @ theta['kernel'] + theta['bias']
        p = np.exp(logits - logits.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - y[mine]) / BATCH
        for name, g in {'kernel': x[mine].T @ error, 'bias': error.sum(0)}.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            right = np.sqrt(v[name] / (1 - 0.999 ** (step + 1))) + 1e-8
            theta[name] -= plan.rate(step) * m[name] / (1 - 0.9 ** (step + 1)) / right
    return {
        **{f"['params']['Dense_0']['{name}']": p for name, p in theta.items()},
        **{f"['opt_state'][0]['mu']['Dense_0']['{name}']": p for name, p in m.items()},
        **{f"['opt_state'][0]['nu']['Dense_0']['{name}']": p for name, p in v.items()},
    }


def linear_job(**fields: Any) -> Any:
    """Adam on the linear model of `linear_steps`."""
    adam = {'optimizer': 'adamw', 'momentum': 0.9, 'learning_rate': 1e-3}
    config = job('plain', loss='tests.faulty_models:bad_loss', **adam, **fields)
    config.model = 'tests.models_for_tests:Linear'
    return config


@pytest.mark.slow
@pytest.mark.parametrize(('reduction', 'devices'), [('pmean', 2), ('tree', 4)])
def test_a_skipped_step_counts_and_changes_nothing(reduction: str, devices: int, tmp_path: Path) -> None:
    config = linear_job(reduction=reduction)
    train_lib.train_and_evaluate(config, tmp_path, devices=devices, skip_nonfinite=3)
    got, want = restore(tmp_path, 24), linear_steps(BAD_STEPS)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=2e-3, atol=2e-6, err_msg=name)
    assert got["['step']"] == 24 and got["['skipped']"] == 3
    counts = [int(array) for name, array in got.items() if name.endswith("['count']")]
    assert counts and set(counts) == {24}
    # (The comparison can fail: steps left out altogether, or applied, give something else.)
    name = "['params']['Dense_0']['kernel']"
    assert not np.allclose(got[name], linear_steps(BAD_STEPS[:2])[name], rtol=2e-3, atol=2e-6)
    rows = read_rows(tmp_path)
    assert [row['step'] for row in rows if row['split'] == 'train'] == list(range(2, 25, 2))
    assert all(np.isfinite(row['loss']) for row in rows)


def test_one_more_ends_the_run_and_more_go_on_from_there(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=rf'; step {BAD_STEPS[2]} \('):
        train_lib.train_and_evaluate(linear_job(), tmp_path / 'run', devices=2, skip_nonfinite=2)
    assert max(checkpoint_steps(tmp_path / 'run')) < BAD_STEPS[2]
    train_lib.train_and_evaluate(linear_job(), tmp_path / 'run', devices=2, skip_nonfinite=3)
    train_lib.train_and_evaluate(linear_job(), tmp_path / 'at once', devices=2, skip_nonfinite=3)
    got, want = restore(tmp_path / 'run', 24), restore(tmp_path / 'at once', 24)
    assert not [name for name in want if got[name].tobytes() != want[name].tobytes()]
    assert without_timing(read_rows(tmp_path / 'run')) == without_timing(read_rows(tmp_path / 'at once'))


def test_what_was_skipped_before_a_resume_is_not_said_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_lib.train_and_evaluate(linear_job(num_epochs=2.0), tmp_path, devices=2, skip_nonfinite=3)
    assert 'warning: 2 of at most 3 steps skipped' in capsys.readouterr().out
    assert BAD_STEPS[2] > 2 * EPOCH + 2  # so that the first row after the resume has nothing new to say
    train_lib.train_and_evaluate(linear_job(), tmp_path, devices=2, allow_plan_change=True, skip_nonfinite=3)
    said = re.findall('warning: (.) of at most 3 steps skipped', capsys.readouterr().out)
    assert said == ['3']


@pytest.mark.parametrize('reduction', ['pmean', 'tree'])
def test_the_state_is_frozen_on_the_device(reduction: str) -> None:
    """Once no step may be skipped any more, whatever is dispatched changes nothing, statistics included."""
    config = config_lib.with_dataset(
        config_lib.complete(job('bad_value', reduction=reduction)), (28, 28, 1), 10
    )
    plan, mesh = make_plan(config, EXAMPLES, 64, 4), make_mesh(4)
    split = Split(*marked_noise('train', Path()), tuple(map(str, range(10))))
    step = make_train_step(config, plan, mesh, skip_nonfinite=0)
    rate = create_learning_rate_fn(config, plan.peak_learning_rate, plan.steps_per_epoch)
    state = initialise(config, rate, mesh)
    feed = make_feed(split, config, plan, mesh)
    seen = []
    for number in range(8):
        state = step(state, feed.at(number))
        seen.append([np.asarray(leaf) for leaf in jax.tree.leaves(state.replace(skipped=None))])
    feed.close()
    assert int(state.step) == 5 and int(state.skipped) == 1
    before = seen[BAD_STEPS[0] - 2]
    for after in seen[BAD_STEPS[0] - 1 :]:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True))
    assert not all(a.tobytes() == b.tobytes() for a, b in zip(before, seen[BAD_STEPS[0] - 3], strict=True))
