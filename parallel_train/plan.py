"""What will happen: every number that follows from a config, a dataset's size and the devices.

Pure arithmetic, done once, before anything runs. The loop, the schedule, the checkpoints and the
reports all read this one plan. But for the fields in `HARDWARE_FIELDS` it is the same on any number
of devices.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

from parallel_train import config as config_lib
from parallel_train import config_fields
from parallel_train.batch_fit import check_fit
from parallel_train.errors import UserError
from parallel_train.pieces import Piece
from parallel_train.schedule import READS, epochs_to_steps, rate_at, schedule_pieces, snapshot_steps

HARDWARE_FIELDS = ('num_devices', 'num_processes', 'per_device_batch_size')


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of a run. Counts of examples, steps (completed updates) and devices are ints."""

    num_train_examples: int
    num_eval_examples: int
    batch_size: int  # examples in a step, over all devices
    num_devices: int
    num_processes: int
    per_device_batch_size: int  # examples a device computes at once
    accumulation_steps: int
    shards: int
    examples_per_shard: int
    num_epochs: float
    steps_per_epoch: int
    dropped_examples_per_epoch: int
    num_steps: int
    warmup_steps: int  # updates whose rate comes from the warmup
    decay_steps: int  # updates that the decay takes to its end, whether the run gets there or not
    boundaries: list[int]  # steps from which on another piece of the schedule gives the rate
    peak_learning_rate: float
    final_learning_rate: float  # the rate of the last update
    learning_rate_at: dict[int, float]  # step -> the rate once that many updates are completed
    eval_batch_size: int
    eval_steps: int
    log_every_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int
    snapshot_steps: list[int]  # ends of the schedule's cycles: evaluated, saved, and kept
    divergence_check_steps: int
    warnings: list[str]
    pieces: tuple[Piece, ...] = dataclasses.field(repr=False)

    def rate(self, step: float) -> float:
        """Returns the learning rate once `step` updates are completed."""
        return rate_at(self.pieces, step)

    @property
    def compare_replicas_every(self) -> int:
        """Steps between two comparisons. What one finds is seen at the next, so that nobody waits for it."""
        return max(self.divergence_check_steps // 2, 1)

    def epoch_of(self, step: int) -> float:
        """Returns how many epochs `step` completed updates are."""
        return step / self.steps_per_epoch

    def is_due(self, step: int, every_steps: int) -> bool:
        """Whether what happens every so many steps happens once `step` updates are completed.

        At snapshots and at the end everything does.
        """
        return step == self.num_steps or step % every_steps == 0 or step in self.snapshot_steps

    def anything_due(self, step: int) -> bool:
        """Whether anything happens once `step` updates are completed."""
        every = (
            self.log_every_steps,
            self.eval_every_steps,
            self.checkpoint_every_steps,
            self.compare_replicas_every,
        )
        return any(self.is_due(step, steps) for steps in every)

    def check_reaches(self, step: int) -> None:
        """Raises UserError if a run that has trained `step` steps is past the plan's last one."""
        if step > self.num_steps:
            raise UserError(
                f'config.num_epochs={self.num_epochs:g}: is {self.num_steps} steps, but {step} are trained '
                f'already; use at least {self.epoch_of(step):g}, or another workdir'
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as `plan.json` holds it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields['pieces']
        fields['learning_rate_at'] = {str(k): v for k, v in self.learning_rate_at.items()}
        return fields

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + '\n'

    def comparable(self) -> dict[str, Any]:
        """Returns the fields that do not name the hardware, for comparing two plans."""
        return {k: v for k, v in self.to_dict().items() if k not in HARDWARE_FIELDS + ('warnings',)}


def make_plan(
    config: Any,
    num_train_examples: int,
    num_eval_examples: int,
    num_devices: int,
    num_processes: int = 1,
) -> Plan:
    """Works out the plan.

    Args:
      config: a config; fields that it leaves out have their defaults.
      num_train_examples: size of the train split.
      num_eval_examples: size of the eval split.
      num_devices: devices over all processes.
      num_processes: processes of the job.

    Raises:
      UserError: a field is wrong, or batch, shards, devices and dataset do not fit together; the
        message names the nearest sizes that do.
    """
    config = config_lib.complete(config)
    check_fit(config, num_train_examples, num_eval_examples, num_devices, num_processes)
    batch_size = config.batch_size
    turns = num_devices * config.accumulation_steps
    shards = config.shards or turns
    steps_per_epoch = num_train_examples // batch_size
    num_steps = math.floor(epochs_to_steps(config.num_epochs, steps_per_epoch))
    if num_steps < 1:
        raise UserError(
            f'config.num_epochs={config.num_epochs:g}: is less than one step; with '
            f'{steps_per_epoch} steps an epoch, use at least {1 / steps_per_epoch:.3g}'
        )
    _check_countable('num_epochs', config.num_epochs, num_steps, steps_per_epoch)
    peak = config.learning_rate * _rate_scale(config)
    if not math.isfinite(peak):
        raise UserError(
            f'config.learning_rate={config.learning_rate:g}: is not finite after '
            f'{config.learning_rate_scaling} scaling by {batch_size}/{config.reference_batch_size}'
        )
    pieces = schedule_pieces(config, peak, steps_per_epoch)
    warmup_steps = next((math.ceil(p.length) for p in pieces if p.name == 'warmup'), 0)
    _check_countable('warmup_epochs', config.warmup_epochs, warmup_steps, steps_per_epoch)
    decay_steps = math.ceil(_decay_length(pieces))
    boundaries = [math.ceil(piece.begin) for piece in pieces[1:]]
    marks = sorted({0, *boundaries, num_steps - 1, num_steps})
    return Plan(
        num_train_examples=num_train_examples,
        num_eval_examples=num_eval_examples,
        batch_size=batch_size,
        num_devices=num_devices,
        num_processes=num_processes,
        per_device_batch_size=batch_size // turns,
        accumulation_steps=config.accumulation_steps,
        shards=shards,
        examples_per_shard=batch_size // shards,
        num_epochs=config.num_epochs,
        steps_per_epoch=steps_per_epoch,
        dropped_examples_per_epoch=num_train_examples - steps_per_epoch * batch_size,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        boundaries=boundaries,
        peak_learning_rate=peak,
        final_learning_rate=rate_at(pieces, num_steps - 1),
        learning_rate_at={step: rate_at(pieces, step) for step in marks},
        eval_batch_size=config.eval_batch_size,
        eval_steps=-(-num_eval_examples // min(config.eval_batch_size, num_eval_examples)),
        log_every_steps=config.log_every_steps,
        eval_every_steps=_every_steps(config.eval_every_epochs, steps_per_epoch, num_steps),
        checkpoint_every_steps=config.checkpoint_every_steps
        or _every_steps(config.checkpoint_every_epochs, steps_per_epoch, num_steps),
        snapshot_steps=snapshot_steps(config, pieces, num_steps),
        divergence_check_steps=config.divergence_check_steps or num_steps,
        warnings=_warnings(config, pieces, steps_per_epoch, num_steps),
        pieces=pieces,
    )


def _decay_length(pieces: tuple[Piece, ...]) -> float:
    """Returns how many steps lie between the end of the warmup and the last change of the rate."""
    after_warmup = [piece for piece in pieces if piece.name != 'warmup']
    first, last = after_warmup[0], after_warmup[-1]
    return last.begin - first.begin + (last.length if math.isfinite(last.length) else 0)


def _check_countable(field: str, epochs: float, steps: float, steps_per_epoch: int) -> None:
    if steps > config_fields.MAX_STEPS:
        raise UserError(
            f'config.{field}={epochs:g}: is more steps than can be counted, {config_fields.MAX_STEPS}; with '
            f'{steps_per_epoch} steps an epoch, use at most {config_fields.MAX_STEPS // steps_per_epoch}'
        )


def _every_steps(every_epochs: float, steps_per_epoch: int, num_steps: int) -> int:
    if every_epochs == 0:
        return num_steps
    return max(1, round(epochs_to_steps(every_epochs, steps_per_epoch)))


def _rate_scale(config: Any) -> float:
    """Linear: Goyal et al. 2017, section 2.1. Square root: Krizhevsky 2014, section 3.2."""
    ratio = config.batch_size / config.reference_batch_size
    return {'none': 1.0, 'linear': ratio, 'sqrt': math.sqrt(ratio)}[config.learning_rate_scaling]


def _warnings(config: Any, pieces: Iterable[Piece], steps_per_epoch: int, num_steps: int) -> list[str]:
    warnings = []
    last = list(pieces)[-1]
    final = rate_at(tuple(pieces), num_steps - 1)
    if config.schedule == 'steps' and num_steps <= last.begin:
        warnings.append(
            f'TRAINING ENDS BEFORE THE LAST DECAY: its {num_steps} steps (num_epochs={config.num_epochs:g}) '
            f'end before step {last.begin:g}, from which on the rate would be {last.start:.6g}; training '
            f'ends at rate {final:.6g}.'
        )
    elif config.schedule == 'cosine' and num_steps <= last.begin:
        warnings.append(
            f'TRAINING ENDS INSIDE THE WARMUP: its {num_steps} steps (num_epochs={config.num_epochs:g}) end '
            f'before the {last.begin:g} of the warmup do, so the peak rate is never used; '
            f'training ends at rate {final:.6g}.'
        )
    elif config.schedule == 'cosine' and num_steps < math.floor(last.begin + last.length):
        warnings.append(
            f'THE DECAY WILL NOT BE FINISHED: num_epochs - warmup_epochs = '
            f'{config.num_epochs - config.warmup_epochs:g} is less than 1, and the cosine takes at '
            f'least 1 epoch ({steps_per_epoch} steps); training ends at rate {final:.6g}, not near 0.'
        )
    if config.schedule == 'constant' and config.warmup_epochs > 0:
        warnings.append(
            f"schedule='constant' has no warmup: warmup_epochs={config.warmup_epochs:g} has no effect."
        )
    defaults = config_lib.default_config()
    for field in sorted({field for fields in READS.values() for field in fields}):
        unread = field not in READS[config.schedule] and field != 'warmup_epochs'  # said above
        if unread and config[field] != defaults[field]:
            warnings.append(
                f'schedule={config.schedule!r} does not read {field}: {config[field]!r} has no effect.'
            )
    return warnings
