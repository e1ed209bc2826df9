"""A checkpoint that cannot be read just now is not damaged: nothing is set aside, the run ends."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tracemalloc  # noqa: F401, else pytest would while no file can be opened
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest

from parallel_train import config as config_lib
from parallel_train import damage, start_devices
from parallel_train import train as train_lib
from parallel_train.checkpoint import open_checkpoints
from parallel_train.errors import UserError
from parallel_train.mesh import make_mesh, replicated
from parallel_train.replicas import digest
from parallel_train.state import TrainState, abstract_state, initialise
from tests.conftest import checkpoint_steps
from tests.models_for_tests import tiny

start_devices(8)

CONFIG = config_lib.with_dataset(
    config_lib.complete(config_lib.Config({'model': 'tests.models_for_tests:Linear'})), (28, 28, 1), 10
)


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp('saved') / 'run'
    state = initialise(CONFIG, lambda _: 0.0, make_mesh(2))
    with open_checkpoints(workdir, keep=3) as checkpoints:
        for step in (1, 2, 3):
            state = state.replace(step=state.step + 1)
            assert checkpoints.save(step, state, digest(state))
    return workdir


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / 'run'))


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, '_PAUSE', 0.0)


def latest(workdir: Path, said: list[str]) -> TrainState | None:
    with open_checkpoints(workdir, keep=3, say=said.append) as checkpoints:
        return checkpoints.restore_latest(abstract_state(CONFIG, lambda _: 0.0), replicated(make_mesh(2)))


class ServiceUnavailable(Exception):
    """As a client of an object store raises it."""

    code = 503


class NotFound(ServiceUnavailable):
    code = 404


ServiceUnavailable.__module__ = NotFound.__module__ = 'google.api_core.exceptions'


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


PASSING: dict[str, Callable[[], Exception]] = {
    'EIO': lambda: OSError(errno.EIO, 'Input/output error'),
    'EMFILE': lambda: caused(ValueError('no metadata'), OSError(errno.EMFILE, 'Too many open files')),
    'EACCES': lambda: PermissionError(errno.EACCES, 'Permission denied'),
    'memory': lambda: jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.'),
    'memory of the host': MemoryError,
    'files of TensorStore': lambda: ValueError(
        'RESOURCE_EXHAUSTED: Error opening "zarr" driver: [OS error 24]'
    ),
    'disk of TensorStore': lambda: ValueError('UNKNOWN: Error reading: [OS error 5: EIO Input/output error]'),
    'store': lambda: ValueError('UNAVAILABLE: All retry attempts failed: HTTP 503'),
    'client of the store': lambda: ServiceUnavailable('503'),
}
DAMAGE: dict[str, Callable[[], Exception]] = {
    'ENOENT': lambda: FileNotFoundError(errno.ENOENT, 'No such file or directory'),
    'checksum': lambda: ValueError('DATA_LOSS: CRC-32C mismatch'),
    'not found': lambda: ValueError('NOT_FOUND: Error opening "zarr" driver'),
    'no JSON': lambda: ValueError('Expecting value: line 1 column 1 (char 0)'),
    'no key': lambda: KeyError('params'),
    'not in the store': lambda: NotFound('404'),
}


def fail(monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], times: int) -> list[int]:
    """Makes the first reads of a checkpoint fail; returns the steps that are asked for."""
    restore, asked = ocp.CheckpointManager.restore, []

    def failing(manager: Any, step: int, **options: Any) -> Any:
        asked.append(step)
        if len(asked) <= times:
            raise error()
        return restore(manager, step, **options)

    monkeypatch.setattr(ocp.CheckpointManager, 'restore', failing)
    return asked


@pytest.mark.parametrize('kind', PASSING)
def test_what_passes_costs_nothing(kind: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, said = fail(monkeypatch, PASSING[kind], 1), list[str]()
    state = latest(workdir, said)
    assert state is not None and int(state.step) == 3 and asked == [3, 3] and not said
    assert checkpoint_steps(workdir) == [1, 2, 3] and not (workdir / 'damaged').exists()


@pytest.mark.parametrize('kind', PASSING)
def test_what_does_not_pass_sets_nothing_aside(
    kind: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, said = fail(monkeypatch, PASSING[kind], 99), list[str]()
    with pytest.raises(OSError, match='checkpoint 3 cannot be read .*it is left as it is'):
        latest(workdir, said)
    assert asked == [3, 3] and not said
    assert checkpoint_steps(workdir) == [1, 2, 3] and not (workdir / 'damaged').exists()


@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_is_set_aside(kind: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, said = fail(monkeypatch, DAMAGE[kind], 1), list[str]()
    state = latest(workdir, said)
    assert state is not None and int(state.step) == 2 and asked == [3, 2] and len(said) == 1
    assert checkpoint_steps(workdir) == [1, 2] and (workdir / 'damaged' / '3').is_dir()


@pytest.mark.filterwarnings('ignore')  # what Orbax leaves unawaited
def test_no_file_can_be_opened(workdir: Path) -> None:
    """For real: every file descriptor that this process may have is taken."""
    said, taken = list[str](), list[int]()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    template, sharding = abstract_state(CONFIG, lambda _: 0.0), replicated(make_mesh(2))
    with open_checkpoints(workdir, keep=3, say=said.append) as checkpoints:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            with pytest.raises(OSError, match='Too many open files'):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            with pytest.raises(OSError, match='checkpoint 3 cannot be read .*it is left as it is'):
                checkpoints.restore_latest(template, sharding)
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert checkpoint_steps(workdir) == [1, 2, 3] and not (workdir / 'damaged').exists() and not said
        assert int(checkpoints.restore_latest(template, sharding).step) == 3


def test_fingerprints_that_cannot_be_read(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax says no more than that there are none."""
    template, sharding = abstract_state(CONFIG, lambda _: 0.0), replicated(make_mesh(2))

    def broken(path: Path) -> bytes:
        raise OSError(errno.EIO, 'Input/output error', str(path))

    with open_checkpoints(workdir, keep=3) as checkpoints:
        monkeypatch.setattr(checkpoints, '_metadata', lambda step: {})
        with pytest.raises(UserError, match='its fingerprints are missing'):
            checkpoints.restore(template, sharding)
        monkeypatch.setattr(Path, 'read_bytes', broken)
        with pytest.raises(OSError, match='checkpoint 3 cannot be read .*Input/output error'):
            checkpoints.restore(template, sharding)


def test_the_run_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = tmp_path / 'run'
    train_lib.train_and_evaluate(tiny(num_epochs=1.0, warmup_epochs=0.0), workdir, devices=2)
    steps = checkpoint_steps(workdir)
    fail(monkeypatch, PASSING['EIO'], 99)
    with pytest.raises(OSError, match=f'checkpoint {steps[-1]} cannot be read'):
        train_lib.train_and_evaluate(tiny(num_epochs=1.0, warmup_epochs=0.0), workdir, devices=2)
    assert checkpoint_steps(workdir) == steps and not (workdir / 'damaged').exists()
