"""What is in the dataset: decoded once, sliced as TFDS slices; what each wrong set is told."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from parallel_train import decode
from parallel_train.dataset import find_sizes, load_split
from parallel_train.errors import UserError
from parallel_train.prepare import SYSTEM_FOLDER, prepare
from parallel_train.prepared import find_prepared
from tests.test_idx import NAMES, idx_bytes, pattern, write_set

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('pristine')
    source = write_set(folder / 'idx', train=200, test=50)
    prepare('mnist', folder / 'data', source, say=lambda line: None)
    return folder / 'data'


@pytest.fixture
def data_dir(pristine: Path, tmp_path: Path) -> Path:
    """A prepared set that was never decoded."""
    ignore = shutil.ignore_patterns('decoded')
    return Path(shutil.copytree(pristine, tmp_path / 'data', ignore=ignore))


def config(**fields: Any) -> ConfigDict:
    defaults = {
        'dataset': 'mnist',
        'train_split': 'train',
        'eval_split': 'test',
        'num_train_examples': 0,
        'num_eval_examples': 0,
        'input_shape': (),
        'num_classes': 0,
    }
    return ConfigDict({**defaults, **fields})


def pairs(images: np.ndarray, labels: np.ndarray) -> set[tuple[bytes, int]]:
    return {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


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


def test_loads_what_was_stored(data_dir: Path) -> None:
    for split, (images, labels) in {'train': pattern(200), 'test': pattern(50, 1000)}.items():
        loaded = load_split('mnist', split, data_dir)
        assert loaded.images.shape == (len(images), 28, 28, 1) and loaded.images.dtype == np.uint8
        assert loaded.labels.shape == (len(images),) and loaded.labels.dtype == np.int32
        assert isinstance(loaded.images, np.memmap) and loaded.images.ctypes.data % 64 == 0
        assert not loaded.images.flags.writeable
        assert pairs(loaded.images, loaded.labels) == pairs(images, labels)
        assert loaded.class_names == tuple('0123456789') and loaded.num_classes == 10


def test_order_is_that_of_tfds_after_a_killed_try_and_with_several_processes(
    tmp_path: Path,
) -> None:
    import tensorflow_datasets as tfds

    source = write_set(tmp_path / 'idx', train=10_500, test=10)
    prepare('mnist', tmp_path / 'data', source, say=lambda line: None)
    decoded = tmp_path / 'data/mnist/3.0.1/decoded'
    code = (
        'from pathlib import Path; from parallel_train.dataset import load_split\n'
        f'load_split("mnist", "train", Path({str(tmp_path / "data")!r}))'
    )
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
    deadline = time.monotonic() + 20
    while not list(decoded.glob('.train-*.part/labels.npy')):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list(decoded.glob('train-*'))
    loaded = load_split('mnist', 'train', tmp_path / 'data')
    reader = tfds.data_source('mnist', split='train', data_dir=tmp_path / 'data')
    for index in (0, 1, 5249, 5250, 5251, 10_499):
        np.testing.assert_array_equal(loaded.images[index], reader[index]['image'])
        assert loaded.labels[index] == reader[index]['label']
    assert pairs(loaded.images, loaded.labels) == pairs(*pattern(10_500))
    assert len(list(decoded.iterdir())) == 1


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
def test_slices_are_those_of_tfds(pristine: Path, split: str) -> None:
    import tensorflow_datasets as tfds

    expected = tfds.builder_from_directory(pristine / 'mnist/3.0.1').as_data_source(split)
    loaded = load_split('mnist', split, pristine)
    assert len(loaded.images) == len(loaded.labels) == len(expected)
    np.testing.assert_array_equal(loaded.images[0], expected[0]['image'])
    np.testing.assert_array_equal(loaded.images[-1], expected[len(expected) - 1]['image'])


def test_a_cold_load_imports_no_tensorflow_and_a_warm_one_no_tfds(data_dir: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from parallel_train.dataset import load_split, find_sizes
from types import SimpleNamespace
data_dir = Path({str(data_dir)!r})
for split in ('train', 'test', 'train[:150]', 'train[10%:]'):
    load_split('mnist', split, data_dir)
config = SimpleNamespace(dataset='mnist', train_split='train[:90%]', eval_split='test',
    num_train_examples=0, num_eval_examples=0, input_shape=(), num_classes=0)
find_sizes(config, data_dir)
print([name in sys.modules for name in ('tensorflow', 'tensorflow_datasets', 'jax', 'PIL')])
"""
    assert run(code) == '[False, True, False, True]\n'
    assert run(code) == '[False, False, False, False]\n'


def test_a_warm_load_writes_nothing_and_a_new_set_is_decoded_anew(data_dir: Path) -> None:
    load_split('mnist', 'train', data_dir)
    decoded = data_dir / 'mnist/3.0.1/decoded'
    (first,) = decoded.iterdir()
    stamp = (first / 'images.npy').stat().st_mtime_ns
    load_split('mnist', 'train', data_dir)
    assert (first / 'images.npy').stat().st_mtime_ns == stamp
    info = data_dir / 'mnist/3.0.1/dataset_info.json'
    info.write_text(info.read_text().replace('handwritten', 'handwritten, newly'))
    leftover = decoded / '.train-killed.part'
    leftover.mkdir()
    load_split('mnist', 'train', data_dir)
    (second,) = decoded.iterdir()  # the stale one and the leftover are gone
    assert second.name != first.name


def test_tfds_still_reads_a_set_with_decoded_arrays(data_dir: Path) -> None:
    import tensorflow_datasets as tfds

    load_split('mnist', 'train', data_dir)
    assert len(tfds.data_source('mnist', split='train', data_dir=data_dir)) == 200


def test_many_processes_decode_once(data_dir: Path) -> None:
    code = (
        'import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n'
        'from pathlib import Path; from parallel_train.dataset import load_split\n'
        f'print(int(load_split("mnist", "train", Path({str(data_dir)!r})).images.sum()))'
    )
    processes = [
        subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert sum('decoding mnist' in output for output in outputs) == 1, outputs
    assert len({output.splitlines()[-1] for output in outputs}) == 1


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    'truncated': ('images.npy', lambda content: content[:-1]),
    'half': ('images.npy', lambda content: content[: len(content) // 2]),
    'empty': ('images.npy', lambda content: b''),
    'too long': ('images.npy', lambda content: content + b'x'),
    'no array': ('images.npy', lambda content: b'PK' + bytes(len(content))),
    'missing': ('images.npy', lambda content: None),
    'other shape': ('images.npy', lambda content: content.replace(b'(200, 28, 28, 1)', b'(200, 14, 56, 1)')),
    'other type': ('images.npy', lambda content: content.replace(b"'|u1'", b"'|i1'")),
    'labels truncated': ('labels.npy', lambda content: content[:-4]),
    'labels empty': ('labels.npy', lambda content: b''),
    'labels of another set': ('labels.npy', lambda content: npy(np.zeros(50, np.int32))),
    'labels missing': ('labels.npy', lambda content: None),
}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize('case', DAMAGE)
def test_a_decoded_array_that_is_not_whole_is_made_again(
    data_dir: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    name, damage = DAMAGE[case]
    load_split('mnist', 'train', data_dir)
    (folder,) = (data_dir / 'mnist/3.0.1/decoded').iterdir()
    content = damage((folder / name).read_bytes())
    assert content != (folder / name).read_bytes()
    (folder / name).unlink()  # an array may be mapped elsewhere: what is mapped is never changed
    if content is not None:
        (folder / name).write_bytes(content)
    with caplog.at_level(logging.INFO):
        loaded = load_split('mnist', 'train', data_dir)
    assert len(caplog.messages) == 1 and 'again, as the arrays there are damaged' in caplog.text
    assert pairs(loaded.images, loaded.labels) == pairs(*pattern(200))
    assert list((data_dir / 'mnist/3.0.1/decoded').iterdir()) == [folder]
    caplog.clear()
    load_split('mnist', 'train', data_dir)
    assert caplog.messages == []


def test_arrays_of_other_records_are_made_again(data_dir: Path, tmp_path: Path) -> None:
    """The metadata stay; only the files of records are others, of the same size at that."""
    load_split('mnist', 'train', data_dir)
    source = write_set(tmp_path / 'idx', train=200, test=50)
    labels = (9 - pattern(200)[1]).astype(np.uint8)
    (source / f'{NAMES["train", "labels"]}.gz').write_bytes(gzip.compress(idx_bytes(labels)))
    prepare('mnist', tmp_path / 'other', source, say=lambda line: None)
    (theirs,) = (tmp_path / 'other/mnist/3.0.1').glob('*-train.array_record*')
    ours = data_dir / 'mnist/3.0.1' / theirs.name
    assert ours.stat().st_size == theirs.stat().st_size
    shutil.copy(theirs, ours)
    loaded = load_split('mnist', 'train', data_dir)
    assert pairs(loaded.images, loaded.labels) == pairs(pattern(200)[0], labels)


RECORDS: dict[str, Callable[[bytes], bytes | None]] = {
    'truncated': lambda content: content[: len(content) // 2],
    'cut by a block': lambda content: content[: -(2**16)],
    'empty': lambda content: b'',
    'zeros': lambda content: bytes(len(content)),
    'noise': lambda content: np.random.default_rng(0).bytes(len(content)),
    'noise within': lambda content: content[:9000] + np.random.default_rng(0).bytes(500) + content[9500:],
    'no record': lambda content: b'404 not found\n',
    'missing': lambda content: None,
}


@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('case', RECORDS)
def test_damaged_records(data_dir: Path, monkeypatch: pytest.MonkeyPatch, case: str, workers: int) -> None:
    monkeypatch.setattr(decode, 'cores', lambda: workers)
    monkeypatch.setattr(decode, '_EXAMPLES_PER_WORKER', 50)
    (path,) = (data_dir / 'mnist/3.0.1').glob('*-train.array_record*')
    content = RECORDS[case](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match='damaged: delete this folder and run `prepare` again') as caught:
        load_split('mnist', 'train', data_dir)
    assert str(path.parent) in str(caught.value)
    assert not list((data_dir / 'mnist/3.0.1/decoded').glob('*train-*'))
    assert len(load_split('mnist', 'test', data_dir).images) == 50  # the other split is whole


@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
@pytest.mark.parametrize(
    'content', ['', '{', '[]', 'null', '{"splits": 3, "fileFormat": "array_record"}', '\xff']
)
def test_damaged_metadata(data_dir: Path, name: str, content: str) -> None:
    path = data_dir / 'mnist/3.0.1' / name
    path.write_bytes(content.encode('latin1'))
    with pytest.raises(UserError, match='damaged: delete this folder and run `prepare` again') as caught:
        load_split('mnist', 'train', data_dir)
    assert str(path.parent) in str(caught.value)


def test_a_folder_that_cannot_be_written(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then the user's cache serves, then memory. A file in the way stops root as well; see also test_cli."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (data_dir / 'mnist/3.0.1/decoded').write_text('')
    for again in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            loaded = load_split('mnist', 'train', data_dir)
        assert isinstance(loaded.images, np.memmap) and str(tmp_path / 'cache') in str(loaded.images.filename)
        assert pairs(loaded.images, loaded.labels) == pairs(*pattern(200))
        assert len(caplog.messages) == (0 if again else 1)
        assert again or 'decoded cannot be written' in caplog.text
    monkeypatch.setenv('XDG_CACHE_HOME', str(data_dir / 'mnist/3.0.1/decoded'))
    loaded = load_split('mnist', 'train', data_dir)
    assert 'decoding in memory' in caplog.text
    assert pairs(loaded.images, loaded.labels) == pairs(*pattern(200))


def test_no_room_on_the_disk(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r'needs 0\.0 GB in .* are free: make room'):
        load_split('mnist', 'train', data_dir)
    assert [path.name for path in (data_dir / 'mnist/3.0.1/decoded').iterdir()] == []


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
def test_bad_split(pristine: Path, split: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_split('mnist', split, pristine)


def test_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'python -m parallel_train prepare .*--data_dir='):
        load_split('mnist', 'train', tmp_path)
    with pytest.raises(UserError, match='unknown to TFDS .did you mean mnist'):
        load_split('mnits', 'train', tmp_path)


def test_stored_in_a_form_without_index(data_dir: Path) -> None:
    info = data_dir / 'mnist/3.0.1/dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(UserError, match='stored as tfrecord, which cannot be read by index'):
        load_split('mnist', 'train', data_dir)


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


def test_sizes_of_the_prepared_set(data_dir: Path) -> None:
    sizes = find_sizes(config(train_split='train[:75%]', eval_split='train[75%:]'), data_dir)
    assert (sizes.num_train_examples, sizes.num_eval_examples) == (150, 50)
    assert (sizes.input_shape, sizes.num_classes) == ((28, 28, 1), 10)
    assert str(data_dir) in sizes.source
    assert not (data_dir / 'mnist/3.0.1/decoded').exists()  # no decoding for a plan


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
def test_sizes_that_contradict_the_data(pristine: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f'config.{next(iter(fields))}=.* contradicts'):
        find_sizes(config(**fields), pristine)


def test_counts_of_the_data_win_over_those_of_the_config(pristine: Path) -> None:
    sizes = find_sizes(config(num_train_examples=60_000, num_eval_examples=49), pristine)
    assert sizes == find_sizes(config(), pristine)


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
