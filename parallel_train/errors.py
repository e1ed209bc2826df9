"""Whose mistake is it, and with which code does the program exit?"""

from __future__ import annotations

OK, FAULT, USER_ERROR, DIVERGED, DOES_NOT_FIT, PREEMPTED = 0, 1, 2, 3, 4, 75


class UserError(ValueError):
    """Wrong input, told in one message that names the field, the value it has and what would be valid.

    Raised before anything is written, where it can be told by then. `on_every_process` says that each
    process of a job raises it by itself.
    """

    exit_code = USER_ERROR
    on_every_process = False


class NoData(UserError):
    """A function that stands for a dataset fails, as where its data are not here."""


class Late(RuntimeError):
    """A process of the job did not come or did not answer in time: another start may mend that."""

    exit_code = FAULT


class Diverged(RuntimeError):
    """Loss, gradient or state are no longer finite.

    `frozen` says that the state is as it was before the step that was not finite.
    """

    exit_code = DIVERGED
    on_every_process = True  # all see the same numbers, at the same step

    def __init__(self, message: str, frozen: bool = False):
        super().__init__(message)
        self.frozen = frozen


class DoesNotFit(RuntimeError):
    """A recipe does not fit the hardware that it was compiled for."""

    exit_code = DOES_NOT_FIT


class Preempted(RuntimeError):
    """Asked to stop, the run has saved its state: start it again."""

    exit_code = PREEMPTED
    on_every_process = True


class ReplicasDiffer(RuntimeError):
    """A device holds another state than the others: a fault of hardware or software."""

    exit_code = FAULT
    on_every_process = True


ENDINGS = (UserError, Late, Diverged, DoesNotFit, Preempted, ReplicasDiffer)
