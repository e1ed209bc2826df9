"""What does the loop work with?"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from parallel_train import dataset, processes
from parallel_train import mesh as mesh_lib
from parallel_train.batches import HostFeed, ResidentFeed, make_feed
from parallel_train.checkpoint import Checkpoints
from parallel_train.clock import Clock
from parallel_train.evaluate import Evaluator
from parallel_train.examples import unit_of
from parallel_train.lifeline import Lifeline
from parallel_train.metrics import MetricsLog
from parallel_train.pace import Pace
from parallel_train.plan import Plan
from parallel_train.preflight import Job
from parallel_train.profiling import Profiler, Steps
from parallel_train.progress import Progress
from parallel_train.recorder import Recorder
from parallel_train.replicas import Replicas
from parallel_train.state import TrainState
from parallel_train.step import TrainStep, make_train_step


@dataclasses.dataclass
class Run:
    """What the loop works with; `step` is the number of updates that the host has dispatched."""

    config: Any
    plan: Plan
    clock: Clock
    train_split: dataset.AnySplit
    feed: ResidentFeed | HostFeed
    evaluator: Evaluator
    recorder: Recorder
    log: MetricsLog
    checkpoints: Checkpoints
    replicas: Replicas
    lifeline: Lifeline
    pace: Pace
    profiler: Profiler
    train_steps: dict[int, TrainStep]  # by steps in one dispatch
    start: int  # the step that was resumed from
    step: int
    done_before: list[str]  # splits whose row at `start` is written already
    compiled: set[str] = dataclasses.field(default_factory=set)  # what ran once; see `compiling`
    save_asked: bool = False

    def restart_interval(self) -> None:
        """Leaves what was just waited for (a compilation, an evaluation, a save) out of throughput."""
        self.recorder.restart(self.step, self.feed.wait_seconds)

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Something whose first call compiles, which may take any time and is no stall."""
        with contextlib.nullcontext() if what in self.compiled else self.lifeline.unwatched():
            yield
        self.compiled.add(what)

    def profile(self, state: TrainState) -> None:
        """Begins or ends a trace."""
        jax.block_until_ready(state)  # a step that never ends is a stall; writing a trace is none
        with self.clock.timed('profile'), self.lifeline.unwatched():
            self.profiler.switch(state, self.step, self.feed.wait_seconds)
        self.restart_interval()

    def must_stop(self) -> bool:
        """Passes a moment at which all processes together may stop; notes whether they are to save."""
        self.lifeline.completed = self.pace.completed
        asked = self.lifeline.tick()
        self.save_asked |= asked == 'save'
        return asked == 'stop'


@contextlib.contextmanager
def open_run(
    job: Job,
    plan: Plan,
    mesh: Mesh,
    workdir: Path,
    state: TrainState,
    checkpoints: Checkpoints,
    lifeline: Lifeline,
    clock: Clock,
    skip_nonfinite: int,
    profile_steps: Steps | None = None,
) -> Iterator[Run]:
    """Opens feed, evaluator, log and step for a run that starts from `state`; closes them at the end."""
    start, first = int(state.step), processes.is_first()
    log = MetricsLog(workdir, start, active=first)
    for row in log.rows:
        if row['split'] == 'eval':
            checkpoints.evaluated(row['step'], row['accuracy'])
    unit = unit_of(job.config.input_shape)
    lifeline.save_every(60 * job.config.checkpoint_every_minutes)
    with (
        contextlib.closing(make_feed(job.train_split, job.config, plan, mesh)) as feed,
        contextlib.closing(
            Recorder(
                plan, mesh, log, Progress(plan, start, first, unit), start, skip_nonfinite, int(state.skipped)
            )
        ) as recorder,
        contextlib.closing(Profiler(profile_steps, workdir, start)) as profiler,
    ):
        yield Run(
            config=job.config,
            plan=plan,
            clock=clock,
            train_split=job.train_split,
            feed=feed,
            evaluator=Evaluator(job.eval_split, job.config, mesh, state),
            recorder=recorder,
            log=log,
            checkpoints=checkpoints,
            replicas=Replicas(mesh),
            lifeline=lifeline,
            pace=Pace(start),
            profiler=profiler,
            train_steps={
                count: make_train_step(job.config, plan, mesh, count, skip_nonfinite)
                for count in {1, steps_per_dispatch(job.config, mesh, feed)}
            },
            start=start,
            step=start,
            # Of process 0, so that all of them do the same.
            done_before=processes.share(lambda: log.splits_at(start)),
        )


def steps_per_dispatch(config: Any, mesh: Mesh, feed: ResidentFeed | HostFeed) -> int:
    """Returns how many steps go into one dispatch at most: on CPU 1, as convolutions crawl in loops."""
    if mesh_lib.is_cpu(mesh) or isinstance(feed, HostFeed) or config.reduction == 'tree':
        return 1
    return config.steps_per_dispatch
