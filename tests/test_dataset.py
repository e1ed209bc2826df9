"""What is in the dataset: sliced as TFDS slices; what each wrong set is told."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from parallel_train import sizes as sizes_lib
from parallel_train.dataset import load_split
from parallel_train.errors import UserError
from parallel_train.prepare import SYSTEM_FOLDER, prepare
from parallel_train.prepared import find_prepared
from parallel_train.sizes import find_sizes
from tests.conftest import environment, run_ok, snapshot
from tests.test_idx import pairs, pattern


def config(**fields: Any) -> ConfigDict:
    defaults = {
        'dataset': 'mnist',
        'train_split': 'train',
        'eval_split': 'test',
        'num_train_examples': 0,
        'num_eval_examples': 0,
        'input_shape': (),
        'num_classes': 0,
        'image_size': 0,
        'random_resized_crop': False,
    }
    return ConfigDict({**defaults, **fields})


def store(folder: Path, examples: list[dict[str, Any]], features: Any) -> Path:
    """A TFDS set `own` of the given examples and features."""
    import tensorflow_datasets as tfds

    tfds.dataset_builders.store_as_tfds_dataset(
        name='own',
        version='1.0.0',
        features=tfds.features.FeaturesDict(features),
        split_datasets={'train': list(enumerate(examples))},
        data_dir=folder,
        file_format='array_record',
        disable_shuffling=True,
    )
    return folder


# --- loading -------------------------------------------------------------------------------------


def test_loads_what_was_stored(undecoded: Path) -> None:
    for split, (images, labels) in {'train': pattern(200), 'test': pattern(50, 1000)}.items():
        loaded = load_split('mnist', split, undecoded)
        assert loaded.images.shape == (len(images), 28, 28, 1) and loaded.images.dtype == np.uint8
        assert loaded.labels.shape == (len(images),) and loaded.labels.dtype == np.int32
        assert isinstance(loaded.images, np.memmap) and loaded.images.ctypes.data % 64 == 0
        assert not loaded.images.flags.writeable
        assert pairs(loaded.images, loaded.labels) == pairs(images, labels)
        assert loaded.class_names == tuple('0123456789') and loaded.num_classes == 10


@pytest.mark.parametrize(
    'split',
    [
        'train',
        'train[:50]',
        'train[50:]',
        'train[-30:]',
        'train[:-30]',
        'train[20:40]',
        'train[10%:]',
        'train[:33%]',
        'train[-7%:]',
        'train[7%:21%]',
        'train+test',
        'train[:10]+test[40:]',
        'all',
        'train[:1shard]',
    ],
)
def test_slices_are_those_of_tfds(small_mnist: Path, split: str) -> None:
    import tensorflow_datasets as tfds

    expected = tfds.builder_from_directory(small_mnist / 'mnist/3.0.1').as_data_source(split)
    loaded = load_split('mnist', split, small_mnist)
    assert len(loaded.images) == len(loaded.labels) == len(expected)
    np.testing.assert_array_equal(loaded.images[0], expected[0]['image'])
    np.testing.assert_array_equal(loaded.images[-1], expected[len(expected) - 1]['image'])


@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
@pytest.mark.parametrize(
    'content', ['', '{', '[]', 'null', '{"splits": 3, "fileFormat": "array_record"}', '\xff']
)
def test_damaged_metadata(undecoded: Path, name: str, content: str) -> None:
    path = undecoded / 'mnist/3.0.1' / name
    path.write_bytes(content.encode('latin1'))
    with pytest.raises(UserError, match='damaged: delete this folder and run `prepare` again') as caught:
        load_split('mnist', 'train', undecoded)
    assert str(path.parent) in str(caught.value)


# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('split', 'message'),
    [
        ('validation', r"Unknown split 'validation'.*splits: .*train \(200\)"),
        ('train[:0]', 'holds no examples'),
        ('train[50:50]', 'holds no examples'),
        ('train[60:50]', 'holds no examples'),
        ('train[:0%]', 'holds no examples'),
        ('train[:201]', 'beyond the 200 examples'),
        ('train[200%:]', 'beyond the 200 examples'),
        ('train[abc', 'is not valid'),
        ('', 'is not valid'),
    ],
)
def test_bad_split(small_mnist: Path, split: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_split('mnist', split, small_mnist)


def test_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'python -m parallel_train prepare .*--data_dir='):
        load_split('mnist', 'train', tmp_path)
    with pytest.raises(UserError, match='unknown to TFDS .did you mean mnist'):
        load_split('mnits', 'train', tmp_path)


def test_stored_in_a_form_without_index(undecoded: Path) -> None:
    info = undecoded / 'mnist/3.0.1/dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(UserError, match='stored as tfrecord, which cannot be read by index'):
        load_split('mnist', 'train', undecoded)


def test_own_tfds_sets(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.Scalar(np.int64)
    small, large = np.full((2, 4, 3), 7, np.uint8), np.zeros((5, 4, 3), np.uint8)
    features = {'image': image, 'label': label}

    equal = store(tmp_path / '1', [{'image': small, 'label': k} for k in (0, 2)], features)
    loaded = load_split('own', 'train', equal)
    assert loaded.images.shape == (2, 2, 4, 3) and loaded.class_names == ('0', '1', '2')
    sizes = find_sizes(config(dataset='own', eval_split='train[:1]'), equal)
    assert (sizes.input_shape, sizes.num_classes, sizes.num_eval_examples) == ((2, 4, 3), 3, 1)

    unequal = [{'image': small, 'label': 0}, {'image': large, 'label': 1}]
    with pytest.raises(UserError, match=r'image 1 of .*\(5, 4, 3\).*the first \(2, 4, 3\)'):
        load_split('own', 'train', store(tmp_path / '2', unequal, features))

    unlabelled = [{'image': small, 'label': -1}]
    with pytest.raises(UserError, match='label -1'):
        load_split('own', 'train', store(tmp_path / '3', unlabelled, features))

    with pytest.raises(UserError, match="has no 'image'"):
        examples = [{'pixels': small, 'label': 1}]
        path = store(tmp_path / '4', examples, {'pixels': image, 'label': label})
        load_split('own', 'train', path)

    with pytest.raises(UserError, match="'label' is not one integer"):
        examples = [{'image': small, 'label': 1.5}]
        path = store(tmp_path / '5', examples, {'image': image, 'label': tfds.features.Scalar(np.float32)})
        load_split('own', 'train', path)


# --- a function of one's own ---------------------------------------------------------------------

GOOD = """
import numpy as np
def pair(split, data_dir):
    n = 6 if split == 'train' else 4
    return np.zeros((n, 3, 3), np.uint8), np.arange(n)
def named(split, data_dir):
    images = np.zeros((2, 3, 3, 3), np.uint8)
    return {'image': images, 'label': [0, 1], 'class_names': ['a', 'b', 'c']}
def floats(split, data_dir): return np.zeros((2, 3, 3, 1)), np.arange(2)
def flat(split, data_dir): return np.zeros((2, 9), np.uint8), np.arange(2)
def one_hot(split, data_dir): return np.zeros((2, 3, 3, 1), np.uint8), np.eye(2, dtype=int)
def real_labels(split, data_dir): return np.zeros((2, 3, 3, 1), np.uint8), np.array([0., 1.])
def unequal(split, data_dir): return np.zeros((2, 3, 3, 1), np.uint8), np.arange(3)
def empty(split, data_dir): return np.zeros((0, 3, 3, 1), np.uint8), np.arange(0)
def negative(split, data_dir): return np.zeros((2, 3, 3, 1), np.uint8), np.array([0, -1])
def outside(split, data_dir):
    return {'image': np.zeros((2, 3, 3, 1), np.uint8), 'label': [0, 5], 'class_names': ['a']}
def nothing(split, data_dir): return None
number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / 'own_dataset.py').write_text(GOOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop('own_dataset', None)


def test_own_function(own_module: None, tmp_path: Path) -> None:
    loaded = load_split('own_dataset:pair', 'train', tmp_path)
    assert loaded.images.shape == (6, 3, 3, 1) and loaded.labels.dtype == np.int32
    assert load_split('own_dataset:named', 'x', tmp_path).class_names == ('a', 'b', 'c')
    sizes = find_sizes(config(dataset='own_dataset:pair'), None)
    assert (sizes.num_train_examples, sizes.num_eval_examples) == (6, 4)
    assert (sizes.input_shape, sizes.num_classes) == ((3, 3, 1), 6)
    assert 'own_dataset:pair' in sizes.source


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        ('floats', 'images are float64 .* must be uint8'),
        ('flat', r'images are uint8 \[2, 9\]'),
        ('one_hot', r'labels are int64 \[2, 2\]'),
        ('real_labels', 'labels are float64'),
        ('unequal', '2 images but 3 labels'),
        ('empty', "split 'train' is empty"),
        ('negative', r'labels -1\.\.0, outside'),
        ('outside', r'labels 0\.\.5, outside 0\.\.0'),
        ('nothing', 'returned NoneType'),
        ('number', 'must name a function'),
        ('par', r"has no 'par' \(did you mean pair\?\)"),
    ],
)
def test_own_function_that_is_wrong(own_module: None, tmp_path: Path, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_split(f'own_dataset:{function}', 'train', tmp_path)


def test_own_module_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='cannot import no_such_package'):
        load_split('no_such_package.data:load', 'train', tmp_path)


# --- sizes ---------------------------------------------------------------------------------------


def test_sizes_of_the_prepared_set(undecoded: Path) -> None:
    sizes = find_sizes(config(train_split='train[:75%]', eval_split='train[75%:]'), undecoded)
    assert (sizes.num_train_examples, sizes.num_eval_examples) == (150, 50)
    assert (sizes.input_shape, sizes.num_classes) == ((28, 28, 1), 10)
    assert str(undecoded) in sizes.source
    assert not (undecoded / 'mnist/3.0.1/decoded').exists()  # no decoding for a plan


def test_classes_of_plain_integers_are_counted_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `plan` asks; nor is an image decoded. Once the arrays are there, the records are not read either."""
    import tensorflow_datasets as tfds

    features = {'image': tfds.features.Image(shape=(4, 4, 3)), 'label': tfds.features.Scalar(np.int64)}
    image = np.full((4, 4, 3), 7, np.uint8)
    path = store(tmp_path / 'data', [{'image': image, 'label': k} for k in (0, 5, 2) * 20], features)
    recipe = tmp_path / 'own.py'
    recipe.write_text(
        'from parallel_train.config import default_config\n\n\ndef get_config():\n'
        '    config = default_config()\n    config.dataset, config.batch_size = "own", 8\n'
        '    config.train_split, config.eval_split = "train[:50]", "train[50:]"\n    return config\n'
    )
    before, env = snapshot(tmp_path), environment(XDG_CACHE_HOME=str(tmp_path / 'cache'))
    planned = run_ok('plan', f'--config={recipe}', f'--data_dir={path}', '--devices=2', '--json', env=env)
    assert json.loads(planned.stdout)['num_train_examples'] == 50
    monkeypatch.setattr(tfds.features.Image, 'decode_example', lambda *_: pytest.fail('decodes an image'))
    # Of the whole split: whatever the slice, the model is the same.
    given = config(dataset='own', train_split='train[:1]', eval_split='train[2:]')
    sizes = find_sizes(given, path)
    assert sizes.num_classes == 6 and snapshot(tmp_path) == before

    monkeypatch.undo()
    load_split('own', 'train', path)
    monkeypatch.setattr(sizes_lib, 'open_source', lambda *_, **__: pytest.fail('reads records'))
    assert find_sizes(given, path) == sizes

    path = store(tmp_path / 'unlabelled', [{'image': image, 'label': k} for k in (3, -1)], features)
    monkeypatch.undo()
    with pytest.raises(UserError, match="config.dataset='own': 'train' has label -1"):
        find_sizes(config(dataset='own', eval_split='train'), path)


def test_sizes_without_data_come_from_tfds_and_config(tmp_path: Path) -> None:
    given = config(dataset='cifar10', num_train_examples=50_000, num_eval_examples=10_000)
    sizes = find_sizes(given, tmp_path)
    assert (sizes.input_shape, sizes.num_classes) == ((32, 32, 3), 10)
    assert sizes.source == ("TFDS's metadata, config.num_train_examples, config.num_eval_examples")
    assert list(tmp_path.iterdir()) == []


def test_sizes_from_the_config_alone() -> None:
    given = config(
        num_train_examples=55_000,
        num_eval_examples=5_000,
        input_shape=(28, 28, 1),
        num_classes=10,
        train_split='train[:55000]',
        eval_split='train[55000:]',
    )
    sizes = find_sizes(given, None)
    assert (sizes.num_train_examples, sizes.num_eval_examples) == (55_000, 5_000)
    assert sizes.source.startswith('config.num_train_examples')


def test_sizes_that_nobody_gives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'config\.num_train_examples, config\.num_eval_examples'):
        find_sizes(config(), tmp_path)
    with pytest.raises(UserError, match='unknown to TFDS'):
        find_sizes(config(dataset='mnits'), None)


@pytest.mark.parametrize(
    'fields',
    [
        {'input_shape': (32, 32, 3)},
        {'num_classes': 9},
    ],
)
def test_sizes_that_contradict_the_data(small_mnist: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f'config.{next(iter(fields))}=.* contradicts'):
        find_sizes(config(**fields), small_mnist)


def test_counts_of_the_data_win_over_those_of_the_config(small_mnist: Path) -> None:
    sizes = find_sizes(config(num_train_examples=60_000, num_eval_examples=49), small_mnist)
    assert sizes == find_sizes(config(), small_mnist)


def test_sizes_that_contradict_the_split() -> None:
    given = config(num_train_examples=60_000, train_split='train[:55000]')
    with pytest.raises(UserError, match=r'num_train_examples=60000 contradicts .*55000'):
        find_sizes(given, None)


# --- the real set --------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (SYSTEM_FOLDER.is_dir() or os.environ.get('FASHION_MNIST_IDX')),
    reason=f'needs {SYSTEM_FOLDER} (or FASHION_MNIST_IDX=DIR)',
)
def test_real_fashion_mnist(tmp_path: Path) -> None:
    source = Path(os.environ.get('FASHION_MNIST_IDX', SYSTEM_FOLDER))
    prepare('fashion_mnist', tmp_path, source, say=lambda line: None)
    found = find_prepared('fashion_mnist', tmp_path)
    assert found is not None
    assert json.loads((found.path / 'dataset_info.json').read_text())['version'] == '3.0.1'
    train = load_split('fashion_mnist', 'train', tmp_path)
    assert train.images.shape == (60_000, 28, 28, 1)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert train.class_names[9] == 'Ankle boot'
    assert len(load_split('fashion_mnist', 'test', tmp_path).images) == 10_000
