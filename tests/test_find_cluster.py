"""How the processes of a job are found: what flags and the variables of each launcher come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel_train import cluster
from parallel_train.cluster import Cluster, find_cluster
from parallel_train.cluster import _has_tpu_chips as has_tpu_chips
from parallel_train.errors import UserError

SLURM = {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_ID': '0',
    'SLURM_STEP_NUM_TASKS': '4',
    'SLURM_NTASKS': '4',
    'SLURM_PROCID': '3',
    'SLURM_STEP_TASKS_PER_NODE': '2(x2)',
}
OPEN_MPI = {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1:34911'}
TPU = {'TPU_WORKER_HOSTNAMES': '10.0.0.1,10.0.0.2'}
TPU_SLICES = {'TPU_WORKER_HOSTNAMES': '10.0.0.1', 'MEGASCALE_COORDINATOR_ADDRESS': '10.0.0.1:8080'}


@pytest.fixture(autouse=True)
def _no_chips_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine of the tests has."""
    monkeypatch.setattr(cluster, '_has_tpu_chips', lambda: False)


def found(environ: dict[str, str]) -> Cluster | None:
    return find_cluster(None, None, None, environ)


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ('environ', 'by'),
    [
        ({}, None),
        (SLURM, 'Slurm'),
        ({**SLURM, 'SLURM_PROCID': '0'}, 'Slurm'),
        ({**SLURM, 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, None),
        ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '1'}, None),  # a batch script of one task, without srun
        ({'SLURM_JOB_ID': '7'}, None),
        (without(SLURM, 'SLURM_JOB_ID'), None),
        (OPEN_MPI, 'Open MPI'),
        ({**OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '1'}, None),
        (TPU, 'Cloud TPU'),
        (TPU_SLICES, 'Cloud TPU'),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),  # one host, and no chips here: see the fixture
        # Of two launchers, the first in JAX's order, for JAX then asks that one.
        ({**SLURM, **OPEN_MPI, **TPU}, 'Open MPI'),
        ({**SLURM, **TPU}, 'Slurm'),
        # mpirun in a Slurm job: on the node of its script, and where it had srun start its daemons.
        ({**without(SLURM, 'SLURM_STEP_ID', 'SLURM_STEP_NUM_TASKS'), **OPEN_MPI}, 'Open MPI'),
        ({**SLURM, 'SLURM_STEP_NUM_TASKS': '1', **OPEN_MPI}, 'Open MPI'),
    ],
)
def test_who_is_found_in_the_environment(environ: dict[str, str], by: str | None) -> None:
    """JAX finds number and address of the processes itself, so nothing else is said."""
    assert found(environ) == (None if by is None else Cluster(by))


def test_the_order_of_launchers_is_that_of_jax() -> None:
    clusters = pytest.importorskip('jax._src.clusters')
    known = [launcher.name for launcher in clusters.ClusterEnv._cluster_types]
    assert known.index('ompi') < known.index('slurm') < known.index('gcetpu')


@pytest.mark.parametrize(
    ('environ', 'words'),
    [
        ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4'}, ['SLURM_NTASKS=4', 'write `srun python']),
        (without(SLURM, 'SLURM_STEP_ID'), ['SLURM_NTASKS=4', 'not started by srun']),
        ({**SLURM, 'SLURM_NTASKS': '8'}, ['SLURM_NTASKS=8', 'SLURM_STEP_NUM_TASKS=4', 'srun --ntasks=8']),
        ({**SLURM, 'SLURM_PROCID': '4'}, ["SLURM_PROCID='4'", 'from 0 to 3']),
        ({**SLURM, 'SLURM_PROCID': '-1'}, ["SLURM_PROCID='-1'", 'from 0 to 3']),
        (without(SLURM, 'SLURM_PROCID'), ["SLURM_PROCID=''", 'from 0 to 3']),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, ['OMPI_COMM_WORLD_SIZE=2', 'give --coordinator=HOST:PORT']),
    ],
)
def test_variables_that_contradict_each_other(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        found(environ)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ('per_node', 'visible', 'ids'),
    [
        ('1(x4)', '0,1,2', (0, 1, 2)),  # the only task of its node has all GPUs of it
        ('1(x4)', 'GPU-a, GPU-b', (0, 1)),
        ('1(x4)', '', None),
        ('4', '0,1,2', None),  # else JAX gives each the one of its local number
        ('2(x2)', '0,1,2', None),
        ('1,3', '0,1,2', None),
        ('1(x2),2', '0,1,2', None),
        ('12(x2)', '0,1,2', None),
        (None, '0,1,2', None),
    ],
)
def test_gpus_of_a_slurm_task(per_node: str | None, visible: str, ids: tuple[int, ...] | None) -> None:
    environ = {**without(SLURM, 'SLURM_STEP_TASKS_PER_NODE'), 'CUDA_VISIBLE_DEVICES': visible}
    if per_node is not None:
        environ['SLURM_STEP_TASKS_PER_NODE'] = per_node
    assert found(environ) == Cluster('Slurm', local_device_ids=ids)


@pytest.mark.parametrize('environ', [{}, SLURM, {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4'}, OPEN_MPI, TPU])
@pytest.mark.parametrize('address', ['host:1234', '10.0.0.1:65535', '[::1]:1'])
def test_flags_come_before_the_environment(address: str, environ: dict[str, str]) -> None:
    assert find_cluster(address, 4, 3, environ) == Cluster('flags', 4, 3, address)
    assert find_cluster(address, 1, 0, environ) == Cluster('flags', 1, 0, address)


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ((None, 2, 0), 'coordinator: is missing'),
        (('a:1', None, 0), 'num_processes: is missing'),
        (('a:1', 2, None), 'process_id: is missing'),
        ((None, None, 0), 'coordinator: is missing'),
        *[((bad, 2, 0), f'coordinator={bad!r}: must be') for bad in ('a', ':1', 'a:', 'a:b', 'a:0', 'a:-1')],
        (('a:65536', 2, 0), "coordinator='a:65536': must be HOST:PORT"),
        (('a:1', 0, 0), 'num_processes=0: must be at least 1'),
        (('a:1', 2, 2), 'process_id=2: must be from 0 to num_processes - 1 = 1'),
        (('a:1', 2, -1), 'process_id=-1: must be from 0'),
    ],
)
@pytest.mark.parametrize('environ', [{}, SLURM])  # which does not make up for what is missing
def test_flags_that_do_not_name_a_job(flags: tuple[Any, Any, Any], words: str, environ: Any) -> None:
    with pytest.raises(UserError) as error:
        find_cluster(*flags, environ)
    assert str(error.value).startswith(words)


# ---------------------------------------------------------------- TPU chips


@pytest.fixture
def bus(tmp_path: Path) -> Path:
    """A PCI bus without a TPU: a GPU, and what else of Google's a host of theirs may have."""
    add(tmp_path, '0000:00:04.0', '0x10de', '0x0063')
    add(tmp_path, '0000:00:05.0', '0x1ae0', '0x0042')
    return tmp_path


def add(bus: Path, name: str, vendor: str, device: str) -> None:
    (bus / name).mkdir()
    (bus / name / 'vendor').write_text(f'{vendor}\n')
    (bus / name / 'device').write_text(f'{device}\n')


@pytest.mark.parametrize('chip', sorted(cluster.TPU_CHIPS))
def test_tpu_chips_are_found_on_the_bus(chip: str, bus: Path) -> None:
    assert not has_tpu_chips(bus) and not has_tpu_chips(bus / 'none')
    add(bus, '0000:00:06.0', '0x1ae0', chip)
    assert has_tpu_chips(bus)


def test_tpu_chips_are_those_that_jax_knows() -> None:
    hardware_utils = pytest.importorskip('jax._src.hardware_utils')
    assert set(hardware_utils._TPU_PCI_DEVICE_IDS) == cluster.TPU_CHIPS


def test_a_host_with_tpu_chips_is_a_cloud_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is the only one: JAX then asks for the number of hosts."""
    monkeypatch.setattr(cluster, '_has_tpu_chips', lambda: True)
    assert found({}) == Cluster('Cloud TPU')
    assert found(SLURM) == Cluster('Slurm')
