"""Whose mistake is it, and with which code does the program exit?"""

from __future__ import annotations

OK, FAULT, USER_ERROR, DIVERGED, PREEMPTED = 0, 1, 2, 3, 75


class UserError(ValueError):
    """Wrong input, told in one message that names the field, the value it has and what would be valid.

    Raised before anything is written. The command line prints it as `error: MESSAGE` and exits 2.
    """

    on_every_process = False  # whether each process of a job raises it by itself


class Diverged(RuntimeError):
    """Loss, gradient or state are no longer finite. The command line prints it and exits 3.

    `frozen` says that the state is as it was before the step that was not finite.
    """

    on_every_process = True  # all see the same numbers, at the same step

    def __init__(self, message: str, frozen: bool = False):
        super().__init__(message)
        self.frozen = frozen


class Preempted(RuntimeError):
    """Asked to stop, the run has saved its state. The command line prints it and exits 75."""

    on_every_process = True


class ReplicasDiffer(RuntimeError):
    """A device holds another state than the others: a fault of hardware or software. Exit code 1."""

    on_every_process = True
