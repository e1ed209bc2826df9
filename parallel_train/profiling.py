"""Where do the microseconds of some steps go? `--profile_steps`: a trace that XProf and Perfetto open.

Lies in the workdir as XProf wants it: profile/plugins/profile/steps_A_B/process_N.xplane.pb, with
.trace.json.gz, the same for Perfetto, and .json, what profile_shares.py makes of it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from parallel_train import processes
from parallel_train.damage import first_line
from parallel_train.errors import UserError
from parallel_train.files import write_atomically
from parallel_train.paths import is_remote
from parallel_train.plan import Plan
from parallel_train.profile_shares import Shares, read_operations, shares
from parallel_train.say import print_flushed
from parallel_train.state import TrainState

FOLDER = 'profile'


@dataclasses.dataclass(frozen=True)
class Steps:
    """From the moment that `first` updates are completed to that when `last` are."""

    first: int
    last: int

    def check(self, plan: Plan, workdir: Path) -> None:
        """Raises UserError if the run has no such steps, or the workdir takes no trace."""
        if is_remote(workdir):
            raise UserError(
                f'profile_steps={self.first}:{self.last}: a trace needs a workdir that is a folder; '
                'name one for a short run'
            )
        if self.last > plan.num_steps:
            raise UserError(
                f'profile_steps={self.first}:{self.last}: the run has {plan.num_steps} steps; end at '
                f'{plan.num_steps} or before'
            )


def parse(text: str | None) -> Steps | None:
    """Returns the steps that '100:110' names; None for None. UserError if it names none."""
    if text is None:
        return None
    first, colon, last = text.partition(':')
    if not (colon and all(part.isascii() and part.isdigit() for part in (first, last))):
        raise UserError(f'profile_steps={text!r}: must be FIRST:LAST in whole numbers, such as 100:110')
    if int(first) >= int(last):
        raise UserError(f'profile_steps={text!r}: the first must be less than the last, such as 100:110')
    return Steps(int(first), int(last))


class Profiler:
    """Traces the steps that were asked for; without any, does nothing.

    Args:
      steps: which; None for none.
      workdir: of the run.
      start: the step that the run starts from. What lies before it was traced before, or never.
    """

    def __init__(self, steps: Steps | None, workdir: Path, start: int):
        self._steps, self._folder = steps, workdir / FOLDER
        self._edges: tuple[int, ...] = ()
        if steps and start < steps.last:
            self._edges = max(steps.first, start), steps.last
        self._past = steps is not None and not self._edges
        self._since: tuple[int, float, float] | None = None  # step, clock and seconds waited at the start
        self._found: list[Shares | None] = []  # of each process

    def is_due(self, step: int) -> bool:
        """Whether a trace begins or ends once `step` updates are completed."""
        return step in self._edges

    def switch(self, state: TrainState, step: int, waited_seconds: float) -> None:
        """Begins or ends the trace; waits for the devices first, so that it holds whole steps."""
        jax.block_until_ready(state)
        if self._since is None:
            shutil.rmtree(self._own_folder(), ignore_errors=True)  # of a run that was killed in its trace
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow the host down, whose part is to be seen
            jax.profiler.start_trace(self._own_folder(), profiler_options=options)
            self._since = step, time.perf_counter(), waited_seconds
            return
        _, start, waited = self._since
        mine = self._end(time.perf_counter() - start, waited_seconds - waited)
        told = processes.gather('shares of the profile', mine and dataclasses.asdict(mine))
        self._found = [Shares(**each) if each else None for each in told]

    def tell(self, say: Callable[[str], None]) -> None:
        """Says what came of it."""
        if self._past and self._steps:
            say(f'profile: steps {self._steps.first} to {self._steps.last} lie before this start')
        for process, found in enumerate(self._found):
            whose = f' of process {process}' if len(self._found) > 1 else ''
            text = found.text() if found else 'the trace holds no operations of devices'
            say(f'profile{whose}: {text}')
        if any(self._found) and jax.default_backend() == 'cpu':
            say('  (CPU devices share cores: an operation lasts while its thread waits for one, too)')
        if self._found:
            say(f'trace: {self._session().resolve()}')

    def close(self) -> None:
        """Ends a trace that a stop or a fault cut short; it is kept, but not read."""
        if self._since is None or self._found:
            return
        try:
            self._keep()
        except Exception as error:  # which is not why the run ends
            print_flushed(
                f'warning: the trace that was cut short is not kept: {first_line(error)}', sys.stderr
            )

    def _session(self) -> Path:
        assert self._steps
        return self._folder / 'plugins' / 'profile' / f'steps_{self._steps.first}_{self._steps.last}'

    def _own_folder(self) -> Path:
        return self._folder / f'.process_{processes.index()}'

    def _end(self, seconds: float, waited_seconds: float) -> Shares | None:
        """Writes the trace to its place and returns what it says."""
        session, name = self._keep()
        found = shares(read_operations(session / f'{name}.xplane.pb'), seconds, waited_seconds)
        summary = {'seconds': seconds, 'data_wait_seconds': waited_seconds}
        if found:
            summary |= dataclasses.asdict(found)
        write_atomically(session / f'{name}.json', json.dumps(summary, indent=2) + '\n')
        return found

    def _keep(self) -> tuple[Path, str]:
        """Ends the trace and brings it to its place; returns the folder, and the name of this process's."""
        jax.profiler.stop_trace()
        session, name = self._session(), f'process_{processes.index()}'
        session.mkdir(parents=True, exist_ok=True)
        # JAX names the files after host and second, which processes on one host share.
        for file in self._own_folder().glob('plugins/profile/*/*'):
            for kind in ('.xplane.pb', '.trace.json.gz'):
                if file.name.endswith(kind):
                    file.replace(session / f'{name}{kind}')
        shutil.rmtree(self._own_folder())
        return session, name
