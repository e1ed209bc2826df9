"""The story of a training run, top to bottom."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from parallel_train import dataset, machine, processes, profiling
from parallel_train import mesh as mesh_lib
from parallel_train import workdir as workdir_lib
from parallel_train.checkpoint import Checkpoints, open_checkpoints
from parallel_train.clock import Clock
from parallel_train.devices import choose_devices
from parallel_train.diagnose import diagnose
from parallel_train.errors import Diverged, Preempted, UserError
from parallel_train.finish import finish, say_complete
from parallel_train.lifeline import Lifeline, Limits
from parallel_train.paths import opened
from parallel_train.plan import Plan, make_plan
from parallel_train.preflight import check_job, facts
from parallel_train.run import Run, open_run
from parallel_train.say import print_flushed
from parallel_train.schedule import create_learning_rate_fn
from parallel_train.show_plan import plan_table
from parallel_train.state import TrainState, abstract_state, initialise

_A_DAY = 86_400.0  # seconds; whether process 0 still lives is the lifeline's question


def train_and_evaluate(
    config: Any,
    workdir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    devices: int | None = None,
    allow_plan_change: bool = False,
    skip_nonfinite: int = 0,
    limits: Limits = Limits(),  # noqa: B008, frozen
    profile_steps: str | None = None,
) -> TrainState:
    """Trains as `config` says, in `workdir`, from its latest checkpoint if it holds one.

    Args:
      config: an ml_collections ConfigDict; fields that it leaves out have their defaults.
      workdir: where config, plan, metrics, checkpoints and report go.
      data_dir: where the dataset was prepared; TFDS's default place if None.
      devices: how many devices to use, over all processes; for the default, see `choose_devices`.
      allow_plan_change: continue the job in `workdir` although config or plan differ from its own.
      skip_nonfinite: how many steps whose loss or gradient is not finite are left out before the run ends.
      limits: after which times a process counts as lost, or as stuck.
      profile_steps: 'FIRST:LAST', the steps of which a trace is written (profiling.py); None for none.

    Returns:
      The state after the last step, replicated over the devices.

    Raises:
      UserError: the input is wrong; nothing was written.
      Diverged: loss or gradient are not finite; the last good checkpoint stands.
      Preempted: a signal asked to stop; the state is saved.
      ReplicasDiffer: a device holds another state than the others.
    """
    clock = Clock()
    profiled = profiling.parse(profile_steps)
    workdir, data_dir = opened('workdir', workdir), dataset.default_data_dir(data_dir)
    say = print_flushed if processes.is_first() else say_nothing
    with Lifeline(limits) as lifeline, contextlib.ExitStack() as stack:
        # What will happen, and may it? Nothing is written before every process knows that it may.
        job = processes.agree(
            lambda: check_job(config, workdir, data_dir, devices, allow_plan_change),
            lambda job: {**facts(job), 'skip_nonfinite': skip_nonfinite, 'profile_steps': profile_steps},
            limits.start_timeout,
        )
        plan = make_plan(
            job.config,
            job.sizes.num_train_examples,
            job.sizes.num_eval_examples,
            choose_devices(job.config, job.sizes, devices, workdir, say),
            processes.count(),
        )
        workdir_lib.check_plan(workdir, job.config, plan, allow_plan_change)
        if profiled:
            profiled.check(plan, workdir)
        mesh = mesh_lib.make_mesh(plan.num_devices)
        # The state: the latest checkpoint's, on whatever devices there are now, or a new one.
        if processes.is_first():
            stack.enter_context(workdir_lib.hold(workdir, lifeline.fail))
        workdir_lib.check_seen_by_all(workdir)
        keep = job.config.keep_checkpoints
        checkpoints = stack.enter_context(
            open_checkpoints(workdir, keep, say=say, snapshots=plan.snapshot_steps)
        )
        plan.check_reaches(checkpoints.latest_step() or 0)
        with lifeline.longer('restore'):
            state = starting_state(job.config, plan, mesh, checkpoints, skip_nonfinite)
        start = lifeline.completed = int(state.step)
        say(plan_table(plan, job.config, job.sizes.source))  # nothing is refused any more
        # Of process 0, as another may not see yet what a network file system was given.
        if start == plan.num_steps and processes.share((workdir / workdir_lib.REPORT).exists):
            say_complete(workdir, start, say)
            return state
        if start:
            say(f'resuming from step {start:,} of {plan.num_steps:,}')
        if processes.is_first():
            environment = {**machine.environment(), **job.digests}
            for warning in workdir_lib.changes(workdir, job.config, plan, environment):
                say(warning)
            workdir_lib.claim(workdir, job.config, plan, environment)

        # The steps.
        run = stack.enter_context(
            open_run(job, plan, mesh, workdir, state, checkpoints, lifeline, clock, skip_nonfinite, profiled)
        )
        lifeline.start()
        clock.add('start-up', clock.total())
        if start:
            state = do_what_is_due(state, run)
        if run.profiler.is_due(start):
            run.profile(state)
        while run.step < plan.num_steps:
            state = train_epoch(state, run)
        clock.add('data wait', run.feed.wait_seconds)
        with clock.timed('save'):
            save_for_good(state, run)
        stack.close()

        # What came of it. The others wait for process 0, so that a signal ends none of them before it.
        lifeline.steps_are_over()
        with lifeline.longer('report'):
            processes.share(
                lambda: finish(
                    workdir, job.config, plan, run.log.rows, state, job.eval_split, clock, run.recorder
                ),
                timeout=_A_DAY,
            )
        run.profiler.tell(say)
    return state


def starting_state(
    config: Any, plan: Plan, mesh: Mesh, checkpoints: Checkpoints, skip_nonfinite: int
) -> TrainState:
    """Returns the state of the latest checkpoint, or a new one; not one that is frozen from the start."""
    learning_rate_fn = create_learning_rate_fn(config, plan.peak_learning_rate, plan.steps_per_epoch)
    template = abstract_state(config, learning_rate_fn)
    state = checkpoints.restore_latest(template, mesh_lib.replicated(mesh))
    if state is None:
        return initialise(config, learning_rate_fn, mesh)
    skipped = int(state.skipped)
    if skipped > skip_nonfinite:
        raise UserError(
            f'skip_nonfinite={skip_nonfinite}: {skipped} steps were left out before the checkpoint; use '
            f'at least {skipped}'
        )
    return state


def train_epoch(state: TrainState, run: Run) -> TrainState:
    """Trains to the end of the epoch, or of the run. Waits for the devices only where something is due."""
    plan = run.plan
    end = min((run.step // plan.steps_per_epoch + 1) * plan.steps_per_epoch, plan.num_steps)
    while run.step < end:
        count = next_dispatch(run, end)
        data = run.feed.at(run.step)
        run.lifeline.came_on()  # else who waits for others here looks like who waits for its data
        if f'{count} steps' in run.compiled:
            state = run.train_steps[count](state, data)
        else:
            with run.clock.timed('compile'), run.compiling(f'{count} steps'):
                state = run.train_steps[count](state, data)
            run.restart_interval()
        run.step += count
        run.pace.after(state, run.step)
        if run.profiler.is_due(run.step):
            run.profile(state)
        state = do_what_is_due(state, run)
        if run.must_stop():
            with explained(state, run):
                stop(state, run)
    return state


def next_dispatch(run: Run, end: int) -> int:
    """Returns how many steps go into the next dispatch: as many as come before something is due."""
    largest = max(run.train_steps)
    if largest == 1 or run.step + largest > end:
        return 1
    steps = range(run.step + 1, run.step + largest)
    due = (run.plan.anything_due(step) or run.profiler.is_due(step) for step in steps)
    return 1 if any(due) else largest


def do_what_is_due(state: TrainState, run: Run) -> TrainState:
    """Logs, evaluates, saves, in this order: the rows up to a checkpoint are on disk before it is.

    Also the first thing after a resume: what is there already is not done again.
    """
    plan, step = run.plan, run.step
    there = run.done_before if step == run.start else []
    with explained(state, run):
        if plan.is_due(step, plan.log_every_steps):
            state = run.recorder.log(state, step, run.feed.wait_seconds, written='train' in there)
        if plan.is_due(step, plan.compare_replicas_every):
            run.replicas.check(state, step)
            if plan.divergence_check_steps == 1:  # with the next comparison it would be a step late
                run.replicas.settle()
        if plan.is_due(step, plan.eval_every_steps) and 'eval' not in there:
            jax.block_until_ready(state)  # else the evaluation would be charged for steps under way
            with run.clock.timed('eval'):
                evaluation = run.evaluator(state, run.must_stop, run.compiling('evaluation'))
            if evaluation is None:  # interrupted
                return stop(state, run)
            run.recorder.evaluated(step, evaluation)
            run.checkpoints.evaluated(step, evaluation['accuracy'])
            run.restart_interval()
        if plan.is_due(step, plan.checkpoint_every_steps) or run.save_asked:
            save(state, run)
    return state


def save(state: TrainState, run: Run) -> None:
    """Starts to save a state that is known to be good: its rows on disk, finite, alike on all devices."""
    run.save_asked = False
    if run.checkpoints.latest_step() == run.step:
        return
    jax.block_until_ready(state)  # a step that never ends is a stall, also before the first save
    with run.compiling('checks of the state'):
        run.recorder.check(state)
        run.replicas.check(state, run.step)
        fingerprints = run.replicas.settle()
    with run.clock.timed('save'), run.lifeline.longer('save'):
        if problem := run.recorder.sync():
            run.checkpoints.leave_out(run.step, problem)
        else:
            run.checkpoints.save(run.step, state, fingerprints)
    run.restart_interval()


def save_for_good(state: TrainState, run: Run) -> None:
    """Returns once the state is on disk; a disk that did not take it gets a second chance."""
    if not is_saved(run):
        save(state, run)
        if not is_saved(run):
            last = run.checkpoints.latest_step()
            raise OSError(
                f'the checkpoint of step {run.step} could not be written: {run.checkpoints.problem}; '
                f'the same command {f"goes on from that of step {last}" if last else "starts anew"}'
            )


def is_saved(run: Run) -> bool:
    """Waits for the save under way; whether the state of this step is on disk then."""
    with run.lifeline.longer('save'):
        return run.checkpoints.wait() and run.checkpoints.latest_step() == run.step


def stop(state: TrainState, run: Run) -> NoReturn:
    """Saves and ends the run, at the same step on every process."""
    save(state, run)
    save_for_good(state, run)
    raise Preempted(
        f'stopped at step {run.step:,} of {run.plan.num_steps:,}, saved; the same command goes on from there'
    )


@contextlib.contextmanager
def explained(state: TrainState, run: Run) -> Iterator[None]:
    """Says of a divergence that is noticed within where it came from."""
    try:
        yield
    except Diverged as error:
        raise Diverged(explain(error, state, run)) from None


def explain(error: Diverged, state: TrainState, run: Run) -> str:
    """Returns the message of a run that diverged: what, where, and what to do."""
    where = ''
    if error.frozen:  # told by all, for a launcher may show any one's last words
        with run.lifeline.unwatched():
            where = '; ' + processes.share(
                lambda: diagnose(state, run.config, run.plan, run.train_split), timeout=_A_DAY
            )
    with run.lifeline.longer('save'):
        run.checkpoints.wait()
    last = run.checkpoints.latest_step()
    stands = f'the checkpoint of step {last} stands' if last else 'no checkpoint was made yet'
    return (
        f'{error}{where}; {stands}. Lower config.learning_rate or lengthen '
        'config.warmup_epochs, and use a new workdir; or leave out a few such steps: --skip_nonfinite=N'
    )


def say_nothing(line: str) -> None:
    """What the processes but the first say."""
