"""Recipes train on 8 devices on data of their shape, and their plans are the papers' numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from parallel_train import UserError, make_plan, start_devices, train_and_evaluate
from parallel_train import config as config_lib
from parallel_train.sizes import find_sizes
from tests.conftest import ROOT, read_rows

start_devices(8)

CIFAR_SIZES = (50_000, 10_000)


def load(name: str) -> Any:
    return config_lib.load(ROOT / 'configs' / f'{name}.py')


@pytest.mark.parametrize('dataset', ['cifar10', 'cifar100'])
@pytest.mark.parametrize('devices', [1, 8])
def test_wide_resnet_has_the_papers_plan(dataset: str, devices: int) -> None:
    """Zagoruyko & Komodakis 2016, section 3: batch 128, 200 epochs, rate 0.1, times 0.2 at 60, 120, 160."""
    plan = make_plan(load(f'{dataset}_wrn28_10'), *CIFAR_SIZES, devices)
    assert (plan.batch_size, plan.steps_per_epoch, plan.num_steps) == (128, 390, 78_000)
    assert plan.peak_learning_rate == 0.1 and plan.warmup_steps == 0
    assert plan.boundaries == [23_400, 46_800, 62_400]
    assert [plan.rate(step) for step in (0, 23_399, 23_400, 46_800, 62_400, 77_999)] == pytest.approx(
        [0.1, 0.1, 0.02, 0.004, 0.0008, 0.0008]
    )


@pytest.mark.parametrize('dataset', ['cifar10', 'cifar100'])
def test_restarts_come_when_the_paper_has_them(dataset: str) -> None:
    """Loshchilov & Hutter 2017, table 1: rate 0.05, T_0 = 10, T_mult = 2: cycles end at 10, 30, 70, 150."""
    plan = make_plan(load(f'{dataset}_wrn28_10_sgdr'), *CIFAR_SIZES, 8)
    assert plan.num_steps == 150 * 390
    assert plan.boundaries == [3_900, 11_700, 27_300]
    assert plan.snapshot_steps == [3_900, 11_700, 27_300, 58_500]
    for start, end in ((0, 3_900), (3_900, 11_700), (11_700, 27_300), (27_300, 58_500)):
        assert plan.rate(start) == pytest.approx(0.05)
        assert plan.rate((start + end) / 2) == pytest.approx(0.025)
        last = 0.05 * (1 + math.cos(math.pi * (1 - 1 / (end - start)))) / 2  # equation 5
        assert plan.rate(end - 1) == pytest.approx(last)


@pytest.mark.parametrize('devices', [1, 8, 64])
def test_vit_has_the_papers_plan(devices: int) -> None:
    """Beyer et al. 2022, their vit_s16_i1k.py: batch 1,024, 90 epochs, rate 1e-3, warmup of 10,000 steps."""
    config = load('imagenet_vit_s16')
    plan = make_plan(config, config.num_train_examples, config.num_eval_examples, devices)
    assert (plan.steps_per_epoch, plan.num_steps, plan.warmup_steps) == (1_251, 112_590, 10_000)
    assert plan.peak_learning_rate == 1e-3 and plan.boundaries == [10_000]
    assert [plan.rate(step) for step in (0, 5_000, 10_000)] == pytest.approx([0, 5e-4, 1e-3])
    assert (plan.shards, plan.examples_per_shard) == (64, 16)  # whose examples mixup mixes


def write_texts(folder: Path) -> Path:
    """Writes folders of text, `train` of 256 rows of 128 bytes and `test` of 64; the text is our own."""
    text = b''.join(page.read_bytes() for page in sorted((ROOT / 'docs').glob('*.md')))
    for split, rows in (('train', 256), ('test', 64)):
        (folder / split).mkdir(parents=True)
        (folder / split / 'pages.txt').write_bytes(text[: rows * 128])
    return folder


@pytest.mark.parametrize(
    ('name', 'dataset', 'model'),
    [
        # Those of many layers with few, or narrow ones, which compile in seconds.
        pytest.param('cifar10_wrn28_10', 'cifar10', 'WideResNetShrunk', marks=pytest.mark.slow),
        pytest.param('cifar100_wrn28_10', 'cifar100', 'WideResNetShrunk', marks=pytest.mark.slow),
        pytest.param('cifar10_wrn28_10_sgdr', 'cifar10', 'WideResNetShrunk', marks=pytest.mark.slow),
        ('cifar100_wrn28_10_sgdr', 'cifar100', 'WideResNetShrunk'),
        pytest.param('fashion_mnist_wrn', 'noise', 'WideResNetShrunk', marks=pytest.mark.slow),
        ('fashion_mnist_fast', 'noise', ''),
        pytest.param('imagenet_resnet50', 'pictures', 'ResNet50Shrunk', marks=pytest.mark.slow),
        pytest.param('imagenet_vit_s16', 'pictures', 'ViTS16Shrunk', marks=pytest.mark.slow),
        pytest.param('text_transformer', 'texts', '', marks=pytest.mark.slow),
    ],
)
def test_recipe_trains(
    name: str, dataset: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config, data_dir, num_train, num_eval = load(name), tmp_path, 256, 64
    with config.ignore_type():
        config.num_train_examples = config.num_eval_examples = 0
    if dataset == 'pictures':
        data_dir, num_train, num_eval = request.getfixturevalue('image_job').data_dir, 73, 13
        config.dataset, config.num_classes = dataset, 3
        if 'resnet' in name:
            config.image_size, config.input_shape = 64, ()  # its 224 take a minute
    elif dataset == 'texts':
        data_dir = write_texts(tmp_path / 'texts')
    else:
        config.dataset = f'tests.models_for_tests:{dataset}'
    if model:
        config.model = f'tests.models_for_tests:{model}'
    config.batch_size, config.eval_batch_size, config.shards = 32, 64, 8
    one_step = 1 / (num_train // 32)  # in epochs
    config.num_epochs = 3 * one_step
    config.warmup_epochs = min(config.warmup_epochs, one_step)
    config.log_every_steps = 1
    if config.schedule == 'cosine_restarts':
        config.restart_epochs = one_step
        config.restart_multiplier = 2.0
    train_and_evaluate(config, tmp_path / 'run', data_dir, devices=8)
    rows = read_rows(tmp_path / 'run')
    train = [row for row in rows if row['split'] == 'train']
    assert [row['step'] for row in train] == [1, 2, 3]
    assert all(math.isfinite(row['loss']) and row['grad_norm'] > 0 for row in train)
    assert rows[-1]['split'] == 'eval' and rows[-1]['num_examples'] == num_eval
    assert json.loads((tmp_path / 'run' / 'plan.json').read_text())['num_devices'] == 8


@pytest.mark.parametrize(
    'recipe',
    sorted(set((ROOT / 'configs').glob('*.py')) - {ROOT / 'configs' / 'default.py'}),
    ids=lambda p: p.stem,
)
def test_recipe_is_planned_without_its_data(recipe: Path, tmp_path: Path) -> None:
    config = config_lib.complete(config_lib.load(recipe))
    sizes = find_sizes(config, tmp_path)
    plan = make_plan(config, sizes.num_train_examples, sizes.num_eval_examples, 1)
    assert plan.num_steps > 0 and sizes.source


def test_functions_are_imported_even_where_their_data_are_not_needed(tmp_path: Path) -> None:
    config = config_lib.complete(load('text_transformer'))
    config = config.copy_and_resolve_references().unlock()
    config.dataset = 'parallel_train.text:absent'
    with pytest.raises(UserError, match="parallel_train.text has no 'absent'"):
        find_sizes(config, tmp_path)
    config.dataset = 'parallel_train.text:LENGTH'
    with pytest.raises(UserError, match='must name a function'):
        find_sizes(config, tmp_path)
