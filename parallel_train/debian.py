"""How are the files of a Debian package had without root, and without installing it?"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_TIMEOUT = 300  # seconds a command


class PackageError(Exception):
    """The package cannot be had here; the text says why."""


def unpack(package: str, folder: Path) -> Path:
    """Downloads `package` from the machine's own package sources and unpacks it under `folder`.

    Returns the folder that stands for `/`. Raises PackageError.
    """
    missing = [program for program in ('apt-get', 'dpkg-deb') if not shutil.which(program)]
    if missing:
        raise PackageError(f'there is no {" and no ".join(missing)}')
    _download(package, folder)
    archives = list(folder.glob('*.deb'))
    if not archives:
        raise PackageError('apt-get downloaded nothing')
    root = folder / 'root'
    _run(['dpkg-deb', '-x', str(archives[0]), str(root)], folder)
    return root


def _download(package: str, folder: Path) -> None:
    command = ['apt-get', '-qq']
    for option in (
        # As root, apt would download as the user _apt, who cannot write here, and warn about it.
        'APT::Sandbox::User=root',
        'Acquire::Retries=1',
        'Acquire::http::Timeout=15',
        'Acquire::https::Timeout=15',
    ):
        command += ['-o', option]
    try:
        _run([*command, 'download', package], folder)
    except PackageError:
        # Container images come without package lists: get them into a folder of our own.
        own = []
        for option, part in (('Dir::State::lists', 'lists'), ('Dir::Cache', 'cache')):
            (folder / part / 'partial').mkdir(parents=True)
            own += ['-o', f'{option}={folder / part}']
        _run([*command, *own, 'update'], folder)
        _run([*command, *own, 'download', package], folder)


def _run(command: list[str], folder: Path) -> None:
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            env={**os.environ, 'LC_ALL': 'C'},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PackageError(f'{command[0]} took longer than {_TIMEOUT} s') from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f'exit code {result.returncode}']
        reason = next((line for line in lines if line.startswith('E:')), lines[-1])
        raise PackageError(f'{command[0]}: {reason}')
