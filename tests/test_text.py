"""The trainer is not only for images: rows of bytes, their loss and accuracy, and what is reported."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sysconfig
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel_train import UserError, losses, start_devices, text
from parallel_train import config as config_lib
from parallel_train.batches import HostFeed
from parallel_train.dataset import Split, load_split
from parallel_train.evaluate import Evaluator
from parallel_train.forward import check_model_and_loss
from parallel_train.mesh import make_mesh
from parallel_train.sizes import find_sizes
from parallel_train.state import create_model, initialise
from tests.conftest import ROOT, Job, environment, read_rows, run_ok, write_recipe
from tests.test_step import distance, train

start_devices(8)

LENGTH = 32


def make_config(**fields: Any) -> Any:
    return config_lib.complete(
        config_lib.Config({
            'model': 'transformer_small', 'loss': 'next_byte_cross_entropy', 'batch_size': 16, 'shards': 8,
            'input_shape': (LENGTH,), 'num_classes': 256, 'num_epochs': 10, **fields,
        })
    )  # fmt: skip


def make_text(rows: int, tail: int = 5) -> Split:
    """Rows of letters that follow one another mostly; the last row holds `tail` of them and then zeros."""
    rng = np.random.default_rng(0)
    letters = 97 + np.cumsum(rng.random((rows, LENGTH)) < 0.8, axis=1) % 26
    letters[-1, tail:] = 0
    tokens = letters.astype(np.uint8)
    return Split(tokens, tokens, tuple(map(str, range(256))))


@pytest.fixture(scope='session')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of Python's own library, some hundred kilobytes, in folders; and a file that is no text."""
    root = tmp_path_factory.mktemp('texts')
    source = Path(sysconfig.get_paths()['stdlib'])
    for package in ('json', 'logging', 'email'):
        shutil.copytree(source / package, root / package, ignore=shutil.ignore_patterns('__pycache__'))
    (root / 'email' / 'picture.dat').write_bytes(b'\x89PNG\x00\x00')
    return root


def test_every_byte_of_a_folder_is_in_one_split(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows = {split: text.rows_of_folder(folder, split, 128) for split in ('train', 'test')}
    assert [r.message for r in caplog.records if 'email/picture.dat' in r.message] and len(
        caplog.records
    ) == 1
    for split, found in rows.items():
        assert found.shape[1] == 128 and found.dtype == np.uint8
        mine = [
            path.read_bytes()
            for path in sorted(p for p in folder.rglob('*') if p.is_file() and p.suffix != '.dat')
            if (zlib.crc32(path.relative_to(folder).as_posix().encode()) % 10 == 0) == (split == 'test')
        ]
        expected = b'\n'.join(mine)
        assert len(mine) > 1 and found.tobytes().rstrip(b'\0') == expected
        assert found.size - len(expected) < 128


def test_folders_that_are_splits(tmp_path: Path) -> None:
    for split, content in (('train', b'abcdefgh'), ('test', b'xyz')):
        (tmp_path / split).mkdir()
        (tmp_path / split / 'a.txt').write_bytes(content)
    assert text.rows_of_folder(tmp_path, 'train', 4).tobytes() == b'abcdefgh'
    assert text.rows_of_folder(tmp_path, 'test', 4).tobytes() == b'xyz\0'


def test_folders_without_text(tmp_path: Path) -> None:
    (tmp_path / 'only').write_bytes(b'\0')
    for root, split, message in (
        (tmp_path / 'nowhere', 'train', 'is no folder'),
        (tmp_path, 'train', "holds no text for the split 'train'"),
        (tmp_path, 'train[:10]', r"split 'train\[:10\]': .* train and test"),
    ):
        with pytest.raises(UserError, match=message):
            load_split('parallel_train.text:folder', split, root)


def give_tokens(split: str, data_dir: Path | None) -> dict[str, Any]:
    """A dataset function: 300 different tokens, too many for a byte; and some that are wrong."""
    if split == 'flat':
        return {'tokens': np.zeros(8, np.uint8)}
    if split == 'uncounted':
        return {'tokens': np.zeros((8, 4), np.int64)}
    return {'tokens': np.arange(8).reshape(2, 4) + 292, 'num_classes': 299 if split == 'few' else 300}


def test_tokens_of_a_function() -> None:
    name = f'{__name__}:give_tokens'
    split = load_split(name, 'train', Path())
    assert split.images.dtype == np.int32 and split.images is split.labels and split.num_classes == 300
    config = make_config(dataset=name, input_shape=(), num_classes=0)
    sizes = find_sizes(config, None)
    assert (sizes.num_train_examples, sizes.input_shape, sizes.num_classes) == (2, (4,), 300)
    for wrong, message in (
        ('flat', r'uint8 \[8\]; they must be rows'),
        ('uncounted', "must also return 'num_classes'"),
        ('few', r'292\.\.299, outside 0\.\.298'),
    ):
        with pytest.raises(UserError, match=message):
            load_split(name, wrong, Path())


def test_loss_of_each_byte() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 256)).astype(np.float32)
    label = np.array([[65, 66, 255], [67, 0, 0]])
    got, weights = losses.next_byte_cross_entropy(jnp.asarray(logits), {'label': jnp.asarray(label)})
    by_hand = [
        [
            math.log(np.exp(np.float64(row)).sum()) - row[byte]
            for row, byte in zip(rows, label_row, strict=True)
        ]
        for rows, label_row in zip(logits, label, strict=True)
    ]
    np.testing.assert_allclose(got, by_hand, rtol=1e-5)
    np.testing.assert_array_equal(weights, [[1, 1, 1], [1, 0, 0]])


def test_a_byte_is_predicted_from_those_before_it_alone() -> None:
    model = create_model(make_config())
    tokens = jnp.asarray(make_text(3).images[:2].astype(np.int32))
    variables = model.init(jax.random.key(0), tokens)
    logits = np.asarray(model.apply(variables, tokens))
    assert logits.shape == (2, LENGTH, 256)
    for place in (0, 7, LENGTH - 1):
        changed = np.asarray(model.apply(variables, tokens.at[:, place].set(1)))
        np.testing.assert_array_equal(changed[:, : place + 1], logits[:, : place + 1])
        if place < LENGTH - 1:
            assert np.all(np.any(changed[:, place + 1] != logits[:, place + 1], axis=-1))


@pytest.mark.slow
@pytest.mark.parametrize(('devices', 'accumulation'), [(8, 1), (2, 2)])
def test_any_devices_compute_what_one_computes(devices: int, accumulation: int) -> None:
    split = make_text(48)
    start = train(make_config(), 1, 0, split)
    one = train(make_config(), 1, 3, split)
    many = train(make_config(accumulation_steps=accumulation), devices, 3, split)
    assert distance(many.params, one.params, start.params) < 1e-4
    for name in ('loss', 'accuracy', 'grad_norm'):
        assert many.sums[name] == pytest.approx(one.sums[name], rel=1e-4)


@pytest.mark.parametrize(
    ('placement', 'reduction'), [('device', 'pmean'), ('host', 'pmean'), ('device', 'tree')]
)
def test_evaluation_is_exact_for_each_byte_and_counts_rows(placement: str, reduction: str) -> None:
    split, mesh = make_text(21), make_mesh(4)
    config = make_config(eval_batch_size=8, data_placement=placement, reduction=reduction)
    state = initialise(config, 0.1, mesh)
    logits = np.asarray(state.apply_fn({'params': state.params}, split.images.astype(np.int32)), np.float64)
    text_there = split.images != 0
    assert text_there.sum() == 20 * LENGTH + 5
    log_sums = np.log(np.exp(logits).sum(-1))
    byte_losses = log_sums - np.take_along_axis(logits, split.images[..., None].astype(int), -1)[..., 0]
    right = logits.argmax(-1) == split.images
    result = Evaluator(split, config, mesh, state)(state)
    assert result is not None and result['num_examples'] == 21
    assert result['loss'] == pytest.approx(byte_losses[text_there].mean(), rel=1e-5)
    assert result['accuracy'] == pytest.approx(right[text_there].mean(), abs=2.5 / text_there.sum())


def test_rows_come_from_the_host_as_bytes() -> None:
    split, mesh = make_text(48), make_mesh(2)
    from parallel_train.plan import make_plan

    feed = HostFeed(split, make_config(), make_plan(make_config(), 48, 1, 2), mesh)
    data = feed.at(0)
    feed.close()
    assert data['image'].dtype == np.uint8 and data['image'].shape == (16, LENGTH)
    np.testing.assert_array_equal(data['image'], split.images[np.asarray(data['index'])])
    np.testing.assert_array_equal(data['image'], data['label'])


def test_what_does_not_go_with_rows_of_tokens() -> None:
    for fields, message in (
        ({'random_flip': True}, 'random_flip=True: is for images'),
        ({'model': 'tests.models_for_tests:Linear'}, r'logits \[batch, length, classes\], not \(5, 256\)'),
        ({'model': 'vit_s16'}, 'does not take rows of tokens of shape'),
        ({'num_classes': 300, 'model': f'{__name__}:Bytes'}, 'gives 256 logits'),
    ):
        with pytest.raises(UserError, match=message):
            check_model_and_loss(make_config(**fields))


def Bytes() -> Any:  # noqa: N802, it makes a model
    from parallel_train.models.transformer import TransformerSmall

    return TransformerSmall(num_classes=256)


@pytest.mark.slow
def test_training_on_a_folder(tmp_path: Path, folder: Path) -> None:
    """The commands, from text files to a report without pictures, and an evaluation that says the same."""
    more = (ROOT / 'configs' / 'text_transformer.py').read_text()
    recipe = write_recipe(tmp_path / 'recipe.py')
    recipe.write_text(
        more.replace('    return config\n', '    config.num_epochs = 0.25\n    return config\n')
    )
    job = Job(recipe, folder, environment())
    quick = ('--config.warmup_epochs=0.1', '--config.log_every_steps=5')
    plan = json.loads(run_ok(*job.line('plan', '--json', '--devices=2', *quick)).stdout)
    rows = {split: len(text.rows_of_folder(folder, split, 128)) for split in ('train', 'test')}
    assert (plan['num_train_examples'], plan['num_eval_examples']) == (rows['train'], rows['test'])
    done = run_ok(*job.train(tmp_path / 'run', *quick))
    assert 'rows/s: ' in done.stdout and ' rows/s  ' in done.stdout and 'images/s' not in done.stdout
    logged = read_rows(tmp_path / 'run')
    evaluation = logged[-1]
    assert evaluation['split'] == 'eval' and evaluation['num_examples'] == rows['test']
    assert logged[0]['loss'] > evaluation['loss'] and evaluation['loss'] < 0.7 * math.log(256)
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert 'transformer_small' in page and 'Test images' not in page
    again = run_ok(*job.line('evaluate', f'--workdir={tmp_path / "run"}', '--json', '--devices=4', *quick))
    assert json.loads(again.stdout)['loss'] == pytest.approx(evaluation['loss'], rel=1e-5)
