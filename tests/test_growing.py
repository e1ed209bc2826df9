"""Files that are appended to, on disks that do not take everything: what was promised to be there, is."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from parallel_train import files
from parallel_train.metrics import MetricsLog, read_rows


class Disk:
    """As the kernel does it: where an fsync fails, what was not on the disk yet is gone, and said once."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        self.path, self.full, self._safe, self._fsync = path, False, 0, os.fsync
        monkeypatch.setattr(files.os, 'fsync', self.fsync)

    def fsync(self, descriptor: int) -> None:
        if not self.path.exists() or not os.path.samestat(os.fstat(descriptor), self.path.stat()):
            return self._fsync(descriptor)
        if not self.full:
            self._safe = self.path.stat().st_size
            return None
        content = self.path.read_bytes()
        self.path.write_bytes(content[: self._safe] + bytes(len(content) - self._safe))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path / 'rows', monkeypatch)


def test_what_an_fsync_loses_is_written_again(disk: Disk) -> None:
    growing = files.Growing(disk.path)
    assert growing.append(b'one\n') == growing.sync() == ''
    for line in (b'two\n', b'three\n'):
        assert growing.append(line) == ''
    disk.full = True
    for _ in range(2):
        assert 'No space left' in growing.sync()
        assert disk.path.read_bytes() == b'one\n'  # and nothing that only looks like more
    growing.append(b'four\n')
    disk.full = False
    assert growing.sync() == ''
    assert disk.path.read_bytes() == b'one\ntwo\nthree\nfour\n'
    growing.append(b'five\n')
    growing.close()
    assert disk.path.read_bytes() == b'one\ntwo\nthree\nfour\nfive\n'


class Stuck:
    """A file that cannot be cut back while the disk is full, and takes half of what is written."""

    def __init__(self, file: Any, disk: Disk):
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def truncate(self, size: int) -> int:
        if self._disk.full:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(self._file.truncate(size))

    def write(self, data: bytes) -> int:
        if self._disk.full and len(data) < 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data[: len(data) // 2] if self._disk.full else data))


def test_what_could_not_be_cut_back_is_later(disk: Disk) -> None:
    growing = files.Growing(disk.path)
    assert growing.append(b'one\n') == growing.sync() == growing.append(b'two\n') == ''
    growing._file = Stuck(growing._file, disk)
    disk.full = True
    assert 'No space left' in growing.append(b'three\n')
    assert growing.sync() and growing.append(b'four\n')
    disk.full = False
    assert growing.append(b'five\n') == growing.sync() == ''
    assert disk.path.read_bytes() == b'one\ntwo\nthree\nfour\nfive\n'


def test_rows_are_not_promised_that_the_disk_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is committed once `sync` says so."""
    disk, log = Disk(tmp_path / 'metrics.jsonl', monkeypatch), MetricsLog(tmp_path, 0)
    rows = [{'split': 'train', 'step': step, 'loss': 0.5} for step in (1, 2, 3)]
    log.write(rows[0])
    disk.full = True
    log.write(rows[1])
    assert log.sync() == 'metrics.jsonl: No space left on device'
    disk.full = False
    log.write(rows[2])
    assert log.sync() == '' and read_rows(tmp_path) == rows
    log.close()
