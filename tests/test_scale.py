"""`scale`: what is measured at each size, in real processes; and what is made of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from parallel_train import scale_figures, start_devices
from parallel_train.chip_here import chip_name, topology_of
from parallel_train.config import Config, complete
from parallel_train.errors import UserError
from parallel_train.mesh import make_mesh
from parallel_train.plan import make_plan
from parallel_train.scale_child import Bench
from parallel_train.scale_processes import gpus_of_each
from parallel_train.scale_sizes import Experiment, Size, modes_of, numbers, plan_experiment
from parallel_train.sizes import Sizes
from parallel_train.state import initialise
from parallel_train.step import make_train_step
from tests.conftest import ROOT, Result, environment, run_cli, snapshot
from tests.test_step import make_split

start_devices(8)

FIELDS = {
    'mode', 'num_devices', 'num_processes', 'batch_size', 'examples_per_second', 'step_seconds', 'efficiency',
    'spread',
}  # fmt: skip
OWN = """
import flax.linen as nn
import numpy as np


class Small(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(64)(x.reshape((x.shape[0], -1))))
        return nn.Dense(self.num_classes)(nn.Dropout(0.1, deterministic=not train)(x))


def noise(split, data_dir):
    rng = np.random.default_rng(0 if split == 'train' else 1)
    count = 512 if split == 'train' else 64
    return {'image': rng.integers(0, 256, (count, 8, 8, 1), np.uint8), 'label': rng.integers(0, 10, count)}
"""
RECIPE = """
from parallel_train import default_config


def get_config():
    config = default_config()
    config.model, config.dataset = 'scale_things:Small', 'scale_things:noise'
    config.batch_size, config.shards, config.num_epochs = 32, 4, 2.0
    return config
"""
STEPS, ROUNDS = 6, 3


@pytest.fixture(scope='session')
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quick recipe, its model and its dataset."""
    folder = tmp_path_factory.mktemp('scale')
    (folder / 'scale_things.py').write_text(OWN)
    (folder / 'recipe.py').write_text(RECIPE)
    return folder


def scale(things: Path, workdir: Path, *more: str, **options: Any) -> Result:
    env = environment(PYTHONPATH=os.pathsep.join([str(things), str(ROOT)]))
    flags = [f'--config={things / "recipe.py"}', f'--workdir={workdir}', f'--data_dir={workdir.parent}']
    return run_cli('scale', *flags, f'--steps={STEPS}', f'--rounds={ROUNDS}', *more, env=env, **options)


def scaled(things: Path, workdir: Path, *more: str) -> dict[str, Any]:
    """Returns the JSON that the command prints."""
    result = scale(things, workdir, *more, '--json')
    assert result.code == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


# ---------------------------------------------------------------- real processes


@pytest.fixture(scope='session')
def strong(things: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Strong scaling to 2 devices, in 1 process and in 2: the workdir, only to be read, and the JSON."""
    workdir = tmp_path_factory.mktemp('strong') / 'run'
    return workdir, scaled(things, workdir, '--mode=strong', '--device_counts=1,2', '--processes=1,2')


@pytest.mark.slow
def test_every_size_is_measured(strong: tuple[Path, dict[str, Any]]) -> None:
    workdir, results = strong
    rows = results['measurements']
    assert [(row['num_devices'], row['num_processes']) for row in rows] == [(1, 1), (2, 1), (2, 2)]
    for row in rows:
        assert set(row) >= FIELDS
        assert row['mode'] == 'strong' and row['batch_size'] == 32 and row['rounds'] == ROUNDS
        assert row['step_seconds'] > 0 and row['spread'] >= 0
        assert 0 <= row['data_wait_fraction'] <= 1
        assert row['communication_fraction'] < 1
        assert row['predicted_step_seconds'] > 0 and row['speed_of_prediction'] > 0
    assert rows[0]['efficiency'] == rows[0]['speedup'] == 1
    assert rows[0]['communication_fraction'] == 0  # one device has nobody to exchange with
    assert json.loads((workdir / 'scale.json').read_text()) == results


@pytest.mark.slow
def test_a_size_that_waits_for_its_turn_costs_nothing(strong: tuple[Path, dict[str, Any]]) -> None:
    assert max(row['idle_cpu_fraction'] for row in strong[1]['measurements']) < 0.1


@pytest.mark.slow
def test_loss_curves_of_strong_scaling_coincide(strong: tuple[Path, dict[str, Any]]) -> None:
    first, *others = strong[1]['measurements']
    assert len(first['losses']) == STEPS and np.isfinite(first['losses']).all()
    assert len(set(first['losses'])) == STEPS  # of single steps, each on other examples
    for row in others:
        np.testing.assert_allclose(row['losses'], first['losses'], rtol=1e-4)
        assert row['loss_difference'] == max(abs(np.subtract(row['losses'], first['losses'])))


@pytest.mark.slow
def test_page_and_plots(strong: tuple[Path, dict[str, Any]]) -> None:
    workdir = strong[0]
    page = (workdir / 'scale.html').read_text()
    assert 'NOT A SCALING EFFICIENCY' in page and page.count('<svg') == 2
    for name in ('strong', 'losses'):
        assert (workdir / 'plots' / f'{name}.png').read_bytes().startswith(b'\x89PNG')


def test_one_size_alone(things: Path, tmp_path: Path) -> None:
    """What others would be compared with is compared with itself."""
    [row] = scaled(things, tmp_path / 'run', '--mode=strong', '--device_counts=2')['measurements']
    assert set(row) >= FIELDS and (row['num_devices'], row['batch_size'], row['shards']) == (2, 32, 4)
    assert row['step_seconds'] > 0 and row['efficiency'] == 1 and row['loss_difference'] == 0
    assert (tmp_path / 'run' / 'plots' / 'strong.png').exists()


@pytest.mark.long
@pytest.mark.slow
def test_what_is_measured_is_kept(strong: tuple[Path, dict[str, Any]], things: Path, tmp_path: Path) -> None:
    """After a kill, and with more sizes: what is missing is measured, beside what they are compared with."""
    workdir, before = tmp_path / 'run', json.loads((strong[0] / 'scale.json').read_text())
    workdir.mkdir()
    lost = before['turns'].pop()  # as if killed before it
    (workdir / 'scale.json').write_text(json.dumps(before))
    result = scale(things, workdir, '--mode=weak,strong', '--device_counts=1,2', '--processes=1,2')
    assert result.code == 0, result.stderr
    after = json.loads((workdir / 'scale.json').read_text())
    assert after['turns'][: len(before['turns'])] == before['turns']
    more = [turn['size'] for turn in after['turns'][len(before['turns']) :]]
    weak = [f'devices=2 processes={count} batch_size=64' for count in (1, 2)]
    assert {size: more.count(size) for size in set(more)} == {
        'devices=1 processes=1 batch_size=32': ROUNDS,
        lost['size']: 1,
        **dict.fromkeys(weak, ROUNDS),
    }
    rows = {(r['mode'], r['num_devices'], r['num_processes']): r for r in after['measurements']}
    assert len(rows) == 6
    assert rows['weak', 2, 1]['batch_size'] == 64 and rows['weak', 2, 1]['shards'] == 8
    assert rows['weak', 1, 1]['step_seconds'] == rows['strong', 1, 1]['step_seconds']  # one job
    for words in ('Weak scaling', 'Strong scaling', 'NOT A SCALING EFFICIENCY', 'Loss curves', 'scale.html'):
        assert words in result.stdout


# ---------------------------------------------------------------- one process, opened up


def test_tree_reduction_is_measured_and_its_losses_are_the_same_bits(things: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(things))
    config = complete(
        Config({
            'model': 'scale_things:Small', 'dataset': 'scale_things:noise', 'batch_size': 32, 'shards': 4,
            'num_epochs': 10.0, 'reduction': 'tree', 'input_shape': (8, 8, 1), 'num_classes': 10,
        })
    )  # fmt: skip
    facts = {}
    for devices in (1, 2):
        bench = Bench(config, things, devices, steps=3)
        facts[devices] = bench.facts()
        turn = bench.turn(backwards=False)
        bench.close()
        assert turn['fed'] > 0 and ('alone' in turn) == (devices > 1)
    assert facts[1]['losses'] == facts[2]['losses']


def test_without_exchange_the_step_has_no_collective() -> None:
    from tests.test_step import make_config

    config, mesh, split = make_config('norm_dropout'), make_mesh(4), make_split()
    plan = make_plan(config, len(split.images), 1, 4)
    state = initialise(config, 0.1, mesh)
    data = {
        'image': jax.ShapeDtypeStruct((32, *split.images.shape[1:]), np.uint8),
        'label': jax.ShapeDtypeStruct((32,), np.int32),
        'index': jax.ShapeDtypeStruct((32,), np.int32),
    }
    for exchange in (True, False):
        step: Any = make_train_step(config, plan, mesh, exchange=exchange)
        assert ('all-reduce' in step.lower(state, data).compile().as_text()) == exchange


# ---------------------------------------------------------------- sizes


SIZES = Sizes(512, 64, (8, 8, 1), 10, '')


def plan_of(
    modes: Sequence[str], devices: Sequence[int], processes: Sequence[int] = (1,), **fields: Any
) -> Any:
    config = complete(Config({'batch_size': 32, 'shards': 8, 'num_epochs': 2.0, **fields}))
    return plan_experiment(config, SIZES, modes, devices, processes, steps=5, rounds=2)


def test_weak_scaling_holds_the_examples_of_a_device_and_of_a_shard() -> None:
    experiment = plan_of(['weak', 'strong'], [2, 4, 8], accumulation_steps=1)
    assert experiment.modes['weak'] == [Size(2, 1, 32, 8), Size(4, 1, 64, 16), Size(8, 1, 128, 32)]
    assert experiment.modes['strong'] == [Size(2, 1, 32, 8), Size(4, 1, 32, 8), Size(8, 1, 32, 8)]
    assert len(experiment.sizes) == 5


@pytest.mark.parametrize(
    'fields', [{'schedule': 'cosine_restarts', 'restart_epochs': 0.5}, {'schedule': 'one_cycle'}]
)
def test_schedules_that_fit_no_other_epochs_are_measured(fields: dict[str, Any]) -> None:
    experiment = plan_of(['strong'], [1, 2], warmup_epochs=1.0, **fields)
    assert len(experiment.sizes) == 2


def test_processes_that_cannot_share_a_count_leave_it_out() -> None:
    sizes = plan_of(['strong'], [1, 2, 4], [1, 2]).modes['strong']
    assert [(s.num_devices, s.num_processes) for s in sizes] == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)]


@pytest.mark.parametrize(
    ('modes', 'devices', 'processes', 'fields', 'words'),
    [
        (['strong'], [1, 3], [1], {}, ['device_counts=3', 'strong', 'config.shards=8', 'multiple']),
        (['strong'], [1, 64], [1], {'shards': 0}, ['device_counts=64', 'config.batch_size=32']),
        (['weak'], [3, 6], [1], {'shards': 0}, ['device_counts=3', 'config.batch_size=32', '3']),
        (['weak'], [1, 32], [1], {}, ['device_counts=32', 'config.batch_size=1024', 'larger than the train']),
        (['strong'], [1, 2], [3], {}, ['processes=3', 'device_counts=1,2']),
    ],
)
def test_sizes_that_do_not_fit(
    modes: list[str], devices: list[int], processes: list[int], fields: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        plan_of(modes, devices, processes, **fields)
    for word in words:
        assert word in str(refused.value)


def test_lists() -> None:
    assert numbers('device_counts', '4, 1,2,2') == [1, 2, 4]
    assert modes_of('strong,weak') == ['weak', 'strong']
    for text in ('', '0', '1,,2', '-1', '1.5', 'two', '²'):
        with pytest.raises(UserError, match='device_counts='):
            numbers('device_counts', text)
    with pytest.raises(UserError, match="mode='week': must be weak or strong.*weak"):
        modes_of('week')


# ---------------------------------------------------------------- figures


def test_drift_cancels_within_a_round() -> None:
    """Each round is twice as slow as the one before; 4 devices always take a quarter of one's time."""
    sizes = [Size(1, 1, 32, 4), Size(4, 1, 32, 4)]
    turns = [
        {
            'size': size.key, 'session': 'a', 'round': i, 'fed': 2.0**i / size.num_devices * 1.1,
            'resident': 2.0**i / size.num_devices, 'data_wait': 0.05, 'idle_cpu': 0.0,
            **({'alone': 0.8 * 2.0**i / 4} if size.num_devices > 1 else {}),
            'batch 16': 2.0**i / size.num_devices * 0.75, 'batch 64': 2.0**i / size.num_devices * 1.5,
        }
        for i in range(4)
        for size in sizes
    ]  # fmt: skip
    facts = {
        size.key: {
            'losses': [2.0, 1.0 + size.num_devices / 1000, 0.5], 'per_device_batch_size': 8,
            'accumulation_steps': 1, 'shards': 4, 'predicted_step_seconds': None, 'not_predicted': '',
        }
        for size in sizes
    }  # fmt: skip
    one, four = scale_figures.measurements(Experiment({'strong': sizes}, 5, 4), turns, facts)
    assert four['speedup'] == pytest.approx(4) and four['efficiency'] == pytest.approx(1)
    assert four['quartiles']['efficiency'] == pytest.approx((1, 1))
    assert four['communication_fraction'] == pytest.approx(0.2) and one['communication_fraction'] == 0
    assert four['input_fraction'] == pytest.approx(1 - 1 / 1.1)
    assert four['spread'] > 0.5  # the machine's, told as it is
    # Half an overhead, half growing with the batch: a line through the two other batches hits the third.
    assert four['speed_of_prediction'] == pytest.approx(1) and four['predicted_efficiency'] == pytest.approx(
        1
    )
    assert four['loss_difference'] == pytest.approx(0.003) and four['loss_difference_step'] == 2
    assert 'loss_difference_step' in one and one['loss_difference'] == 0
    turns = [turn for turn in turns if turn['size'] == sizes[0].key or turn['round'] < 3]
    assert len(scale_figures.measurements(Experiment({'strong': sizes}, 5, 4), turns, facts)) == 1


def test_chips_are_known_by_what_jax_calls_them() -> None:
    known = {
        'TPU v5 lite': 'v5e', 'TPU v5p': 'v5p', 'TPU v5': 'v5p', 'TPU v6 lite': 'v6e', 'TPU v4': 'v4',
        'NVIDIA H100 80GB HBM3': 'h100', 'NVIDIA H200': 'h200', 'NVIDIA A100-SXM4-80GB': 'a100', 'cpu': None,
    }  # fmt: skip
    assert {kind: chip_name(kind) for kind in known} == known
    for chip, count in (('v5e', 8), ('v4', 8), ('h100', 4), ('v5p', 1)):
        topology = topology_of(chip, count)
        assert topology is not None and topology.num_devices == count
    assert topology_of('v5e', 7) is None


def test_processes_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert [e['CUDA_VISIBLE_DEVICES'] for e in gpus_of_each(2, 4)] == ['0,1', '2,3']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5,3,1')
    assert [e['CUDA_VISIBLE_DEVICES'] for e in gpus_of_each(2, 2)] == ['5', '3']


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ([], ['device_counts: is missing']),
        (['--device_counts=1,2', '--mode=both'], ["mode='both'", 'weak or strong']),
        (['--device_counts=1,2', '--devices=2'], ['devices=2', '--device_counts']),
        (['--device_counts=3', '--mode=strong'], ['device_counts=3', 'config.shards=4']),
        (['--device_counts=1,2', '--steps=0'], ['steps=0', 'at least 1']),
        (['--device_counts=2048', '--config.shards=0', '--config.batch_size=2048'], ['2048']),
    ],
)
def test_bad_flags_are_refused(things: Path, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    folder = tmp_path / 'here'
    folder.mkdir()
    refused(scale(things, folder / 'run', *flags), words)
    assert list(folder.iterdir()) == []


def refused(result: Result, words: Sequence[str]) -> None:
    assert result.code == 2, result
    assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--config.learning_rate=0.5'], ['workdir', 'config.learning_rate was 0.1 and is 0.5']),
        ([f'--steps={STEPS + 1}'], ['workdir', f'steps were {STEPS} and are {STEPS + 1}']),
    ],
)
def test_a_workdir_of_other_measurements_is_refused(
    strong: tuple[Path, dict[str, Any]], things: Path, flags: list[str], words: list[str]
) -> None:
    before = snapshot(strong[0])
    refused(scale(things, strong[0], '--device_counts=1,2', *flags), words)
    assert snapshot(strong[0]) == before


def test_a_workdir_of_a_training_job_is_refused(things: Path, tmp_path: Path) -> None:
    (tmp_path / 'config.json').write_text('{}')
    before = snapshot(tmp_path)
    refused(scale(things, tmp_path, '--device_counts=1'), ['workdir', '`train`', 'another workdir'])
    assert snapshot(tmp_path) == before
