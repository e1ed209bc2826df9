"""What is recorded? `metrics.jsonl`, one JSON object a line, and the same as TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from parallel_train.errors import UserError
from parallel_train.workdir import METRICS, write_atomically

Row = dict[str, Any]
TIMING_FIELDS = ('examples_per_second', 'data_wait_fraction')


def read_rows(workdir: Path) -> list[Row]:
    """Returns the rows of a run's `metrics.jsonl`; a last line torn by a crash is left out.

    Raises:
      UserError: another line is no row.
    """
    try:
        lines = (workdir / METRICS).read_text(errors='replace').splitlines(keepends=True)
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, 'split': row['split'], 'step': int(row['step'])})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(
                    f'workdir={str(workdir)!r}: line {number} of {METRICS} is no row of metrics; remove it'
                ) from error
    return rows


class MetricsLog:
    """Appends rows. On a resume from step N, rows after N are dropped first.

    Only process 0 reads and writes; the others' log is `active=False`. A disk that is full costs no row:
    what could not be written is kept and tried again with the next one.
    """

    def __init__(self, workdir: Path, from_step: int, active: bool = True):
        self._path, self._active = workdir / METRICS, active
        self.rows: list[Row] = []
        self._waiting: list[str] = []  # lines that the disk did not take yet
        if not active:
            return
        from tensorboardX import SummaryWriter

        self.rows = [row for row in read_rows(workdir) if row['step'] <= from_step]
        write_atomically(self._path, ''.join(json.dumps(row) + '\n' for row in self.rows))
        self._file = open(self._path, 'ab', buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._events = SummaryWriter(str(workdir), purge_step=from_step + 1)

    def splits_at(self, step: int) -> list[str]:
        """Returns of which splits the row after `step` updates is written."""
        return [row['split'] for row in self.rows if row['step'] == step]

    def accuracy_at(self, step: int) -> float | None:
        """Returns the accuracy on the eval split after `step` updates; None if it was not evaluated."""
        found = [row['accuracy'] for row in self.rows if (row['split'], row['step']) == ('eval', step)]
        return found[-1] if found else None

    def write(self, row: Row) -> None:
        self.rows.append(row)
        if not self._active:
            return
        self._waiting.append(json.dumps(row, allow_nan=False) + '\n')
        self._flush()
        # Its thread ends at a full disk, and would then be waited for in vain.
        if self._events.file_writer.event_writer._worker.is_alive():
            for name, value in row.items():
                if name not in ('split', 'step') and math.isfinite(value):
                    self._events.add_scalar(f'{row["split"]}/{name}', value, row['step'])

    def _flush(self) -> bool:
        """Writes the lines that wait; False if the disk does not take them."""
        data = ''.join(self._waiting).encode()
        try:
            if not self._path.exists():  # else the rows would go where nobody finds them
                raise FileNotFoundError(f'{self._path} was removed while the run goes on')
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)  # half a line
                self._file.seek(self._size)
            print(
                f'warning: {self._path}: {error.strerror}; kept in memory, tried again later', file=sys.stderr
            )
            return False
        self._size = self._file.seek(0, os.SEEK_END)
        self._waiting.clear()
        return True

    def sync(self) -> bool:
        """Returns True once every row is on disk; False if the disk does not take them."""
        if not self._active:
            return True
        if not self._flush():
            return False
        os.fsync(self._file.fileno())
        if self._events.file_writer.event_writer._worker.is_alive():
            self._events.flush()
        return True

    def close(self) -> None:
        if self._active:
            with contextlib.suppress(OSError):
                self.sync()
            self._file.close()
            if self._events.file_writer.event_writer._worker.is_alive():
                self._events.close()
