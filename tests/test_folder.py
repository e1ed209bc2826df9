"""A folder of images becomes a TFDS set, or the message says which files stand in the way."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from parallel_train import folder
from parallel_train.decode import open_records
from parallel_train.errors import UserError
from parallel_train.prepare import prepare
from parallel_train.prepared import find_prepared
from tests.conftest import ImageJob, run_cli, snapshot
from tests.pictures import CLASSES, encoded, write_folder


def quiet(line: str) -> None:
    del line


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_folder(tmp_path / 'images', train=3, val=1, corrupt=False)


def test_plain_tfds_reads_what_the_command_prepared(image_job: ImageJob) -> None:
    import tensorflow_datasets as tfds

    for split, own in (('train', 'train'), ('validation', 'val')):
        files = {path.name + path.parent.name: path for path in (image_job.source / own).glob('*/*.jpg')}
        as_stored = {'image': tfds.decode.SkipDecoding()}
        source = tfds.data_source('pictures', split=split, data_dir=image_job.data_dir, decoders=as_stored)
        assert len(source) == len(files)
        for example in source:
            original = files.pop(example['file_name'].decode() + CLASSES[example['label']])
            assert example['image'] == original.read_bytes()  # as they are, not encoded again
        assert not files
    builder = tfds.builder_from_directory(image_job.data_dir / 'pictures/1.0.0')
    assert tuple(builder.info.features['label'].names) == CLASSES
    assert f'train: {len(list((image_job.source / "train").glob("*/*"))):,} examples of' in image_job.said


def test_it_is_prepared_once_and_from_one_folder(images: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / 'data'
    prepare('own', data_dir, images, say=quiet, splits=('train', 'validation[:50%]'))
    before = snapshot(data_dir)
    assert 'from the files in' in prepare('own', data_dir, images, say=quiet)
    (images / 'train' / 'rings' / '000.jpg').unlink()
    with pytest.raises(UserError, match='other files than those .* was prepared from'):
        prepare('own', data_dir, images, say=quiet)
    assert snapshot(data_dir) == before


def damage_no_train(images: Path) -> None:
    (images / 'train').rename(images / 'training')


def damage_one_class(images: Path) -> None:
    for name in CLASSES[1:]:
        shutil.rmtree(images / 'train' / name)


def damage_empty_class(images: Path) -> None:
    (images / 'train' / 'zebras').mkdir()


def damage_flat_val(images: Path) -> None:
    (images / 'val' / 'picture.jpg').write_bytes(b'')


def damage_unknown_class(images: Path) -> None:
    (images / 'val' / 'rings').rename(images / 'val' / 'circles')


def damage_two_vals(images: Path) -> None:
    shutil.copytree(images / 'val', images / 'validation')


def damage_class_name(images: Path) -> None:
    for split in ('train', 'val'):
        (images / split / 'rings').rename(images / split / 'ri\nngs')


def damage_file_name(images: Path) -> None:
    (images / 'train' / 'rings' / '000.jpg').rename(images / 'train' / 'rings' / '\udcff.jpg')


def damage_files(images: Path) -> None:
    (images / 'train' / 'rings' / 'notes.txt').write_text('no image')
    (images / 'train' / 'rings' / 'empty.jpg').write_bytes(b'')
    (images / 'val' / 'checks' / 'gone.jpg').symlink_to(images / 'nowhere')
    (images / 'val' / 'checks' / '.DS_Store').write_bytes(b'is no part of it')


@pytest.mark.parametrize(
    'damage, said',
    [
        (damage_no_train, r'no folder train/ \(it holds training, val\)'),
        (damage_one_class, r'holds 1 class folder \(checks\); at least 2'),
        (damage_empty_class, r'no image in train/zebras'),
        (damage_flat_val, r'val/picture.jpg in no class folder'),
        (damage_unknown_class, r'val/circles, but no such class in train/'),
        (damage_class_name, r"'ri\\nngs' in train/ is no name for a class"),
        (damage_file_name, r'1 of 12 files are no images .*\(its name is not UTF-8\)'),
        (damage_two_vals, r'both val/ and validation/'),
        (
            damage_files,
            r'3 of 15 files are no images .*rings/empty.jpg \(not JPEG.*rings/notes.txt.*'
            r'gone.jpg \(No such file',
        ),
    ],
)
def test_bad_folders(damage: object, said: str, images: Path, tmp_path: Path) -> None:
    damage(images)  # type: ignore[operator]
    with pytest.raises(UserError, match=said):
        prepare('own', tmp_path / 'data', images, say=quiet)
    assert not (tmp_path / 'data').exists()


def test_a_split_that_the_folder_has_not(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images for the split 'test', only for train, validation"):
        prepare('own', tmp_path / 'data', images, say=quiet, splits=('train', 'test[:10]'))
    assert not (tmp_path / 'data').exists()


def test_the_name_of_a_known_set_wants_its_classes(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'cifar10': is the name of a set that TFDS knows, with 10 classes"):
        prepare('cifar10', tmp_path / 'data', images, say=quiet)
    # Those of rock_paper_scissors, in TFDS's order, which is not the alphabet's.
    for own, name in zip(CLASSES, ('paper', 'rock', 'scissors'), strict=True):
        for split in ('train', 'val'):
            (images / split / own).rename(images / split / name)
    prepare('rock_paper_scissors', tmp_path / 'data', images, say=quiet)
    prepared = find_prepared('rock_paper_scissors', tmp_path / 'data')
    assert prepared is not None and prepared.class_names == ('rock', 'paper', 'scissors')
    assert prepared.num_examples('train') == 9
    raw = open_records(prepared.path, 'train')
    paper = (images / 'train' / 'paper' / '000.jpg').read_bytes()
    import tensorflow as tf

    label = {
        example.features.feature['image'].bytes_list.value[0]: example.features.feature[
            'label'
        ].int64_list.value[0]
        for example in (tf.train.Example.FromString(raw[i]) for i in range(len(raw)))
    }
    assert label[paper] == 1


def test_a_folder_that_may_not_be_listed_is_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, listed = images / 'val' / 'rings', Path.iterdir

    def refused(folder: Path) -> Iterator[Path]:  # root may list any
        if folder == closed:
            raise PermissionError(errno.EACCES, 'Permission denied', str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, 'iterdir', refused)
    with pytest.raises(UserError, match=f'--from={images}: {closed} cannot be read .*denied.*: allow it, or'):
        prepare('own', tmp_path / 'data', images, say=quiet)
    assert not (tmp_path / 'data').exists()


def test_what_pillow_reads_and_we_do_not(images: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    (images / 'train' / 'rings' / 'odd.jpg').write_bytes(encoded(pixels, form='tiff'))
    with pytest.raises(UserError, match='odd.jpg'):
        folder.load(images)


def test_by_the_command_line_a_bad_folder_is_the_users_mistake(
    image_job: ImageJob, images: Path, tmp_path: Path
) -> None:
    damage_files(images)
    result = run_cli(
        'prepare', f'--config={image_job.recipe}', f'--data_dir={tmp_path}/d', f'--from={images}'
    )
    assert (
        result.code == 2 and result.stderr.startswith('error: --from=') and '3 of 15 files' in result.stderr
    )
    assert not (tmp_path / 'd').exists()
