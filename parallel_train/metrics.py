"""What is recorded? `metrics.jsonl`, one JSON object a line, and the same as TensorBoard events."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from parallel_train import events
from parallel_train.errors import UserError
from parallel_train.files import growing, write_atomically
from parallel_train.say import print_flushed
from parallel_train.workdir import METRICS

Row = dict[str, Any]
TIMING_FIELDS = ('examples_per_second', 'data_wait_fraction')


def read_rows(workdir: Path) -> list[Row]:
    """Returns the rows of a run's `metrics.jsonl`; a last line torn by a crash is left out.

    Raises:
      UserError: another line is no row.
    """
    try:
        lines = (workdir / METRICS).read_bytes().decode(errors='replace').splitlines(keepends=True)
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
        self._warned = False
        if not active:
            return
        self.rows = [row for row in read_rows(workdir) if row['step'] <= from_step]
        write_atomically(self._path, ''.join(json.dumps(row) + '\n' for row in self.rows))
        self._file = growing(self._path)
        self._events = growing(workdir / events.file_name())
        self._events.append(events.beginning(from_step))

    def splits_at(self, step: int) -> list[str]:
        """Returns of which splits the row after `step` updates is written."""
        return [row['split'] for row in self.rows if row['step'] == step]

    def write(self, row: Row) -> None:
        self.rows.append(row)
        if self._active:
            self._warn_of(self._file.append((json.dumps(row, allow_nan=False) + '\n').encode()))
            self._events.append(events.of_row(row))

    def sync(self) -> str:
        """Returns '' once every row is on disk; if the disk does not take them, why."""
        if not self._active:
            return ''
        problem = self._file.sync()
        self._events.sync()
        self._warn_of(problem)
        return problem and f'{METRICS}: {problem}'

    def _warn_of(self, problem: str) -> None:
        if problem and not self._warned:  # once for as long as it lasts
            print_flushed(f'warning: {self._path}: {problem}; kept in memory, tried again later', sys.stderr)
        self._warned = bool(problem)

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._events.close()
