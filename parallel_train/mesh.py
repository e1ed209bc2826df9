"""On which devices does it run, and what lies where?"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel_train import processes
from parallel_train.errors import UserError
from parallel_train.machine import cores, keep_freed_memory
from parallel_train.reduce import DATA_AXIS

# Threads in the pool of XLA's CPU client, at least. The size of the pool changes the last bits of some
# results, so with reduction='tree' it follows neither cores nor devices: it is that of a device a shard.
MIN_CPU_THREADS = 16
MAX_CPU_DEVICES = 1024  # each takes two threads
_SAME_BITS_ON_GPUS = '--xla_gpu_deterministic_ops=true'


def start_devices(cpu_devices: int, tree_shards: int = 0) -> None:
    """Starts JAX's backend, with `cpu_devices` XLA devices in all processes if that is the CPU.

    On CPU the pool of XLA's client is given two threads or more a device. It runs each device's program
    as a task, which holds its thread while the program waits in an all-reduce; and once 32 programs
    are queued for a device, the task of the next holds another thread until a place is free. With
    fewer than two threads a device, those two can take the whole pool while the program that all wait
    for has no thread to run on: XLA aborts after 40 seconds. The pool's size is read from the
    environment variable NPROC when the client starts. Memory that a step frees stays with the process, for
    the next step (machine.py).

    Args:
      cpu_devices: over all processes.
      tree_shards: of the config, with reduction='tree'; 0 without, where the pool's size may follow the
        number of cores and devices.

    Raises:
      UserError: the backend runs already, on the CPU, with fewer devices or a pool that can hang; or the
        processes of the job cannot have as many each.
    """
    if cpu_devices > MAX_CPU_DEVICES:
        raise UserError(f'devices={cpu_devices}: must be at most {MAX_CPU_DEVICES}')
    if cpu_devices % processes.count():
        raise UserError(
            f'devices={cpu_devices}: must be a multiple of the {processes.count()} processes, which share '
            'them'
        )
    if backend_runs():
        if jax.default_backend() == 'cpu':
            _check_running_cpu_client(cpu_devices, tree_shards)
            keep_freed_memory()
        _check_gpu_flags(tree_shards)
        return
    here = cpu_devices // processes.count()
    jax.config.update('jax_num_cpu_devices', here)
    os.environ['NPROC'] = str(_threads(here, tree_shards))
    if jax.default_backend() == 'cpu':  # which starts it
        keep_freed_memory()
    _check_gpu_flags(tree_shards)


def _threads(devices_here: int, tree_shards: int) -> int:
    least = max(MIN_CPU_THREADS, 2 * devices_here)
    return max(least, 2 * tree_shards if tree_shards else _default_threads())


def _check_gpu_flags(tree_shards: int) -> None:
    """Warns where two runs would not have the same bits: kernels add in the order in which threads arrive."""
    flags = os.environ.get('XLA_FLAGS', '')
    if tree_shards and jax.default_backend() == 'gpu' and _SAME_BITS_ON_GPUS not in flags:
        warnings.warn(
            "reduction='tree': on GPUs no two runs have the same bits without "
            f'XLA_FLAGS={_SAME_BITS_ON_GPUS} in the environment',
            stacklevel=3,
        )


def _default_threads() -> int:
    asked = os.environ.get('NPROC', '')
    return int(asked) if asked.isdigit() else cores()


def backend_runs() -> bool:
    """Whether JAX has started its backend, so that the number of CPU devices is settled."""
    number: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        # Refused once the backend runs, unless it is the number there is: hence another one first.
        jax.config.update('jax_num_cpu_devices', number + 1 if number > 0 else 1)
        jax.config.update('jax_num_cpu_devices', number)
    except RuntimeError:
        return True
    return False


def usable_cpu_devices() -> int:
    """Returns how many devices of a running CPU backend can be used without the risk of a hang."""
    return max(1, min(len(jax.devices()), _default_threads() // 2))


def _check_running_cpu_client(cpu_devices: int, tree_shards: int) -> None:
    if len(jax.devices()) < cpu_devices:
        raise UserError(
            f'devices={cpu_devices}: JAX runs already with {len(jax.devices())} CPU devices; call '
            f'parallel_train.start_devices({cpu_devices}) before anything else uses JAX'
        )
    threads = _default_threads()
    if cpu_devices > 1 and threads < 2 * cpu_devices:
        raise UserError(
            f'devices={cpu_devices}: JAX runs already with a pool of {threads} threads, which can hang '
            f'with fewer than {2 * cpu_devices}; call parallel_train.start_devices({cpu_devices}) '
            f'before anything else uses JAX, or set NPROC={2 * cpu_devices} in the environment'
        )
    if tree_shards and threads != _threads(cpu_devices, tree_shards):
        warnings.warn(
            f"reduction='tree': JAX runs already with a pool of {threads} threads: the bits will be those of "
            f'runs with as many; call parallel_train.start_devices({cpu_devices}, {tree_shards}) before '
            'anything else uses JAX',
            stacklevel=3,
        )


def make_mesh(num_devices: int) -> Mesh:
    """Returns a mesh with one axis over the first `num_devices` devices.

    Raises:
      UserError: there are not that many.
    """
    devices = jax.devices()
    if not 1 <= num_devices <= len(devices):
        raise UserError(
            f'devices={num_devices}: there are {len(devices)} {devices[0].platform} devices; '
            f'use 1 to {len(devices)}'
        )
    if num_devices < len(devices) and processes.count() > 1:
        raise UserError(
            f'devices={num_devices}: a job of {processes.count()} processes uses all of their {len(devices)} '
            f'{devices[0].platform} devices; leave it out, or start other processes'
        )
    return jax.make_mesh(
        (num_devices,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:num_devices]
    )


def is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == 'cpu'


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: the state, the dataset."""
    return NamedSharding(mesh, P())


def put(mesh: Mesh, shape: tuple[int, ...], spec: P, part: Callable[[Any], np.ndarray]) -> jax.Array:
    """Puts an array on the mesh: the one way from host memory to the devices.

    Args:
      mesh: the mesh.
      shape: the shape of the whole array.
      spec: how it is cut.
      part: from a tuple of slices of the whole array to that part of it. Called for the devices of
        this process alone, so that no process needs the parts of others.
    """
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)


def put_whole(mesh: Mesh, array: np.ndarray, spec: P | None = None) -> jax.Array:
    """Puts an array that this process holds whole, cut as `spec` says (replicated without)."""
    return put(mesh, array.shape, P() if spec is None else spec, lambda index: array[index])
