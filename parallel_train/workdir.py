"""What lies in a workdir, and may this job use it?"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from parallel_train import config as config_lib
from parallel_train import config_fields, lease, processes
from parallel_train.errors import UserError
from parallel_train.files import check_writable, lock, open_lock, write_atomically
from parallel_train.machine import BITS_DEPEND_ON
from parallel_train.paths import is_remote
from parallel_train.plan import HARDWARE_FIELDS, Plan
from parallel_train.say import print_flushed

# What a checkpoint means depends on these, and every version has written them. Where a field that came
# later is missing, its default holds, which must mean what was done before there was such a field.
_ALWAYS_WRITTEN = (
    'seed', 'model', 'dataset', 'train_split', 'eval_split', 'input_shape', 'num_classes', 'batch_size',
    'num_epochs', 'schedule', 'learning_rate', 'optimizer',
)  # fmt: skip
CONFIG, PLAN, METRICS, CHECKPOINTS = 'config.json', 'plan.json', 'metrics.jsonl', 'checkpoints'
REPORT = 'report.html'
DAMAGED = 'damaged'  # checkpoints that were set aside
ENVIRONMENT = 'environment.json'  # of the last start
WHICH_DATA = ('train split', 'eval split')  # in it
LOCK, LEASES = '.lock', '.leases'
_NETWORK_FILES_SHOW = 15.0  # seconds until a new file shows on other hosts; NFS keeps what it knew as long


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, None where there is no file.

    Raises:
      UserError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except Exception as error:  # of many kinds, from an object store
        raise UserError(
            f'workdir: {path} cannot be read ({error}); put the right one back, or name another workdir'
        ) from error
    if not isinstance(content, dict):
        raise UserError(f'workdir: {path} does not hold a JSON object')
    return content


def read_config(workdir: Path) -> Any:
    """Returns the complete config of the job in `workdir`.

    Raises:
      UserError: there is none, or the file is not what this program wrote.
    """
    config = _find_config(workdir)
    if config is None:
        raise UserError(f'workdir={str(workdir)!r}: holds no job (no {CONFIG}); train one first')
    return config


def _find_config(workdir: Path) -> Any:
    values = read_json(workdir / CONFIG)
    if values is None:
        return None
    missing = [field for field in _ALWAYS_WRITTEN if field not in values]
    try:
        if missing:
            raise ValueError(f'it has no {", ".join(missing)}')
        return config_lib.complete(config_lib.Config(values))
    except ValueError as error:  # a UserError too: a field that is unknown, or holds what it may not
        raise UserError(
            f'workdir={str(workdir)!r}: its {CONFIG} is not what this program wrote ({error}); put the '
            'right one back, or name another workdir'
        ) from error


def planned_devices(workdir: Path) -> int | None:
    """Returns how many devices the job in `workdir` used last, None where there is no job."""
    plan = read_json(workdir / PLAN) or {}
    devices = plan.get('num_devices')
    return devices if isinstance(devices, int) else None


def check(workdir: Path, config: Any, allow_plan_change: bool) -> None:
    """Checks that a job with this config may write to `workdir`; writes nothing that stays.

    Raises:
      UserError: it cannot be written, has a link where folders are deleted, or holds another job: names the
        fields that differ.
    """
    check_writable('workdir', workdir)
    if not is_remote(workdir):
        _check_no_links(workdir)
    there = _find_config(workdir)
    if there is None:
        if any(workdir.glob(f'{CHECKPOINTS}/*')) or (workdir / METRICS).exists():
            raise UserError(
                f'workdir={str(workdir)!r}: holds checkpoints or metrics but no {CONFIG}, so what made '
                'them is not known; name another workdir'
            )
        return
    old, new = (json.loads(config_lib.to_json(c)) for c in (there, config))
    _refuse_differences(workdir, old, new, config_fields.RUN_FIELDS, 'config.', allow_plan_change)


def _check_no_links(workdir: Path) -> None:
    """Checks that what is deleted, old checkpoints, lies here: through a link it may be anybody's."""
    folders = [workdir / CHECKPOINTS, workdir / DAMAGED]
    for path in (*folders, *(step for folder in folders for step in folder.glob('*'))):
        if path.is_symlink():
            raise UserError(
                f'workdir={str(workdir)!r}: {path.relative_to(workdir)} in it is a link, which this program '
                'neither makes nor follows; put what it means there itself, or name another workdir'
            )


def check_plan(workdir: Path, config: Any, plan: Plan, allow_plan_change: bool) -> None:
    """Checks that the job in `workdir`, if there is one, has this plan, but for the hardware.

    Raises:
      UserError: names the fields that differ.
    """
    hardware: tuple[str, ...] = (*HARDWARE_FIELDS, *config_fields.RUN_FIELDS, 'warnings')
    if not config.shards:  # 0 means as many as the hardware takes
        hardware += ('shards', 'examples_per_shard')
    there = read_json(workdir / PLAN) or {}
    _refuse_differences(workdir, there, plan.to_dict(), hardware, '', allow_plan_change)


def changes(workdir: Path, config: Any, plan: Plan, environment: dict[str, str]) -> list[str]:
    """Returns what a job that goes on should be told: changes that it may make, but that change numbers."""
    told = []
    old_plan = read_json(workdir / PLAN) or {}
    if not config.shards and old_plan.get('shards', plan.shards) != plan.shards:
        told.append(
            f'warning: with config.shards=0 there are now {plan.shards} shards, not {old_plan["shards"]}: '
            'groups of BatchNorm and keys of dropout change; set config.shards to keep them'
        )
    old = read_json(workdir / ENVIRONMENT) or {}
    other = [name for name in BITS_DEPEND_ON if name in old and old[name] != environment[name]]
    if config.reduction == 'tree' and other:
        named = ', '.join(f'{name} was {old[name]}, is {environment[name]}' for name in other)
        told.append(f'warning: the last bits may not be those of a run that went on as it began: {named}')
    for name in WHICH_DATA:
        if name in old and old[name] != environment[name]:
            told.append(
                f'warning: the {name} is not the one that this job last started with: (shape, digests) '
                f'was {old[name]}, is {environment[name]}; what is saved and logged so far is of that one'
            )
    return told


def _refuse_differences(
    workdir: Path,
    old: dict[str, Any],
    new: dict[str, Any],
    free: Collection[str],
    prefix: str,
    allowed: bool,
) -> None:
    differing = [
        f'{prefix}{key} was {old[key]!r} and is {value!r}'
        for key, value in new.items()
        if key in old and key not in free and old[key] != value
    ]
    if differing and not allowed:
        raise UserError(
            f'workdir={str(workdir)!r}: holds a job with another config or plan: '
            f'{"; ".join(differing)}. Name another workdir, undo the change, or continue this job with '
            'the change by --allow_plan_change'
        )


def claim(workdir: Path, config: Any, plan: Plan, environment: dict[str, str]) -> None:
    """Creates the workdir and writes config, plan and environment into it; an earlier end's report goes."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / REPORT).unlink(missing_ok=True)  # else a run that goes on, and is killed, would look complete
    with _explained_if_full(workdir):
        write_atomically(workdir / CONFIG, config_lib.to_json(config))
        write_atomically(workdir / PLAN, plan.to_json())
        write_atomically(workdir / ENVIRONMENT, json.dumps(environment, indent=2) + '\n')


@contextlib.contextmanager
def _explained_if_full(workdir: Path) -> Iterator[None]:
    """Says which disk has no room, which an error of writing does not."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        message = f'workdir={str(workdir)!r}: its disk has no room left; make some, or name another workdir'
        raise OSError(message) from None


@contextlib.contextmanager
def hold(workdir: Path, lost: Callable[[str], None] | None = None) -> Iterator[None]:
    """Creates the workdir and keeps other jobs out of it.

    By a lock of the operating system's, which ends with the process however that ends: none is ever stale.
    In an object store by a lease.

    Args:
      workdir: of the job.
      lost: ends the process, with a message; called in a thread if a lease is lost.

    Raises:
      UserError: another process holds it.
    """
    if is_remote(workdir):
        assert lost, workdir
        with lease.held(workdir / LEASES, lost) as owner:
            write_atomically(workdir / LOCK, owner)
            yield
        return
    new = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    with open_lock(workdir / LOCK, f'workdir={str(workdir)!r}: its {LOCK}') as file:
        try:
            locked = lock(file.fileno())
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f'workdir={str(workdir)!r}: another job runs there ({file.read().strip() or "unknown"}); '
                'wait for it, stop it, or name another workdir'
            ) from error
        if not locked:
            print_flushed(f'warning: {workdir}: its file system has no locks, so no other job is kept out')
        with _explained_if_full(workdir):
            file.truncate(0)
            # Past Python's buffer, which would be written again when the file is closed.
            os.pwrite(file.fileno(), f'process {os.getpid()} on {socket.gethostname()}\n'.encode(), 0)
        try:
            yield
        except UserError:
            if new:  # nothing was begun: leave nothing
                (workdir / LOCK).unlink()
                for folder in (workdir / CHECKPOINTS, workdir):
                    with contextlib.suppress(OSError):
                        folder.rmdir()
            raise


def check_seen_by_all(workdir: Path) -> None:
    """Checks that every process sees the lock that process 0 holds, and so what it will write.

    Raises:
      UserError: on every process; names the one that does not.
    """
    if processes.count() == 1:
        return
    held = processes.share((workdir / LOCK).read_text)
    deadline = time.monotonic() + _NETWORK_FILES_SHOW
    while not (seen := _content(workdir / LOCK) == held) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process, sees in enumerate(processes.gather('workdir', seen)):
        if not sees:
            failure = UserError(
                f'workdir={str(workdir)!r}: process {process} does not see there what process 0 writes; give '
                'all processes one folder that all hosts share'
            )
            failure.on_every_process = True
            raise failure


def _content(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
