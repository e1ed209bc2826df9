"""Which precision gradients and reductions have; and what is computed again instead of kept."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel_train import UserError, start_devices
from parallel_train.batches import ResidentFeed
from parallel_train.diagnose import diagnose
from parallel_train.mesh import make_mesh
from parallel_train.models.resnet import BasicBlock, BottleneckBlock, ResNet
from parallel_train.models.vit import ViT
from parallel_train.models.wide_resnet import WideResNet
from parallel_train.plan import make_plan
from parallel_train.state import create_model, initialise, takes_train
from parallel_train.step import make_train_step
from tests.conftest import ROOT, run_ok
from tests.test_compile import CNN_PARAMETERS, MAIN, METRICS, needs_libtpu
from tests.test_step import distance, make_config, make_split, train
from tests.test_text import make_config as make_text_config
from tests.test_text import make_text

start_devices(8)


def lowered(config: Any, split: Any, devices: int) -> Any:
    mesh = make_mesh(devices)
    plan = make_plan(config, len(split.images), 1, devices)
    state, feed = initialise(config, 0.1, mesh), ResidentFeed(split, config, plan, mesh)
    return make_train_step(config, plan, mesh).lower(state, feed.at(0))


def reduced(program: str) -> dict[str, int]:
    """Returns how many numbers of which type a program reduces over the devices, before it is compiled."""
    found: dict[str, int] = {}
    blocks = re.findall(r'"stablehlo.all_reduce".*?\}\) : \(([^)]*)\)', program, re.DOTALL)
    for shape, dtype in re.findall(r'tensor<((?:\d+x)*)(\w+)>', ', '.join(blocks)):
        size = int(np.prod([int(n) for n in shape.split('x') if n]))
        found[dtype] = found.get(dtype, 0) + size
    return found


def test_reductions_are_float32_where_products_are_bfloat16() -> None:
    split = make_split()
    config = make_config('resnet', dtype='bfloat16')
    state = initialise(config, 0.1, make_mesh(1))
    size = sum(x.size for x in jax.tree.leaves((state.params, state.batch_stats))) + 3
    assert reduced(lowered(config, split, 2).as_text()) == {'f32': size}


def test_gradients_travel_as_bfloat16_if_asked() -> None:
    """And nothing else: statistics and metrics stay float32."""
    config = make_config('norm_dropout', gradient_dtype='bfloat16')
    state = initialise(config, 0.1, make_mesh(1))
    params, stats = (sum(x.size for x in jax.tree.leaves(t)) for t in (state.params, state.batch_stats))
    assert reduced(lowered(config, make_split(), 2).as_text()) == {'bf16': params, 'f32': stats + 3}


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 2, 8])
def test_error_of_gradients_in_bfloat16(devices: int) -> None:
    """One step at rate 1 is minus the gradient. Rounding to 8 bits gives an error of at most 2⁻⁸ each time.

    Twice here: each device's part, which may be larger than the sum, and the sum.
    """
    split = make_split()
    start, exact = (
        one_step('cnn', 'float32', devices, 0, split),
        one_step('cnn', 'float32', devices, 1, split),
    )
    narrow = one_step('cnn', 'bfloat16', devices, 1, split)
    error = distance(narrow.params, exact.params, start.params)
    assert 2**-12 < error < 2**-8
    assert narrow.sums['loss'] == pytest.approx(exact.sums['loss'], rel=1e-6)


def one_step(model: str, gradient_dtype: str, devices: int, steps: int, split: Any) -> Any:
    return train(make_config(model, gradient_dtype=gradient_dtype), devices, steps, split, rate=1.0)


def test_tree_adds_float32_alone() -> None:
    with pytest.raises(UserError, match=r"config.gradient_dtype='bfloat16': .*reduction='tree'"):
        make_plan(make_config('cnn', gradient_dtype='bfloat16', reduction='tree'), 96, 1, 2)


@needs_libtpu
@pytest.mark.slow
def test_bfloat16_halves_the_bytes_on_tpus(tmp_path: Path) -> None:
    rows = {}
    for dtype in ('float32', 'bfloat16'):
        flags = [f'--config={MAIN}', f'--config.gradient_dtype={dtype}', '--topology=v5e:2x4']
        result = run_ok('compile', *flags, '--json', f'--data_dir={tmp_path}', timeout=900)
        [row] = json.loads(result.stdout)['topologies']
        [rows[dtype]] = row['collectives']
    assert rows['float32']['bytes'] == pytest.approx(4 * (CNN_PARAMETERS + METRICS), rel=0.01)
    assert rows['bfloat16']['bytes'] == pytest.approx(2 * CNN_PARAMETERS + 4 * METRICS, rel=0.01)


# ---------------------------------------------------------------- rematerialisation


@pytest.mark.slow
@pytest.mark.parametrize(
    'model',
    [
        ResNet(BasicBlock, (1, 1), num_classes=10),
        ResNet(BottleneckBlock, (2,), num_classes=10),
        WideResNet(1, 1, num_classes=10),
        ViT(width=32, heads=2, depth=2, patch=4, num_classes=10),
    ],
    ids=['basic', 'bottleneck', 'wide', 'vit'],
)
def test_activations_computed_again_give_the_same_gradients(model: Any) -> None:
    images = jax.random.uniform(jax.random.key(0), (4, 16, 16, 3))
    flags = {'train': True} if takes_train(model) else {}
    variables = dict(model.init(jax.random.key(1), images, **flags))
    # The last scales of the blocks, and ViT's head, start at 0, which would hide most of the gradients.
    variables['params'] = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), variables['params']
    )

    def gradient_of(remat: bool) -> Any:
        def loss(params: Any) -> Any:
            given = {**variables, 'params': params}
            logits, changed = model.clone(remat=remat).apply(given, images, **flags, mutable=['batch_stats'])
            return jnp.sum(logits**2), changed

        return jax.grad(loss, has_aux=True)

    programs = [str(jax.make_jaxpr(gradient_of(remat))(variables['params'])) for remat in (False, True)]
    assert ['remat' in program for program in programs] == [False, True]
    plain, again = (jax.jit(gradient_of(remat))(variables['params']) for remat in (False, True))
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    # Of a key's bias in attention the gradient is 0 but for rounding, which is that of the others.
    rounding = 1e-6 * max(float(jnp.max(jnp.abs(a))) for a in jax.tree.leaves(plain[0]))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(a))) + rounding)


def test_activations_computed_again_give_the_same_steps() -> None:
    split, after = make_text(64), {}
    start = train(make_text_config(), 1, 0, split)
    for remat in (False, True):
        after[remat] = train(make_text_config(remat=remat, batch_size=64, shards=1), 1, 2, split)
    assert distance(after[True].params, after[False].params, start.params) < 1e-4


@pytest.mark.long
@needs_libtpu
@pytest.mark.slow
def test_activations_computed_again_take_less_memory_on_tpus(tmp_path: Path) -> None:
    # XLA's compiler for CPUs may put the second computation where it frees nothing.
    temporary = {}
    for remat in (False, True):
        flags = ['--config.batch_size=512', '--config.shards=8', f'--config.remat={remat}']
        recipe = f'--config={ROOT / "configs" / "text_transformer.py"}'
        result = run_ok(
            'compile', recipe, *flags, '--topology=v5e:2x4', '--json', f'--data_dir={tmp_path}', timeout=900
        )
        [row] = json.loads(result.stdout)['topologies']
        temporary[remat] = row['temporary_bytes']
    assert temporary[True] < 0.5 * temporary[False]


def test_a_divergence_is_traced_into_what_is_computed_again() -> None:
    config, split = make_text_config(remat=True, shards=2), make_text(32)
    state = initialise(config, 0.1, make_mesh(1))
    block = next(name for name in state.params if 'Block' in name)
    state = state.replace(
        params={**state.params, block: jax.tree.map(lambda p: p + 3e38, state.params[block])}
    )
    text = diagnose(state, config, make_plan(config, 32, 1, 1), split)
    assert f'the output of {block}/' in text, text
    # What hinders the diagnosis is no reason to end by it.
    unread = dataclasses.replace(split, images=split.images[:1])
    text = diagnose(state, config, make_plan(config, 32, 1, 1), unread)
    assert text.startswith('where it came from could not be found (IndexError: '), text


def test_a_model_that_cannot_compute_again_says_so() -> None:
    with pytest.raises(UserError, match='config.remat=True: cnn has no field remat; use False'):
        create_model(make_config('cnn', remat=True))
