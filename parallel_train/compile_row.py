"""What is told of a compiled step? The fields of `compile --json`, which docs/foresight.md explains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jax.sharding import Mesh

from parallel_train import roofline
from parallel_train.compiled import Compiled
from parallel_train.measure_cpu import measure_on_cpu
from parallel_train.sizes import Sizes
from parallel_train.topologies import GIB, Topology

_OF_THE_PLAN = (
    'batch_size', 'per_device_batch_size', 'accumulation_steps', 'shards', 'examples_per_shard',
    'num_epochs', 'steps_per_epoch', 'num_steps', 'boundaries',
)  # fmt: skip


def row_of(
    config: Any,
    sizes: Sizes,
    topology: Topology,
    mesh: Mesh,
    compiled: Compiled,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Returns the row of a topology; on a CPU the step is run as well, if it fits."""
    row = {
        'topology': topology.name,
        'num_devices': topology.num_devices,
        'fits': compiled.fits,
        'why': None if compiled.fits else _why(compiled),
        'serves': None,
        **{name: getattr(compiled.plan, name) for name in _OF_THE_PLAN},
        **_memory_fields(compiled),
        'compile_seconds': compiled.seconds,
        'compilers': _versions('jax', 'jaxlib', *(() if topology.is_cpu else ('libtpu',))),
        **dict.fromkeys((
            'flops_per_step', 'hbm_bytes_per_step', 'bytes_accessed_per_step', 'collectives',
            'predicted_seconds', 'predicted_step_seconds', 'predicted_examples_per_second',
            'predicted_efficiency', 'bound',
            'predicted_hours', 'predicted_device_hours', 'measured_step_seconds',
        )),
    }  # fmt: skip
    if not compiled.fits:
        return row
    row['flops_per_step'] = compiled.flops
    row['hbm_bytes_per_step'] = compiled.hbm_bytes
    row['bytes_accessed_per_step'] = compiled.bytes_accessed
    row['collectives'] = [dataclasses.asdict(c) for c in compiled.collectives]
    if topology.is_cpu:
        measured = measure_on_cpu(config, sizes, mesh, compiled, say)
        if measured:
            row['measured_step_seconds'] = measured.seconds
            row |= _prediction_fields(compiled, measured.predicted)
    else:
        assert topology.chip is not None
        predicted = roofline.predict(
            topology.chip, topology, compiled.flops, compiled.hbm_bytes, compiled.collectives
        )
        row |= _prediction_fields(compiled, predicted)
    return row


def _why(compiled: Compiled) -> str:
    short = compiled.needed_bytes - compiled.limit_bytes
    text = f'{short / GIB:.2f} GiB too many a device; use more devices, or a smaller batch (see --fit)'
    plan = compiled.plan
    local_shards = plan.shards // (plan.num_devices * plan.accumulation_steps)
    if local_shards > 1:
        turns = next(n for n in range(2, local_shards + 1) if local_shards % n == 0) * plan.accumulation_steps
        text += f', or --config.accumulation_steps={turns}'
    return text


def _memory_fields(compiled: Compiled) -> dict[str, int | None]:
    parts = {'argument_bytes': 'arguments', 'temporary_bytes': 'temporaries', 'output_bytes': 'outputs'}
    return {
        'hbm_bytes': compiled.needed_bytes,
        'hbm_limit_bytes': compiled.limit_bytes,
        'hbm_headroom_bytes': compiled.limit_bytes - compiled.needed_bytes,
        **{
            field: getattr(compiled.memory, part, None)  # None where the compiler refuses
            for field, part in {**parts, 'code_bytes': 'code'}.items()
        },
    }


def _prediction_fields(compiled: Compiled, predicted: roofline.Prediction) -> dict[str, Any]:
    plan, seconds = compiled.plan, predicted.step_seconds
    hours = seconds * plan.num_steps / 3600
    return {
        'predicted_seconds': dataclasses.asdict(predicted),
        'predicted_step_seconds': seconds,
        'predicted_examples_per_second': plan.batch_size / seconds,
        'predicted_efficiency': predicted.efficiency,
        'bound': predicted.bound,
        'predicted_hours': hours,
        'predicted_device_hours': hours * plan.num_devices,
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a library named by TPU_LIBRARY_PATH
            found[package] = 'unknown'
    return found
