"""BatchNorm over the global batch: what N devices compute is what one computes with a single shard."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

from parallel_train import UserError, start_devices
from parallel_train.batches import ResidentFeed
from parallel_train.diagnose import diagnose
from parallel_train.forward import check_model_and_loss
from parallel_train.mesh import make_mesh
from parallel_train.plan import make_plan
from parallel_train.state import initialise
from parallel_train.step import make_train_step
from tests.test_step import distance, make_config, make_split, train

start_devices(8)

NORM = 'tests.models_for_tests:NormNet'


@functools.cache
def whole_batch(steps: int) -> Any:
    """One device and one shard: nothing is exchanged at all."""
    return train(make_config(NORM, shards=1), 1, steps, make_split())


@pytest.mark.slow
@pytest.mark.parametrize(('devices', 'shards'), [(8, 8), (2, 8), (1, 4)])
def test_statistics_and_gradients_are_those_of_the_whole_batch(devices: int, shards: int) -> None:
    """10 plain-SGD steps; the tolerance is that of test_step.py."""
    start, whole = whole_batch(0), whole_batch(10)
    synced = train(make_config(NORM, shards=shards, batch_norm='global'), devices, 10, make_split())
    assert distance(synced.params, whole.params, start.params) < 1e-4
    assert distance(synced.batch_stats, whole.batch_stats, start.batch_stats) < 1e-4
    for name in ('loss', 'accuracy', 'grad_norm'):
        assert synced.sums[name] == pytest.approx(whole.sums[name], rel=1e-4)


def test_statistics_by_shard_are_another_function() -> None:
    by_shard = train(make_config(NORM, shards=4), 1, 10, make_split())
    assert distance(by_shard.params, whole_batch(10).params, whole_batch(0).params) > 1e-2


def test_dropout_still_belongs_to_the_shard() -> None:
    split = make_split()
    config = make_config('norm_dropout', batch_norm='global')
    start, one, eight = (train(config, devices, steps, split) for devices, steps in ((1, 0), (1, 5), (8, 5)))
    assert distance(eight.params, one.params, start.params) < 1e-4


def test_several_steps_in_one_dispatch() -> None:
    config, split, mesh = make_config(NORM, batch_norm='global'), make_split(), make_mesh(2)
    plan = make_plan(config, 96, 1, 2)
    feed = ResidentFeed(split, config, plan, mesh)
    state = make_train_step(config, plan, mesh, 3)(initialise(config, 0.05, mesh), feed.at(0))
    single = initialise(config, 0.05, mesh)
    start, step = jax.device_get(single.params), make_train_step(config, plan, mesh)
    for i in range(3):
        single = step(single, feed.at(i))
    assert distance(jax.device_get(state.params), jax.device_get(single.params), start) < 1e-4


def test_of_blocks_that_are_computed_again() -> None:
    """With `remat` as well, each BatchNorm averages over shards and devices, here before it is compiled."""
    mesh, split = make_mesh(2), make_split()
    counts = []
    for model in ('small_resnet', 'small_resnet_again'):
        config = make_config(f'tests.models_for_tests:{model}', batch_norm='global')
        check_model_and_loss(config)
        plan = make_plan(config, 96, 1, 2)
        state, feed = initialise(config, 0.1, mesh), ResidentFeed(split, config, plan, mesh)
        program = make_train_step(config, plan, mesh).lower(state, feed.at(0)).as_text()
        counts.append(program.count('stablehlo.all_reduce'))
    assert counts[1] > counts[0] > 3  # those of the forward pass a second time


def test_what_is_exchanged() -> None:
    """Besides the one all-reduce of the step: mean and mean square of each layer, and their gradients."""
    mesh, split = make_mesh(8), make_split()
    counts = {}
    for batch_norm in ('shard', 'global'):
        config = make_config(NORM, batch_norm=batch_norm)
        plan = make_plan(config, 96, 1, 8)
        state, feed = initialise(config, 0.1, mesh), ResidentFeed(split, config, plan, mesh)
        program = make_train_step(config, plan, mesh).lower(state, feed.at(0)).compile().as_text()
        counts[batch_norm] = len(re.findall(r' all-reduce(?:-start)?\(', program))
    layers = len(state.batch_stats)
    assert counts['shard'] == 1
    assert 1 + layers <= counts['global'] <= 1 + 2 * layers


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        ({'reduction': 'tree'}, "config.batch_norm='global': .*reduction='tree'"),
        ({'accumulation_steps': 2}, "config.batch_norm='global': .*accumulation_steps=2"),
    ],
)
def test_what_it_cannot_serve(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_plan(make_config('norm_dropout', batch_norm='global', **fields), 96, 1, 2)


def test_a_model_without_batch_norm() -> None:
    check_model_and_loss(make_config('norm_dropout', batch_norm='global'))
    with pytest.raises(UserError, match="batch_norm='global': cnn calls no flax.linen.BatchNorm"):
        check_model_and_loss(make_config('cnn', batch_norm='global'))


def test_a_divergence_is_explained() -> None:
    """By the statistics of each shard, on one device: no axis is there to exchange anything."""
    config, split = make_config('norm_dropout', batch_norm='global'), make_split()
    plan = make_plan(config, 96, 1, 2)
    state = initialise(config, 0.1, make_mesh(1))
    params = dict(state.params)
    for layer in ('Dense_0', 'Dense_1'):  # each finite by itself
        params[layer] = {**params[layer], 'kernel': params[layer]['kernel'] * np.float32(1e30)}
    text = diagnose(dataclasses.replace(state, params=params), config, plan, split)
    assert re.search(r'step 1 .*the output of Dense_1', text), text
