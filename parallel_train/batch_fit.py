"""Do batch, shards, devices and dataset fit together? If not: which field, and the nearest sizes that do."""

from __future__ import annotations

import math
from typing import Any

from parallel_train.errors import UserError


def check_fit(
    config: Any, num_train_examples: int, num_eval_examples: int, devices: int, processes: int
) -> None:
    """Raises UserError for what does not fit.

    Args:
      config: a complete config, each field of it right by itself.
      num_train_examples: size of the train split.
      num_eval_examples: size of the eval split.
      devices: over all processes.
      processes: of the job.
    """
    _check_counts(config, num_train_examples, num_eval_examples, devices, processes)
    turns = devices * config.accumulation_steps
    product = f'{devices} × {config.accumulation_steps} = {turns}'
    if config.shards and config.shards % turns:
        raise UserError(
            f'config.shards={config.shards}: must be a multiple of devices × accumulation_steps = {product}, '
            f'or 0 for exactly that many; {_near_shards(config, turns, processes, num_train_examples)}'
        )
    _check_tree(config, turns)
    _check_exchange(config)
    _check_batch(config, turns, product, num_train_examples)


def mixes(config: Any) -> bool:
    """Whether examples are mixed with others of their shard, which then needs two at least."""
    return bool(config.mixup_alpha or config.cutmix_alpha)


def _check_counts(
    config: Any, num_train_examples: int, num_eval_examples: int, devices: int, processes: int
) -> None:
    for name, value in (('devices', devices), ('num_processes', processes)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f'{name}={value!r}: must be a whole number of at least 1')
    if devices % processes:
        raise UserError(f'num_processes={processes}: must divide the number of devices, {devices}')
    for split, size in ((config.train_split, num_train_examples), (config.eval_split, num_eval_examples)):
        if size < 1:
            raise UserError(f'config.dataset={config.dataset!r}: split {split!r} holds no examples')


def _check_tree(config: Any, turns: int) -> None:
    shards, tree = config.shards, config.reduction == 'tree'
    if tree and config.optimizer == 'muon':
        raise UserError(
            "config.optimizer='muon': its bits were seen to depend on the number of devices, which they must "
            "not with config.reduction='tree'; use pmean, or another optimizer"
        )
    if tree and not _is_power_of_two(shards):
        raise UserError(
            f"config.shards={shards}: must be a power of two with config.reduction='tree', which adds the "
            f'shards in a binary tree; such as {1 << max(turns - 1, 0).bit_length()}'
        )


def _check_exchange(config: Any) -> None:
    if config.reduction == 'tree' and config.gradient_dtype != 'float32':
        raise UserError(
            f"config.gradient_dtype={config.gradient_dtype!r}: cannot be used with config.reduction='tree', "
            'which adds float32; use float32, or pmean'
        )
    if config.batch_norm == 'global' and config.reduction == 'tree':
        raise UserError(
            "config.batch_norm='global': cannot be used with config.reduction='tree', which computes one "
            'shard at a time; use shard, or pmean'
        )
    if config.batch_norm == 'global' and config.accumulation_steps > 1:
        raise UserError(
            f"config.batch_norm='global': cannot be used with config.accumulation_steps="
            f'{config.accumulation_steps}, as the turns know nothing of one another; use shard, or 1'
        )


def _check_batch(config: Any, turns: int, product: str, num_train_examples: int) -> None:
    batch_size, shards = config.batch_size, config.shards
    parts = shards or turns  # a multiple of `turns` either way
    near = _near_multiples(batch_size, parts, at_most=num_train_examples)
    if batch_size % turns:
        raise UserError(
            f'config.batch_size={batch_size}: must be divisible by devices × accumulation_steps = '
            f'{product}{f" and by shards={shards}" if shards else ""}; {near}'
        )
    if batch_size % parts:
        raise UserError(f'config.batch_size={batch_size}: must be divisible by shards={shards}; {near}')
    for field in ('mixup_alpha', 'cutmix_alpha'):
        if config[field] and batch_size == parts:
            raise UserError(
                f'config.{field}={config[field]:g}: mixes the examples of a shard, and each of the {parts} '
                f'shards has one alone; use fewer shards, or a batch_size of at least {2 * parts}'
            )
    if batch_size > num_train_examples:
        raise UserError(
            f'config.batch_size={batch_size}: is larger than the train split, which holds '
            f'{num_train_examples} examples; {near}'
        )


def _near_shards(config: Any, turns: int, processes: int, num_train_examples: int) -> str:
    """Returns what to do about shards that `turns` do not divide: advice that nothing else refuses."""
    batch_size, least = config.batch_size, 2 if mixes(config) else 1

    def adds_up(shards: int) -> bool:
        return config.reduction != 'tree' or _is_power_of_two(shards)

    def allowed(shards: int) -> bool:
        divides = batch_size % shards == 0 and least * shards <= batch_size <= num_train_examples
        return divides and adds_up(shards)

    # Numbers may be of any size here, so what is tried is bounded by the examples there are.
    near = [n for n in range(turns, min(batch_size, num_train_examples) + 1, turns) if allowed(n)]
    near = [*[n for n in near if n < config.shards][-1:], *[n for n in near if n > config.shards][:1]]
    ways = []
    if near:
        form = 'are, and divide' if len(near) > 1 else 'is, and divides'
        ways.append(f'nearest that {form} batch_size={batch_size}: {", ".join(map(str, near))}')
    if allowed(config.shards):
        most = min(turns - 1, config.shards) // config.accumulation_steps
        counts = range(processes, most + 1, processes)
        fewer = [n for n in counts if config.shards % (n * config.accumulation_steps) == 0]
        ways += [f'use fewer devices: {n}' for n in fewer[-1:]]
    if not near and adds_up(turns) and least * turns <= num_train_examples:
        batch = max(min(batch_size, num_train_examples) // turns, least) * turns
        ways.append(f'use shards={turns} with batch_size={batch}')
    return ', or '.join(ways) or 'use fewer devices or accumulation_steps'


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _near_multiples(value: int, of: int, at_most: float = math.inf) -> str:
    below, above = value // of * of, -(-value // of) * of
    near = [str(n) for n in sorted({min(below, at_most // of * of), above}) if 0 < n <= at_most]
    if not near:
        return f'{of}, the least that is, is more than there are examples: use fewer devices, turns or shards'
    return f'nearest that {"are" if len(near) > 1 else "is"}: {", ".join(near)}'
