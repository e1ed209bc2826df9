"""Which processes make up this job, and do they agree?

A job of several processes is JAX's: one coordinator, run by process 0, and a key-value store there.
The store carries what is said before and beside the collectives; nothing here waits for ever.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from parallel_train.errors import UserError

START_TIMEOUT = 300  # seconds


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
    for find in (_slurm, _open_mpi, _cloud_tpu):
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
        raise UserError(
            f'process_id={process_id}: must be from 0 to num_processes - 1 = {num_processes - 1}'
        )


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
    if ',' in hosts or 'MEGASCALE_COORDINATOR_ADDRESS' in environ or os.path.exists('/dev/accel0'):
        return Cluster('Cloud TPU')
    return None


def start(cluster: Cluster, heartbeat_timeout: float, timeout: float, say: Callable[[str], None]) -> None:
    """Joins the job; JAX's backend must not run yet.

    Raises:
      UserError: the coordinator cannot be reached, or not all processes came in time.
    """
    import jax

    # Our own watch (lifeline.py) ends a job with a message that names the process that is gone; JAX's
    # would abort with a stack trace. JAX's stays as the last resort, a good deal later.
    jax.config.update('jax_enable_recoverability', True)
    jax.config.update('jax_enable_preemption_service', False)
    where = cluster.coordinator or 'found by JAX'
    if cluster.process_id:
        _await_coordinator(cluster.coordinator, timeout)
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=cluster.local_device_ids,
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=int(max(100, 3 * heartbeat_timeout)),
            shutdown_timeout_seconds=60,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f'coordinator={where}: the job cannot be joined within {timeout:g} s: '
            f'{str(error).strip().splitlines()[0]}. Are all processes started, with the same '
            '--num_processes? (On a TPU pod: the command on every worker, --worker=all)'
        ) from error
    if jax.process_index() == 0:
        say(f'{jax.process_count()} processes, found by {cluster.found_by}; coordinator {where}')


def _await_coordinator(address: str | None, timeout: float) -> None:
    """Waits until somebody listens there: JAX's client would end the process without a word of ours."""
    if address is None:
        return
    host, _, port = address.rpartition(':')
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f'coordinator={address!r}: cannot be reached within {timeout:g} s ({error}); is '
                    'process 0 started, is this its address, and does no firewall stand between?'
                ) from error
        time.sleep(0.2)


def count() -> int:
    import jax

    return jax.process_count() if client() is not None else 1


def index() -> int:
    import jax

    return jax.process_index() if client() is not None else 0


def is_first() -> bool:
    """Whether this process prints and writes for all."""
    return index() == 0


def client() -> Any:
    """Returns the client of the job's key-value store; None for a process on its own."""
    from jax._src import distributed  # JAX has no public name for it

    return distributed.global_state.client


def host() -> str:
    return socket.gethostname()


_shared = 0


def share(value: Callable[[], Any], timeout: float = START_TIMEOUT) -> Any:
    """Returns on every process what `value()` gives on process 0 (as JSON can hold it).

    Every process calls it, in the same order.
    """
    global _shared
    store = client()
    if store is None:
        return value()
    key, _shared = f'parallel_train/shared/{_shared}', _shared + 1
    if is_first():
        store.key_value_set(key, json.dumps(value()))
    return json.loads(store.blocking_key_value_get(key, int(timeout * 1000)))


def agree(facts: Callable[[], dict[str, Any]], timeout: float) -> None:
    """Checks that all processes are here and that their facts are equal, before any collective.

    Args:
      facts: what must be equal. A UserError that it raises is known to all processes, and raised there.
      timeout: seconds to wait for the last process.

    Raises:
      UserError: on every process; names the processes that did not come, or process and field that differ.
    """
    store = client()
    if store is None:
        facts()
        return
    try:
        mine: dict[str, Any] = {'facts': facts(), 'address': _address()}
    except UserError as error:
        mine = {'error': str(error)}
    store.key_value_set(f'parallel_train/facts/{index()}', json.dumps(mine))
    if is_first():
        store.key_value_set('parallel_train/verdict', _verdict(store, timeout))
    try:
        verdict = store.blocking_key_value_get('parallel_train/verdict', int((timeout + 30) * 1000))
    except Exception as error:  # of jaxlib's own kind
        raise UserError(f'process 0 ({timeout:g} s): did not say whether all processes agree') from error
    if verdict:
        raise UserError(verdict)


def _verdict(store: Any, timeout: float) -> str:
    """Returns '' where all processes agree with process 0, else what is wrong."""
    deadline = time.monotonic() + timeout
    all_facts, absent = [], []
    for process in range(count()):
        left = max(deadline - time.monotonic(), 0.1)
        try:
            text = store.blocking_key_value_get(f'parallel_train/facts/{process}', int(left * 1000))
            all_facts.append(json.loads(text))
        except Exception:  # a time-out, of jaxlib's own kind
            absent.append(process)
    if absent:
        names = ', '.join(map(str, absent))
        return f'process {names}: did not come within {timeout:g} s; see its own output'
    return differences(all_facts)


def differences(all_facts: list[dict[str, Any]]) -> str:
    """Returns what is wrong with the facts of processes 0, 1, ...: '' if nothing is."""
    for process, told in enumerate(all_facts):
        if 'error' in told:
            return told['error'] if process == 0 else f'process {process}: {told["error"]}'
    first = all_facts[0]
    for process, told in enumerate(all_facts):
        for field, value in first['facts'].items():
            if told['facts'].get(field) != value:
                return (
                    f'process {process}: {field} is {told["facts"].get(field)!r}, but process 0 has {value!r}; '
                    'start all processes with the same code, command and data'
                )
    hosts = {told['address'][0] for told in all_facts}
    for process, told in enumerate(all_facts):
        name, address = told['address']
        if len(hosts) > 1 and address.startswith('127.'):
            return (
                f'process {process}: its host name {name!r} means {address} there, which other hosts cannot '
                f'reach; in /etc/hosts of {name}, give {name} the address of its network interface'
            )
    return ''


def _address() -> tuple[str, str]:
    try:
        return host(), socket.gethostbyname(host())
    except OSError:
        return host(), 'unknown'
