"""How is a run saved and found again? Orbax checkpoints, labelled by completed steps.

Each keeps fingerprints of its arrays (replicas.py), which are compared when it is restored: what is damaged
is never used. (Orbax and TensorStore by themselves take a chunk with flipped bits as it is.) The one before
is used, and the damaged one set aside.

Every process holds the whole state: process 0 alone writes, each reads for itself, and Orbax never waits for
another process, which may have met a full disk or be gone. What process 0 found, all do.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel_train import damage, processes
from parallel_train.damage import Damaged, first_line, full_disk
from parallel_train.errors import UserError
from parallel_train.files import move_folder
from parallel_train.kept import KeepLatestAndBest, open_manager, quiet_orbax
from parallel_train.paths import absolute
from parallel_train.replicas import digest
from parallel_train.state import TrainState, saved_parts
from parallel_train.workdir import CHECKPOINTS, DAMAGED

_A_DAY = 86_400.0  # seconds
_METADATA, _FINGERPRINTS = '_CHECKPOINT_METADATA', 'fingerprints'  # Orbax's file, and what is ours in it


@contextlib.contextmanager
def open_checkpoints(
    workdir: Path,
    keep: int = 1,
    read_only: bool = False,
    say: Callable[[str], None] = print,
    snapshots: Collection[int] = (),
) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a workdir; on leaving, waits for saves under way.

    Args:
      workdir: the run's folder.
      keep: how many of the latest are kept, besides the best on the eval split.
      read_only: nothing is created or cleaned up.
      say: shows a line to the user.
      snapshots: steps whose checkpoints are kept for good.
    """
    directory = absolute(workdir / CHECKPOINTS)
    if read_only and not directory.is_dir():
        raise UserError(f'workdir={str(workdir)!r}: holds no checkpoints; train first')
    checkpoints = Checkpoints(workdir, keep, read_only, say, snapshots)
    try:
        yield checkpoints
    except BaseException:
        with contextlib.suppress(Exception):  # that of a save is not why the run ends
            checkpoints.close()
        raise
    checkpoints.close()


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
      problem: why the state that was last to be saved is not; '' if it is, or may still be.
    """

    problem = _told = ''

    def __init__(
        self,
        workdir: Path,
        keep: int,
        read_only: bool,
        say: Callable[[str], None],
        snapshots: Collection[int],
    ):
        self._workdir, self._keep, self._say, self._snapshots = workdir, keep, say, snapshots
        self._read_only = read_only or not processes.is_first()
        self._saving = 0  # the step of the last save
        self._accuracy: dict[int, float] = {}  # on the eval split, by step
        self._open()

    def _open(self) -> None:
        directory = absolute(self._workdir / CHECKPOINTS)
        policy = KeepLatestAndBest(self._keep, self._accuracy, self._snapshots)
        if processes.is_first():
            self._manager = open_manager(directory, policy, self._read_only)
        self._latest: int | None = processes.share(lambda: self._manager.latest_step())
        if not processes.is_first():  # now that process 0 has made the folder
            self._manager = open_manager(directory, policy, self._read_only)

    def evaluated(self, step: int, accuracy: float) -> None:
        """Tells of an evaluation after `step` updates, before or after they were saved.

        Of those before a resume too: a checkpoint itself does not say how good it is, as a run that is
        stopped while it evaluates has saved by then.
        """
        self._accuracy[step] = accuracy

    def _metadata(self, step: int) -> dict[str, Any]:
        """Returns what `save` put beside the arrays; {} where it is lost."""
        with quiet_orbax():
            return self._manager.metadata(step).custom_metadata or {}

    def latest_step(self) -> int | None:
        """Returns the completed steps of the latest checkpoint, None if there is none."""
        return self._latest

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, fingerprints: dict[str, int]) -> bool:
        """Starts to save `state`, whose arrays may be donated as soon as this returns.

        Args:
          step: completed steps.
          state: the state.
          fingerprints: of its arrays, by name (replicas.py).

        Returns:
          False if the disk did not take it: said, and to be tried again later.
        """
        self.wait()
        self._saving, self.problem = step, ''
        beside = {_FINGERPRINTS: fingerprints}

        def begin() -> None:
            parts = jax.tree.map(_here, saved_parts(state))
            args = ocp.args.StandardSave(parts)
            begun = self._manager.save(step, args=args, custom_metadata=beside, force=True)
            assert begun, step

        if not self._written(begin):
            return False
        self._latest = step
        return True

    def leave_out(self, step: int, problem: str) -> None:
        """Says why the state after `step` updates is not saved now, once whatever is under way is done."""
        self.wait()  # what a failed one leaves behind may be what takes the room
        self._tell(step, problem)

    def _tell(self, step: int, problem: str) -> None:
        told = f'warning: the checkpoint of step {step} could not be written: {problem}'
        if told != self._told:  # a second chance may fail as the first did
            self._say(told)
        self.problem, self._told = problem, told

    def wait(self) -> bool:
        """Waits until every save is on disk; False if the disk did not take the last one: said."""
        return self._written(lambda: self._manager.wait_until_finished())

    def _written(self, write: Callable[[], None]) -> bool:
        """Makes process 0 `write`; where it cannot, says so and makes what remains go: its space is free."""
        problem = ''
        if processes.is_first():
            try:
                write()
            except Exception as error:  # of many kinds, from Orbax and TensorStore
                if processes.exchange_failed(error):  # not the disk: another process is gone
                    raise
                problem = full_disk(error, self._workdir) or first_line(error)
        # A save may take longer than any exchange; whether process 0 still lives is the lifeline's question.
        problem = processes.share(lambda: problem, timeout=_A_DAY)
        if not problem:
            return True
        self._tell(self._saving, problem)
        with contextlib.suppress(Exception):
            self._manager.close()
        if processes.is_first():
            for remains in (self._workdir / CHECKPOINTS).glob('*.orbax-checkpoint-tmp*'):
                shutil.rmtree(remains, ignore_errors=True)
        self._open()
        return False

    def restore_latest(self, template: TrainState, sharding: Any) -> TrainState | None:
        """Returns the state of the latest checkpoint that is whole, None if there is no checkpoint.

        Damaged ones after it are set aside, and said.

        Raises:
          UserError: there are checkpoints, but none can be restored; or process 0 can, and another not.
          OSError: one cannot be read just now; nothing is set aside.
        """
        problems: dict[int, str] = {}
        for step in reversed(processes.share(self.steps)):
            state, problem = None, ''
            try:
                state = self._restore(template, sharding, step)
            except Damaged as error:
                problem = str(error)
            problem = _of_all(step, problem)
            if problem:
                problems[step] = problem
                continue
            for bad, problem in problems.items():
                self._say(f'warning: checkpoint {bad} is damaged ({problem}); going on from the one before')
            if problems:
                self._set_aside(list(problems))
            return state
        if problems:
            step, steps = max(problems), ', '.join(map(str, sorted(problems)))
            raise UserError(
                f'workdir={str(self._workdir)!r}: none of its checkpoints, {steps}, '
                f'can be restored ({problems[step]}): they are damaged, or hold other arrays than this '
                'config.model, config.optimizer and config.ema_decay have; name another workdir'
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        self._manager.close()
        if processes.is_first():
            for step in steps:
                move_folder(self._workdir / CHECKPOINTS / str(step), self._workdir / DAMAGED / str(step))
        processes.share(lambda: None)  # all open the folder again once it is done
        self._open()

    def restore(self, template: TrainState, sharding: Any, step: int | None = None) -> TrainState:
        """Returns a state from a checkpoint, every array laid out as `sharding` says.

        Args:
          template: a state, or its shapes and dtypes (`abstract_state`).
          sharding: a JAX sharding, any number of devices.
          step: which; the latest if None.

        Raises:
          UserError: there is no such checkpoint, it holds other arrays than `template`, or is damaged.
          OSError: it cannot be read just now.
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
                f'config.model and config.optimizer, or is damaged; name another --step, or another '
                f'workdir ({error})'
            ) from error

    def _restore(self, template: TrainState, sharding: Any, step: int) -> TrainState:
        local = sharding if sharding.is_fully_addressable else NamedSharding(sharding.mesh.local_mesh, P())
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=local), saved_parts(template)
        )

        def read() -> tuple[Any, Any]:
            with quiet_orbax():
                parts = self._manager.restore(step, args=ocp.args.StandardRestore(target))
            kept = self._metadata(step).get(_FINGERPRINTS)
            if not isinstance(kept, dict):
                # Orbax does not say why it could not read them: this does.
                (self._workdir / CHECKPOINTS / str(step) / _METADATA).read_bytes()
                raise ValueError('its fingerprints are missing')
            return parts, kept

        parts, kept = damage.read(f'checkpoint {step}', read)
        state = template.replace(**parts)
        found = digest(state)
        differing = [name for name in found if found[name] != kept.get(name)]
        if differing:
            raise Damaged(f'{differing[0]} is not what was saved')
        if local is sharding:
            return state
        return state.replace(**jax.tree.map(lambda x: _everywhere(x, sharding), parts))

    def close(self) -> None:
        self._manager.close()


def _of_all(step: int, problem: str) -> str:
    """Returns what process 0 met in restoring a checkpoint; another that meets more sees another disk."""
    first, *others = processes.gather(f'checkpoint {step}', problem)
    for process, met in enumerate(others, 1):
        if met and not first:
            failure = UserError(
                f'workdir: process {process} cannot restore checkpoint {step} ({met}), which process 0 can; '
                'do all see one disk?'
            )
            failure.on_every_process = True
            raise failure
    return first


def _here(x: jax.Array) -> jax.Array | np.ndarray:
    """Returns this process's copy of a replicated array, as Orbax takes it from one of several processes."""
    return x if x.is_fully_addressable else np.array(x.addressable_data(0))


def _everywhere(x: jax.Array, sharding: Any) -> jax.Array:
    """Returns the replicated array of all processes from this one's copies."""
    return jax.make_array_from_single_device_arrays(x.shape, sharding, [s.data for s in x.addressable_shards])
