"""Augmentations do what their papers say, and the same on any number of devices."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel_train import UserError, augment, mix, randaugment, start_devices
from parallel_train.augment_fit import check_augmentation
from parallel_train.forward import make_forward
from parallel_train.losses import softmax_cross_entropy
from parallel_train.plan import make_plan
from parallel_train.randaugment import OPERATIONS
from parallel_train.state import create_model
from tests.conftest import ROOT, run_cli
from tests.models_for_tests import weighted_loss
from tests.test_step import distance, make_config, make_split, one_device, train
from tests.test_tree import different, tree_config
from tests.test_tree import train as train_tree

start_devices(8)

EVERYTHING: dict[str, Any] = {
    'random_crop_padding': 2,
    'random_flip': True,
    'randaugment_layers': 1,
    'cutout_size': 6,
    'random_erasing': 0.5,
    'mixup_alpha': 0.3,
    'cutmix_alpha': 1.0,
}


def keys(n: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed, impl='threefry2x32'), n)


def images(n: int, height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    """Smooth colour pictures, none of whose pixels is 0 or 255."""
    rng = np.random.default_rng(0)
    small = rng.integers(20, 235, (n, height // 8, width // 8, channels))
    big = np.kron(small, np.ones((1, 8, 8, 1))) + rng.integers(-9, 10, (n, height, width, channels))
    return big.astype(np.uint8)


def boxes(changed: np.ndarray) -> np.ndarray:
    """Returns (height, width, pixels) of what changed in each image, bool [batch, height, width]."""
    tall, wide = changed.any(2).sum(1), changed.any(1).sum(1)
    return np.stack([tall, wide, changed.sum((1, 2))], axis=1)


# ---------------------------------------------------------------- one example


def test_cutout_blanks_a_square_centred_on_any_pixel() -> None:
    n, size = 4000, 7
    before = np.full((n, 24, 32, 1), 200, np.uint8)
    before[:, ::2] = 100
    after = np.asarray(jax.jit(augment.cutout, static_argnums=2)(before, keys(n), size))
    assert set(np.unique(after)) == {100, 150, 200}
    tall, wide, pixels = boxes((after == 150)[..., 0]).T
    assert (pixels == tall * wide).all() and tall.max() == wide.max() == size
    # Cut off at an edge in 3 of 24 rows on either side: with a centre that is any pixel alike.
    assert np.mean(tall < size) == pytest.approx(6 / 24, abs=0.03)
    assert np.mean(wide < size) == pytest.approx(6 / 32, abs=0.03)
    assert tall.min() == wide.min() == 4


def test_random_erasing_draws_area_and_ratio_of_the_paper() -> None:
    n, height, width = 3000, 60, 80
    before = np.zeros((n, height, width, 3), np.uint8)
    after = np.asarray(jax.jit(augment.random_erasing, static_argnums=2)(before, keys(n), 0.7))
    erased = after.any(axis=-1)
    hit = erased.any(axis=(1, 2))
    assert hit.mean() == pytest.approx(0.7, abs=0.03)
    tall, wide, pixels = boxes(erased[hit]).T
    assert (pixels > 0.999 * tall * wide - 1).all()  # one box; a pixel of noise may be black
    area, ratio = tall * wide / (height * width), tall / wide
    assert area.min() > 0.017 and 0.3 < area.max() < 0.42
    assert 0.25 < ratio.min() < 0.4 and 2.5 < ratio.max() < 3.9
    # Ratios are uniform, so three quarters of them are above 1; boxes that do not fit make them fewer.
    assert 0.6 < np.mean(ratio > 1) < 0.8
    noise = after[hit][erased[hit]]
    assert noise.mean() == pytest.approx(127.5, abs=1) and noise.std() == pytest.approx(73.9, abs=1)


@functools.partial(jax.jit, static_argnums=3)
def operate(image: jax.Array, operation: int, sign: float, magnitude: float) -> jax.Array:
    return randaugment.apply(image, operation, sign, magnitude)


def operated(name: str, image: np.ndarray, magnitude: float = 10, sign: float = 1) -> np.ndarray:
    return np.asarray(operate(jnp.asarray(image), OPERATIONS.index(name), sign, magnitude))


def test_randaugment_operations_are_those_of_pillow() -> None:
    """Its ImageEnhance and ImageOps are what the paper's code calls."""
    from PIL import Image, ImageEnhance, ImageOps

    image = images(1)[0]
    pil = Image.fromarray(image)
    for name, enhance in {
        'colour': ImageEnhance.Color,
        'contrast': ImageEnhance.Contrast,
        'brightness': ImageEnhance.Brightness,
        'sharpness': ImageEnhance.Sharpness,
    }.items():
        for sign, factor in ((1, 1.45), (-1, 0.55)):
            ours = operated(name, image, 5, sign).astype(int)
            theirs = np.asarray(enhance(pil).enhance(factor)).astype(int)
            assert np.abs(ours - theirs).max() <= 2, name  # it truncates where we round
            assert np.abs(ours - image).max() > 5, name
    for name, theirs in {
        'autocontrast': ImageOps.autocontrast(pil),
        'equalize': ImageOps.equalize(pil),
        'posterize': ImageOps.posterize(pil, 4),
    }.items():
        difference = np.abs(operated(name, image).astype(int) - np.asarray(theirs))
        assert difference.max() <= (1 if name == 'autocontrast' else 0), name
    assert np.array_equal(operated('solarize', image, 5), ImageOps.solarize(pil, 128))
    assert np.array_equal(operated('identity', image), image)
    assert np.array_equal(operated('posterize', image, 0), image)
    assert np.array_equal(operated('solarize', image, 0), image)


def test_randaugment_geometry_moves_pixels_by_its_formulas() -> None:
    image = np.zeros((33, 33, 1), np.uint8)
    image[16, 16] = 255  # the centre stays where it is but for a translation
    image[16, 26] = 100  # 10 to the right of it
    image[6, 16] = 50  # 10 above it

    def place(name: str, value: int, sign: float = 1) -> tuple[int, int]:
        found = np.argwhere(operated(name, image, 10, sign)[..., 0] == value)
        assert len(found), (name, value)
        row, column = found.mean(axis=0)
        return round(row - 16), round(column - 16)

    for name in ('rotate', 'shear_x', 'shear_y'):
        assert place(name, 255) == (0, 0)
    # 30 degrees: (cos 30°, sin 30°)·10 = (9, 5).
    assert {place('rotate', 100, 1), place('rotate', 100, -1)} == {(5, 9), (-5, 9)}
    assert {place('shear_x', 50, 1), place('shear_x', 50, -1)} == {(-10, 3), (-10, -3)}
    assert {place('shear_y', 100, 1), place('shear_y', 100, -1)} == {(3, 10), (-3, 10)}
    assert {place('translate_x', 255, 1), place('translate_x', 255, -1)} == {(0, 15), (0, -15)}
    assert {place('translate_y', 255, 1), place('translate_y', 255, -1)} == {(15, 0), (-15, 0)}


def test_randaugment_draws_all_operations_alike() -> None:
    n = 560
    image = images(1)[0]
    rand_augment = jax.jit(randaugment.rand_augment, static_argnums=(2, 3))
    results = np.asarray(rand_augment(np.repeat(image[None], n, axis=0), keys(n), 1, 7.0))
    kinds: dict[bytes, int] = {}
    for result in results:
        kinds[result.tobytes()] = kinds.get(result.tobytes(), 0) + 1
    numbers, signs = (
        jnp.repeat(jnp.arange(len(OPERATIONS)), 2),
        jnp.tile(jnp.array([1.0, -1.0]), len(OPERATIONS)),
    )
    apply = jax.jit(jax.vmap(lambda number, sign: randaugment.apply(jnp.asarray(image), number, sign, 7.0)))
    possible = np.asarray(apply(numbers, signs)).reshape(len(OPERATIONS), 2, *image.shape)
    for name, pair in zip(OPERATIONS, possible, strict=True):
        count = sum(kinds.pop(result, 0) for result in {one.tobytes() for one in pair})
        assert 15 < count < 65, (name, count)  # 40 ± 4 standard deviations
    assert not kinds
    grey = np.asarray(rand_augment(image[None, :, :, :1], keys(1), 3, 7.0))
    assert grey.shape == (1, 24, 32, 1) and grey.dtype == np.uint8


# ---------------------------------------------------------------- two examples


def shards_of_constants(count: int, examples: int) -> dict[str, jax.Array]:
    """Images all of whose pixels are their label, from 0 on in each shard."""
    label = jnp.tile(jnp.arange(examples), (count, 1))
    image = jnp.broadcast_to(label[:, :, None, None, None].astype(jnp.float32), (count, examples, 16, 20, 1))
    return {'image': image, 'label': label}


def mixed(count: int, examples: int, **fields: Any) -> dict[str, np.ndarray]:
    config = make_config('linear', **fields)
    mix_shards = jax.jit(lambda batch, keys: mix.mix_shards(batch, keys, config))
    return {
        k: np.asarray(v) for k, v in mix_shards(shards_of_constants(count, examples), keys(count)).items()
    }


@pytest.mark.parametrize('alpha', [0.2, 1.0])
def test_mixup_is_a_line_between_partners_of_a_shard(alpha: float) -> None:
    batch = mixed(3000, 4, mixup_alpha=alpha)
    own, other, share = batch['label'], batch['mixed_label'], batch['mix']
    assert (np.sort(other, axis=1) == own).all()  # a permutation of the shard
    line = share * own + (1 - share) * other
    np.testing.assert_allclose(
        batch['image'], np.broadcast_to(line[..., None, None, None], batch['image'].shape), atol=1e-5
    )
    assert (share == share[:, :1]).all()
    # Beta(α, α): mean 1/2, variance 1/(4(2α + 1)).
    assert share[:, 0].mean() == pytest.approx(0.5, abs=0.03)
    assert share[:, 0].var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_cutmix_weighs_labels_by_area() -> None:
    batch = mixed(3000, 3, cutmix_alpha=1.0)
    own, other, share = batch['label'], batch['mixed_label'], batch['mix']
    from_other = batch['image'][..., 0] == other[..., None, None]
    is_own = batch['image'][..., 0] == own[..., None, None]
    assert (from_other | is_own).all()
    differ = own != other
    np.testing.assert_allclose(share[differ], is_own[differ].mean(axis=(1, 2)), atol=1e-6)
    tall, wide, pixels = boxes(from_other[differ]).T
    assert (pixels == tall * wide).all()
    # λ is uniform for α = 1: the box before it is cut off at the edges has 1 - λ of the area.
    first = batch['mix'][:, 0]
    assert 0.5 < first.mean() < 0.75 and first.min() < 0.2 and first.max() > 0.97


def test_both_are_taken_in_turns_and_some_shards_are_left() -> None:
    batch = mixed(2000, 3, mixup_alpha=1.0, cutmix_alpha=1.0, mix_probability=0.6)
    left = (batch['mix'] == 1).all(axis=1)
    assert 0.35 < left.mean() < 0.45  # a box may be empty
    differ = ~left & (batch['label'] != batch['mixed_label']).any(axis=1)
    whole = np.array([
        np.isin(image, (0.0, 1.0, 2.0)).all() for image in batch['image'][differ]
    ])  # of CutMix: pixels are those of one or the other  # fmt: skip
    assert 0.4 < whole.mean() < 0.6


@pytest.mark.parametrize('loss', ['softmax_cross_entropy', 'tests.models_for_tests:weighted_loss'])
def test_any_loss_is_a_sum_over_both_labels(loss: str) -> None:
    config = make_config('linear', loss=loss, mixup_alpha=0.4)
    forward = make_forward(config, create_model(config).apply)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 10)), jnp.float32)
    batch = {
        'label': jnp.asarray(rng.integers(0, 10, 6)),
        'mixed_label': jnp.asarray(rng.integers(0, 10, 6)),
        'mix': jnp.asarray(rng.uniform(size=6), jnp.float32),
    }
    losses, weights, correct = forward.measure(logits, batch, train=True)
    one = weighted_loss if 'weighted' in loss else softmax_cross_entropy
    share = batch['mix']
    (a, wa), (b, wb) = (one(logits, {'label': batch[name]}) for name in ('label', 'mixed_label'))
    np.testing.assert_allclose(losses, share * a * wa + (1 - share) * b * wb, rtol=1e-5)
    np.testing.assert_allclose(weights, share * wa + (1 - share) * wb, rtol=1e-5)
    hit = [(np.argmax(logits, 1) == np.asarray(batch[name])) for name in ('label', 'mixed_label')]
    np.testing.assert_allclose(correct, share * wa * hit[0] + (1 - share) * wb * hit[1], rtol=1e-5)
    if one is softmax_cross_entropy:  # the paper's: cross-entropy against the mixed one-hot labels
        target = share[:, None] * jax.nn.one_hot(batch['label'], 10) + (1 - share)[:, None] * jax.nn.one_hot(
            batch['mixed_label'], 10
        )
        np.testing.assert_allclose(losses, -(target * jax.nn.log_softmax(logits)).sum(1), rtol=1e-5)


# ---------------------------------------------------------------- on any devices


@functools.cache
def trained(devices: int) -> Any:
    return train(make_config('norm_dropout', **EVERYTHING), devices, 6, make_split())


@pytest.mark.parametrize('devices', [pytest.param(2, marks=pytest.mark.slow), 8])
def test_any_devices_augment_alike(devices: int) -> None:
    start = one_device('norm_dropout', 0)
    assert distance(trained(devices).params, trained(1).params, start.params) < 1e-4
    assert trained(devices).sums['accuracy'] == pytest.approx(trained(1).sums['accuracy'], rel=1e-4)


def test_mixing_changes_what_is_trained() -> None:
    """The comparison above can fail."""
    start = one_device('linear', 0)
    mixed = train(make_config('linear', mixup_alpha=1.0), 1, 6, make_split())
    assert distance(mixed.params, one_device('linear', 6).params, start.params) > 1e-2


@pytest.mark.slow
def test_the_same_bits_in_a_tree() -> None:
    config = tree_config(
        'norm_dropout',
        **{k: v for k, v in EVERYTHING.items() if not k.startswith('random_c') and k != 'random_flip'},
    )
    assert not different(train_tree(config, 4, 6), train_tree(config, 1, 6))


@pytest.mark.parametrize('field', ['mixup_alpha', 'cutmix_alpha'])
def test_a_shard_of_one_example_has_no_partner(field: str) -> None:
    config = make_config('linear', shards=32, **{field: 0.2})
    with pytest.raises(UserError, match=rf'config.{field}=0.2: .* at least 64'):
        make_plan(config, 96, 1, 1)


@pytest.mark.parametrize('field', ['cutout_size', 'random_crop_padding'])
def test_what_is_larger_than_the_image_is_refused(field: str) -> None:
    check_augmentation(make_config('linear', **{field: 27}))
    with pytest.raises(UserError, match=rf'config.{field}=28: .* less than 28'):
        check_augmentation(make_config('linear', **{field: 28}))


def test_a_plan_refuses_what_training_would(tmp_path: Path) -> None:
    line = ('plan', f'--config={ROOT}/configs/default.py', f'--data_dir={tmp_path}', '--devices=2')
    noise = '--config.dataset=tests.models_for_tests:noise'  # 28×28
    result = run_cli(*line, noise, '--config.cutout_size=28')
    assert (result.code, result.stdout) == (2, '')
    assert result.stderr.startswith('error: config.cutout_size=28: ') and 'less than 28' in result.stderr
    assert run_cli(*line, noise, '--config.cutout_size=27').code == 0
