"""What `compile` found, as a person reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from parallel_train.text_table import table
from parallel_train.topologies import GIB

Row = dict[str, Any]
_Columns = dict[str, Callable[[Row], str]]


def compile_table(rows: Sequence[Row], config: Any, sizes_source: str = '') -> str:
    """Returns the rows of `compile_for` as tables of text, a line a topology in each."""
    compiled = [row for row in rows if row['compile_seconds'] is not None]
    fitting = [row for row in compiled if row['fits']]
    measured = [row for row in fitting if row['measured_step_seconds'] is not None]
    predicted = [row for row in fitting if row['predicted_step_seconds'] is not None]
    blocks = [
        f'{config.model} in {config.dtype} on {config.dataset}, sizes from {sizes_source}',
        _table('Memory of a device, GiB (the compiler\'s figures)', compiled, _MEMORY),
        _table('A step of one device', fitting, _STEP),
        _table('Predicted (roofline: the chips\' peaks; see docs/foresight.md)', predicted, _PREDICTED),
        _table('Measured here', measured, _MEASURED),
        _table('Plan', compiled, _PLAN),
        *(f'{row["topology"]} DOES NOT FIT: {row["why"]}' for row in rows if not row['fits']),
    ]  # fmt: skip
    return '\n\n'.join(block for block in blocks if block)


def _table(title: str, rows: Sequence[Row], columns: _Columns) -> str:
    return table(title, rows, {'topology': lambda row: row['topology'], **columns})


def _gib(field: str) -> Callable[[Row], str]:
    return lambda row: '-' if row[field] is None else f'{row[field] / GIB:.2f}'


def _collectives(row: Row) -> str:
    parts = [f'{c["count"]} {c["kind"]}, {_bytes(c["bytes"])}' for c in row['collectives']]
    return '; '.join(parts) or 'none'


def _bytes(count: float) -> str:
    for unit, size in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if count >= size:
            return f'{count / size:.4g} {unit}'
    return f'{count:.0f} B'


def _flops(count: float) -> str:
    for unit, size in (('TFLOP', 1e12), ('GFLOP', 1e9)):
        if count >= size:
            return f'{count / size:.4g} {unit}'
    return f'{count / 1e6:.4g} MFLOP'


def _seconds(seconds: float) -> str:
    return f'{seconds:.3f} s' if seconds >= 1 else f'{seconds * 1e3:.3g} ms'


def _hours(hours: float) -> str:
    return f'{hours:,.1f} h' if hours >= 1 else f'{hours * 60:.1f} min'


_MEMORY: _Columns = {
    'devices': lambda row: f'{row["num_devices"]:,}',
    'images each': lambda row: f'{row["per_device_batch_size"]:,}',
    'arguments': _gib('argument_bytes'),
    'temporaries': _gib('temporary_bytes'),
    'outputs': _gib('output_bytes'),
    'in all': _gib('hbm_bytes'),
    'of': _gib('hbm_limit_bytes'),
    'headroom': _gib('hbm_headroom_bytes'),
    'fits': lambda row: 'yes' if row['fits'] else 'NO',
}
_STEP: _Columns = {
    'arithmetic': lambda row: _flops(row['flops_per_step']),
    'memory traffic': lambda row: _bytes(row['hbm_bytes_per_step']),
    'collectives': _collectives,
    'compiled in': lambda row: f'{row["compile_seconds"]:.0f} s',
}
_PREDICTED: _Columns = {
    'step': lambda row: _seconds(row['predicted_step_seconds']),
    'images/s': lambda row: f'{row["predicted_examples_per_second"]:,.0f}',
    'efficiency': lambda row: f'{row["predicted_efficiency"]:.1%}',
    'bound': lambda row: row['bound'],
    'whole run': lambda row: _hours(row['predicted_hours']),
    'device-hours': lambda row: f'{row["predicted_device_hours"]:,.1f}',
}
_MEASURED: _Columns = {
    'step': lambda row: _seconds(row['measured_step_seconds']),
    'images/s': lambda row: f'{row["batch_size"] / row["measured_step_seconds"]:,.0f}',
    'predicted ÷ measured': lambda row: f'{row["predicted_step_seconds"] / row["measured_step_seconds"]:.2f}',
}
_PLAN: _Columns = {
    'global batch': lambda row: f'{row["batch_size"]:,}',
    'shards': lambda row: f'{row["shards"]:,} of {row["examples_per_shard"]}',
    'accumulation': lambda row: str(row['accumulation_steps']),
    'steps an epoch': lambda row: f'{row["steps_per_epoch"]:,}',
    'steps': lambda row: f'{row["num_steps"]:,}',
    'boundaries': lambda row: ', '.join(f'{step:,}' for step in row['boundaries']) or 'none',
}
