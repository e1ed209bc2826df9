"""Which sizes does a scaling experiment have, and which batch has each?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from parallel_train.config_fields import nearest
from parallel_train.errors import UserError
from parallel_train.plan import make_plan
from parallel_train.sizes import Sizes

MODES = ('weak', 'strong')
LEAD = 5  # steps before the timed ones of a stretch: more than a feed keeps ready


@dataclasses.dataclass(frozen=True, order=True)
class Size:
    """One job that is measured: so many devices in so many processes, on one global batch."""

    num_devices: int
    num_processes: int
    batch_size: int
    shards: int  # as config.shards: 0 is one a device and accumulation step

    @property
    def key(self) -> str:
        """Its name in scale.json."""
        return f'devices={self.num_devices} processes={self.num_processes} batch_size={self.batch_size}'

    @property
    def name(self) -> str:
        devices = f'{self.num_devices} device{"s" if self.num_devices > 1 else ""}'
        processes = f' in {self.num_processes} processes' if self.num_processes > 1 else ''
        return f'{devices}{processes}, batch {self.batch_size:,}'


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What was asked for: the sizes of each mode, the smallest first, which the others are compared with."""

    modes: dict[str, list[Size]]
    steps: int  # timed, in each stretch
    rounds: int

    @property
    def sizes(self) -> list[Size]:
        """All of them, each once: the smallest is weak and strong scaling's alike."""
        return sorted({size for sizes in self.modes.values() for size in sizes})


def numbers(flag: str, text: str) -> list[int]:
    """Returns the whole numbers of a list such as '1,2,4', in rising order, each once.

    Raises:
      UserError: it is none.
    """
    parts = [part.strip() for part in text.split(',')]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UserError(f'{flag}={text!r}: must be whole numbers of at least 1, such as 1,2,4')
    return sorted(set(map(int, parts)))


def modes_of(text: str) -> list[str]:
    """Returns the modes of a list such as 'weak,strong', each once; UserError names one that is unknown."""
    asked = [part.strip() for part in text.split(',')]
    for mode in asked:
        if mode not in MODES:
            raise UserError(f'mode={mode!r}: must be {" or ".join(MODES)}, or both{nearest(mode, MODES)}')
    return [mode for mode in MODES if mode in asked]


def plan_experiment(
    config: Any,
    sizes: Sizes,
    modes: Sequence[str],
    device_counts: Sequence[int],
    process_counts: Sequence[int],
    steps: int,
    rounds: int,
) -> Experiment:
    """Returns the experiment, every size of which the config and the dataset allow.

    Device counts that cannot be shared among so many processes are left out there. Strong scaling has the
    config's batch at each size. Weak scaling has it at the smallest; elsewhere as many examples a device, in
    shards of as many examples.

    Raises:
      UserError: batch, shards, devices or processes do not fit together; or a number is below 1.
    """
    for name, value in (('steps', steps), ('rounds', rounds)):
        if value < 1:
            raise UserError(f'{name}={value}: must be at least 1')
    pairs = [(n, p) for p in process_counts for n in device_counts if n % p == 0]
    for count in process_counts:
        if not any(p == count for _, p in pairs):
            raise UserError(
                f'processes={count}: none of device_counts={",".join(map(str, device_counts))} can be shared '
                f'among {count} processes; use multiples of it'
            )
    first = min(pairs)[0]
    by_mode: dict[str, list[Size]] = {}
    for mode in modes:
        by_mode[mode] = []
        for num_devices, num_processes in sorted(pairs):
            try:
                size = _size(config, mode, num_devices, num_processes, first)
                changed = config_of(config, sizes, size, steps, rounds)
                make_plan(
                    changed, sizes.num_train_examples, sizes.num_eval_examples, num_devices, num_processes
                )
            except UserError as error:
                raise UserError(f'device_counts={num_devices}, {mode} scaling: {error}') from error
            by_mode[mode].append(size)
    return Experiment(by_mode, steps, rounds)


def _size(config: Any, mode: str, num_devices: int, num_processes: int, first: int) -> Size:
    batch_size, shards = config.batch_size, config.shards
    if mode == 'weak':
        for name, value in (('batch_size', batch_size), ('shards', shards)):
            if value % first:
                raise UserError(
                    f'config.{name}={value}: must be divisible by the smallest device count, {first}, '
                    'whose devices hold as much as every other device'
                )
        batch_size, shards = batch_size // first * num_devices, shards // first * num_devices
    return Size(num_devices, num_processes, batch_size, shards)


def config_of(config: Any, sizes: Sizes, size: Size, steps: int, rounds: int) -> Any:
    """Returns the config of one size; with as many epochs as measuring takes, if it has fewer.

    More epochs make the decay of the rate longer, and change nothing else of the first steps. Schedules that
    fit no other number of epochs then go down in a line.
    """
    changed = config.copy_and_resolve_references().unlock()
    changed.batch_size, changed.shards = size.batch_size, size.shards
    steps_per_epoch = max(sizes.num_train_examples // size.batch_size, 1)
    needed = float((rounds + 1) * (LEAD + steps) // steps_per_epoch + 1)
    if needed > config.num_epochs:
        changed.num_epochs = needed
        if config.schedule in ('cosine_restarts', 'one_cycle'):
            changed.schedule = 'linear'
    return changed.lock()
