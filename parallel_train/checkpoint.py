"""How is a run saved and found again? Orbax checkpoints, labelled by completed steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from parallel_train.errors import UserError
from parallel_train.state import TrainState, saved_parts
from parallel_train.workdir import CHECKPOINTS


@contextlib.contextmanager
def open_checkpoints(workdir: Path, keep: int = 1, read_only: bool = False) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a workdir; on leaving, waits for saves under way.

    Args:
      workdir: the run's folder.
      keep: how many of the latest are kept, besides the best on the eval split.
      read_only: nothing is created or cleaned up.
    """
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
    directory = (workdir / CHECKPOINTS).resolve()
    if read_only and not directory.is_dir():
        raise UserError(f'workdir={str(workdir)!r}: holds no checkpoints; train first')
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # else Orbax warns of what `read_only` means
    try:
        manager = ocp.CheckpointManager(directory, options=options)
    finally:
        logging.set_verbosity(verbosity)
    try:
        yield Checkpoints(manager, workdir)
    finally:
        manager.close()


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, manager: ocp.CheckpointManager, workdir: Path):
        self._manager, self._workdir = manager, workdir

    def latest_step(self) -> int | None:
        """Returns the completed steps of the latest whole checkpoint, None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Starts to save `state`, whose arrays may be donated as soon as this returns.

        Args:
          step: completed steps.
          state: the state.
          metrics: of the eval split at this step, if it was evaluated.
        """
        saving = self._manager.save(
            step, args=ocp.args.StandardSave(saved_parts(state)), metrics=metrics, force=True
        )
        assert saving, step

    def restore(self, template: TrainState, sharding: Any, step: int | None = None) -> TrainState:
        """Returns a state from a checkpoint, every array laid out as `sharding` says.

        Args:
          template: a state, or its shapes and dtypes (`abstract_state`).
          sharding: a JAX sharding, any number of devices.
          step: which; the latest if None.

        Raises:
          UserError: there is no such checkpoint, or it holds other arrays than `template`.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(
                f'step={"latest" if step is None else step}: {self._workdir} has no such checkpoint; '
                f'it has {", ".join(map(str, steps)) or "none"}'
            )
        chosen = self._manager.latest_step() if step is None else step
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            saved_parts(template),
        )
        try:
            parts = self._manager.restore(
                chosen,
                args=ocp.args.StandardRestore(target),
            )
        except Exception as error:  # of many kinds, from Orbax and TensorStore
            raise UserError(
                f'workdir={str(self._workdir)!r}: its checkpoint does not hold the arrays of this '
                'config.model and config.optimizer, or is damaged; name another workdir, or '
                f'delete {CHECKPOINTS}/{chosen} to go on from the checkpoint before '
                f'({str(error).strip().splitlines()[0]})'
            ) from error
        return template.replace(**parts)

    def wait(self) -> None:
        """Waits until every save is on disk."""
        self._manager.wait_until_finished()
