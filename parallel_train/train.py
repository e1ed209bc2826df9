"""The story of a training run, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from parallel_train import config as config_lib
from parallel_train import dataset
from parallel_train import mesh as mesh_lib
from parallel_train import workdir as workdir_lib
from parallel_train.batches import HostFeed, ResidentFeed, make_feed
from parallel_train.checkpoint import Checkpoints, open_checkpoints
from parallel_train.clock import Clock
from parallel_train.devices import choose_devices
from parallel_train.evaluate import Evaluator
from parallel_train.finish import finish, say_complete
from parallel_train.metrics import MetricsLog
from parallel_train.plan import Plan, make_plan
from parallel_train.progress import Progress
from parallel_train.recorder import Recorder
from parallel_train.schedule import create_learning_rate_fn
from parallel_train.show_plan import plan_table
from parallel_train.state import TrainState, abstract_state, initialise
from parallel_train.step import check_model_and_loss, make_train_step


@dataclasses.dataclass
class Run:
    """What the loop works with; `step` is the number of updates that the host has dispatched."""

    plan: Plan
    clock: Clock
    feed: ResidentFeed | HostFeed
    evaluator: Evaluator
    recorder: Recorder
    log: MetricsLog
    checkpoints: Checkpoints
    train_steps: dict[int, Any]  # by steps in one dispatch, as `make_train_step` gives them
    step: int
    compiled: dict[int, Callable[[TrainState, Any], TrainState]] = dataclasses.field(default_factory=dict)

    def restart_interval(self) -> None:
        """Leaves what was just waited for (a compilation, an evaluation, a save) out of throughput."""
        self.recorder.restart(self.step, self.feed.wait_seconds)


def train_and_evaluate(
    config: Any,
    workdir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    devices: int | None = None,
    allow_plan_change: bool = False,
) -> TrainState:
    """Trains as `config` says, in `workdir`, from its latest checkpoint if it holds one.

    Args:
      config: an ml_collections ConfigDict; fields that it leaves out have their defaults.
      workdir: where config, plan, metrics, checkpoints and report go.
      data_dir: where the dataset was prepared; TFDS's default place if None.
      devices: how many devices to use; for the default, see `choose_devices`.
      allow_plan_change: continue the job in `workdir` although config or plan differ from its own.

    Returns:
      The state after the last step, replicated over the devices.

    Raises:
      UserError: the input is wrong; nothing was written.
      Diverged: loss or gradient are not finite; the last good checkpoint stands.
    """
    clock = Clock()
    workdir, data_dir = Path(workdir), dataset.default_data_dir(data_dir)

    # What will happen, and may it? Nothing is written before that is known.
    config = config_lib.complete(config)
    sizes = dataset.find_sizes(config, data_dir)
    config = config_lib.with_dataset(config, sizes.input_shape, sizes.num_classes)
    check_model_and_loss(config)
    workdir_lib.check(workdir, config, allow_plan_change)
    examples = sizes.num_train_examples, sizes.num_eval_examples
    if devices is not None:
        make_plan(config, *examples, devices)  # what does not fit is refused before devices are made
    plan = make_plan(config, *examples, choose_devices(config, sizes, devices, workdir, say=print))
    workdir_lib.check_plan(workdir, config, plan, allow_plan_change)
    mesh = mesh_lib.make_mesh(plan.num_devices)
    learning_rate_fn = create_learning_rate_fn(config, plan.peak_learning_rate, plan.steps_per_epoch)
    train_split = dataset.load_split(config.dataset, config.train_split, data_dir)
    eval_split = dataset.load_split(config.dataset, config.eval_split, data_dir)

    with open_checkpoints(workdir, config.keep_checkpoints) as checkpoints:
        # The state: the latest checkpoint's, on whatever devices there are now, or a new one.
        start = checkpoints.latest_step() or 0
        if start:
            plan.check_reaches(start)
            template = abstract_state(config, learning_rate_fn)
            state = checkpoints.restore(template, mesh_lib.replicated(mesh))
        print(plan_table(plan, config, sizes.source), flush=True)  # nothing is refused any more
        if start:
            if start == plan.num_steps and (workdir / 'report.html').exists():
                say_complete(workdir, start)
                return state
            print(f'resuming from step {start:,} of {plan.num_steps:,}', flush=True)
        else:
            state = initialise(config, learning_rate_fn, mesh)
        workdir_lib.claim(workdir, config, plan)

        log = MetricsLog(workdir, start)
        feed = make_feed(train_split, config, plan, mesh)
        run = Run(
            plan=plan,
            clock=clock,
            feed=feed,
            evaluator=Evaluator(eval_split, config, mesh, state),
            recorder=Recorder(plan, mesh, log, Progress(plan, start), start),
            log=log,
            checkpoints=checkpoints,
            train_steps={
                count: make_train_step(config, plan, mesh, count)
                for count in {1, steps_per_dispatch(config, mesh, feed)}
            },
            step=start,
        )
        with contextlib.closing(run.recorder), contextlib.closing(run.feed):
            clock.add('start-up', clock.total())
            if start:
                state = do_what_is_due(state, run)
            while run.step < plan.num_steps:
                state = train_epoch(state, run)
            clock.add('data wait', feed.wait_seconds)
            with clock.timed('save'):
                checkpoints.wait()
    finish(workdir, config, plan, log.rows, state, eval_split, clock, run.recorder)
    return state


def train_epoch(state: TrainState, run: Run) -> TrainState:
    """Trains to the end of the epoch, or of the run. Waits for the devices only where something is due."""
    plan = run.plan
    end = min((run.step // plan.steps_per_epoch + 1) * plan.steps_per_epoch, plan.num_steps)
    while run.step < end:
        count = next_dispatch(run, end)
        data = run.feed.at(run.step)
        if count not in run.compiled:
            with run.clock.timed('compile'):
                run.compiled[count] = run.train_steps[count].lower(state, data).compile()
            run.restart_interval()
        state = run.compiled[count](state, data)
        run.step += count
        state = do_what_is_due(state, run)
    return state


def steps_per_dispatch(config: Any, mesh: Mesh, feed: ResidentFeed | HostFeed) -> int:
    """Returns how many steps go into one dispatch at most: on CPU 1, as convolutions crawl in loops."""
    if mesh_lib.is_cpu(mesh) or isinstance(feed, HostFeed):
        return 1
    return config.steps_per_dispatch


def next_dispatch(run: Run, end: int) -> int:
    """Returns how many steps go into the next dispatch: as many as come before something is due."""
    largest = max(run.train_steps)
    if largest == 1 or run.step + largest > end:
        return 1
    steps = range(run.step + 1, run.step + largest)
    return 1 if any(anything_due(run.plan, step) for step in steps) else largest


def anything_due(plan: Plan, step: int) -> bool:
    every = (plan.log_every_steps, plan.eval_every_steps, plan.checkpoint_every_steps)
    return any(plan.is_due(step, steps) for steps in every)


def do_what_is_due(state: TrainState, run: Run) -> TrainState:
    """Logs, evaluates, saves, in this order: the rows up to a checkpoint are on disk before it is.

    Also the first thing after a resume: what is there already is not done again.
    """
    plan, step = run.plan, run.step
    if plan.is_due(step, plan.log_every_steps) and not run.log.has('train', step):
        state = run.recorder.log(state, step, run.feed.wait_seconds)
    evaluation = None
    if plan.is_due(step, plan.eval_every_steps) and not run.log.has('eval', step):
        jax.block_until_ready(state)  # else the evaluation would be charged for steps under way
        with run.clock.timed('eval'):
            evaluation = run.evaluator(state)
        run.recorder.evaluated(step, evaluation)
        run.restart_interval()
    if plan.is_due(step, plan.checkpoint_every_steps) and run.checkpoints.latest_step() != step:
        run.recorder.sync(state)
        with run.clock.timed('save'):
            run.checkpoints.save(step, state, evaluation)
        run.restart_interval()
    return state
