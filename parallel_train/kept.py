"""Which checkpoints are kept, and how is Orbax told?"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from parallel_train import processes

_YEARS = 10**9  # seconds; how long a save may take is the lifeline's question


def open_manager(
    directory: Path, policy: preservation_policy.PreservationPolicy, read_only: bool
) -> ocp.CheckpointManager:
    here = ocp.options.MultiprocessingOptions()
    if processes.count() > 1:
        here = ocp.options.MultiprocessingOptions(
            primary_host=processes.index(), active_processes={processes.index()}
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        read_only=read_only,
        create=False,
        cleanup_tmp_directories=not read_only,
        multiprocessing_options=here,
        # Orbax times what it waits for by the time of day: a clock that jumps would fail a save. And its
        # threads wait ten minutes for another of them to make a folder that cannot be made.
        async_options=ocp.AsyncOptions(timeout_secs=_YEARS, create_directories_asynchronously=False),
    )
    _quiet_late_answers()
    if not read_only:
        directory.mkdir(parents=True, exist_ok=True)
    with quiet_orbax():  # else it warns of what `read_only` means
        # With the handler named, Orbax does not tell from the first checkpoint that it meets, perhaps one
        # whose deletion was cut short, how to read all of them.
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=here)
        return ocp.CheckpointManager(directory, options=options, item_handlers=handler)


@functools.cache  # once a process
def _quiet_late_answers() -> None:
    """Keeps from stderr what follows from an error that Orbax raised already.

    It reads and writes arrays together, and gives up at the first that fails. The answers for the others
    then come to a closed event loop, and TensorStore's threads print a traceback for each.
    """
    shown = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        trace = unraisable.exc_traceback
        # The outermost frame is asyncio's: nothing of ours called it.
        late = trace and trace.tb_frame.f_code.co_name == 'call_soon_threadsafe'
        if not (late and str(unraisable.exc_value) == 'Event loop is closed'):
            shown(unraisable)

    sys.unraisablehook = hook


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


class KeepLatestAndBest(preservation_policy.PreservationPolicy):
    """Keeps the latest `latest` checkpoints, the one of the highest accuracy, and all snapshots.

    Orbax's own policy for the best knows nothing of what was saved before a resume.
    """

    def __init__(self, latest: int, accuracy: dict[int, float], snapshots: Collection[int]):
        self._latest, self._accuracy, self._snapshots = latest, accuracy, snapshots

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        kept = {*sorted(steps)[-self._latest :], *self._snapshots}
        evaluated = [step for step in steps if step in self._accuracy]
        if evaluated:
            kept.add(max(evaluated, key=lambda step: (self._accuracy[step], step)))
        return [step in kept for step in steps]
