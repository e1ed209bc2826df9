"""Which rate has each step?

A schedule is a row of pieces (pieces.py). The plan evaluates them in Python floats; `create_learning_rate_fn`
gives the same pieces as an optax schedule, to run inside the compiled step. Its argument, `step`, is
the number of updates completed: the first update has the rate at step 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from parallel_train import config as config_lib
from parallel_train.config_fields import SCHEDULES
from parallel_train.errors import UserError
from parallel_train.pieces import Piece, in_optax

if TYPE_CHECKING:
    import optax

MAX_CYCLES = 100  # each is a piece of the compiled schedule, and a checkpoint that is kept
_EPSILON = 1e-9  # epochs that differ by less are the same but for the rounding of floats

# Which of the schedules' fields each of them reads.
_WARMUP = ('warmup_epochs', 'warmup_learning_rate')
READS: dict[str, tuple[str, ...]] = {
    'constant': (),
    'cosine': (*_WARMUP, 'end_learning_rate'),
    'cosine_restarts': (*_WARMUP, 'end_learning_rate', 'restart_epochs', 'restart_multiplier'),
    'linear': (*_WARMUP, 'end_learning_rate'),
    'polynomial': (*_WARMUP, 'end_learning_rate', 'decay_power'),
    'steps': (*_WARMUP, 'decay_epochs', 'decay_factor'),
    'rsqrt': (*_WARMUP, 'end_learning_rate', 'timescale_epochs', 'cooldown_epochs'),
    'warmup_stable_decay': (*_WARMUP, 'end_learning_rate', 'cooldown_epochs'),
    'one_cycle': (*_WARMUP, 'end_learning_rate'),
}


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> float:
    """Returns epochs × steps_per_epoch, as an int where it is whole but for the rounding of floats."""
    steps = epochs * steps_per_epoch
    whole = round(steps)
    return whole if abs(steps - whole) <= 1e-9 * max(1.0, abs(steps)) else steps


class _Epochs:
    """What the kinds of schedules work with: a config's fields, the peak rate, and epochs made steps."""

    def __init__(self, config: Any, peak: float, steps_per_epoch: int):
        self._config, self.peak, self.steps_per_epoch = config, peak, steps_per_epoch
        self.end_rate = self['end_learning_rate']

    def __getitem__(self, field: str) -> Any:
        given = self._config.get(field)
        return config_lib.default_config()[field] if given is None else given

    def piece(
        self, name: str, shape: str, begin: float, length: float, start: float, end: float, bend: float = 1.0
    ) -> Piece:
        """Returns a piece whose `begin` and `length` are given in epochs."""
        first, count = (epochs_to_steps(epochs, self.steps_per_epoch) for epochs in (begin, length))
        return Piece(name, shape, first, count, start, end, bend)


def schedule_pieces(config: Any, base_learning_rate: float, steps_per_epoch: int) -> tuple[Piece, ...]:
    """Returns the pieces of the config's schedule, in order, without those of no length.

    Args:
      config: has `num_epochs`, `warmup_epochs` and, unless it is 'cosine', `schedule`; other fields that it
        leaves out have their defaults.
      base_learning_rate: the peak rate.
      steps_per_epoch: optimizer updates in an epoch.

    Raises:
      UserError: the schedule does not fit the epochs.
    """
    kind = config.get('schedule', SCHEDULES[0])
    if kind not in SCHEDULES:
        raise UserError(f'config.schedule={kind!r}: must be one of: {", ".join(SCHEDULES)}')
    if kind == 'constant':
        return (Piece('constant', 'constant', 0, math.inf, base_learning_rate, base_learning_rate),)
    run = _Epochs(config, base_learning_rate, steps_per_epoch)
    if 'end_learning_rate' in READS[kind] and run.end_rate > base_learning_rate:
        raise UserError(
            f'config.end_learning_rate={run.end_rate:g}: is above the peak rate, {base_learning_rate:g}; it '
            'must be at most that'
        )
    warmup = run['warmup_epochs']
    ramp = run.piece('warmup', 'linear', 0, warmup, run['warmup_learning_rate'], base_learning_rate)
    return tuple(piece for piece in (ramp, *_KINDS[kind](run, warmup)) if piece.length > 0)


def snapshot_steps(config: Any, pieces: Sequence[Piece], num_steps: int) -> list[int]:
    """Returns the steps at which a cycle of a schedule with restarts has ended: [] for other schedules."""
    if config.schedule != 'cosine_restarts':
        return []
    cycles = [piece for piece in pieces if piece.shape == 'cosine']
    return [min(math.ceil(cycle.begin + cycle.length), num_steps) for cycle in cycles]


# ---------------------------------------------------------------- the kinds: what follows on the warmup


def _cosine(run: _Epochs, warmup: float) -> list[Piece]:
    # The guide's clamp: the cosine takes at least one epoch, even where the run ends before it does.
    epochs = max(run['num_epochs'] - warmup, 1)
    return [run.piece('cosine', 'cosine', warmup, epochs, run.peak, run.end_rate)]


def _polynomial(run: _Epochs, warmup: float) -> list[Piece]:
    """From the peak to the end rate by (1 - t)**power: 'linear' and 'polynomial'."""
    epochs = _room(run, warmup)
    if epochs <= _EPSILON:
        raise UserError(
            f'config.warmup_epochs={warmup:g}: leaves nothing of num_epochs={run["num_epochs"]:g} for the '
            f'decay of config.schedule={run["schedule"]!r}; it must be less'
        )
    if run['schedule'] == 'linear':
        return [run.piece('linear', 'linear', warmup, epochs, run.peak, run.end_rate)]
    return [run.piece('polynomial', 'polynomial', warmup, epochs, run.peak, run.end_rate, run['decay_power'])]


def _cosine_restarts(run: _Epochs, warmup: float) -> list[Piece]:
    """Cycles of T_0, T_0·T_mult, T_0·T_mult², ... epochs (Loshchilov & Hutter 2017, section 3).

    With T_mult = 1 that is the schedule of snapshot ensembles (Huang et al. 2017, equation 2).
    """
    first, multiplier, num_epochs = run['restart_epochs'], run['restart_multiplier'], run['num_epochs']
    if first * run.steps_per_epoch < 1:
        raise UserError(
            f'config.restart_epochs={first:g}: is less than one step; schedule "cosine_restarts" needs '
            'the length of its first cycle, in epochs, such as 10'
        )
    pieces: list[Piece] = []
    begin, length = warmup, first
    while begin + length <= num_epochs + _EPSILON:
        if len(pieces) == MAX_CYCLES:
            raise UserError(
                f'config.restart_epochs={first:g}: gives more than {MAX_CYCLES} cycles in '
                f'num_epochs={num_epochs:g}; use longer ones'
            )
        pieces.append(run.piece(f'cycle {len(pieces) + 1}', 'cosine', begin, length, run.peak, run.end_rate))
        begin, length = begin + length, length * multiplier
    if abs(begin - num_epochs) > _EPSILON or not pieces:
        near = [f'{epochs:g}' for epochs in (begin, begin + length) if epochs > warmup]
        raise UserError(
            f'config.num_epochs={num_epochs:g}: cycles of restart_epochs={first:g}, each '
            f'{multiplier:g} times as long as the one before, do not end there; the nearest that '
            f'{"fits is" if len(near) == 1 else "fit are"}: {", ".join(near)}'
        )
    return pieces


def _steps(run: _Epochs, warmup: float) -> list[Piece]:
    """The rates between `decay_epochs`, as constant pieces."""
    epochs = run['decay_epochs']
    if epochs and epochs[0] < warmup:
        raise UserError(
            f'config.decay_epochs={tuple(epochs)}: the first comes before the warmup ends; '
            f'it must be at least warmup_epochs={warmup:g}'
        )
    marks = [epochs_to_steps(e, run.steps_per_epoch) for e in (warmup, *epochs)]
    rates = [run.peak * run['decay_factor'] ** i for i in range(len(marks))]
    return [
        Piece('constant', 'constant', begin, end - begin, rate, rate)
        for begin, end, rate in zip(marks, [*marks[1:], math.inf], rates, strict=True)
    ]


def _reciprocal_root(run: _Epochs, warmup: float) -> list[Piece]:
    """peak / √(1 + s/τ), s being the time since the warmup; then linearly down (Zhai et al. 2022)."""
    timescale = run['timescale_epochs'] or warmup
    if not timescale:
        raise UserError(
            'config.timescale_epochs=0: means warmup_epochs, which is 0 too; schedule "rsqrt" needs '
            'one of them'
        )
    bend = timescale * run.steps_per_epoch
    epochs = _room(run, warmup)
    root = run.piece('rsqrt', 'rsqrt', warmup, epochs, run.peak, 0.0, bend)
    lowest = root.rate(root.begin + root.length)
    if run['cooldown_epochs'] and run.end_rate > lowest:
        raise UserError(
            f'config.end_learning_rate={run.end_rate:g}: is above the rate from which the cooldown starts, '
            f'{lowest:g}; it must be at most that'
        )
    return [run.piece('rsqrt', 'rsqrt', warmup, epochs, run.peak, lowest, bend), *_cooldown(run, lowest)]


def _stable(run: _Epochs, warmup: float) -> list[Piece]:
    """The peak rate, then linearly down (Zhai et al. 2022; Hu et al. 2024, who call it WSD)."""
    if not run['cooldown_epochs']:
        raise UserError(
            'config.cooldown_epochs=0: schedule "warmup_stable_decay" needs the length of its decay, in '
            f'epochs, such as {run["num_epochs"] / 10:g}'
        )
    stable = run.piece('stable', 'constant', warmup, _room(run, warmup), run.peak, run.peak)
    return [stable, *_cooldown(run, run.peak)]


def _one_cycle(run: _Epochs, warmup: float) -> list[Piece]:
    """Down as it went up, in the same time; then on to the end rate (Smith & Topin 2018, section 3).

    The rate alone: the momentum, which they lower while the rate is high, stays.
    """
    num_epochs, low = run['num_epochs'], run['warmup_learning_rate']
    rest = num_epochs - 2 * warmup
    if warmup <= 0 or rest < -_EPSILON:
        raise UserError(
            f'config.warmup_epochs={warmup:g}: schedule "one_cycle" goes up in so many epochs and down in as '
            f'many, which must fit num_epochs={num_epochs:g}: use more than 0 and at most {num_epochs / 2:g}'
        )
    if rest > _EPSILON and low <= run.end_rate:
        raise UserError(
            f'config.warmup_learning_rate={low:g}: schedule "one_cycle" ends its cycle at this rate and has '
            f'{rest:g} epochs left to go from there to end_learning_rate={run.end_rate:g}; use a higher one, '
            f'such as {run.peak / 10:g}, or warmup_epochs={num_epochs / 2:g}'
        )
    return [
        run.piece('descent', 'linear', warmup, warmup, run.peak, low),
        run.piece('tail', 'linear', 2 * warmup, rest, low, run.end_rate),
    ]


def _cooldown(run: _Epochs, start: float) -> list[Piece]:
    epochs = run['cooldown_epochs']
    return [run.piece('cooldown', 'linear', run['num_epochs'] - epochs, epochs, start, run.end_rate)]


def _room(run: _Epochs, warmup: float) -> float:
    """Returns the epochs between warmup and cooldown."""
    cooldown = run['cooldown_epochs'] if 'cooldown_epochs' in READS[run['schedule']] else 0.0
    epochs = run['num_epochs'] - warmup - cooldown
    if epochs < -_EPSILON:
        field = 'cooldown_epochs' if cooldown else 'warmup_epochs'
        most = run['num_epochs'] - warmup
        raise UserError(
            f'config.{field}={run[field]:g}: warmup_epochs={warmup:g}'
            f'{f" and cooldown_epochs={cooldown:g} are" if cooldown else " is"} longer than '
            f'num_epochs={run["num_epochs"]:g}'
            + (f'; use at most {most:g}' if cooldown and most > 0 else '; shorten the warmup')
        )
    return max(epochs, 0.0)


_KINDS: dict[str, Callable[[_Epochs, float], list[Piece]]] = {
    'cosine': _cosine,
    'cosine_restarts': _cosine_restarts,
    'linear': _polynomial,
    'polynomial': _polynomial,
    'steps': _steps,
    'rsqrt': _reciprocal_root,
    'warmup_stable_decay': _stable,
    'one_cycle': _one_cycle,
}

# ---------------------------------------------------------------- the whole


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
    `schedule` names another curve to follow the warmup (docs/schedules.md); 'constant' gives
    `base_learning_rate` at every step, without warmup.

    Args:
      config: has `num_epochs`, `warmup_epochs` (floats allowed) and, optionally, the other fields.
      base_learning_rate: the peak rate.
      steps_per_epoch: optimizer updates in an epoch.

    Returns:
      A function from the number of completed updates (int or int32 array) to the rate (float32).
    """
    import optax

    pieces = schedule_pieces(config, base_learning_rate, steps_per_epoch)
    return optax.join_schedules(
        [in_optax(piece) for piece in pieces],
        boundaries=[piece.begin for piece in pieces[1:]],  # type: ignore[misc]
    )
