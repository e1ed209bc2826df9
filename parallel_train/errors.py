"""Whose mistake is it? The user's mistakes are `UserError`; everything else is a fault of ours."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input, told in one message that names the field, the value it has and what would be valid.

    Raised before anything is written. The command line prints it as `error: MESSAGE` and exits 2.
    """


class Diverged(RuntimeError):
    """The loss or the gradient is no longer finite. The command line prints it and exits 3."""


class DoesNotFit(RuntimeError):
    """A recipe does not fit the hardware that it was compiled for. The command line exits 4."""
