"""Where a dataset comes from, what it is stored as, and that a killed `prepare` leaves nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from parallel_train import prepare as prepare_lib
from parallel_train.dataset import load_split
from parallel_train.errors import UserError
from parallel_train.prepare import SYSTEM_FOLDER, prepare
from parallel_train.prepared import CHECKSUMS, find_prepared
from tests.test_idx import NAMES, idx_bytes, pattern, write_set

ROOT = Path(__file__).resolve().parent.parent
# A port where nobody listens: any try to reach the network fails at once.
OFFLINE = {f'{kind}_proxy': 'http://127.0.0.1:9' for kind in ('http', 'https')}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in OFFLINE.items():
        monkeypatch.setenv(key, value)
        monkeypatch.setenv(key.upper(), value)


def quiet(line: str) -> None:
    del line


def command(data_dir: Path, source: Path | None) -> list[str]:
    code = (
        'import sys; from pathlib import Path; from parallel_train.prepare import prepare\n'
        'prepare("mnist", Path(sys.argv[1]), Path(sys.argv[2]))\n'
        'print("tensorflow" in sys.modules)'
    )
    return [sys.executable, '-c', code, str(data_dir), str(source)]


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


def test_plain_tfds_reads_the_same_pixels_without_tensorflow(tmp_path: Path) -> None:
    source, data_dir = write_set(tmp_path / 'idx'), tmp_path / 'data'
    code = f"""
import sys
from pathlib import Path
import numpy as np
from parallel_train.prepare import prepare
prepare('fashion_mnist', Path({str(data_dir)!r}), Path({str(source)!r}))
import tensorflow_datasets as tfds
for split in ('train', 'test'):
    examples = list(tfds.data_source('fashion_mnist', split=split, data_dir={str(data_dir)!r}))
    np.savez({str(tmp_path)!r} + '/' + split, x=np.stack([e['image'] for e in examples]),
             y=[e['label'] for e in examples])
info = tfds.builder('fashion_mnist', data_dir={str(data_dir)!r}).info
print(info.features['label'].names[9], info.version, info.features['image'].encoding_format)
assert 'tensorflow' not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith('Ankle boot 3.0.1')
    for split, (images, labels) in {'train': pattern(40), 'test': pattern(20, 1000)}.items():
        read = np.load(tmp_path / f'{split}.npz')
        assert read['x'].dtype == np.uint8 and read['x'].shape == (len(images), 28, 28, 1)
        # TFDS stores in an order of its own.
        given = {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
        assert given == {(x.tobytes(), int(y)) for x, y in zip(read['x'], read['y'], strict=True)}


def test_says_where_from_and_then_that_it_is_there(tmp_path: Path) -> None:
    source, data_dir = write_set(tmp_path / 'idx'), tmp_path / 'data'
    lines: list[str] = []
    first = prepare('mnist', data_dir, source, say=lines.append)
    assert str(source) in first and lines[-1] == f'mnist: {first}'
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob('*')}
    assert prepare('mnist', data_dir, say=quiet).startswith('already prepared in')
    assert before == {path: path.stat().st_mtime_ns for path in data_dir.rglob('*')}
    record = json.loads((data_dir / 'mnist/3.0.1/idx_checksums.json').read_text())
    assert sorted(record['sha256']) == sorted(NAMES.values())
    assert [path.name for path in data_dir.iterdir()] == ['mnist']


def test_wrong_files_write_nothing(tmp_path: Path) -> None:
    source, data_dir = write_set(tmp_path / 'idx'), tmp_path / 'data'
    path = source / 'train-images-idx3-ubyte.gz'
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(UserError, match='truncated'):
        prepare('mnist', data_dir, source, say=quiet)
    assert not data_dir.exists()


def test_wrong_image_size_writes_nothing(tmp_path: Path) -> None:
    source, data_dir = tmp_path / 'idx', tmp_path / 'data'
    write_set(source)
    for split, start in (('train', 0), ('test', 1000)):
        images = pattern(40 if split == 'train' else 20, start, size=32)[0]
        (source / f'{NAMES[split, "images"]}.gz').write_bytes(gzip.compress(idx_bytes(images)))
    with pytest.raises(UserError, match='32x32 pixels; those of mnist have 28x28'):
        prepare('mnist', data_dir, source, say=quiet)
    assert not data_dir.exists()


def test_from_without_idx_files_does_not_fall_through(tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no IDX files'):
        prepare('fashion_mnist', tmp_path / 'data', tmp_path / 'empty', say=quiet)
    with pytest.raises(UserError, match='is not a folder'):
        prepare('fashion_mnist', tmp_path / 'data', tmp_path / 'nowhere', say=quiet)
    with pytest.raises(UserError, match='has no folder train/'):
        prepare('cifar10', tmp_path / 'data', tmp_path / 'empty', say=quiet)
    assert not (tmp_path / 'data').exists()


def test_unknown_name_and_wrong_kind_of_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='did you mean fashion_mnist'):
        prepare('fashon_mnist', tmp_path / 'data', say=quiet)
    with pytest.raises(UserError, match='neither a TFDS name'):
        prepare('fashion mnist', tmp_path / 'data', say=quiet)
    with pytest.raises(UserError, match="has no 'image'"):
        prepare('iris', tmp_path / 'data', say=quiet)
    assert not (tmp_path / 'data').exists()


def test_data_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'data_dir=.*cannot be written'):
        prepare('mnist', tmp_path / 'file' / 'data', write_set(tmp_path / 'idx'), say=quiet)


def test_data_dir_that_cannot_be_written_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    for data_dir, message in (
        (Path('/proc/no_such_folder/data'), 'data_dir=.*cannot be written'),
        (tmp_path / 'file', 'data_dir=.*cannot be written .*file is not a folder'),
        (tmp_path / ('x' * 300), 'File name too long.*: choose another --data_dir'),
    ):
        lines: list[str] = []
        with pytest.raises(UserError, match=message):
            prepare('fashion_mnist', data_dir, say=lines.append)
        assert lines == []  # such as: fetching Debian's package


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r'storing mnist needs 0\.0 MB in .* are free: make room'):
        prepare('mnist', tmp_path / 'data', write_set(tmp_path / 'idx'), say=quiet)
    assert not (tmp_path / 'data').exists()


def test_folders_that_were_made_on_the_way_go_with_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_set(tmp_path / 'idx')
    (tmp_path / 'there').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    before = everything_in(tmp_path)
    for data_dir in (Path('a/b'), tmp_path / 'a' / 'b' / 'c', Path('there/b'), Path('there')):
        with pytest.raises(UserError, match='make room'):
            prepare('mnist', data_dir, source, say=quiet)
        assert everything_in(tmp_path) == before


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError, RuntimeError])
def test_folders_that_were_made_on_the_way_go_however_it_ends(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data_dir = write_set(tmp_path / 'idx'), tmp_path / 'a' / 'b'
    before = everything_in(tmp_path)

    def store_half(name: str, files: Any, part: Path) -> None:
        (part / name).mkdir()
        raise error

    monkeypatch.setattr(prepare_lib, 'store_idx', store_half)
    with pytest.raises(error):
        prepare('mnist', data_dir, source, say=quiet)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ('got', 'left'), [([], []), (['half'], ['a', 'a/b', 'a/b/downloads', 'a/b/downloads/half'])]
)
def test_a_download_that_is_interrupted_leaves_what_it_got(
    got: list[str], left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / 'a' / 'b'

    def interrupted(builder: Any) -> None:
        (data_dir / 'downloads').mkdir()
        for name in got:
            (data_dir / 'downloads' / name).write_text('half')
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_lib, '_probe', interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare('cifar10', data_dir, say=quiet)
    assert everything_in(tmp_path) == left


def test_from_is_read_even_where_the_set_is_there(tmp_path: Path) -> None:
    source, data_dir = write_set(tmp_path / 'idx'), tmp_path / 'data'
    prepare('mnist', data_dir, source, say=quiet)
    before = everything_in(data_dir)
    assert 'from the files in' in prepare('mnist', data_dir, source, say=quiet)
    with pytest.raises(UserError, match='is not a folder'):
        prepare('mnist', data_dir, tmp_path / 'nowhere', say=quiet)
    other = write_set(tmp_path / 'other', train=41)
    with pytest.raises(UserError, match='other files than those .* was prepared from'):
        prepare('mnist', data_dir, other, say=quiet)
    with pytest.raises(UserError, match='made by a function of its own'):
        prepare('my.module:load', data_dir, source, say=quiet)
    (data_dir / 'mnist/3.0.1' / CHECKSUMS).unlink()  # as TFDS's own preparation leaves it
    assert 'is not needed' in prepare('mnist', data_dir, other, say=quiet)
    before.remove(f'mnist/3.0.1/{CHECKSUMS}')
    assert everything_in(data_dir) == before


def test_import_path_needs_nothing(tmp_path: Path) -> None:
    assert 'nothing to prepare' in prepare('my.module:load', tmp_path / 'data', say=quiet)
    assert not (tmp_path / 'data').exists()


@pytest.mark.skipif(SYSTEM_FOLDER.is_dir(), reason=f'{SYSTEM_FOLDER} would be taken')
def test_no_source_lists_them_all(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PATH', str(tmp_path))  # neither apt-get nor dpkg-deb
    with pytest.raises(UserError) as caught:
        prepare('fashion_mnist', tmp_path / 'data', say=quiet)
    message = str(caught.value)
    for part in (
        str(tmp_path / 'data'),
        str(SYSTEM_FOLDER),
        'dataset-fashion-mnist: there is no apt-get and no dpkg-deb',
        "TFDS's own download: ",
        '--from=DIR',
        'internet access',
    ):
        assert part in message
    assert not (tmp_path / 'data').exists()


@pytest.mark.skipif(SYSTEM_FOLDER.is_dir(), reason=f'{SYSTEM_FOLDER} would be taken')
@pytest.mark.skipif(not shutil.which('dpkg-deb'), reason='needs dpkg-deb')
def test_debian_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real dpkg-deb on a small package; only the network side, apt-get, is replaced."""
    tree = tmp_path / 'tree'
    write_set(tree / SYSTEM_FOLDER.relative_to('/'))
    (tree / 'DEBIAN').mkdir()
    (tree / 'DEBIAN/control').write_text(
        'Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\n'
        'Maintainer: A <a@example.org>\nDescription: test\n'
    )
    package = tmp_path / 'package.deb'
    build = ['dpkg-deb', '--build', '--root-owner-group', str(tree), str(package)]
    subprocess.run(build, check=True, capture_output=True)
    programs = tmp_path / 'bin'
    programs.mkdir()
    # As on a machine without package lists: `download` fails until `update` was called.
    (programs / 'apt-get').write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'*update) touch {tmp_path}/updated ;;\n'
        f'*download*) [ -e {tmp_path}/updated ] ||\n'
        '  { echo "E: Unable to locate package" >&2; exit 100; }\n'
        f'  cp {package} . ;;\nesac\n'
    )
    (programs / 'apt-get').chmod(0o755)
    monkeypatch.setenv('PATH', f'{programs}:{os.environ["PATH"]}')
    message = prepare('fashion_mnist', tmp_path / 'data', say=quiet)
    assert "from Debian's package dataset-fashion-mnist" in message
    found = find_prepared('fashion_mnist', tmp_path / 'data')
    assert found is not None and found.num_examples('train') == 40


def test_set_that_tfds_makes_itself_with_configs(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds
    from PIL import Image

    # Registered with TFDS by being defined, under the name own_shapes.
    class OwnShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('2.0.0')
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ('dark', 'bright')]  # noqa: RUF012

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                'image': tfds.features.Image(shape=(4, 4, 3)),
                'label': tfds.features.ClassLabel(names=['left', 'right']),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager: Any) -> dict[str, Any]:
            return {'train': self._generate_examples(6), 'test': self._generate_examples(2)}

        def _generate_examples(self, count: int) -> Iterator[Any]:
            level = {'dark': 10, 'bright': 200}[self.builder_config.name]
            for index in range(count):
                png = io.BytesIO()
                Image.new('RGB', (4, 4), (level, index, 0)).save(png, 'png')
                png.seek(0)
                yield index, {'image': png, 'label': index % 2}

    data_dir = tmp_path / 'data'
    assert 'the download of TFDS' in prepare('own_shapes/bright', data_dir, say=quiet)
    assert (data_dir / 'own_shapes/bright/2.0.0/dataset_info.json').is_file()
    assert find_prepared('own_shapes', data_dir) is None  # that means the first config
    prepare('own_shapes', data_dir, say=quiet)
    for name, level in (('own_shapes', 10), ('own_shapes/bright:2.*.*', 200)):
        split = load_split(name, 'train', data_dir)
        assert split.class_names == ('left', 'right')
        assert (split.images[..., 0] == level).all() and len(split.images) == 6
    assert sorted(path.name for path in data_dir.iterdir() if path.name != 'downloads') == ['own_shapes']
    with pytest.raises(UserError, match=r'not accepted by TFDS: .*BuilderConfig dim not found'):
        prepare('own_shapes/dim', data_dir, say=quiet)


def test_killed_at_any_moment_leaves_nothing_half_made(tmp_path: Path) -> None:
    source, data_dir = write_set(tmp_path / 'idx', train=6000, test=500), tmp_path / 'data'
    killed_while_storing = 0
    for delay in (0.0, 0.2, 0.4, 0.7):
        process = subprocess.Popen(command(data_dir, source), cwd=ROOT, stdout=subprocess.DEVNULL)
        # Counted from the moment that it starts to write.
        deadline = time.monotonic() + 20
        while not list(data_dir.glob('.preparing-*.part')) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and not (data_dir / 'mnist/3.0.1').exists():
            killed_while_storing += 1
            assert find_prepared('mnist', data_dir) is None
            assert list(data_dir.glob('.preparing-*.part'))
        elif found := find_prepared('mnist', data_dir):  # it was faster than the signal
            assert found.num_examples('train') == 6000
            shutil.rmtree(found.path)
    assert killed_while_storing >= 2
    subprocess.run(command(data_dir, source), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert [path.name for path in data_dir.iterdir()] == ['mnist']
    found = find_prepared('mnist', data_dir)
    assert found is not None and found.num_examples('train+test') == 6500


def test_two_at_once_agree(tmp_path: Path) -> None:
    source, data_dir = write_set(tmp_path / 'idx', train=2000, test=500), tmp_path / 'data'
    processes = [
        subprocess.Popen(command(data_dir, source), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum('from IDX files' in output for output in outputs) == 1
    assert sum('already prepared' in output for output in outputs) == 1
    assert everything_in(data_dir)[0] == 'mnist'
