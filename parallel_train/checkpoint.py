"""How is a run saved and found again? Orbax checkpoints, labelled by completed steps.

Each keeps fingerprints of its arrays (replicas.py), which are compared when it is restored: what is damaged
is never used. The one before is, and the damaged one is set aside.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from parallel_train import processes
from parallel_train.errors import UserError
from parallel_train.replicas import digest
from parallel_train.state import TrainState, saved_parts
from parallel_train.workdir import CHECKPOINTS

DAMAGED = 'damaged'  # folder of a workdir, beside its checkpoints
_FINGERPRINTS = 'fingerprints'


@contextlib.contextmanager
def open_checkpoints(
    workdir: Path, keep: int = 1, read_only: bool = False, say: Callable[[str], None] = print
) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a workdir; on leaving, waits for saves under way.

    Args:
      workdir: the run's folder.
      keep: how many of the latest are kept, besides the best on the eval split.
      read_only: nothing is created or cleaned up.
      say: shows a line to the user.
    """
    directory = (workdir / CHECKPOINTS).resolve()
    if read_only and not directory.is_dir():
        raise UserError(f'workdir={str(workdir)!r}: holds no checkpoints; train first')
    checkpoints = Checkpoints(lambda: _manager(directory, keep, read_only), workdir, say)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _manager(directory: Path, keep: int, read_only: bool) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics['accuracy'],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        ),
        read_only=read_only,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # else Orbax warns of what `read_only` means
    try:
        return ocp.CheckpointManager(directory, options=options)
    finally:
        logging.set_verbosity(verbosity)


class Damaged(Exception):
    """A checkpoint that cannot be read, or does not hold what was saved."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self, open_manager: Callable[[], ocp.CheckpointManager], workdir: Path, say: Callable[[str], None]
    ):
        self._open, self._workdir, self._say = open_manager, workdir, say
        self._manager = open_manager()

    def latest_step(self) -> int | None:
        """Returns the completed steps of the latest whole checkpoint, None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None) -> bool:
        """Starts to save `state`, whose arrays may be donated as soon as this returns.

        Args:
          step: completed steps.
          state: the state.
          metrics: of the eval split at this step, if it was evaluated.

        Returns:
          False if the disk did not take it, or the one before: said, and to be tried again later.
        """
        try:
            saving = self._manager.save(
                step,
                args=ocp.args.StandardSave(saved_parts(state)),
                metrics=metrics,
                custom_metadata={_FINGERPRINTS: digest(state)},
                force=True,
            )
        except Exception as error:  # of many kinds, from Orbax and TensorStore; also of the save before
            self._failed(step, error)
            return False
        assert saving, step
        return True

    def wait(self) -> bool:
        """Waits until every save is on disk; False if the disk did not take the last one."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(self._manager.latest_step(), error)
            return False
        return True

    def _failed(self, step: int | None, error: Exception) -> None:
        """Says that a save failed and makes its remains go, so that their space is free."""
        self._say(f'warning: a checkpoint up to step {step} could not be written ({_first_line(error)})')
        with contextlib.suppress(Exception):
            self._manager.close()
        if processes.is_first():
            for remains in (self._workdir / CHECKPOINTS).glob('*.orbax-checkpoint-tmp*'):
                shutil.rmtree(remains, ignore_errors=True)
        self._manager = self._open()

    def restore_latest(self, template: TrainState, sharding: Any) -> TrainState | None:
        """Returns the state of the latest checkpoint that is whole, None if there is no checkpoint.

        Damaged ones after it are set aside, and said.

        Raises:
          UserError: there are checkpoints, but none can be restored.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state = self._restore(template, sharding, step)
            except Damaged as error:
                problems[step] = str(error)
                continue
            for bad, problem in problems.items():
                self._say(f'warning: checkpoint {bad} is damaged ({problem}); going on from the one before')
            if problems:
                self._set_aside(list(problems))
            return state
        if problems:
            step = max(problems)
            raise UserError(
                f'workdir={str(self._workdir)!r}: none of its checkpoints, {", ".join(map(str, problems))}, '
                'holds the arrays of this config.model and config.optimizer, or they are damaged; name '
                f'another workdir ({problems[step]})'
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        self._manager.close()
        if processes.is_first():
            (self._workdir / DAMAGED).mkdir(exist_ok=True)
            for step in steps:
                there = self._workdir / DAMAGED / str(step)
                shutil.rmtree(there, ignore_errors=True)
                shutil.move(self._workdir / CHECKPOINTS / str(step), there)
        processes.share(lambda: None)  # all open the folder again once it is done
        self._manager = self._open()

    def restore(self, template: TrainState, sharding: Any, step: int | None = None) -> TrainState:
        """Returns a state from a checkpoint, every array laid out as `sharding` says.

        Args:
          template: a state, or its shapes and dtypes (`abstract_state`).
          sharding: a JAX sharding, any number of devices.
          step: which; the latest if None.

        Raises:
          UserError: there is no such checkpoint, it holds other arrays than `template`, or is damaged.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(
                f'step={"latest" if step is None else step}: {self._workdir} has no such checkpoint; '
                f'it has {", ".join(map(str, steps)) or "none"}'
            )
        chosen = steps[-1] if step is None else step
        try:
            return self._restore(template, sharding, chosen)
        except Damaged as error:
            raise UserError(
                f'workdir={str(self._workdir)!r}: checkpoint {chosen} does not hold the arrays of this '
                f'config.model and config.optimizer, or is '
                f'damaged; name another --step, or another workdir ({error})'
            ) from error

    def _restore(self, template: TrainState, sharding: Any, step: int) -> TrainState:
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved_parts(template)
        )
        try:
            parts = self._manager.restore(step, args=ocp.args.StandardRestore(target))
            kept = self._manager.metadata(step).custom_metadata[_FINGERPRINTS]
        except Exception as error:  # of many kinds, from Orbax and TensorStore
            raise Damaged(_first_line(error)) from error
        state = template.replace(**parts)
        found = digest(state)
        differing = [name for name in found if found[name] != kept.get(name)]
        if differing:
            raise Damaged(f'{differing[0]} is not what was saved')
        return state

    def close(self) -> None:
        self._manager.close()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
