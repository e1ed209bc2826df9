"""What a scaling experiment found, as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel_train.text_table import Columns, table

Row = Mapping[str, Any]


def scale_table(results: Mapping[str, Any]) -> str:
    """Returns the measurements of scale.json as tables of text, and what the figures are."""
    config, machine = results['config'], results['machine']
    blocks = [
        f'{config["model"]} in {config["dtype"]} on {config["dataset"]}; {machine["device_kind"]}; '
        f'{results["steps"]} steps a stretch; medians (quartiles)'
    ]
    for mode in ('weak', 'strong'):
        rows = [row for row in results['measurements'] if row['mode'] == mode]
        speed, parts = columns_of(mode)
        blocks += [
            table(f'{mode.capitalize()} scaling: {WHAT[mode]}', rows, speed),
            table(f'{mode.capitalize()} scaling: where it goes', rows, parts),
        ]
    blocks += notes(results)
    return '\n\n'.join(block for block in blocks if block)


WHAT = {
    'weak': 'as many examples on each device at every size',
    'strong': 'the same global batch at every size',
}


def columns_of(mode: str) -> tuple[Columns, Columns]:
    """Returns the columns of the two tables of a mode: the speed, and what it is made of."""
    return _SPEED, {**_PARTS, **(_LOSS if mode == 'strong' else {})}


def shares_cores(results: Mapping[str, Any]) -> bool:
    return results['machine']['platform'] == 'cpu'


def notes(results: Mapping[str, Any]) -> list[str]:
    """Returns what a reader must know of the figures, a paragraph each."""
    rows, machine = results['measurements'], results['machine']
    told = []
    if shares_cores(results):
        told.append(
            f"NOT A SCALING EFFICIENCY: all of these XLA devices share this machine's {machine['cores']} CPU "
            'cores. "Efficiency" is here images/s of a device against that of the smallest size: what '
            'splitting the work costs or gains on one machine. It says nothing about devices of their own.'
        )
    differences = [row for row in rows if row.get('loss_difference') is not None]
    if len(differences) > 1:
        worst = max(differences, key=lambda row: row['loss_difference'])
        told.append(
            f'Loss curves of strong scaling: over the first {results["steps"]} steps all sizes differ from '
            f'the smallest by at most {worst["loss_difference"]:.2g} (step {worst["loss_difference_step"]}, '
            f'{worst["num_devices"]} devices), the loss there being '
            f'{worst["losses"][worst["loss_difference_step"] - 1]:.4f}.' + _why_not_alike(results)
        )
    unknown = {row['not_predicted'] for row in rows if row['not_predicted']}
    told += [f'Not predicted: {reason}.' for reason in sorted(unknown)]
    return told


def _why_not_alike(results: Mapping[str, Any]) -> str:
    if results['config']['shards']:
        return ''
    return (
        ' With config.shards=0 there is a shard for each device, so dropout masks and BatchNorm groups '
        'differ from size to size.'
    )


def _with_quartiles(field: str, form: str) -> Any:
    def text(row: Row) -> str:
        low, high = row['quartiles'][field]
        return f'{row[field]:{form}} ({low:{form}} to {high:{form}})'

    return text


def _or_dash(field: str, form: str) -> Any:
    return lambda row: '-' if row[field] is None else f'{row[field]:{form}}'


def _milliseconds(row: Row) -> str:
    return f'{row["step_seconds"] * 1e3:.3g} ms'


_SIZE: Columns = {
    'devices': lambda row: f'{row["num_devices"]:,}',
    'processes': lambda row: str(row['num_processes']),
    'batch': lambda row: f'{row["batch_size"]:,}',
}
_SPEED: Columns = {
    **_SIZE,
    'images/s': _with_quartiles('examples_per_second', ',.0f'),
    'step': _milliseconds,
    '× smallest': _with_quartiles('speedup', '.2f'),
    'efficiency': _or_dash('efficiency', '.1%'),
    'predicted': _or_dash('predicted_efficiency', '.1%'),
}
_PARTS: dict[str, Any] = {
    **_SIZE,
    'resident batch, images/s': _with_quartiles('resident_examples_per_second', ',.0f'),
    'input': _or_dash('input_fraction', '.1%'),
    'data wait': _or_dash('data_wait_fraction', '.1%'),
    'all-reduce': _with_quartiles('communication_fraction', '.1%'),
    'predicted': _or_dash('predicted_examples_per_second', ',.0f'),
    'measured ÷ it': _or_dash('speed_of_prediction', '.2f'),
}
_LOSS: dict[str, Any] = {'losses differ by': _or_dash('loss_difference', '.1e')}
