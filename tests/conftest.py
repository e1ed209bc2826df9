"""What several test files share: a small learnable dataset, recipes, the command line, one trained run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pictures import write_folder
from tests.test_idx import NAMES, idx_bytes, write_set

os.environ.setdefault('EPATH_USE_TF', 'false')  # gs:// by gcsfs, whichever test imports epath first
os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # where there is no TPU, libtpu says so on stderr

ROOT = Path(__file__).resolve().parent.parent
TRAIN_EXAMPLES, EVAL_EXAMPLES = 1200, 300
BATCH_SIZE, EPOCHS, WARMUP_EPOCHS, PEAK_RATE = 48, 2, 0.5, 0.05
STEPS_PER_EPOCH = TRAIN_EXAMPLES // BATCH_SIZE  # 25
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
LOG_EVERY, CHECKPOINT_EVERY = 4, 6  # neither divides the other, nor the epoch
TIMING_FIELDS = {'examples_per_second', 'data_wait_fraction'}

# Logs, evaluations and checkpoints all come at different steps, so that a resume meets every case.
RECIPE = f"""
from parallel_train.config import default_config


def get_config():
    config = default_config()
    config.model = {{model!r}}
    config.batch_size = {BATCH_SIZE}
    config.eval_batch_size = 128
    config.shards = 8
    config.num_epochs = {float(EPOCHS)}
    config.warmup_epochs = {WARMUP_EPOCHS}
    config.learning_rate = {PEAK_RATE}
    config.log_every_steps = {LOG_EVERY}
    config.checkpoint_every_epochs = 0.25
    config.keep_checkpoints = 3
    return config
"""

MODELS = """
import flax.linen as nn


class Tiny(nn.Module):
    '''All that a resume could get wrong: parameters, batch statistics, dropout.'''

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=(3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu(x).reshape((x.shape[0], -1))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


class FiveClasses(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(x.reshape((x.shape[0], -1)))


class ColourOnly(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', nn.initializers.normal(), (32 * 32 * 3, 10))
        return x.reshape((x.shape[0], -1)) @ kernel


class AssertsShape(nn.Module):
    @nn.compact
    def __call__(self, x):
        assert x.shape[1:] == (32, 32, 3), x.shape
        return nn.Dense(10)(x.reshape((x.shape[0], -1)))


class OfEachPixel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x)


class NeedsWidth(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape((x.shape[0], -1)))


NOT_A_MODEL = 3
"""


# Of pictures that differ in size, with all that is random about them.
IMAGE_RECIPE = """
config.dataset = 'pictures'
config.eval_split = 'validation'
config.image_size = 32
config.random_resized_crop = True
config.random_flip = True
config.pixel_mean = (0.5, 0.5, 0.5)
config.pixel_std = (0.25,)
config.batch_size = 16
config.eval_batch_size = 8
config.num_epochs = 6.0
config.learning_rate = 0.05
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no core waits at the end for the other's long one."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str


@dataclasses.dataclass(frozen=True)
class Job:
    """A recipe and the data that it is run on, as the command line is told them."""

    recipe: Path
    data_dir: Path
    env: dict[str, str]

    def line(self, command: str, *more: str) -> list[str]:
        return [command, f'--config={self.recipe}', f'--data_dir={self.data_dir}', *more]

    def train(self, workdir: Path | str, *more: str, devices: int = 2) -> list[str]:
        return self.line('train', f'--workdir={workdir}', f'--devices={devices}', *more)


@dataclasses.dataclass(frozen=True)
class ImageJob(Job):
    """A recipe on a set of JPEG files of several sizes; one in train and one in val are cut off."""

    source: Path
    said: str  # by `prepare`


def environment(**changes: str) -> dict[str, str]:
    """Returns this process's environment, in which a subprocess finds the package wherever it runs."""
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep)
    return {**os.environ, 'PYTHONPATH': path, **changes}


def cli(*args: str | Path) -> list[str]:
    return [sys.executable, '-m', 'parallel_train', *map(str, args)]


def run_cli(
    *args: str | Path, cwd: Path | None = None, timeout: float = 300, env: dict[str, str] | None = None
) -> Result:
    """Runs the command line in a process of its own, by default in the folder of the checkout."""
    done = subprocess.run(
        cli(*args),
        cwd=cwd or ROOT,
        env=env or environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_ok(*args: str | Path, **options: Any) -> Result:
    """Like `run_cli`, for what must succeed."""
    result = run_cli(*args, **options)
    assert result.code == 0, f'{args}: exit code {result.code}\n{result.stdout}\n{result.stderr}'
    return result


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Returns what lies under `folder`: path -> (time of change, content; b'' for folders)."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b'',
        )
        for path in sorted(folder.rglob('*'))
    }


def on_read_only(folder: Path, command: list[str]) -> list[str]:
    """Returns `command` as it runs where `folder` is mounted read-only, which holds for root too."""
    private = ['unshare', '--mount'] if os.geteuid() == 0 else ['unshare', '--map-root-user', '--mount']
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    start = [*private, 'sh', '-c', mount, str(folder)]
    try:
        may = subprocess.run([*start, 'true'], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip('there is no unshare')
    if may.returncode != 0:
        pytest.skip(f'a read-only mount is not permitted here: {may.stderr.strip()}')
    return [*start, *command]


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl, every line of it whole."""
    text = (workdir / 'metrics.jsonl').read_text()
    assert text.endswith('\n')
    return [json.loads(line) for line in text.splitlines()]


def without_timing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in rows]


def write_recipe(path: Path, model: str = 'cnn', more: str = '') -> Path:
    """Writes a small recipe; `more` are lines of code that change `config` further."""
    text = RECIPE.format(model=model)
    lines = ''.join(f'    {line}\n' for line in more.splitlines())
    path.write_text(text.replace('    return config', f'{lines}    return config'))
    return path


def make_tiny_job(folder: Path, data_dir: Path, models_dir: Path, more: str = '') -> Job:
    """The tiny model (BatchNorm, dropout); `more` are lines of its recipe."""
    env = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(models_dir)]))
    return Job(write_recipe(folder / 'tiny.py', 'own_models:Tiny', more), data_dir, env)


def restore(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Reads a checkpoint with Orbax alone: name -> array of everything that was saved."""
    from parallel_train import start_devices

    start_devices(8)  # as every test that uses JAX in this process: the first one decides
    import jax
    import orbax.checkpoint as ocp

    path = workdir / 'checkpoints' / str(step) / 'default'
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = checkpointer.restore(path, restore_args=as_numpy)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(arrays)}


def checkpoint_steps(workdir: Path) -> list[int]:
    """Returns the steps of the checkpoints that are whole."""
    return sorted(int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit())


@pytest.fixture(scope='session', autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps what is remembered about device counts out of the cache of whoever runs the tests."""
    os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='session')
def idx_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IDX files of a set that is learned in an epoch: a coarse pattern for each class, plus noise."""
    folder = tmp_path_factory.mktemp('idx')
    rng = np.random.default_rng(0)
    patterns = np.kron(rng.integers(0, 256, (10, 7, 7)), np.ones((4, 4)))
    for split, count in (('train', TRAIN_EXAMPLES), ('test', EVAL_EXAMPLES)):
        labels = (np.arange(count) * 7 % 10).astype(np.uint8)
        noise = rng.normal(0, 50, (count, 28, 28))
        images = np.clip(0.4 * patterns[labels] + 75 + noise, 0, 255).astype(np.uint8)
        (folder / NAMES[split, 'images']).write_bytes(idx_bytes(images))
        (folder / NAMES[split, 'labels']).write_bytes(idx_bytes(labels))
    return folder


@pytest.fixture(scope='session')
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains the guide's CNN in seconds."""
    return write_recipe(tmp_path_factory.mktemp('recipe') / 'small.py')


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory: pytest.TempPathFactory, idx_dir: Path, recipe: Path) -> Path:
    """The set, prepared and decoded by the command."""
    folder = tmp_path_factory.mktemp('data') / 'tfds'
    run_ok('prepare', f'--config={recipe}', f'--data_dir={folder}', f'--from={idx_dir}')
    return folder


@pytest.fixture(scope='session')
def small_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with 200 train and 50 test examples, all different, as the set `mnist`. Only to be read."""
    from parallel_train.prepare import prepare

    folder = tmp_path_factory.mktemp('small_mnist')
    source = write_set(folder / 'idx', train=200, test=50)
    prepare('mnist', folder / 'data', source, say=lambda line: None)
    return folder / 'data'


@pytest.fixture
def undecoded(small_mnist: Path, tmp_path: Path) -> Path:
    """A copy of `small_mnist` of one's own, never decoded."""
    ignore = shutil.ignore_patterns('decoded')
    return Path(shutil.copytree(small_mnist, tmp_path / 'data', ignore=ignore))


@pytest.fixture(scope='session')
def job(recipe: Path, data_dir: Path) -> Job:
    """The small recipe of the guide's CNN."""
    return Job(recipe, data_dir, environment())


@pytest.fixture(scope='session')
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with `own_models.py`: models of all kinds, fit and unfit."""
    folder = tmp_path_factory.mktemp('models')
    (folder / 'own_models.py').write_text(MODELS)
    return folder


@pytest.fixture(scope='session')
def trained(tmp_path_factory: pytest.TempPathFactory, job: Job) -> Path:
    """The workdir of a finished run of `job` on 2 devices, never interrupted. Only to be read.

    Beside it: stdout, stderr, and `imported`, if the run tried to import TensorFlow or TFDS.
    """
    workdir = tmp_path_factory.mktemp('trained') / 'run'
    for name in ('tensorflow', 'tensorflow_datasets'):
        code = (
            f'open({str(workdir.parent / "imported")!r}, "a").write(__name__)\nraise ImportError(__name__)\n'
        )
        (workdir.parent / f'{name}.py').write_text(code)
    env = environment(PYTHONPATH=os.pathsep.join([str(workdir.parent), str(ROOT)]))
    result = run_ok(*job.train('run'), env=env, cwd=workdir.parent)
    (workdir.parent / 'stdout').write_text(result.stdout)
    (workdir.parent / 'stderr').write_text(result.stderr)
    return workdir


@pytest.fixture(scope='session')
def image_job(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> ImageJob:
    """Pictures in folders, prepared by the command: 73 to train on and 13 to evaluate on."""
    folder = tmp_path_factory.mktemp('pictures')
    source = write_folder(folder / 'images', train=24, val=4)
    job = make_tiny_job(folder, folder / 'data', models_dir, IMAGE_RECIPE)
    said = run_ok(*job.line('prepare', f'--from={source}'), env=job.env).stdout
    return ImageJob(job.recipe, job.data_dir, job.env, source, said)
