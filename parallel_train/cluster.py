"""How are the processes of a job found? By flags, or by what a launcher puts into the environment."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from parallel_train.errors import UserError

# PCI device ids, as jax._src.hardware_utils knows them.
TPU_CHIPS = frozenset({'0x0027', '0x0056', '0x005e', '0x0062', '0x0063', '0x006f', '0x0076'})


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How the processes of a job were found. `coordinator` is None where JAX finds it by itself."""

    found_by: str
    num_processes: int | None = None
    process_id: int | None = None
    coordinator: str | None = None
    local_device_ids: tuple[int, ...] | None = None


def find_cluster(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environ: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """Returns the job that the flags or the environment tell of; None for a process on its own.

    Raises:
      UserError: flags or variables are missing, or contradict each other.
    """
    given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < len(given):
        if missing:
            raise UserError(
                f'{missing[0]}: is missing; a job is named by all of --coordinator=HOST:PORT, '
                '--num_processes=P and --process_id=I, or found by Slurm, Open MPI or Cloud TPU'
            )
        assert num_processes is not None and process_id is not None and coordinator is not None
        _check_named(coordinator, num_processes, process_id)
        return Cluster('flags', num_processes, process_id, coordinator)
    # In JAX's order, for JAX then looks by itself: what mpirun starts in a Slurm job is Open MPI's.
    for find in (_open_mpi, _slurm, _cloud_tpu):
        cluster = find(environ)
        if cluster:
            return cluster
    return None


def _check_named(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f'coordinator={coordinator!r}: must be HOST:PORT, the address of process 0')
    if num_processes < 1:
        raise UserError(f'num_processes={num_processes}: must be at least 1')
    if not 0 <= process_id < num_processes:
        raise UserError(f'process_id={process_id}: must be from 0 to num_processes - 1 = {num_processes - 1}')


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    tasks = environ.get('SLURM_STEP_NUM_TASKS')
    if 'SLURM_JOB_ID' not in environ:
        return None
    if tasks is None or 'SLURM_STEP_ID' not in environ:
        if int(environ.get('SLURM_NTASKS', '1')) > 1:
            raise UserError(
                f'SLURM_NTASKS={environ["SLURM_NTASKS"]}: the job has several tasks, but this process was '
                'not started by srun, so it would run alone; write `srun python -m parallel_train ...`'
            )
        return None
    wanted = environ.get('SLURM_NTASKS', tasks)
    if wanted != tasks:
        raise UserError(
            f'SLURM_NTASKS={wanted}: contradicts SLURM_STEP_NUM_TASKS={tasks}; unset SLURM_NTASKS, or '
            f'start as many tasks: srun --ntasks={wanted}'
        )
    if int(tasks) == 1:
        return None
    rank = environ.get('SLURM_PROCID', '')
    if not rank.isdigit() or int(rank) >= int(tasks):
        raise UserError(
            f'SLURM_PROCID={rank!r}: contradicts SLURM_STEP_NUM_TASKS={tasks}; it must be from 0 to '
            f'{int(tasks) - 1}; start the tasks with srun'
        )
    # JAX gives a Slurm task the GPU of its local number; the only task of a node has them all.
    per_node = environ.get('SLURM_STEP_TASKS_PER_NODE', '')
    alone = per_node.partition('(')[0] == '1' and ',' not in per_node
    return Cluster('Slurm', local_device_ids=_visible_gpus(environ) if alone else None)


def _visible_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    named = environ.get('CUDA_VISIBLE_DEVICES')
    if named is not None:
        count = len([name for name in named.split(',') if name.strip()])
    else:
        folder = '/proc/driver/nvidia/gpus'
        count = len(os.listdir(folder)) if os.path.isdir(folder) else 0
    return tuple(range(count)) or None


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    if int(environ.get('OMPI_COMM_WORLD_SIZE', '1')) < 2:
        return None
    if 'OMPI_MCA_orte_hnp_uri' not in environ:
        raise UserError(
            f'OMPI_COMM_WORLD_SIZE={environ["OMPI_COMM_WORLD_SIZE"]}: this Open MPI does not tell where its '
            'job runs (OMPI_MCA_orte_hnp_uri); give --coordinator=HOST:PORT, --num_processes and --process_id'
        )
    return Cluster('Open MPI')


def _cloud_tpu(environ: Mapping[str, str]) -> Cluster | None:
    hosts = environ.get('TPU_WORKER_HOSTNAMES', '')
    if ',' in hosts or 'MEGASCALE_COORDINATOR_ADDRESS' in environ or _has_tpu_chips():
        return Cluster('Cloud TPU')
    return None


def _has_tpu_chips(devices: Path = Path('/sys/bus/pci/devices')) -> bool:
    """Whether a TPU of v3 to v7x is on the PCI bus (the names of device files differ from kind to kind)."""
    return any(
        vendor.read_text().strip() == '0x1ae0' and (vendor.parent / 'device').read_text().strip() in TPU_CHIPS
        for vendor in devices.glob('*/vendor')
    )
