"""A model, a loss and a dataset of a package outside this repository, installed as any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment, read_rows, run_cli, run_ok

PACKAGE = {
    'setup.cfg': """
[metadata]
name = my-package
version = 1.0
[options]
packages = my_package
""",
    'pyproject.toml': """
[build-system]
requires = ['setuptools']
build-backend = 'setuptools.build_meta'
""",
    'my_package/__init__.py': '',
    'my_package/models.py': """
import flax.linen as nn
import jax.numpy as jnp


class Mixer(nn.Module):
    num_classes: int
    dtype: object = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape((images.shape[0], -1)).astype(self.dtype)
        x = nn.Dense(32, dtype=self.dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.num_classes)(x)


class NoBatch(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(4)(images).mean()
""",
    'my_package/losses.py': """
import jax.numpy as jnp
import optax


def of_odd_classes(logits, batch):
    '''Odd classes count three times as much.'''
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return losses, jnp.where(batch['label'] % 2, 3.0, 1.0)


def mean(logits, batch):
    return of_odd_classes(logits, batch)[0].mean()
""",
    'my_package/data.py': """
import numpy as np


def stripes(split, data_dir):
    rng = np.random.default_rng(len(split))
    labels = rng.integers(0, 4, 512 if split == 'train' else 96)
    images = rng.integers(0, 80, (len(labels), 8, 8, 3))
    images[np.arange(len(labels)), labels * 2] += 150
    return {'image': images.astype(np.uint8), 'label': labels, 'class_names': ['a', 'b', 'c', 'd']}
""",
}
RECIPE = """
from parallel_train import default_config


def get_config():
    config = default_config()
    config.model = 'my_package.models:Mixer'
    config.loss = 'my_package.losses:of_odd_classes'
    config.dataset = 'my_package.data:stripes'
    config.batch_size, config.shards, config.num_epochs, config.warmup_epochs = 32, 4, 3.0, 0.5
    return config
"""


@pytest.fixture(scope='module')
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed the package into; where it cannot build one, a copy of its sources."""
    source, target = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('site')
    for name, text in PACKAGE.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    flags = ['--no-deps', '--no-build-isolation', '--no-index', '--quiet', f'--target={target}']
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'install', *flags, str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:  # an environment without setuptools or wheel
        shutil.copytree(source / 'my_package', target / 'my_package', dirs_exist_ok=True)
    (target / 'recipe.py').write_text(RECIPE)
    return target


def test_a_package_of_ones_own(installed: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([environment()['PYTHONPATH'], str(installed)])
    env, recipe = environment(PYTHONPATH=path), f'--config={installed / "recipe.py"}'
    more = ('--config.batch_norm=global', '--config.remat=True', '--config.gradient_dtype=bfloat16')
    run_ok('train', recipe, '--workdir=run', '--devices=2', *more, cwd=tmp_path, env=env)
    evaluation = read_rows(tmp_path / 'run')[-1]
    assert evaluation['num_examples'] == 96 and evaluation['accuracy'] > 0.9
    again = run_ok('evaluate', recipe, '--workdir=run', '--json', *more, cwd=tmp_path, env=env)
    assert json.loads(again.stdout)['loss'] == pytest.approx(evaluation['loss'], rel=1e-4)
    # A model that returns no logits is refused, with what would be right, before anything is written.
    refused = run_cli(
        'train', recipe, '--config.model=my_package.models:NoBatch', '--workdir=other', cwd=tmp_path, env=env
    )
    assert refused.code == 2 and 'must return logits [batch, classes]' in refused.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['run']
