"""Real clusters on this machine, from Debian's packages: Slurm with preemption and limits, Open MPI."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import NUM_STEPS, ROOT, STEPS_PER_EPOCH, environment, read_rows

pytestmark = pytest.mark.slow
Submit = Callable[..., str]
SLURM = ('slurmctld', 'slurmd', 'sbatch', 'munged')
# One node that is this machine; a queue whose jobs are put back when one of the other queue comes.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge,cred_expire=5
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/linear
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=3600
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 OverSubscribe=NO
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF OverSubscribe=NO
"""
# A job of several processes that saves what it did: counts to `steps`, a file a step; at SIGTERM it exits 75.
# Any start goes on where the one before ended.
PROGRAM = """
import json, os, pathlib, signal, sys, time

folder, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
rank = os.environ['SLURM_PROCID']
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
keys = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_RESTART_COUNT')
with open(folder / f'starts-{rank}', 'a') as starts:
    starts.write(json.dumps({key: os.environ.get(key) for key in keys}) + '\\n')
done = len(list(folder.glob(f'step-{rank}-*')))
print(f'process {rank} begins at {done}', flush=True)
for step in range(done, steps):
    time.sleep(0.1)
    (folder / f'step-{rank}-{step}').touch()
    if stop:
        print(f'process {rank} saved {step + 1}', flush=True)
        sys.exit(75)
sys.exit(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
"""


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A running Slurm of one node."""

    folder: Path
    env: dict[str, str]

    def call(self, *command: str | Path, cwd: Path | None = None) -> str:
        done = subprocess.run(
            list(map(str, command)),
            env=self.env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f'{command}: {done.stdout}{done.stderr}'
        return done.stdout.strip()

    def state(self, job: str) -> str:
        shown = self.call('scontrol', '--oneliner', 'show', 'job', job)
        return dict(word.partition('=')[::2] for word in shown.split())['JobState']

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> str:
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, f'job {job} is {state}, not {states}'
            time.sleep(0.5)
        return state


@pytest.fixture(scope='module')
def slurm() -> Iterator[Slurm]:
    """munged, slurmctld and slurmd of our own, in a folder, on free ports of the loopback."""
    if os.geteuid() != 0:
        pytest.skip('slurmd needs root')
    missing = [name for name in SLURM if not shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin')]
    if missing:
        pytest.skip(f'not installed: {", ".join(missing)} (Debian: slurm-wlm, munge)')
    folder = Path(tempfile.mkdtemp(prefix='slurm-', dir='/tmp'))  # a socket's path must be short
    folder.chmod(0o755)
    for name in ('state', 'spool'):
        (folder / name).mkdir()
    (folder / 'key').write_bytes(secrets.token_bytes(1024))
    (folder / 'key').chmod(0o400)
    host = socket.gethostname().partition('.')[0]
    config = folder / 'slurm.conf'
    config.write_text(CONFIG.format(folder=folder, host=host, ports=free_ports(2)))
    env = {**environment(), 'SLURM_CONF': str(config), 'PATH': f'{os.environ["PATH"]}:/usr/sbin'}
    files = [f'--{name}={folder / name}' for name in ('pid-file', 'log-file', 'seed-file')]
    daemons = [
        ['munged', '--foreground', '--force', f'--key-file={folder}/key', f'--socket={folder}/munge', *files],
        ['slurmctld', '-D', '-f', str(config)],
        ['slurmd', '-D', '-f', str(config), '-N', host],
    ]
    running = []
    try:
        for command in daemons:
            log = open(folder / f'{command[0]}.log', 'w')
            running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            if command[0] == 'munged':
                wait_until((folder / 'munge').exists, 'munged', folder)
        cluster = Slurm(folder, env)
        wait_until(lambda: node_is_idle(cluster), 'the node', folder)
        yield cluster
    finally:
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def node_is_idle(cluster: Slurm) -> bool:
    done = subprocess.run(
        ['sinfo', '-h', '-o', '%T'], env=cluster.env, capture_output=True, text=True, check=False
    )
    return 'idle' in done.stdout


def wait_until(is_so: Callable[[], bool], what: str, folder: Path) -> None:
    end = time.monotonic() + 60
    while not is_so():
        logs = '\n'.join(f'{file.name}:\n{file.read_text()[-2000:]}' for file in folder.glob('*.log'))
        assert time.monotonic() < end, f'{what} did not come up\n{logs}'
        time.sleep(0.2)


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path) -> Submit:
    """Submits launch/slurm.sbatch with two tasks, and our program in the place of parallel_train."""
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM)
    python = (
        tmp_path / 'python'
    )  # called as: python -u -m parallel_train ARGUMENTS, and to look for the package
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nshift 3\nexec {sys.executable} -u {program} "$@"\n'
    )
    python.chmod(0o755)

    def start(*arguments: str, flags: tuple[str, ...] = (), **env: str) -> str:
        exported = ','.join(['ALL', f'PYTHON={python}', *(f'{key}={value}' for key, value in env.items())])
        script = ROOT / 'launch' / 'slurm.sbatch'
        command = ['sbatch', '--parsable', '--ntasks-per-node=2', f'--export={exported}', *flags]
        return slurm.call(*command, script, *arguments, cwd=tmp_path)

    return start


def starts(folder: Path, rank: int) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f'starts-{rank}').read_text().splitlines()]


def test_two_tasks_run_to_completion(slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    job = submit(str(tmp_path), '3')
    assert slurm.wait_for(job, 'COMPLETED', 'FAILED') == 'COMPLETED'
    for rank in range(2):
        (begun,) = starts(tmp_path, rank)  # all that JAX needs to find the job
        assert begun['SLURM_JOB_ID'] == job and begun['SLURM_NTASKS'] == '2'
        assert begun['SLURM_LOCALID'] == str(rank) and begun['SLURM_STEP_NODELIST']
    log = (tmp_path / f'parallel_train-{job}.log').read_text()
    assert '0: process 0 begins at 0' in log and '1: process 1 begins at 0' in log


def test_preempted_queued_again_and_completed(slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    job = submit(str(tmp_path), '100')
    wait_for_steps(tmp_path)
    urgent = slurm.call('sbatch', '--parsable', '--partition=high', '--wrap=sleep 3', cwd=tmp_path)
    slurm.wait_for(urgent, 'RUNNING', 'COMPLETED')
    assert slurm.state(job) == 'PENDING'
    assert slurm.wait_for(job, 'COMPLETED', 'FAILED') == 'COMPLETED'
    log = (tmp_path / f'parallel_train-{job}.log').read_text()
    for rank in range(2):
        first, second = starts(tmp_path, rank)
        assert (first['SLURM_RESTART_COUNT'], second['SLURM_RESTART_COUNT']) == (None, '1')
        assert len(list(tmp_path.glob(f'step-{rank}-*'))) == 100
        assert f'{rank}: process {rank} saved' in log


def test_the_time_limit_saves_and_queues_again(slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    # Slurm signals within a minute of the time asked for: at most 120 s before the end of 2 minutes.
    job = submit(str(tmp_path), '300', flags=('--time=2', '--signal=TERM@100'))
    assert slurm.wait_for(job, 'COMPLETED', 'FAILED', 'TIMEOUT', seconds=300) == 'COMPLETED'
    log = (tmp_path / f'parallel_train-{job}.log').read_text()
    assert 'exit code 75: queued again (restart 1' in log
    assert len(starts(tmp_path, 0)) >= 2


@pytest.mark.parametrize(('code', 'runs'), [(2, 1), (3, 1), (1, 3)])
def test_faults_are_queued_again_and_verdicts_are_final(
    slurm: Slurm, submit: Submit, tmp_path: Path, code: int, runs: int
) -> None:
    job = submit(str(tmp_path), '1', str(code), MAX_RESTARTS='2')
    slurm.wait_for(job, 'FAILED')
    shown = slurm.call('scontrol', 'show', 'job', job)
    assert f'ExitCode={code}:0' in shown
    assert len(starts(tmp_path, 0)) == runs


def test_a_cancelled_job_stays_cancelled(slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    job = submit(str(tmp_path), '1000')
    wait_for_steps(tmp_path)
    slurm.call('scancel', job)
    slurm.wait_for(job, 'CANCELLED')
    time.sleep(5)
    assert slurm.state(job) == 'CANCELLED'
    assert len(starts(tmp_path, 0)) == 1


def test_the_true_job_goes_on_after_preemption(
    slurm: Slurm, tmp_path: Path, recipe: Path, data_dir: Path
) -> None:
    pytest.importorskip('parallel_train.cluster', reason='one process only')
    workdir = tmp_path / 'run'
    flags = [f'--config={recipe}', f'--workdir={workdir}', f'--data_dir={data_dir}', '--devices=2']
    command = ['sbatch', '--parsable', '--ntasks-per-node=2', f'--export=ALL,PYTHON={sys.executable}']
    script = ROOT / 'launch' / 'slurm.sbatch'
    job = slurm.call(*command, script, 'train', *flags, '--config.num_epochs=6', cwd=tmp_path)
    log = tmp_path / f'parallel_train-{job}.log'
    end = time.monotonic() + 120
    rows = workdir / 'metrics.jsonl'
    while not (rows.exists() and rows.stat().st_size):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    slurm.call('sbatch', '--parsable', '--partition=high', '--wrap=true', cwd=tmp_path)
    assert slurm.wait_for(job, 'COMPLETED', 'FAILED', seconds=300) == 'COMPLETED', log.read_text()
    assert '2 processes, found by Slurm' in log.read_text()
    assert 'exit code 75: queued again' in log.read_text() and '0: resuming from step' in log.read_text()
    steps = [row['step'] for row in read_rows(workdir) if row['split'] == 'train']
    assert steps == sorted(set(steps)) and steps[-1] == 6 * STEPS_PER_EPOCH


def wait_for_steps(folder: Path) -> None:
    end = time.monotonic() + 60
    while not all(list(folder.glob(f'step-{rank}-*')) for rank in range(2)):
        assert time.monotonic() < end
        time.sleep(0.1)


def mpirun(*command: str | Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which('mpirun'):
        pytest.skip('not installed: mpirun (Debian: openmpi-bin)')
    start = ['mpirun', '--oversubscribe', '-n', '2', sys.executable]
    env = environment(OMPI_ALLOW_RUN_AS_ROOT='1', OMPI_ALLOW_RUN_AS_ROOT_CONFIRM='1')
    return subprocess.run(
        [*start, *map(str, command)], capture_output=True, text=True, timeout=300, env=env, check=False
    )


DETECT = """
from jax._src.clusters import ClusterEnv
import jax._src.distributed, pathlib, sys
found = next(env for env in ClusterEnv._cluster_types if env.is_env_present())
rank = found.get_process_id()
words = found.name, found.get_process_count(), rank, found.get_coordinator_address(10, None)
pathlib.Path(sys.argv[1], f'rank{rank}').write_text(' '.join(map(str, words)))
"""


def test_mpirun_is_what_jax_knows(tmp_path: Path) -> None:
    # A file each: what they print is joined wherever their writes end, in the middle of a line too.
    done = mpirun('-c', DETECT, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [(tmp_path / f'rank{rank}').read_text().split() for rank in range(2)]
    assert [words[:3] for words in lines] == [['ompi', '2', '0'], ['ompi', '2', '1']]
    assert lines[0][3] == lines[1][3]


def test_the_true_job_under_mpirun(tmp_path: Path, recipe: Path, data_dir: Path) -> None:
    pytest.importorskip('parallel_train.cluster', reason='one process only')
    flags = [f'--config={recipe}', f'--workdir={tmp_path / "run"}', f'--data_dir={data_dir}', '--devices=2']
    done = mpirun('-m', 'parallel_train', 'train', *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '2 processes, found by Open MPI' in done.stdout
    assert read_rows(tmp_path / 'run')[-1]['step'] == NUM_STEPS
