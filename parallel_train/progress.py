"""What does a person see while it runs? A bar on a terminal, plain lines in a log."""

from __future__ import annotations

import collections
import os
import statistics
import sys
from typing import Any

from parallel_train.plan import Plan
from parallel_train.say import print_flushed, surviving

_RECENT = 9  # rows that say how long a step takes now


class Progress:
    """Shows rows of metrics as they come; silent where `enabled` is False (process 0 alone shows)."""

    def __init__(self, plan: Plan, from_step: int, enabled: bool = True, unit: str = 'images'):
        self._plan, self._enabled, self._unit = plan, enabled, unit
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._bar = None
        if enabled and sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0:
            from tqdm import tqdm

            self._bar = tqdm(
                total=plan.num_steps,
                initial=from_step,
                unit='step',
                dynamic_ncols=True,
                bar_format='{bar} {percentage:3.0f}%  {desc}',
            )

    def show(self, row: dict[str, Any]) -> None:
        """Shows a row of `metrics.jsonl`."""
        if not self._enabled:
            return
        if row['split'] == 'eval':
            self.say(
                f'epoch {row["epoch"]:6.2f}  step {row["step"]:>6}  EVAL  loss {row["loss"]:.4f}  '
                f'accuracy {row["accuracy"]:.4f}  on all {row["num_examples"]} examples'
            )
            return
        if row['examples_per_second']:
            self._step_seconds.append(self._plan.batch_size / row['examples_per_second'])
        left = self._left(row['step'])
        if self._bar is not None:
            self._bar.set_description_str(
                f'epoch {row["epoch"]:.2f}/{self._plan.num_epochs:g}  step {row["step"]}  '
                f'loss {row["loss"]:.3f}  acc {row["accuracy"]:.3f}  rate {row["learning_rate"]:.4g}  '
                f'{row["examples_per_second"]:,.0f} {self._unit}/s  {left} left',
                refresh=False,
            )
            self._bar.update(row['step'] - self._bar.n)
            return
        self.say(
            f'epoch {row["epoch"]:6.2f}  step {row["step"]:>6}  train loss {row["loss"]:.4f}  '
            f'accuracy {row["accuracy"]:.4f}  rate {row["learning_rate"]:.5f}  '
            f'{row["examples_per_second"]:8,.0f} {self._unit}/s  {left} left'
        )

    def _left(self, step: int) -> str:
        """Returns how long the steps to come take, at the median of recent rows.

        What a row's throughput leaves out (compilation, evaluations, saves) is left out here too.
        """
        if not self._step_seconds:
            return '-:--:--'
        seconds = round(statistics.median(self._step_seconds) * (self._plan.num_steps - step))
        return f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}'

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            with surviving():
                self._bar.write(line, file=sys.stdout)
        else:
            print_flushed(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
