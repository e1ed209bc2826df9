"""Where does the dataset come from?

`prepare` takes the first source that has it and stores it in TFDS's standard form, ArrayRecord,
under the standard name and version, so that plain `tfds.data_source` reads it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parallel_train import debian, folder, idx
from parallel_train.dataset import is_import_path
from parallel_train.errors import UserError
from parallel_train.files import check_room, check_writable, exclusive, sync
from parallel_train.known_sets import check_known, tfds_builder
from parallel_train.paths import is_remote
from parallel_train.prepared import CHECKSUMS, Prepared, find_prepared, parse_name
from parallel_train.tfds_store import store_folder, store_idx

# The sets that are published as four IDX files; TFDS builds all of them with one class.
IDX_NAMES = ('fashion_mnist', 'mnist', 'kmnist')
SYSTEM_FOLDER = Path('/usr/share/datasets/fashion-mnist')
DEBIAN_PACKAGE = 'dataset-fashion-mnist'
_PROBE_TIMEOUT = 10  # seconds

Files = idx.IdxSet | folder.ImageFolder


def prepare(
    name: str,
    data_dir: Path,
    source: Path | None = None,
    say: Callable[[str], None] = print,
    splits: Sequence[str] = (),
) -> str:
    """Puts a dataset into `data_dir`, unless it is there; says, and returns, where it came from.

    The set appears in one rename of a finished folder: a process killed before leaves only a hidden
    folder, which the next one removes.

    Args:
      name: a TFDS name, `name[/config]`; an import path needs no preparation.
      data_dir: TFDS's data directory; made if need be.
      source: a folder of IDX files or of images (`--from`), which then is the only source.
      say: gets progress and result, a line at a time.
      splits: TFDS splits, slices too, that a folder of images must have.

    Raises:
      UserError: unknown name, not an image-classification set, files that are not right or not
        those that the set was prepared from, a `data_dir` that cannot be written, or no source that
        has the set; then it lists every source tried and why it failed.
    """
    if is_import_path(name):
        if source is not None:
            raise UserError(
                f'--from={source}: dataset={name!r} is made by a function of its own: leave out --from'
            )
        message = 'is made by a function of its own: nothing to prepare'
    elif found := find_prepared(name, data_dir):
        message = f'already prepared in {found.path}'
        if source is not None:
            message += _compare(found, source, _load_given(name, source, splits))
    else:
        message = _obtain(name, data_dir, source, say, splits)
    say(f'{name}: {message}')
    return message


def _obtain(
    name: str, data_dir: Path, source: Path | None, say: Callable[[str], None], splits: Sequence[str]
) -> str:
    if source is None or name in IDX_NAMES:
        check_known(name)
    if is_remote(data_dir):
        raise UserError(
            f'data_dir={str(data_dir)!r}: {name} is not there, and is not prepared in a store: run '
            f'`prepare` with a folder, then `gcloud storage cp -r FOLDER/{parse_name(name)[0]} {data_dir}`'
        )
    check_writable('data_dir', data_dir)  # before anything is fetched
    tried: list[str] = []
    files = _load_given(name, source, splits) if source else _find_idx(name, tried, say)
    new_folders = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    prefix = f'.preparing-{parse_name(name)[0]}'
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with exclusive(data_dir / f'{prefix}.lock') as alone:
            if found := find_prepared(name, data_dir):
                return f'already prepared in {found.path}, by another process'
            if alone:  # then these were left by a process that was killed
                for leftover in data_dir.glob(f'{prefix}-*.part'):
                    shutil.rmtree(leftover, ignore_errors=True)
            part = Path(tempfile.mkdtemp(prefix=f'{prefix}-', suffix='.part', dir=data_dir))
            try:
                if files is not None:
                    check_room(f'storing {name}', data_dir, _needed(files))
                    say(f'{name}: storing {files.source} as a TFDS set')
                    if isinstance(files, idx.IdxSet):
                        store_idx(name, files, part)
                    else:
                        store_folder(name, files, part)
                else:
                    _download_tfds(name, part, data_dir, tried, say)
                path = _publish(name, part, data_dir)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except BaseException:  # Ctrl-C too
        for folder_made in new_folders:
            with contextlib.suppress(OSError):  # another process may use it by now
                folder_made.rmdir()
        raise
    return f'prepared in {path}, from {files.source if files else "the download of TFDS"}'


def _needed(files: Files) -> int:
    """Bytes on the disk while a set is written, at most."""
    if isinstance(files, folder.ImageFolder):
        return 2 * files.num_bytes  # TFDS sorts the records by their keys on the disk
    return sum(images.nbytes for images, _ in files.splits.values())  # as PNG a little less


def _find_idx(name: str, tried: list[str], say: Callable[[str], None]) -> idx.IdxSet | None:
    """The IDX files of the first source that has them; notes in `tried` why the others did not."""
    if name != 'fashion_mnist':
        if name in IDX_NAMES:
            tried.append('IDX files: no --from=DIR was given')
        return None
    files = idx.load(SYSTEM_FOLDER) if SYSTEM_FOLDER.is_dir() else None
    if files is None:
        tried.append(f'IDX files: no --from=DIR was given, and there are none in {SYSTEM_FOLDER}')
        files = _fetch_debian_package(tried, say)
    return files


def _load_given(name: str, source: Path, splits: Sequence[str]) -> Files:
    """What `--from` holds: the IDX files of a set that is published so, else images in folders."""
    if name not in IDX_NAMES:
        images = folder.load(source)
        for split in (re.split(r'[\[+]', split)[0] for split in splits):
            if split not in images.splits:
                raise UserError(
                    f'--from={source} has no images for the split {split!r}, only for '
                    f'{", ".join(images.splits)}: set config.train_split and config.eval_split to these, or '
                    "to parts of one, such as 'train[90%:]'"
                )
        return images
    if not source.is_dir():
        raise UserError(f'--from={source} is not a folder')
    files = idx.load(source)
    if files is None:
        raise UserError(
            f'--from={source} holds no IDX files: train-images-idx3-ubyte[.gz], '
            'train-labels-idx1-ubyte[.gz], t10k-images-idx3-ubyte[.gz] and '
            't10k-labels-idx1-ubyte[.gz] are wanted'
        )
    return files


def _compare(found: Prepared, source: Path, files: Files) -> str:
    """Says how a set that is there and the files of `--from` go together; refuses other files."""
    try:
        recorded = json.loads((found.path / CHECKSUMS).read_text())['sha256']
    except (OSError, ValueError, LookupError, TypeError):
        return f'; not from {source}, which is not needed'
    if recorded != files.sha256:
        raise UserError(
            f'--from={source} holds other files than those that {found.path} was prepared from: leave out '
            '--from, delete that folder, or choose another --data_dir'
        )
    return f', from the files in {source}'


def _fetch_debian_package(tried: list[str], say: Callable[[str], None]) -> idx.IdxSet | None:
    label = f"Debian's package {DEBIAN_PACKAGE}"
    say(f'fetching {label} (30 MB)')
    with tempfile.TemporaryDirectory() as folder:
        try:
            root = debian.unpack(DEBIAN_PACKAGE, Path(folder))
            files = idx.load(root / SYSTEM_FOLDER.relative_to('/'))
        except (debian.PackageError, UserError) as error:
            tried.append(f'{label}: {error}')
            return None
    if files is None:
        tried.append(f'{label}: it holds no IDX files')
        return None
    return dataclasses.replace(files, source=label)


def _download_tfds(
    name: str, folder: Path, data_dir: Path, tried: list[str], say: Callable[[str], None]
) -> None:
    """TFDS's own download and preparation, into `folder`; raises UserError if that fails."""
    builder, _ = tfds_builder(name, folder)
    downloads = data_dir / 'downloads'  # TFDS's place: a second try finds what the first has got
    try:
        _probe(builder)
        say(f'{name}: downloading with TFDS')
        builder.download_and_prepare(download_dir=downloads, file_format='array_record')
        return
    except Exception as error:
        reason = ' '.join(str(error).split())[:300]
        tried.append(f"TFDS's own download: {type(error).__name__}: {reason}")
    finally:
        for path, _, _ in os.walk(downloads, topdown=False):
            with contextlib.suppress(OSError):  # keeps what is not empty
                os.rmdir(path)
    by_hand = (
        '--from=DIR with the four IDX files (train- and t10k-, images and labels); or '
        if name in IDX_NAMES
        else ''
    )
    raise UserError(
        f'dataset={name!r} is not prepared in data_dir={data_dir}, and no source has it. Tried:\n'
        + ''.join(f'  - {line}\n' for line in tried)
        + f'Remedy: {by_hand}prepare it on a machine with internet access and copy '
        f'{parse_name(name)[0]}/ from its data_dir into this one'
    )


def _probe(builder: Any) -> None:
    """Fails within seconds where there is no network; TFDS's own tries would take minutes."""
    import requests

    urls = list(builder.url_infos or ())
    if urls:
        requests.head(urls[0], timeout=_PROBE_TIMEOUT)


def _publish(name: str, part: Path, data_dir: Path) -> Path:
    """Moves the one finished set in `part` to its place in `data_dir`, at once and for good."""
    found = find_prepared(name, part)
    if found is None:
        raise RuntimeError(f'TFDS reported success but wrote no {name} into {part}')
    for path in found.path.rglob('*'):
        sync(path)
    sync(found.path)
    final = data_dir / found.path.relative_to(part)
    final.parent.mkdir(parents=True, exist_ok=True)
    for note in part.glob('*/.config'):  # which config a bare name means
        shutil.copytree(note, data_dir / note.relative_to(part), dirs_exist_ok=True)
    try:
        found.path.rename(final)
    except OSError as error:
        if find_prepared(name, data_dir) is None:
            raise UserError(f'{final} is in the way and is not a finished dataset: remove it') from error
    sync(final.parent)
    return final
