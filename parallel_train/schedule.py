"""Which rate has each step?

A schedule is a row of pieces. The plan evaluates them in Python floats; `create_learning_rate_fn`
gives the same pieces as an optax schedule, to run inside the compiled step. Its argument, `step`, is
the number of updates completed: the first update has the rate at step 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from parallel_train.config import SCHEDULES
from parallel_train.errors import UserError

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of a schedule, from step `begin` on for `length` steps; both may be fractions.

    Within the piece, with t = min((step - begin) / length, 1):
    linear: start + (end - start)·t. cosine: end + (start - end)·(1 + cos πt)/2 (Loshchilov & Hutter
    2017, equation 5, one cycle). constant: start.
    """

    shape: str  # 'linear' | 'cosine' | 'constant'
    begin: float
    length: float
    start: float
    end: float

    def rate(self, step: float) -> float:
        """Returns the rate at `step`, in the units of the learning rate."""
        if self.shape == 'constant':
            return self.start
        t = min(max((step - self.begin) / self.length, 0.0), 1.0)
        if self.shape == 'linear':
            return self.start + (self.end - self.start) * t
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t)) / 2


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> float:
    """Returns epochs × steps_per_epoch, as an int where it is whole but for the rounding of floats."""
    steps = epochs * steps_per_epoch
    whole = round(steps)
    return whole if abs(steps - whole) <= 1e-9 * max(1.0, abs(steps)) else steps


def schedule_pieces(config: Any, base_learning_rate: float, steps_per_epoch: int) -> tuple[Piece, ...]:
    """Returns the pieces of the config's schedule, in order, without those of no length.

    Args:
      config: has `num_epochs`, `warmup_epochs` and, unless it is 'cosine', `schedule`.
      base_learning_rate: the peak rate.
      steps_per_epoch: optimizer updates in an epoch.
    """
    kind = config.get('schedule', SCHEDULES[0])
    if kind == 'constant':
        return (Piece('constant', 0, math.inf, base_learning_rate, base_learning_rate),)
    if kind not in SCHEDULES:
        raise UserError(f'config.schedule={kind!r}: must be one of: {", ".join(SCHEDULES)}')
    warmup = epochs_to_steps(config.warmup_epochs, steps_per_epoch)
    start = config.get('warmup_learning_rate', 0.0)
    ramp = Piece('linear', 0, warmup, start, base_learning_rate)
    if kind == 'steps':
        pieces = (ramp, *_steps(config, base_learning_rate, steps_per_epoch, warmup))
    else:
        # The guide's clamp: the cosine takes at least one epoch, even where the run ends before it does.
        cosine_epochs = max(config.num_epochs - config.warmup_epochs, 1)
        decay = epochs_to_steps(cosine_epochs, steps_per_epoch)
        pieces = (ramp, Piece('cosine', warmup, decay, base_learning_rate, 0.0))
    return tuple(piece for piece in pieces if piece.length > 0)


def _steps(config: Any, rate: float, steps_per_epoch: int, begin: float) -> list[Piece]:
    """Returns the rates between `decay_epochs` from step `begin` on, as constant pieces."""
    if config.decay_epochs and config.decay_epochs[0] < config.warmup_epochs:
        raise UserError(
            f'config.decay_epochs={tuple(config.decay_epochs)}: the first comes before the warmup ends; '
            f'it must be at least warmup_epochs={config.warmup_epochs:g}'
        )
    marks = [begin, *(epochs_to_steps(e, steps_per_epoch) for e in config.decay_epochs), math.inf]
    rates = [rate * config.decay_factor**i for i in range(len(marks) - 1)]
    return [
        Piece('constant', start, end - start, value, value)
        for start, end, value in zip(marks, marks[1:], rates, strict=False)
    ]


def rate_at(pieces: Sequence[Piece], step: float) -> float:
    """Returns the rate once `step` updates are completed: that of the last piece begun by then."""
    piece = pieces[0]
    for later in pieces[1:]:
        if step >= later.begin:
            piece = later
    return piece.rate(step)


def create_learning_rate_fn(config: Any, base_learning_rate: float, steps_per_epoch: int) -> optax.Schedule:
    """Creates the learning-rate schedule, as the function of this name in Flax's guide does.

    Linear warmup from `warmup_learning_rate` (0) over `warmup_epochs * steps_per_epoch` updates, then a
    cosine to 0 over `max(num_epochs - warmup_epochs, 1) * steps_per_epoch`, joined where the first ends.
    `schedule='steps'` has instead of the cosine a constant rate that is multiplied by `decay_factor` after
    each of `decay_epochs`; `schedule='constant'` gives `base_learning_rate` at every step, without warmup.

    Args:
      config: has `num_epochs`, `warmup_epochs` (floats allowed) and, optionally, the other fields.
      base_learning_rate: the peak rate.
      steps_per_epoch: optimizer updates in an epoch.

    Returns:
      A function from the number of completed updates (int or int32 array) to the rate (float32).
    """
    import optax

    def in_optax(piece: Piece) -> optax.Schedule:
        if piece.shape == 'constant':
            return optax.constant_schedule(piece.start)
        if piece.shape == 'linear':
            # The length is an int wherever it is whole, as optax declares; fractions work as well.
            return optax.linear_schedule(piece.start, piece.end, transition_steps=piece.length)  # type: ignore[arg-type]
        return optax.cosine_decay_schedule(piece.start, decay_steps=piece.length)  # type: ignore[arg-type]

    pieces = schedule_pieces(config, base_learning_rate, steps_per_epoch)
    return optax.join_schedules(
        [in_optax(piece) for piece in pieces],
        boundaries=[piece.begin for piece in pieces[1:]],  # type: ignore[misc]
    )
