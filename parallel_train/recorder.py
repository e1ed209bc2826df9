"""How do numbers get from the devices to the log without making the host wait?

The devices keep running sums. When a row is due, the sums are taken and a thread waits for them while
the loop goes on; the row is written when the next one is due, or before anything that waits anyway.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from parallel_train import processes
from parallel_train.errors import Diverged
from parallel_train.metrics import MetricsLog
from parallel_train.plan import Plan
from parallel_train.progress import Progress
from parallel_train.state import TrainState, take_sums
from parallel_train.update import all_finite

_A_DAY = 86_400.0  # seconds
_Fetched = tuple[dict[str, float], float]  # the sums, and when the devices had computed them


def _fetch(sums: dict[str, jax.Array]) -> _Fetched:
    values = {name: float(value) for name, value in jax.device_get(sums).items()}
    return values, time.perf_counter()


_all_finite = jax.jit(all_finite)


class Recorder:
    """Writes rows of train and eval metrics, and shows them."""

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        log: MetricsLog,
        progress: Progress,
        step: int,
        skip_nonfinite: int = 0,
        skipped: int = 0,
    ):
        self._plan, self._mesh, self._log, self._progress = plan, mesh, log, progress
        self._may_skip, self._skipped = skip_nonfinite, skipped  # before `step` too, which was said then
        self._pool = ThreadPoolExecutor(1, thread_name_prefix='metrics')
        self._pending: tuple[int, float, Future[_Fetched]] | None = None
        self.steps_seen, self.step_seconds = 0, 0.0  # of all rows so far, for the mean throughput
        self.restart(step)

    def restart(self, step: int, wait_seconds: float = 0.0) -> None:
        """Starts a new interval for throughput: after a compilation, an evaluation, a save."""
        self.settle()
        self._interval = (step, time.perf_counter())
        self._wait_seconds = wait_seconds

    def log(self, state: TrainState, step: int, wait_seconds: float, written: bool = False) -> TrainState:
        """Makes the row of the updates since the one before; returns the state with fresh sums.

        Args:
          state: after `step` completed updates.
          step: completed updates.
          wait_seconds: what the host has waited for data so far, in this process.
          written: the row is there, from before a resume: nothing but the fresh sums is wanted.
        """
        state, sums = take_sums(state, self._mesh)
        if written:
            return state
        waited, self._wait_seconds = wait_seconds - self._wait_seconds, wait_seconds
        job = self._pool.submit(_fetch, sums)
        self.settle()
        self._pending = (step, waited, job)
        return state

    def evaluated(self, step: int, result: dict[str, float]) -> None:
        """Writes the row of an evaluation after `step` updates."""
        self.settle()
        if not math.isfinite(result['loss']):
            raise Diverged(f'training diverged: the loss of the evaluation at step {step} is not finite')
        row = {'split': 'eval', 'step': step, 'epoch': self._plan.epoch_of(step), **result}
        self._log.write(row)
        self._progress.show(row)

    def settle(self) -> None:
        """Returns once every row made so far is written.

        Raises:
          Diverged: a row's loss or gradient norm is not finite.
        """
        if self._pending is None:
            return
        step, waited, job = self._pending
        self._pending = None
        sums, done = job.result()
        begin, start = self._interval
        self._interval = (step, done)
        seconds = max(done - start, 1e-9)
        self.steps_seen += step - begin
        self.step_seconds += seconds
        self._check(sums, step)
        updates = sums['updates']
        if not updates:  # all were skipped; or resumed at this step, whose row is lost
            return
        row: dict[str, Any] = {
            'split': 'train',
            'step': step,
            'epoch': self._plan.epoch_of(step),
            'loss': sums['loss'] / updates,
            'accuracy': sums['accuracy'] / updates,
            'grad_norm': sums['grad_norm'] / updates,
            'learning_rate': self._plan.rate(step - 1),
            'examples_per_second': (step - begin) * self._plan.batch_size / seconds,
            'data_wait_fraction': min(waited / seconds, 1.0),
        }
        self._log.write(row)
        self._progress.show(row)

    def check(self, state: TrainState) -> None:
        """Returns once every row up to this state is written.

        Raises:
          Diverged: a loss or gradient up to this state was not finite, or the state itself is not.
        """
        self.settle()
        self._check({'skipped': float(state.skipped)}, int(state.step))
        if not bool(_all_finite((state.params, state.opt_state, state.batch_stats))):
            raise Diverged(f'training diverged: the state after step {int(state.step)} is not finite')

    def sync(self) -> str:
        """Returns '' once every row written is on disk; if the disk does not take them, why."""
        # Process 0 alone writes, and all do the same. How slow its disk may be is the lifeline's question.
        return processes.share(self._log.sync, timeout=_A_DAY)

    def _check(self, sums: dict[str, float], step: int) -> None:
        skipped = round(sums['skipped'])
        if skipped > self._may_skip:
            after = f', after {self._may_skip} such steps were skipped' if self._may_skip else ''
            raise Diverged(f'training diverged: loss or gradient is not finite{after}', frozen=True)
        if skipped > self._skipped:
            self._progress.say(
                f'warning: {skipped} of at most {self._may_skip} steps skipped, the last up to step {step}: '
                'their loss or gradient was not finite'
            )
            self._skipped = skipped

    def close(self) -> None:
        self._pool.shutdown()
        self._log.close()
        self._progress.close()
