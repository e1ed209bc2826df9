"""What is in a folder of images?

`train/CLASS/*`, and for evaluation `val/`, `validation/` or `test/` with the same classes. Only the head of
each file is looked at: whether all of it decodes is seen when it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parallel_train.errors import UserError

# Folder -> split, by TFDS's names.
SPLITS = {'train': 'train', 'val': 'validation', 'validation': 'validation', 'test': 'test'}
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP')  # what TensorFlow decodes, as Pillow calls it
_THREADS = 16  # waiting for the disk
_NAMED = 10  # files in a message


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The images of a folder.

    Attributes:
      root: the folder.
      class_names: the names of the folders in `train`, in their order.
      splits: TFDS's name -> files, each with the number of its class.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[tuple[Path, int], ...]]

    @property
    def source(self) -> str:
        return f'the images in {self.root}'

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for files in self.splits.values() for file, _ in files)

    @property
    def sha256(self) -> str:
        """Changes with the names and sizes of the files."""
        lines = (
            f'{file.relative_to(self.root)} {file.stat().st_size}\n'
            for _, files in sorted(self.splits.items())
            for file, _ in files
        )
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line.encode('utf-8', 'surrogateescape'))
        return digest.hexdigest()


def load(source: Path) -> ImageFolder:
    """Looks into `source`; files and folders whose names start with a dot are no part of it.

    Raises:
      UserError: no folder `train`, fewer than two classes, a class without images, a class that is not in
        `train`, two folders of one split, a folder that may not be listed, or files that are no
        images, which it counts and names.
    """
    try:
        names, splits = _names_and_splits(source)
    except OSError as error:
        reason = f'{error.filename} cannot be read ({error.strerror})'
        raise UserError(f'--from={source}: {reason}: allow it, or remove that folder') from error
    _check_images(source, [file for files in splits.values() for file, _ in files])
    return ImageFolder(source, names, splits)


def _names_and_splits(source: Path) -> tuple[tuple[str, ...], dict[str, tuple[tuple[Path, int], ...]]]:
    """The names of the classes, and the files of each split, each with its class; UserError if not right."""
    if not source.is_dir():
        raise UserError(f'--from={source} is not a folder')
    if not (source / 'train').is_dir():
        found = ', '.join(sorted(path.name for path in _entries(source))[:_NAMED]) or 'nothing'
        raise UserError(
            f'--from={source} has no folder train/ (it holds {found}): images are wanted as '
            'train/CLASS/FILE, and for evaluation as val/CLASS/FILE, validation/... or test/...'
        )
    names = tuple(sorted(path.name for path in _entries(source / 'train') if path.is_dir()))
    if len(names) < 2:
        raise UserError(
            f'--from={source}: train/ holds {len(names)} class folder{"s" * (len(names) != 1)}'
            f'{f" ({names[0]})" if names else ""}; at least 2 are wanted, train/CLASS/FILE'
        )
    unfit = [name for name in names if not name.isprintable()]  # TFDS keeps them one a line, in UTF-8
    if unfit:
        raise UserError(f'--from={source}: {unfit[0]!r} in train/ is no name for a class: rename it')
    splits: dict[str, tuple[tuple[Path, int], ...]] = {}
    for folder, split in SPLITS.items():
        if not (source / folder).is_dir():
            continue
        if split in splits:
            raise UserError(f'--from={source} holds both val/ and validation/: remove one')
        splits[split] = tuple(_labelled(source, folder, names))
    return names, splits


def _labelled(source: Path, folder: str, names: tuple[str, ...]) -> Iterable[tuple[Path, int]]:
    """The files of a split, each with its class; UserError if the classes are not right."""
    entries = _entries(source / folder)
    stray = [path for path in entries if not path.is_dir()]
    unknown = [path for path in entries if path.is_dir() and path.name not in names]
    if stray:
        raise UserError(
            f'--from={source}: {_list(source, stray)} in no class folder: images are wanted as '
            f'{folder}/CLASS/FILE'
        )
    if unknown:
        raise UserError(
            f'--from={source}: there is {_list(source, unknown)}, but no such class in train/: all splits '
            'must have the classes of train/'
        )
    files = {path.name: _entries(path) for path in entries}
    empty = [source / folder / name for name, inside in files.items() if not inside]
    if empty or not files:
        raise UserError(
            f'--from={source}: there is no image in {_list(source, empty or [source / folder])}: fill '
            'these folders, or remove them'
        )
    return [(file, number) for number, name in enumerate(names) for file in files.get(name, [])]


def _check_images(source: Path, files: list[Path]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = list(filter(None, pool.map(_problem, files, chunksize=256)))
    if problems:
        named = '; '.join(
            f'{Path(path).relative_to(source)} ({reason})' for path, reason in problems[:_NAMED]
        )
        more = f'; and {len(problems) - _NAMED} more' if len(problems) > _NAMED else ''
        raise UserError(
            f'--from={source}: {len(problems)} of {len(files):,} files are no images that can be read: '
            f'{named}{more}: remove or repair them'
        )


def _problem(file: Path) -> tuple[Path, str] | None:
    """Why a file is no image that can be read, from its head; None if it may be one."""
    from PIL import Image, UnidentifiedImageError

    try:
        file.name.encode()  # it is stored
        with Image.open(file, formats=FORMATS):
            return None
    except UnicodeEncodeError:
        return file, 'its name is not UTF-8'
    except UnidentifiedImageError:
        return file, f'not {", ".join(FORMATS)}'
    except OSError as error:
        return file, error.strerror or str(error)
    except Exception as error:  # Pillow's parsers raise many kinds
        return file, f'{type(error).__name__}: {error}'


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith('.'))


def _list(source: Path, paths: list[Path]) -> str:
    more = f' and {len(paths) - _NAMED} more' if len(paths) > _NAMED else ''
    return ', '.join(str(path.relative_to(source)) for path in paths[:_NAMED]) + more
