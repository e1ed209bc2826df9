"""Decoded arrays: made once, in TFDS's order, wherever they can be kept; made again if they are not right."""

from __future__ import annotations

import gzip
import io
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from parallel_train import decode
from parallel_train.dataset import load_split
from parallel_train.errors import UserError
from parallel_train.prepare import prepare
from tests.conftest import ROOT
from tests.test_idx import NAMES, idx_bytes, pairs, pattern, write_set


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


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


def test_a_cold_load_imports_no_tensorflow_and_a_warm_one_no_tfds(undecoded: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from parallel_train.dataset import load_split
from parallel_train.sizes import find_sizes
from parallel_train.config import complete, default_config
data_dir = Path({str(undecoded)!r})
for split in ('train', 'test', 'train[:150]', 'train[10%:]'):
    load_split('mnist', split, data_dir)
config = default_config()
config.update({{'dataset': 'mnist', 'train_split': 'train[:90%]', 'eval_split': 'test'}})
find_sizes(complete(config), data_dir)
print([name in sys.modules for name in ('tensorflow', 'tensorflow_datasets', 'jax', 'PIL')])
"""
    assert run(code) == '[False, True, False, True]\n'
    assert run(code) == '[False, False, False, False]\n'


def test_a_warm_load_writes_nothing_and_a_new_set_is_decoded_anew(undecoded: Path) -> None:
    load_split('mnist', 'train', undecoded)
    decoded = undecoded / 'mnist/3.0.1/decoded'
    (first,) = decoded.iterdir()
    stamp = (first / 'images.npy').stat().st_mtime_ns
    load_split('mnist', 'train', undecoded)
    assert (first / 'images.npy').stat().st_mtime_ns == stamp
    info = undecoded / 'mnist/3.0.1/dataset_info.json'
    info.write_text(info.read_text().replace('handwritten', 'handwritten, newly'))
    leftover = decoded / '.train-killed.part'
    leftover.mkdir()
    load_split('mnist', 'train', undecoded)
    (second,) = decoded.iterdir()  # the stale one and the leftover are gone
    assert second.name != first.name


def test_tfds_still_reads_a_set_with_decoded_arrays(undecoded: Path) -> None:
    import tensorflow_datasets as tfds

    load_split('mnist', 'train', undecoded)
    assert len(tfds.data_source('mnist', split='train', data_dir=undecoded)) == 200


def test_many_processes_decode_once(undecoded: Path) -> None:
    code = (
        'import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n'
        'from pathlib import Path; from parallel_train.dataset import load_split\n'
        f'print(int(load_split("mnist", "train", Path({str(undecoded)!r})).images.sum()))'
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
    undecoded: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    name, damage = DAMAGE[case]
    load_split('mnist', 'train', undecoded)
    (folder,) = (undecoded / 'mnist/3.0.1/decoded').iterdir()
    content = damage((folder / name).read_bytes())
    assert content != (folder / name).read_bytes()
    (folder / name).unlink()  # an array may be mapped elsewhere: what is mapped is never changed
    if content is not None:
        (folder / name).write_bytes(content)
    with caplog.at_level(logging.INFO):
        loaded = load_split('mnist', 'train', undecoded)
    assert len(caplog.messages) == 1 and 'again, as the arrays there are damaged' in caplog.text
    assert pairs(loaded.images, loaded.labels) == pairs(*pattern(200))
    assert list((undecoded / 'mnist/3.0.1/decoded').iterdir()) == [folder]
    caplog.clear()
    load_split('mnist', 'train', undecoded)
    assert caplog.messages == []


def test_arrays_of_other_records_are_made_again(undecoded: Path, tmp_path: Path) -> None:
    """The metadata stay; only the files of records are others, of the same size at that."""
    load_split('mnist', 'train', undecoded)
    source = write_set(tmp_path / 'idx', train=200, test=50)
    labels = (9 - pattern(200)[1]).astype(np.uint8)
    (source / f'{NAMES["train", "labels"]}.gz').write_bytes(gzip.compress(idx_bytes(labels)))
    prepare('mnist', tmp_path / 'other', source, say=lambda line: None)
    (theirs,) = (tmp_path / 'other/mnist/3.0.1').glob('*-train.array_record*')
    ours = undecoded / 'mnist/3.0.1' / theirs.name
    assert ours.stat().st_size == theirs.stat().st_size
    shutil.copy(theirs, ours)
    loaded = load_split('mnist', 'train', undecoded)
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
def test_damaged_records(undecoded: Path, monkeypatch: pytest.MonkeyPatch, case: str, workers: int) -> None:
    monkeypatch.setattr(decode, 'cores', lambda: workers)
    monkeypatch.setattr(decode, '_EXAMPLES_PER_WORKER', 50)
    (path,) = (undecoded / 'mnist/3.0.1').glob('*-train.array_record*')
    content = RECORDS[case](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match='damaged: delete this folder and run `prepare` again') as caught:
        load_split('mnist', 'train', undecoded)
    assert str(path.parent) in str(caught.value)
    assert not list((undecoded / 'mnist/3.0.1/decoded').glob('*train-*'))
    assert len(load_split('mnist', 'test', undecoded).images) == 50  # the other split is whole


def test_a_folder_that_cannot_be_written(
    undecoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then the user's cache serves, then memory. A file in the way stops root as well; see also test_cli."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (undecoded / 'mnist/3.0.1/decoded').write_text('')
    for again in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            loaded = load_split('mnist', 'train', undecoded)
        assert isinstance(loaded.images, np.memmap) and str(tmp_path / 'cache') in str(loaded.images.filename)
        assert pairs(loaded.images, loaded.labels) == pairs(*pattern(200))
        assert len(caplog.messages) == (0 if again else 1)
        assert again or 'decoded cannot be written' in caplog.text
    monkeypatch.setenv('XDG_CACHE_HOME', str(undecoded / 'mnist/3.0.1/decoded'))
    loaded = load_split('mnist', 'train', undecoded)
    assert 'decoding in memory' in caplog.text
    assert pairs(loaded.images, loaded.labels) == pairs(*pattern(200))


def test_no_room_on_the_disk(undecoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r'needs 0\.2 MB in .* 0\.0 MB are free: make room'):
        load_split('mnist', 'train', undecoded)
    assert [path.name for path in (undecoded / 'mnist/3.0.1/decoded').iterdir()] == []
