"""With `reduction='tree'` the bits do not depend on the number of devices."""

from __future__ import annotations

import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from parallel_train.batches import HostFeed, ResidentFeed
from parallel_train.errors import UserError
from parallel_train.evaluate import Evaluator
from parallel_train.mesh import make_mesh, start_devices
from parallel_train.plan import make_plan
from parallel_train.schedule import create_learning_rate_fn
from parallel_train.state import initialise, saved_parts
from parallel_train.step import make_train_step
from parallel_train.tree import add_as_tree
from tests.conftest import Job, run_ok
from tests.test_step import make_config, make_split

start_devices(8)

FIELDS: dict[str, Any] = {'reduction': 'tree', 'momentum': 0.9, 'weight_decay': 1e-4, 'eval_batch_size': 50}


def train(config: Any, devices: int, steps: int, feed: Any = ResidentFeed) -> dict[str, bytes]:
    """Returns everything that the run computed, as bytes."""
    split, mesh = make_split(), make_mesh(devices)
    plan = make_plan(config, 96, 96, devices)
    state = initialise(config, create_learning_rate_fn(config, 0.05, plan.steps_per_epoch), mesh)
    step, data = make_train_step(config, plan, mesh), feed(split, config, plan, mesh)
    for i in range(steps):
        state = step(state, data.at(i))
    data.close()
    evaluation = Evaluator(split, config, mesh, state)(state)
    parts = jax.device_get({**saved_parts(state), 'evaluation': evaluation})
    return {jax.tree_util.keystr(k): np.asarray(v).tobytes() for k, v in jax.tree.leaves_with_path(parts)}


def different(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


@functools.cache
def one_device(model: str, steps: int) -> dict[str, bytes]:
    return train(tree_config(model), 1, steps)


def tree_config(model: str, **fields: Any) -> Any:
    augmented = {'random_crop_padding': 2, 'random_flip': True} if model == 'norm_dropout' else {}
    return make_config(model, **FIELDS, **augmented, **fields)


@pytest.mark.parametrize('devices', [2, 4, 8])
@pytest.mark.parametrize('model', ['cnn', 'norm_dropout'])
def test_the_same_bits_on_any_devices(model: str, devices: int) -> None:
    assert not different(train(tree_config(model), devices, 20), one_device(model, 20))


@pytest.mark.slow
@pytest.mark.parametrize('model', ['cnn', 'resnet', 'norm_dropout'])
def test_the_same_bits_after_200_steps(model: str) -> None:
    steps = 40 if model == 'resnet' else 200
    for devices in (2, 4, 8):
        assert not different(train(tree_config(model), devices, steps), one_device(model, steps)), devices


def test_with_accumulation_and_data_from_the_host() -> None:
    for fields, feed in (({'accumulation_steps': 2}, ResidentFeed), ({'data_placement': 'host'}, HostFeed)):
        config = tree_config('norm_dropout', **fields)
        assert not different(train(config, 2, 10, feed), one_device('norm_dropout', 10))


def test_other_shards_are_other_bits() -> None:
    """The comparisons above can fail."""
    assert different(train(tree_config('cnn', shards=4), 1, 20), one_device('cnn', 20))
    pmean = [train(make_config('cnn', **{**FIELDS, 'reduction': 'pmean'}), n, 20) for n in (1, 8)]
    assert different(*pmean)


def test_parts_are_added_as_neighbours() -> None:
    assert add_as_tree([f'{i}' for i in range(8)], lambda a, b: f'({a}+{b})') == (
        '(((0+1)+(2+3))+((4+5)+(6+7)))'
    )
    assert add_as_tree(['a'], lambda a, b: 'never') == 'a'


@pytest.mark.parametrize('shards', [0, 12])
def test_shards_must_be_a_power_of_two(shards: int) -> None:
    config = make_config('linear', reduction='tree', shards=shards, batch_size=96)
    with pytest.raises(UserError, match=f'config.shards={shards}: must be a power of two'):
        make_plan(config, 96, 96, 4)


@pytest.mark.slow
def test_the_same_bits_on_many_devices_of_one_process(job: Job, tmp_path: Path) -> None:
    """Where each has two threads in XLA's pool, whose size changes bits."""
    flags = ['--config.shards=16', '--config.reduction=tree', '--config.num_epochs=0.4']
    said = [run_ok(*job.train(tmp_path / f'{n}', *flags, devices=n), env=job.env).stdout for n in (2, 16)]
    digests = {re.findall(r'^sha256 of the parameters: (\w{64})$', text, re.MULTILINE)[0] for text in said}
    assert len(digests) == 1, said
    for n in (2, 16):
        environment = json.loads((tmp_path / f'{n}' / 'environment.json').read_text())
        assert environment['threads of XLA (CPU)'] == '32'


def test_gpus_without_deterministic_kernels_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_autotune_level=2')
    with pytest.warns(UserWarning, match='--xla_gpu_deterministic_ops=true'):
        start_devices(8, tree_shards=8)
    with warnings.catch_warnings(action='error'):
        start_devices(8)
        monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_deterministic_ops=true')
        start_devices(8, tree_shards=8)
