"""What is recorded? `metrics.jsonl`, one JSON object a line, and the same as TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from parallel_train.errors import UserError
from parallel_train.workdir import METRICS, write_atomically

Row = dict[str, Any]
TIMING_FIELDS = ('examples_per_second', 'data_wait_fraction')


def read_rows(workdir: Path) -> list[Row]:
    """Returns the rows of a run's `metrics.jsonl`; a last line torn by a crash is left out.

    Raises:
      UserError: another line is no row, or the file cannot be read.
    """
    try:
        lines = (workdir / METRICS).read_text(errors='replace').splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f'workdir={str(workdir)!r}: {METRICS} cannot be read ({error.strerror})') from error
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
    """Appends rows. On a resume from step N, rows after N are dropped first."""

    def __init__(self, workdir: Path, from_step: int):
        from tensorboardX import SummaryWriter

        self.rows = [row for row in read_rows(workdir) if row['step'] <= from_step]
        self._written = {(row['split'], row['step']) for row in self.rows}
        content = ''.join(json.dumps(row) + '\n' for row in self.rows)
        write_atomically(workdir / METRICS, content)
        self._file = open(workdir / METRICS, 'a')
        self._events = SummaryWriter(str(workdir), purge_step=from_step + 1)

    def has(self, split: str, step: int) -> bool:
        """Whether the row of `split` after `step` updates is written."""
        return (split, step) in self._written

    def write(self, row: Row) -> None:
        self.rows.append(row)
        self._written.add((row['split'], row['step']))
        self._file.write(json.dumps(row, allow_nan=False) + '\n')
        self._file.flush()
        for name, value in row.items():
            if name not in ('split', 'step') and math.isfinite(value):
                self._events.add_scalar(f'{row["split"]}/{name}', value, row['step'])

    def sync(self) -> None:
        """Returns once every row is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        self.sync()
        self._file.close()
        self._events.close()
