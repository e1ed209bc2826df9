"""`compile`: the step that `train` runs, for hardware that is not here, by the real compilers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import psutil
import pytest

from parallel_train import config as config_lib
from parallel_train import start_devices
from parallel_train.batches import HostFeed, ResidentFeed
from parallel_train.compiled import needed_bytes, step_shapes
from parallel_train.mesh import make_mesh
from parallel_train.plan import make_plan
from parallel_train.schedule import create_learning_rate_fn
from parallel_train.show_compile import compile_table
from parallel_train.sizes import Sizes
from parallel_train.state import initialise
from tests.conftest import ROOT, cli, environment, run_cli, run_ok
from tests.test_step import make_config, make_split

start_devices(8)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ,
    reason="needs libtpu, which compiles for TPUs: pip install 'parallel-train[tpu]'",
)
MAIN = ROOT / 'configs' / 'fashion_mnist.py'
FIELDS = {
    'topology', 'num_devices', 'fits', 'hbm_bytes', 'hbm_limit_bytes', 'flops_per_step', 'collectives',
    'compile_seconds', 'predicted_step_seconds', 'predicted_efficiency', 'bound',
}  # fmt: skip
CNN_PARAMETERS = 824_458
METRICS = 3  # sums of losses, of weights, of correct answers


def rows_of(*flags: str | Path, nowhere: Path, code: int = 0) -> list[dict[str, Any]]:
    """Returns the rows that the command prints as JSON, on a machine without the data."""
    result = run_cli('compile', *flags, '--json', f'--data_dir={nowhere}', timeout=900)
    assert result.code == code, result.stdout + result.stderr
    rows = json.loads(result.stdout)['topologies']
    assert all(set(row) >= FIELDS for row in rows)
    assert list(nowhere.iterdir()) == []
    return rows


# ---------------------------------------------------------------- what is compiled


@pytest.mark.parametrize('feed', [ResidentFeed, HostFeed])
def test_shapes_are_those_that_train_gives_the_step(feed: type) -> None:
    config = make_config('norm_dropout', data_placement='device' if feed is ResidentFeed else 'host')
    split, mesh = make_split(), make_mesh(4)
    plan = make_plan(config, len(split.images), 1, 4)
    rate = create_learning_rate_fn(config, plan.peak_learning_rate, plan.steps_per_epoch)
    sizes = Sizes(len(split.images), 1, split.images.shape[1:], split.num_classes, '')
    shapes = step_shapes(config, sizes, plan, mesh, 0)
    real_feed = feed(split, config, plan, mesh)
    real = initialise(config, rate, mesh), real_feed.at(0)
    real_feed.close()

    def described(tree: Any) -> dict[str, Any]:
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(path): (x.shape, x.dtype, x.sharding) for path, x in leaves}

    assert described(shapes) == described(real)


def test_reading_a_compilers_refusal() -> None:
    message = (
        'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used '
        '41.02G of 15.75G hbm. Exceeded hbm capacity by 25.27G.'
    )
    assert needed_bytes(message) == (round(41.02 * 2**30), round(15.75 * 2**30))
    message = (
        'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
        '(16.22G) exceeds available HBM (15.75G).'
    )
    assert needed_bytes(message) == (round(16.22 * 2**30), round(15.75 * 2**30))
    assert needed_bytes('INVALID_ARGUMENT: Used 3 of 4 things') is None


# ---------------------------------------------------------------- this machine's CPU


@pytest.fixture(scope='module')
def cpu_run(recipe: Path, data_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of cpu:2, and what was said meanwhile."""
    flags = [f'--config={recipe}', f'--data_dir={data_dir}', '--topology=cpu:2']
    result = run_ok('compile', *flags, '--json')
    return json.loads(result.stdout)['topologies'], result.stderr


def test_cpu_is_compiled_measured_and_predicted(cpu_run: tuple[list[dict[str, Any]], str]) -> None:
    [row], said = cpu_run
    assert set(row) >= FIELDS and row['fits'] and row['num_devices'] == 2
    parts = ('argument_bytes', 'temporary_bytes', 'output_bytes', 'code_bytes')
    assert row['hbm_bytes'] == sum(row[part] for part in parts)
    assert row['hbm_headroom_bytes'] == row['hbm_limit_bytes'] - row['hbm_bytes'] > 0
    [reduction] = row['collectives']
    assert (reduction['kind'], reduction['count']) == ('all-reduce', 1)
    assert reduction['bytes'] == 4 * (CNN_PARAMETERS + METRICS)
    # 25.7 MFLOP an image, forward and backward; 24 images a device.
    assert row['flops_per_step'] == pytest.approx(24 * 25.7e6, rel=0.1)
    assert row['steps_per_epoch'] == 25 and row['boundaries'] == [13]
    # Machines are busy while tests run: this sees a wrong unit or a forgotten device, no more.
    assert 0.25 < row['predicted_step_seconds'] / row['measured_step_seconds'] < 4
    assert 'compiling for 2 devices' in said


def test_table(cpu_run: tuple[list[dict[str, Any]], str], recipe: Path) -> None:
    config = config_lib.complete(config_lib.load(recipe))
    table = compile_table(cpu_run[0], config, 'a test')
    for part in ('Memory of a device', 'Predicted', 'Measured here', 'Plan', '1 all-reduce, 3.298 MB'):
        assert part in table, table
    assert table.count('\n  cpu:2 ') == 5


def test_a_compiler_that_crashes_is_told_beside_the_rows_of_the_others(recipe: Path, data_dir: Path) -> None:
    flags = [f'--config={recipe}', f'--data_dir={data_dir}', '--topology=cpu:1,cpu:16', '--json']
    running = subprocess.Popen(
        cli('compile', *flags), cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stderr and 'cpu:1: compiling' in running.stderr.readline()
    [compiler] = psutil.Process(running.pid).children()
    compiler.send_signal(signal.SIGSEGV)
    stdout, stderr = running.communicate(timeout=100)
    assert running.returncode == 1 and 'cpu:1: the compiler ended with code -11' in stderr, stderr
    [row] = json.loads(stdout)['topologies']
    assert row['topology'] == 'cpu:16' and '8 shards are too few' in row['why']


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ('flags', 'parts'),
    [
        ([], ['topology: is missing', '--topology=']),
        (['--topology=v5e:3x3'], ["topology='v5e:3x3'", 'v5e:{2x2', 'cpu:N']),
        (['--topology=cpu:8', '--devices=8'], ['devices=8', '--topology']),
        (['--topology=cpu:8', '--config.shards=0', '--config.batch_size=100'], ['batch_size=100', '96, 104']),
        (['--topology=cpu:8', '--fit', '--config.shards=3'], ['batch_size=256', 'shards=3', '255, 258']),
        (['--topology=cpu:3'], ['shards=8', '3 × 1']),
        (['--topology=cpu:2', '--config.model=own:Gone'], ["model='own:Gone'", 'cannot import own']),
    ],
)
def test_bad_input(flags: list[str], parts: list[str], tmp_path: Path) -> None:
    result = run_cli('compile', f'--config={MAIN}', f'--data_dir={tmp_path}', *flags)
    assert (result.code, result.stdout) == (2, ''), result
    message = result.stderr.splitlines()[-1]
    assert message.startswith('error: ') and 'Traceback' not in result.stderr
    assert all(part in message for part in parts), message


def test_without_libtpu_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['libtpu'] = None  # Python's way to say: not installed\n"
        'from parallel_train.cli import main; sys.exit(main(sys.argv))'
    )
    flags = [f'--config={MAIN}', f'--data_dir={tmp_path}', '--topology=v5e:2x4']
    done = subprocess.run(
        [sys.executable, '-c', code, 'compile', *flags],
        cwd=ROOT, env={k: v for k, v in environment().items() if k != 'TPU_LIBRARY_PATH'},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: topology='v5e:2x4'"), done.stderr
    assert 'parallel-train[tpu]' in done.stderr


def test_imagenet_recipes_are_planned_for_pods(tmp_path: Path) -> None:
    flags = [f'--config={ROOT / "configs" / "imagenet_resnet50.py"}', '--devices=256']
    plan = json.loads(run_ok('plan', *flags, '--json', f'--data_dir={tmp_path}').stdout)
    # Goyal et al. 2017: 0.1 · 8192/256 after 5 epochs from 0.1, ÷ 10 after 30, 60 and 80 of 90 epochs.
    assert (plan['steps_per_epoch'], plan['num_steps']) == (156, 90 * 156)
    assert plan['boundaries'] == [156 * epoch for epoch in (5, 30, 60, 80)]
    rates = [plan['learning_rate_at'][str(step)] for step in (0, *plan['boundaries'])]
    assert rates == pytest.approx([0.1, 3.2, 0.32, 0.032, 0.0032])
    assert (plan['shards'], plan['per_device_batch_size']) == (256, 32)


# ---------------------------------------------------------------- TPUs


@needs_libtpu
@pytest.mark.slow
def test_main_recipe_on_v5e(tmp_path: Path) -> None:
    small, large = rows_of(f'--config={MAIN}', '--topology=v5e:2x4,v5e:16x16', nowhere=tmp_path, code=4)
    assert small['fits'] and small['num_devices'] == 8
    # On the chip: the dataset, the state (parameters, momentum, some scalars) and the order of an epoch.
    dataset = 60_000 * (28 * 28 + 4) + 4 * 234 * 256 // 8
    state = 2 * 4 * CNN_PARAMETERS
    assert small['argument_bytes'] >= dataset + state
    assert small['argument_bytes'] == pytest.approx(dataset + state, rel=0.15)  # padded to tiles
    # So small a step may keep all that is temporary on the chip.
    assert 0 <= small['temporary_bytes'] < 2**30 and small['hbm_limit_bytes'] == int(15.75 * 2**30)
    [reduction] = small['collectives']
    assert (reduction['kind'], reduction['count']) == ('all-reduce', 1)
    assert 4 * CNN_PARAMETERS <= reduction['bytes'] <= 1.01 * 4 * (CNN_PARAMETERS + METRICS)
    assert small['flops_per_step'] == pytest.approx(32 * 25.7e6, rel=0.3)
    # So small a step reads and writes the state, once; the rest stays on the chip.
    assert small['hbm_bytes_per_step'] == pytest.approx(2 * state, rel=0.3)
    assert small['predicted_step_seconds'] > 0 and small['bound'] in ('compute', 'hbm', 'interconnect')
    assert 0 < small['predicted_efficiency'] < 1
    # 8 shards do for 8 chips, not for 256: the row says what would.
    assert not large['fits'] and large['compile_seconds'] is None and '8 shards' in large['why']
    assert large['serves'] == {'batch_size': 8192, 'shards': 256}


@needs_libtpu
@pytest.mark.slow
def test_a_batch_too_large_does_not_fit(tmp_path: Path) -> None:
    """Four million images: on each of 8 chips half a million, of tens of kilobytes of activations."""
    size = 2**22
    flags = [f'--config.batch_size={size}', f'--config.num_train_examples={size}']
    flags += ['--config.data_placement=host']
    [row] = rows_of(f'--config={MAIN}', '--topology=v5e:2x4', *flags, nowhere=tmp_path, code=4)
    assert not row['fits'] and row['hbm_bytes'] > row['hbm_limit_bytes'] == int(15.75 * 2**30)
    assert row['hbm_headroom_bytes'] < 0 and 'too many' in row['why']
    assert row['predicted_step_seconds'] is None


@pytest.mark.long
@needs_libtpu
@pytest.mark.slow
def test_fit_finds_the_largest_batch(tmp_path: Path) -> None:
    """Of whole shards of 4,096 images: it fits, and a little more does not."""
    shard, chips = 2**12, 8
    flags = ['--config.num_train_examples=100000000', '--config.data_placement=host', '--topology=v5e:2x4']
    batch = f'--config.batch_size={8 * shard}'
    [row] = rows_of(f'--config={MAIN}', *flags, batch, '--fit', nowhere=tmp_path)
    assert row['fits'] and row['examples_per_shard'] == shard
    largest = row['shards'] // chips
    assert largest > 2
    more = largest + max(1, largest // 32)
    bigger = [f'--config.batch_size={more * chips * shard}', f'--config.shards={more * chips}']
    [refused] = rows_of(f'--config={MAIN}', *flags, *bigger, nowhere=tmp_path, code=4)
    assert not refused['fits']
