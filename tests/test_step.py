"""The step computes the same function on any number of devices, with one exchange between them."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parallel_train import augment
from parallel_train import config as config_lib
from parallel_train.batches import HostFeed, ResidentFeed
from parallel_train.dataset import Split
from parallel_train.evaluate import Evaluator
from parallel_train.mesh import make_mesh, start_devices
from parallel_train.order import epoch_batches
from parallel_train.plan import make_plan
from parallel_train.state import TrainState, create_model, initialise
from parallel_train.step import make_train_step

start_devices(8)

MODELS = {
    'cnn': 'cnn',
    'resnet': 'resnet_small',
    'norm_dropout': 'tests.models_for_tests:NormDropoutNet',
    'linear': 'tests.models_for_tests:Linear',
}


def make_split(n: int = 96, seed: int = 0) -> Split:
    """Images whose classes differ in brightness and place, with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n).astype(np.int32)
    images = rng.integers(0, 60, (n, 28, 28, 1)) + labels[:, None, None, None] * 15
    images[np.arange(n), labels * 2, :, 0] += 40
    return Split(images.astype(np.uint8), labels, tuple('abcdefghij'))


def make_config(model: str, **fields: Any) -> Any:
    return config_lib.complete(
        config_lib.Config({
            'model': MODELS.get(model, model), 'batch_size': 32, 'shards': 8, 'num_epochs': 10,
            'input_shape': (28, 28, 1), 'num_classes': 10, **fields,
        })
    )  # fmt: skip


def train(config: Any, devices: int, steps: int, split: Split, rate: Any = 0.05, feed: Any = None):
    """Returns the state after so many plain-SGD steps."""
    mesh = make_mesh(devices)
    plan = make_plan(config, len(split.images), 1, devices)
    state = initialise(config, rate, mesh).replace(tx=optax.sgd(rate))
    state = state.replace(opt_state=state.tx.init(state.params))
    step = make_train_step(config, plan, mesh)
    feed = (feed or ResidentFeed)(split, config, plan, mesh)
    for i in range(steps):
        state = step(state, feed.at(i))
    feed.close()
    assert step._cache_size() == min(steps, 1)  # compiled once, whatever the number of steps
    return jax.device_get(state)


@functools.cache
def one_device(model: str, steps: int) -> TrainState:
    return train(make_config(model), 1, steps, make_split())


def distance(a: Any, b: Any, start: Any) -> float:
    """‖a - b‖ / ‖a - start‖: the difference of two results against how far training has come."""

    def norm(x: Any, y: Any) -> float:
        squares = [np.sum((np.float64(p) - np.float64(q)) ** 2) for p, q in zip(
            jax.tree.leaves(x), jax.tree.leaves(y), strict=True)]  # fmt: skip
        return float(np.sqrt(sum(squares)))

    return norm(a, b) / norm(a, start)


@pytest.mark.parametrize(
    ('model', 'devices', 'accumulation'),
    [(m, d, a) for m in ('cnn', 'norm_dropout') for d, a in ((8, 1), (2, 4), (1, 8))] + [('resnet', 8, 1)],
)
def test_any_devices_compute_what_one_computes(model: str, devices: int, accumulation: int) -> None:
    """20 plain-SGD steps with 8 shards.

    Tolerance: float32 sums in another order differ by about 1e-7 of their size. 20 steps of a net with
    ReLUs amplify that, measured here to at most 1e-5; 1e-4 leaves room for other machines, while a
    gradient that is off by any factor, a wrong shard or another dropout mask gives 1e-2 and more.
    """
    # BatchNorm over 4 examples in a deep net is chaotic: after one step the difference is 1e-6, after four
    # 1e-2, on any hardware.
    steps = 1 if model == 'resnet' else 20
    one, start = one_device(model, steps), one_device(model, 0)
    config = make_config(model, accumulation_steps=accumulation)
    many = train(config, devices, steps, make_split())
    assert int(many.step) == int(one.step) == steps
    assert distance(many.params, one.params, start.params) < 1e-4
    if model != 'cnn':
        assert distance(many.batch_stats, one.batch_stats, start.batch_stats) < 1e-4
    for name in ('loss', 'accuracy', 'grad_norm', 'updates'):
        assert many.sums[name] == pytest.approx(one.sums[name], rel=1e-4)


def test_the_shards_make_the_difference() -> None:
    """The comparison above can fail: other shards are another function for BatchNorm and dropout."""
    split = make_split()
    eight, start = one_device('norm_dropout', 20), one_device('norm_dropout', 0)
    four = train(make_config('norm_dropout', shards=4), 1, 20, split)
    assert distance(four.params, eight.params, start.params) > 1e-2
    # And no shards at all means one a device.
    plain = train(make_config('norm_dropout', shards=0), 4, 20, split)
    assert distance(plain.params, four.params, start.params) < 1e-4


@pytest.mark.parametrize('devices', [1, 8])
def test_gradient_is_that_of_the_weighted_mean_over_the_global_batch(devices: int) -> None:
    """One SGD step with rate 1 is minus the gradient, here against jax.grad of the formula itself."""
    split = make_split()
    config = make_config('linear', loss='tests.models_for_tests:weighted_loss')
    before = train(config, devices, 0, split)
    after = train(config, devices, 1, split, rate=1.0)
    batch = epoch_batches(config.seed, 0, 96, 32)[0]
    images, labels = split.images[batch] / np.float32(255), split.labels[batch]

    def mean(params: Any) -> jax.Array:
        logits = create_model(config).apply({'params': params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses * labels) / jnp.sum(labels)

    gradient = jax.grad(mean)(before.params)
    got = jax.tree.map(lambda b, a: b - a, before.params, after.params)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6)
    assert after.sums['loss'] == pytest.approx(float(mean(before.params)), rel=1e-5)
    assert after.sums['grad_norm'] == pytest.approx(float(optax.global_norm(gradient)), rel=1e-4)


@pytest.mark.parametrize('model', ['cnn', 'norm_dropout'])
@pytest.mark.parametrize('devices', [2, 8])
@pytest.mark.parametrize('accumulation', [1, 4])
def test_one_all_reduce_of_gradients_metrics_and_statistics(
    model: str, devices: int, accumulation: int
) -> None:
    config = make_config(model, batch_size=64, shards=32, accumulation_steps=accumulation)
    mesh, split = make_mesh(devices), make_split()
    plan = make_plan(config, 96, 1, devices)
    state = initialise(config, 0.1, mesh)
    feed = ResidentFeed(split, config, plan, mesh)
    program = make_train_step(config, plan, mesh).lower(state, feed.at(0)).compile().as_text()
    reduces = re.findall(r'= (.*) all-reduce(?:-start)?\(', program)
    assert len(reduces) == 1
    others = ('all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter')
    assert not any(f' {other}(' in program for other in others)
    shapes = re.findall(r'(\w+)\[([\d,]*)\]', reduces[0])
    assert {dtype for dtype, _ in shapes} == {'f32'}
    size = sum(int(np.prod([int(n) for n in dims.split(',') if n])) for _, dims in shapes)
    needed = sum(x.size for x in jax.tree.leaves((state.params, state.batch_stats))) + 3
    assert needed <= size <= 1.01 * needed


def test_examples_of_each_step_are_the_same_on_any_devices() -> None:
    split = make_split()
    config = make_config('linear')
    for devices in (1, 2, 8):
        mesh, plan = make_mesh(devices), make_plan(config, 96, 1, devices)
        resident, host = (kind(split, config, plan, mesh) for kind in (ResidentFeed, HostFeed))
        for epoch in (0, 1):
            seen = []
            for row in range(3):
                expected = epoch_batches(config.seed, epoch, 96, 32)[row]
                order = resident.at(epoch * 3 + row)['order']
                sent = host.at(epoch * 3 + row)
                assert np.array_equal(np.asarray(order)[row], expected)
                assert np.array_equal(sent['index'], expected)
                assert np.array_equal(sent['image'], split.images[expected])
                assert np.array_equal(sent['label'], split.labels[expected])
                # Each device has its contiguous slice.
                for shard in order.addressable_shards:
                    part = shard.device.id * 32 // devices
                    assert np.array_equal(shard.data[row], expected[part : part + 32 // devices])
                seen += expected.tolist()
            assert len(set(seen)) == len(seen) == 96
        host.close()


@pytest.mark.parametrize('model', ['norm_dropout'])
def test_data_from_the_host_and_on_the_devices_train_alike(model: str) -> None:
    config = make_config(model, random_crop_padding=2, random_flip=True)
    a, b = (train(config, 4, 7, make_split(), feed=feed) for feed in (ResidentFeed, HostFeed))
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_several_steps_in_one_dispatch_are_the_same_steps() -> None:
    config, split, mesh = make_config('norm_dropout'), make_split(), make_mesh(2)
    plan = make_plan(config, 96, 1, 2)
    feed = ResidentFeed(split, config, plan, mesh)
    single, triple = make_train_step(config, plan, mesh), make_train_step(config, plan, mesh, 3)
    a, b = initialise(config, 0.05, mesh), initialise(config, 0.05, mesh)
    start = jax.device_get(a.params)
    for i in range(6):
        a = single(a, feed.at(i))
    for i in (0, 3):
        b = triple(b, feed.at(i))
    assert int(a.step) == int(b.step) == 6
    assert distance(jax.device_get(a.params), jax.device_get(b.params), start) < 1e-4
    assert float(a.sums['updates']) == float(b.sums['updates']) == 6


def in_colour(split: Split) -> Split:
    """The images in three channels, each other than the next."""
    grey = split.images
    return Split(np.concatenate([grey, 255 - grey, grey // 2], axis=-1), split.labels, split.class_names)


@pytest.mark.parametrize(
    ('channels', 'mean', 'std'),
    [
        (1, (0.286,), (0.353,)),
        (3, (0.2, 0.7, 0.4), (0.2, 0.3, 0.5)),
        (3, (0.4,), ()),
    ],
)
def test_pixels_are_normalised_in_training_and_evaluation(
    channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """One SGD step with rate 1, and an evaluation, against the formulas on images normalised by hand."""
    split = make_split() if channels == 1 else in_colour(make_split())
    fields = {'input_shape': (28, 28, channels), 'pixel_mean': mean, 'pixel_std': std, 'eval_batch_size': 40}
    config = make_config('linear', **fields)
    before, after = train(config, 2, 0, split), train(config, 2, 1, split, rate=1.0)
    images = ((split.images / 255 - (mean or 0)) / (std or 1)).astype(np.float32)

    def mean_loss(params: Any, examples: np.ndarray) -> jax.Array:
        logits = create_model(config).apply({'params': params}, images[examples])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels[examples])
        return jnp.mean(losses)

    loss, gradient = jax.value_and_grad(mean_loss)(before.params, epoch_batches(config.seed, 0, 96, 32)[0])
    assert after.sums['loss'] == pytest.approx(float(loss), rel=1e-5)
    got = jax.tree.map(lambda b, a: b - a, before.params, after.params)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
    mesh = make_mesh(2)
    for placement in ('device', 'host'):
        result = Evaluator(split, make_config('linear', data_placement=placement, **fields), mesh, before)(
            before
        )
        assert result['num_examples'] == 96
        assert result['loss'] == pytest.approx(float(mean_loss(before.params, np.arange(96))), rel=1e-5)


@pytest.mark.parametrize(('reduction', 'num_steps'), [('pmean', 1), ('pmean', 3), ('tree', 1)])
def test_the_state_is_donated(reduction: str, num_steps: int) -> None:
    """A step takes the memory of the state that it is given: two states are never held."""
    config = make_config('tests.models_for_tests:DenseNormNet', reduction=reduction)
    split, mesh, plan = make_split(), make_mesh(2), make_plan(config, 96, 1, 2)
    feed = ResidentFeed(split, config, plan, mesh)
    state, data = initialise(config, 0.05, mesh), feed.at(0)
    step = make_train_step(config, plan, mesh, num_steps)
    for _ in range(2):
        given, state = state, step(state, data)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, data)))


def test_accumulation_in_a_scan_is_accumulation_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lax.scan` is for accelerators; here it is made to run on the CPU."""
    config = make_config('norm_dropout', accumulation_steps=4)
    unrolled = train(config, 2, 5, make_split())
    monkeypatch.setattr('parallel_train.step.is_cpu', lambda mesh: False)
    scanned = train(config, 2, 5, make_split())
    assert distance(scanned.params, unrolled.params, one_device('norm_dropout', 0).params) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'size'), [('linear', 10_000), ('norm_dropout', 1000)])
def test_evaluation_counts_every_example_once_at_any_batch_size(model: str, size: int) -> None:
    split = make_split(size)
    config = make_config(model)
    state = initialise(config, 0.1, make_mesh(1))
    logits = state.apply_fn(
        {'params': state.params, 'batch_stats': state.batch_stats}, split.images / np.float32(255)
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()
    accuracy = float(np.mean(np.argmax(logits, -1) == split.labels))
    for batch_size, devices, placement in [
        (7, 1, 'device'),
        (64, 8, 'host'),
        (1000, 3, 'device'),
        (16384, 8, 'host'),
    ]:
        mesh = make_mesh(devices)
        config = make_config(model, eval_batch_size=batch_size, data_placement=placement)
        state = initialise(config, 0.1, mesh)
        result = Evaluator(split, config, mesh, state)(state)
        assert result['num_examples'] == size
        assert result['loss'] == pytest.approx(float(loss), rel=1e-5)
        # Logits differ in their last bits between batch sizes, which may turn a near tie or two.
        assert result['accuracy'] == pytest.approx(accuracy, abs=2.5 / size)


def test_augmentation_belongs_to_the_example() -> None:
    images = jnp.asarray(make_split(12).images)
    key = jax.random.key(3, impl='threefry2x32')

    def augmented(examples: list[int], epoch: int) -> np.ndarray:
        keys = augment.example_keys(key, jnp.int32(epoch), jnp.asarray(examples))
        return np.asarray(augment.random_crop_and_flip(images[jnp.asarray(examples)], keys, 3, True))

    together = augmented(list(range(12)), 0)
    assert np.array_equal(together[[7, 2]], augmented([7, 2], 0))
    assert not np.array_equal(together, augmented(list(range(12)), 1))
    keys = augment.example_keys(key, jnp.int32(0), jnp.arange(12))
    flipped = np.asarray(augment.random_crop_and_flip(images, keys, 0, True))
    same = [np.array_equal(a, b) for a, b in zip(flipped, images, strict=True)]
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, images, strict=True)]
    assert 0 < sum(same) < 12 and sum(same) + sum(mirrored) == 12
    # Every result is one of the crops of the padded image, mirrored or not.
    padded = np.pad(np.asarray(images), ((0, 0), (3, 3), (3, 3), (0, 0)))
    for image, result in zip(padded, together, strict=True):
        crops = [image[y : y + 28, x : x + 28] for y in range(7) for x in range(7)]
        assert any(np.array_equal(result, c) or np.array_equal(result, c[:, ::-1]) for c in crops)


def test_create_train_state_is_the_guides() -> None:
    """The guide's config has only these fields; its parameters come from `model.init(rng, ones)`."""
    from parallel_train import create_learning_rate_fn, create_train_state

    guide = config_lib.Config(
        {'learning_rate': 0.1, 'momentum': 0.9, 'batch_size': 128, 'num_epochs': 10, 'warmup_epochs': 2}
    )
    rng = jax.random.key(0)
    state = create_train_state(rng, guide, create_learning_rate_fn(guide, 0.1, 468))
    model = create_model(config_lib.complete(guide))
    params = model.init(rng, jnp.ones([1, 28, 28, 1]))['params']
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    assert list(state.params) == ['Conv_0', 'Conv_1', 'Dense_0', 'Dense_1']
    assert sum(x.size for x in jax.tree.leaves(params)) == 824_458
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert isinstance(state, TrainState) and state.step.dtype == jnp.int32
    assert state.apply_fn({'params': state.params}, jnp.ones([3, 28, 28, 1])).shape == (3, 10)
    # Two updates as optax.sgd on the schedule makes them: the first has rate 0.
    tx = optax.sgd(create_learning_rate_fn(guide, 0.1, 468), 0.9)
    opt_state, ours, theirs = tx.init(params), state, params
    for _ in range(2):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, opt_state = tx.update(grads, opt_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        ours = ours.apply_gradients(grads=grads)
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours.params), strict=True):
        np.testing.assert_array_equal(a, b)
