"""The plan as a person reads it."""

from __future__ import annotations

from typing import Any

from parallel_train.plan import Plan


def plan_table(plan: Plan, config: Any, sizes_source: str = '') -> str:
    """Returns the plan as a table of text, its warnings last and loud."""
    devices = f'{plan.num_devices} device{"s" if plan.num_devices > 1 else ""}'
    if plan.num_processes > 1:
        devices += f' in {plan.num_processes} processes'
    rows: list[tuple[str, str]] = [
        ('model, dataset', f'{config.model}, {config.dataset} ({config.train_split})'),
        (
            'global batch',
            f'{plan.batch_size} = {devices} × {plan.per_device_batch_size} examples × '
            f'{plan.accumulation_steps} accumulation step{"s" if plan.accumulation_steps > 1 else ""}',
        ),
        ('shards', f'{plan.shards} of {plan.examples_per_shard} examples'),
        ('train examples', f'{plan.num_train_examples:,}'),
        (
            'steps an epoch',
            f'{plan.steps_per_epoch:,} ({plan.dropped_examples_per_epoch:,} examples left out, others '
            'each epoch)',
        ),
        ('steps in all', f'{plan.num_steps:,} = {plan.num_epochs:g} epochs'),
    ]
    rows += [(f'{name}', text) for name, text in _schedule_rows(plan, config)]
    rows += [
        (
            'evaluation',
            f'{plan.num_eval_examples:,} examples ({config.eval_split}) in {plan.eval_steps:,} batches, '
            f'every {plan.eval_every_steps:,} steps',
        ),
        ('checkpoint', f'every {plan.checkpoint_every_steps:,} steps'),
    ]
    if plan.snapshot_steps:
        steps = ', '.join(f'{step:,}' for step in plan.snapshot_steps)
        rows.append(('snapshots', f'after steps {steps}: evaluated, saved and kept'))
    if sizes_source:
        rows.append(('sizes from', sizes_source))
    width = max(len(name) for name, _ in rows)
    lines = ['Plan', *(f'  {name:<{width}}  {text}' for name, text in rows)]
    lines += [f'  WARNING: {warning}' for warning in plan.warnings]
    return '\n'.join(lines)


def _schedule_rows(plan: Plan, config: Any) -> list[tuple[str, str]]:
    """Returns one row a piece of the schedule: from which step to which, from which rate to which."""
    scaling = ''
    if config.learning_rate_scaling != 'none':
        scaling = (
            f' = {config.learning_rate:g}, {config.learning_rate_scaling} scaling by '
            f'{plan.batch_size}/{config.reference_batch_size}'
        )
    rows = [('peak rate', f'{plan.peak_learning_rate:g}{scaling}')]
    edges = [0, *(b for b in plan.boundaries if b < plan.num_steps), plan.num_steps]
    for piece, begin, end in zip(plan.pieces, edges, edges[1:], strict=False):
        last = end if end < plan.num_steps else end - 1
        rates = f'{piece.rate(begin):.6g}'
        if piece.shape != 'constant':
            rates += f' to {piece.rate(last):.6g}'
        rows.append((
            piece.name,
            f'steps {begin:,} to {end:,} (epochs {plan.epoch_of(begin):.4g} to {plan.epoch_of(end):.4g}), '
            f'rate {rates}',
        ))  # fmt: skip
    rows.append(('last update', f'step {plan.num_steps:,}, rate {plan.final_learning_rate:.6g}'))
    return rows
