"""Pull any plug, lose nothing: damaged checkpoints, full disks, lost folders, jumping clocks, SIGKILL."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import (
    NUM_STEPS,
    ROOT,
    Job,
    checkpoint_steps,
    cli,
    environment,
    make_tiny_job,
    read_rows,
    restore,
    run_cli,
    run_ok,
    snapshot,
    without_timing,
)
from tests.test_processes import Processes, free_port, start  # noqa: F401, a fixture
from tests.test_resume import assert_same_run, copy, last_row_step


@pytest.fixture(scope='module')
def tiny_job(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, models_dir: Path) -> Job:
    """The tiny model (BatchNorm, dropout), with augmentation."""
    return make_tiny_job(tmp_path_factory.mktemp('recipe'), data_dir, models_dir, 'config.random_flip = True')


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_job: Job) -> Path:
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    run_ok(*tiny_job.train(workdir), env=tiny_job.env)
    assert checkpoint_steps(workdir) == [42, 48, 50]
    return workdir


# ---------------------------------------------------------------- damaged checkpoints


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b'')


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def flip_all(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 0x55 for byte in path.read_bytes()))


Damage = Callable[[Path], None]
DAMAGES: tuple[Damage, ...] = (remove, truncate, empty, flip_a_bit, flip_all)


def largest_file(checkpoint: Path) -> Path:
    """The one with the parameters."""
    files = [path for path in checkpoint.rglob('*') if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        name: content
        for name, (_, content) in snapshot(folder).items()
        if not name.startswith(('.lock', 'e'))
    }


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # what TensorStore leaves unawaited after a read that failed
@pytest.mark.parametrize('damage', DAMAGES)
def test_no_damage_to_any_file_gives_another_state(
    damage: Damage, tiny_job: Job, undisturbed: Path, tmp_path: Path
) -> None:
    """Each file of a checkpoint in turn: either all arrays are what was saved, or the one before is used."""
    from parallel_train import start_devices

    start_devices(8)
    import jax

    from parallel_train import workdir as workdir_lib
    from parallel_train.checkpoint import open_checkpoints
    from parallel_train.mesh import make_mesh, replicated
    from parallel_train.state import abstract_state, saved_parts

    os.sys.path.insert(0, tiny_job.env['PYTHONPATH'].split(os.pathsep)[1])
    config = workdir_lib.read_config(undisturbed)
    template, sharding = abstract_state(config, lambda _: 0.0), replicated(make_mesh(2))

    def latest(workdir: Path) -> tuple[list[np.ndarray], list[str]]:
        said: list[str] = []
        with open_checkpoints(workdir, keep=3, say=said.append) as checkpoints:
            state = checkpoints.restore_latest(template, sharding)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(saved_parts(state))], said

    def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
        return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))

    last, _ = latest(undisturbed)
    shutil.copytree(undisturbed / 'checkpoints', tmp_path / 'before' / 'checkpoints')
    shutil.rmtree(tmp_path / 'before' / 'checkpoints' / '50')
    before, _ = latest(tmp_path / 'before')
    assert not same(last, before)
    names = [
        p.relative_to(undisturbed) for p in (undisturbed / 'checkpoints' / '50').rglob('*') if p.is_file()
    ]
    assert len(names) >= 10
    noticed = set()
    for name in names:
        workdir = tmp_path / 'run'
        shutil.copytree(undisturbed / 'checkpoints', workdir / 'checkpoints')
        damage(workdir / name)
        got, said = latest(workdir)
        if said:
            noticed.add(name)
            [line] = said
            assert line.startswith('warning: checkpoint 50 is damaged ('), (name, line)
            assert line.endswith('; going on from the one before') and '\n' not in line
            assert same(got, before), name
            assert checkpoint_steps(workdir) == [42, 48]
            assert [path.name for path in (workdir / 'damaged').iterdir()] == ['50']
        else:  # a file that nothing is read from
            assert same(got, last), name
        shutil.rmtree(workdir)
    kinds = {'_CHECKPOINT_METADATA', '_METADATA', 'manifest.ocdbt'}
    assert kinds <= {name.name for name in noticed} and len(noticed) >= 5


@pytest.mark.parametrize(('damage', 'steps'), [(remove, [50]), (flip_a_bit, [48, 50])])
def test_a_damaged_checkpoint_is_said_and_the_one_before_used(
    damage: Damage, steps: list[int], tiny_job: Job, undisturbed: Path, tmp_path: Path
) -> None:
    workdir = copy(undisturbed, tmp_path / 'run')
    damaged = {}
    for step in steps:
        damage(largest_file(workdir / 'checkpoints' / str(step)))
        damaged[step] = files_of(workdir / 'checkpoints' / str(step))
    result = run_ok(*tiny_job.train(workdir), env=tiny_job.env)
    for step in steps:
        assert f'warning: checkpoint {step} is damaged (' in result.stdout
        assert files_of(workdir / 'damaged' / str(step)) == damaged[step]  # kept, to be looked at
    assert f'resuming from step {max(s for s in (42, 48) if s not in steps)} of {NUM_STEPS}' in result.stdout
    assert_same_run(workdir, undisturbed)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('broken', [1, 3])
def test_a_checkpoint_without_its_arrays_spoils_no_other(broken: int, tmp_path: Path) -> None:
    """A SIGKILL while an old one is deleted leaves such a part: from it nobody can tell what kind it was."""
    from parallel_train import config as config_lib
    from parallel_train import start_devices

    start_devices(8)
    from parallel_train.checkpoint import open_checkpoints
    from parallel_train.mesh import make_mesh, replicated
    from parallel_train.replicas import digest
    from parallel_train.state import abstract_state, initialise

    config = config_lib.with_dataset(config_lib.complete(config_lib.default_config()), (28, 28, 1), 10)
    mesh, said = make_mesh(2), []
    state = initialise(config, lambda _: 0.0, mesh)
    with open_checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, state, digest(state))
    shutil.rmtree(tmp_path / 'checkpoints' / str(broken) / 'default')
    with open_checkpoints(tmp_path, keep=3, say=said.append) as checkpoints:
        found = checkpoints.restore_latest(abstract_state(config, lambda _: 0.0), replicated(mesh))
        assert found is not None and checkpoints.latest_step() == (2 if broken == 3 else 3)
    assert len(said) == (broken == 3)


def test_nothing_is_changed_where_all_checkpoints_are_damaged(
    tiny_job: Job, undisturbed: Path, tmp_path: Path
) -> None:
    workdir = copy(undisturbed, tmp_path / 'run')
    for step, damage in zip((42, 48, 50), (remove, truncate, flip_a_bit), strict=True):
        damage(largest_file(workdir / 'checkpoints' / str(step)))
    before = files_of(workdir)
    result = run_cli(*tiny_job.train(workdir), env=tiny_job.env)
    assert result.code == 2, result
    assert 'error: workdir=' in result.stderr and 'none of its checkpoints, 42, 48, 50,' in result.stderr
    assert 'is not what was saved' in result.stderr
    assert files_of(workdir) == before


def test_damage_of_every_array_at_once_is_said_in_a_line(
    tiny_job: Job, undisturbed: Path, tmp_path: Path
) -> None:
    """TensorStore's threads answer for each array, also after Orbax gave up at the first."""
    workdir = copy(undisturbed, tmp_path / 'run')
    manifests = list(workdir.glob('checkpoints/*/default/manifest.ocdbt'))
    assert len(manifests) == 3
    for manifest in manifests:
        manifest.unlink()
    result = run_cli(*tiny_job.train(workdir), env=tiny_job.env)
    assert result.code == 2 and 'none of its checkpoints, 42, 48, 50,' in result.stderr, result
    assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1, result
    assert 'tensorstore_spec' not in result.stderr


def test_a_damaged_checkpoint_is_not_evaluated_or_loaded(
    tiny_job: Job, undisturbed: Path, tmp_path: Path
) -> None:
    workdir = copy(undisturbed, tmp_path / 'run')
    flip_a_bit(largest_file(workdir / 'checkpoints' / '50'))
    before = files_of(workdir)
    evaluate = ['evaluate', f'--workdir={workdir}', f'--data_dir={tiny_job.data_dir}', '--devices=1']
    result = run_cli(*evaluate, env=tiny_job.env)
    assert result.code == 2, result
    assert 'error: ' in result.stderr and 'checkpoint 50' in result.stderr and 'damaged' in result.stderr
    run_ok(*evaluate, '--step=48', env=tiny_job.env)
    load = f'from parallel_train import load_model; load_model({str(workdir)!r})'
    loading = subprocess.run(
        [cli()[0], '-c', load], env=tiny_job.env, capture_output=True, text=True, check=False
    )
    assert loading.returncode != 0 and 'UserError: ' in loading.stderr and 'checkpoint 50' in loading.stderr
    assert files_of(workdir) == before


# ---------------------------------------------------------------- a full disk

# Said at each save for as long as the rows up to it are not on disk, without which none is begun.
NO_ROWS = ' could not be written: metrics.jsonl: No space left on device'


def assert_same_end(workdir: Path, reference: Path) -> None:
    """As `assert_same_run`, where a checkpoint on the way may be missing."""
    assert without_timing(read_rows(workdir)) == without_timing(read_rows(reference))
    last = max(checkpoint_steps(reference))
    got, want = restore(workdir, last), restore(reference, last)
    assert got.keys() == want.keys()
    assert not [name for name in want if got[name].tobytes() != want[name].tobytes()]


class SmallDisk:
    """A file system of its own size, mounted where only the processes that `inside` starts see it."""

    def __init__(self, folder: Path, size: str):
        folder.mkdir()
        self.inner = folder
        private = ['unshare', '--mount'] if os.geteuid() == 0 else ['unshare', '--map-root-user', '--mount']
        script = 'mount -t tmpfs -o size="$1" tmpfs "$0" && echo mounted && exec cat'
        self._holder = subprocess.Popen(
            [*private, 'sh', '-c', script, str(folder), size],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self._holder.stdout.readline() != 'mounted\n':
            self.close()
            pytest.skip(f'a file system cannot be mounted here: {self._holder.stderr.read().strip()}')
        self.path = Path(f'/proc/{self._holder.pid}/root{folder}')  # as seen from outside

    def inside(self, command: list[str]) -> list[str]:
        enter = ['nsenter', f'--target={self._holder.pid}', '--mount', f'--wd={ROOT}']
        return [*(enter if os.geteuid() == 0 else [*enter, '--user', '--preserve-credentials']), *command]

    def fill(self, leave: int) -> None:
        """Takes all the room there is, but for `leave` bytes."""
        with open(self.path / 'filler', 'ab', buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        if leave:
            os.truncate(self.path / 'filler', (self.path / 'filler').stat().st_size - leave)

    def make_room(self) -> None:
        (self.path / 'filler').unlink()

    def close(self) -> None:
        self._holder.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / 'disk', '8m')
    yield disk
    disk.close()


@pytest.fixture(scope='module')
def slow_job(tiny_job: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same with 24 epochs, logged at each step: long enough to make its disk full, and empty again."""
    path = tmp_path_factory.mktemp('recipe') / 'slow.py'
    more = 'config.num_epochs = 24.0\n    config.log_every_steps = 1\n    config.checkpoint_every_steps = 10'
    path.write_text(
        tiny_job.recipe.read_text().replace('    return config', f'    {more}\n    return config')
    )
    return Job(path, tiny_job.data_dir, tiny_job.env)


@pytest.fixture(scope='module')
def slow_undisturbed(tmp_path_factory: pytest.TempPathFactory, slow_job: Job) -> Path:
    workdir = tmp_path_factory.mktemp('slow') / 'run'
    run_ok(*slow_job.train(workdir), env=slow_job.env)
    return workdir


TREE = '--config.reduction=tree'  # whose bits are the same in several processes


@pytest.fixture(scope='module')
def slow_tree(tmp_path_factory: pytest.TempPathFactory, slow_job: Job) -> Path:
    workdir = tmp_path_factory.mktemp('slow') / 'tree'
    run_ok(*slow_job.train(workdir, TREE), env=slow_job.env)
    return workdir


@contextlib.contextmanager
def training_until_full(
    job: Job, disk: SmallDisk, folder: Path, processes: int = 1, *more: str, leave: int = 0
) -> Iterator[Processes]:
    """Trains on 2 devices in `run` on the small disk, full from step 50 on but for `leave` bytes."""
    where = [f'--coordinator=127.0.0.1:{free_port()}', f'--num_processes={processes}'] * (processes > 1)
    lines = [job.train(disk.inner / 'run', *more, *where) for _ in range(processes)]
    numbered = [[*line, f'--process_id={i}'] if where else line for i, line in enumerate(lines)]
    running = Processes(folder / 'job', [disk.inside(cli(*line)) for line in numbered], job.env)
    try:
        running.wait_until(lambda: max(checkpoint_steps(disk.path / 'run'), default=0) >= 50)
        disk.fill(leave)
        yield running
    finally:
        running.close()


def whole_rows(workdir: Path) -> str:
    """The rows on a full disk: a part of the next one stands there for as long as it takes to cut it back."""
    for _ in range(100):
        if (rows := (workdir / 'metrics.jsonl').read_text()).endswith('\n'):
            return rows
    raise AssertionError(rows)


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    slow_job: Job, slow_undisturbed: Path, small_disk: SmallDisk, tmp_path: Path
) -> None:
    workdir = small_disk.path / 'run'
    with training_until_full(slow_job, small_disk, tmp_path) as job:
        job.wait_until(lambda: NO_ROWS in job.outputs())
        rows = whole_rows(workdir)
        assert checkpoint_steps(workdir)
        small_disk.make_room()
        [result] = job.results()
        assert result.code == 0, result
    assert 'warning: the checkpoint of step ' in result.stdout
    assert 'No space left on device; kept in memory, tried again later' in result.stderr
    assert (workdir / 'metrics.jsonl').read_text().startswith(rows)
    assert_same_end(workdir, slow_undisturbed)
    assert (workdir / 'report.html').exists()


@pytest.mark.slow
def test_a_disk_with_room_for_rows_alone_costs_checkpoints_alone(
    slow_job: Job, slow_undisturbed: Path, small_disk: SmallDisk, tmp_path: Path
) -> None:
    """A checkpoint takes 150 kB, and the rows from one to the next 5."""
    workdir = small_disk.path / 'run'
    with training_until_full(slow_job, small_disk, tmp_path, leave=80_000) as job:
        job.wait_until(lambda: ' could not be written: the disk of ' in job.outputs())
        rows = whole_rows(workdir)
        small_disk.make_room()
        [result] = job.results()
        assert result.code == 0, result
    warnings = re.findall('warning: the checkpoint of step .* could not be written: .*', result.stdout)
    assert warnings and len(warnings) == len(set(warnings)) and warnings[0].endswith(' has no room left')
    assert (workdir / 'metrics.jsonl').read_text().startswith(rows)
    assert not list(workdir.glob('checkpoints/*tmp*'))
    assert_same_end(workdir, slow_undisturbed)


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_an_error(
    slow_job: Job, slow_undisturbed: Path, small_disk: SmallDisk, tmp_path: Path
) -> None:
    workdir = small_disk.path / 'run'
    with training_until_full(slow_job, small_disk, tmp_path) as job:
        [result] = job.results()
    assert result.code == 1, result
    assert result.stderr.splitlines()[-1].startswith('OSError: the checkpoint of step 600 could not be')
    assert 'orbax' not in result.stderr  # no stacks of its threads
    rows, want = without_timing(read_rows(workdir)), without_timing(read_rows(slow_undisturbed))
    assert rows == want[: len(rows)]
    assert checkpoint_steps(workdir)  # the last good one stands, and the same command goes on from it
    small_disk.make_room()
    command = small_disk.inside(cli(*slow_job.train(small_disk.inner / 'run')))
    again = Processes(tmp_path / 'again', [command], slow_job.env)
    [result] = again.results()
    assert result.code == 0 and 'resuming from step' in result.stdout, result
    assert_same_end(workdir, slow_undisturbed)


def test_a_disk_that_is_full_from_the_start_is_named(
    tiny_job: Job, undisturbed: Path, small_disk: SmallDisk, tmp_path: Path
) -> None:
    small_disk.fill(0)
    command = small_disk.inside(cli(*tiny_job.train(small_disk.inner / 'run')))
    [result] = Processes(tmp_path / 'full', [command], tiny_job.env).results()
    assert result.code == 1, result
    message = (
        f"workdir='{small_disk.inner}/run': its disk has no room left; make some, or name another workdir"
    )
    assert result.stderr.splitlines()[-1] == f'OSError: {message}', result
    small_disk.make_room()
    [result] = Processes(tmp_path / 'again', [command], tiny_job.env).results()
    assert result.code == 0, result
    assert_same_end(small_disk.path / 'run', undisturbed)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_several_processes_nothing(
    slow_job: Job, slow_tree: Path, small_disk: SmallDisk, tmp_path: Path
) -> None:
    workdir = small_disk.path / 'run'
    with training_until_full(slow_job, small_disk, tmp_path, 2, TREE) as job:
        job.wait_until(lambda: NO_ROWS in job.outputs())
        rows = whole_rows(workdir)
        assert checkpoint_steps(workdir)
        small_disk.make_room()
        results = job.results()
        assert [result.code for result in results] == [0, 0], results
    assert 'warning: the checkpoint of step ' in results[0].stdout
    assert 'No space left on device; kept in memory, tried again later' in results[0].stderr
    assert 'could not be written' not in results[1].stdout + results[1].stderr  # process 0 says it for all
    assert (workdir / 'metrics.jsonl').read_text().startswith(rows)
    assert_same_end(workdir, slow_tree)


@pytest.mark.long
@pytest.mark.slow
def test_a_disk_that_stays_full_ends_several_processes_with_an_error(
    slow_job: Job, slow_tree: Path, small_disk: SmallDisk, tmp_path: Path
) -> None:
    workdir = small_disk.path / 'run'
    with training_until_full(slow_job, small_disk, tmp_path, 2, TREE) as job:
        results = job.results()
    assert [result.code for result in results] == [1, 1], results
    for result in results:  # gRPC may have a line after the last one: the other process is gone
        told = 'the checkpoint of step 600 could not be written: '
        last = [line for line in result.stderr.splitlines() if told in line][-1]
        assert 'has no room left' in last or 'No space left on device' in last, results
        assert '; the same command goes on from that of step ' in last, results
    rows, want = without_timing(read_rows(workdir)), without_timing(read_rows(slow_tree))
    assert rows == want[: len(rows)]
    stands = checkpoint_steps(workdir)
    small_disk.make_room()
    command = small_disk.inside(cli(*slow_job.train(small_disk.inner / 'run', TREE)))
    again = Processes(tmp_path / 'again', [command], slow_job.env)
    [result] = again.results()
    assert result.code == 0 and f'resuming from step {max(stands)} of' in result.stdout, result
    assert_same_end(workdir, slow_tree)


BUFFERED = {'PYTHONUNBUFFERED': ''}  # as Python is by itself


@pytest.mark.parametrize('streams', [('stdout',), ('stdout', 'stderr')], ids=' and '.join)
def test_a_log_on_a_full_disk_costs_lines_alone(
    streams: tuple[str, ...], tiny_job: Job, undisturbed: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    with open('/dev/full', 'w') as full:
        where = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE} | dict.fromkeys(streams, full)
        done = subprocess.run(
            cli(*tiny_job.train(workdir)),
            cwd=ROOT,
            env=tiny_job.env | BUFFERED,
            text=True,
            check=False,
            **where,
        )
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, undisturbed)
    assert (workdir / 'report.html').exists()


@pytest.mark.parametrize(
    ('line', 'code'), [(['train', '--workdir=run'], 2), (['train'], 2), (['no_such_command'], 2)]
)
def test_the_exit_code_is_told_where_nothing_can_be_said(line: list[str], code: int, tmp_path: Path) -> None:
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            cli(*line), cwd=tmp_path, env=environment() | BUFFERED, stdout=full, stderr=full, check=False
        )
    assert done.returncode == code


def test_a_result_that_cannot_be_printed_is_an_error(tmp_path: Path) -> None:
    """Of a command that gives nothing else."""
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            cli('--help'), cwd=tmp_path, env=environment() | BUFFERED, stdout=full, check=False
        )
    assert done.returncode != 0


# ---------------------------------------------------------------- the folder goes, the clock jumps


@pytest.mark.slow
def test_a_workdir_that_is_removed_ends_the_run(slow_job: Job, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    job = Processes(tmp_path / 'job', [cli(*slow_job.train(workdir))], slow_job.env)
    try:
        job.wait_until(lambda: max(checkpoint_steps(workdir), default=0) >= 30)
        workdir.rename(tmp_path / 'elsewhere')
        [result] = job.results()
    finally:
        job.close()
    assert result.code == 1, result
    last = result.stderr.splitlines()[-1]
    assert 'metrics.jsonl was removed during the run' in last, result.stderr
    shutil.rmtree(workdir, ignore_errors=True)
    (tmp_path / 'elsewhere').rename(workdir)  # put back, it goes on
    result = run_ok(
        *slow_job.train(workdir, '--config.num_epochs=6', '--allow_plan_change'), env=slow_job.env
    )
    assert 'resuming from step' in result.stdout


@pytest.mark.slow
def test_a_save_whose_folder_cannot_be_made_holds_nothing_up(slow_job: Job, tmp_path: Path) -> None:
    """By itself Orbax lets threads wait ten minutes for the folder, and Python waits for threads."""
    workdir = tmp_path / 'run'
    job = Processes(tmp_path / 'job', [cli(*slow_job.train(workdir))], slow_job.env)
    try:
        job.wait_until(lambda: max(checkpoint_steps(workdir), default=0) >= 30)
        (workdir / 'checkpoints').rename(tmp_path / 'elsewhere')
        (workdir / 'checkpoints').write_text('')  # now there is nowhere to make one
        [result] = job.results(seconds=60)
    finally:
        job.close()
    assert result.code == 1, result
    assert 'could not be written' in result.stdout, result
    (workdir / 'checkpoints').unlink()
    (tmp_path / 'elsewhere').rename(workdir / 'checkpoints')
    assert 'resuming from step' in run_ok(*slow_job.train(workdir), env=slow_job.env).stdout


# Python runs this first, where it is the first `sitecustomize`: the time of day, as every library of the run
# asks for it in Python, jumps by four days, to and fro. (The C library's cannot be changed for one process
# alone without breaking its waits.)
JUMPING_CLOCK = """
import time

seconds, nanoseconds = time.time, time.time_ns


def away():
    return 172_800 if int(4 * time.monotonic()) % 2 else -172_800


time.time = lambda: seconds() + away()
time.time_ns = lambda: nanoseconds() + away() * 10**9
"""


def test_a_clock_that_jumps_changes_nothing(tiny_job: Job, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / 'sitecustomize.py').write_text(JUMPING_CLOCK)
    path = os.pathsep.join([str(tmp_path), tiny_job.env.get('PYTHONPATH', '')])
    env = {**tiny_job.env, 'PYTHONPATH': path}
    ask = [cli()[0], '-c', f'import time; print(abs(time.time() - {time.time()}) > 80_000)']
    assert subprocess.run(ask, env=env, capture_output=True, text=True, check=True).stdout == 'True\n'
    run_ok(*tiny_job.train(tmp_path / 'run'), env=env)
    assert_same_run(tmp_path / 'run', undisturbed)
    for row in read_rows(tmp_path / 'run'):
        if row['split'] == 'train':
            assert 0 < row['examples_per_second'] < 1e7 and 0 <= row['data_wait_fraction'] <= 1


# ---------------------------------------------------------------- killed, again and again


@pytest.mark.long
@pytest.mark.slow
def test_killed_ten_times_at_random_moments(tiny_job: Job, undisturbed: Path, tmp_path: Path) -> None:
    """Among them while starting, compiling, stepping and saving: a checkpoint is written at every step."""
    seed = int(os.environ.get('KILL_SEED', '0'))
    moments, workdir, kills, saving = random.Random(seed), tmp_path / 'run', 0, 0
    flags = ['--config.checkpoint_every_steps=1', '--config.num_epochs=8']
    reference = tmp_path / 'reference'
    run_ok(*tiny_job.train(reference, *flags), env=tiny_job.env)
    while kills < 10:
        command = cli(*tiny_job.train(workdir, *flags))
        process = subprocess.Popen(
            command, cwd=ROOT, env=tiny_job.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # From when it resumes on, but for some: up to there it writes nothing.
        if kills % 4:
            before = last_row_step(workdir)
            while last_row_step(workdir) <= before and process.poll() is None:
                time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        saving += bool(list((workdir / 'checkpoints').glob('*tmp*')))
    run_ok(*tiny_job.train(workdir, *flags), env=tiny_job.env)
    print(f'{kills} kills (seed {seed}), {saving} of them in the middle of a save')
    assert_same_run(workdir, reference)


# ---------------------------------------------------------------- when it is saved


def test_saves_by_steps_and_by_minutes(tiny_job: Job, undisturbed: Path, tmp_path: Path) -> None:
    by_steps = tmp_path / 'steps'
    flags = ['--config.keep_checkpoints=99']
    run_ok(*tiny_job.train(by_steps, *flags, '--config.checkpoint_every_steps=15'), env=tiny_job.env)
    assert checkpoint_steps(by_steps) == [15, 30, 45, 50]
    assert without_timing(read_rows(by_steps)) == without_timing(read_rows(undisturbed))


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.long)])
def test_saves_by_minutes(
    processes: int,
    tiny_job: Job,
    start: Callable[..., Processes],  # noqa: F811
    tmp_path: Path,
) -> None:
    """So many as the time that it took holds, at steps that follow from nothing else."""
    flags = ['--config.checkpoint_every_epochs=0', '--config.keep_checkpoints=99', '--config.num_epochs=60']
    minutes = ['--config.checkpoint_every_minutes=0.01', '--config.eval_every_epochs=0']
    job = start(tiny_job, tmp_path / 'run', processes, 2, *flags, *minutes)
    for result in job.results():
        assert result.code == 0, job.outputs()
    steps = checkpoint_steps(tmp_path / 'run')
    seconds = float(re.search(r'\bstep (\d+\.\d) s', job.outputs())[1])
    assert steps[-1] == 1500 and 2 <= len(steps) <= 3 + seconds / 0.6 * 2, (steps, seconds)
