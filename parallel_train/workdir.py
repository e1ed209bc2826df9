"""What lies in a workdir, and may this job use it?"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from parallel_train import config as config_lib
from parallel_train.errors import UserError
from parallel_train.plan import HARDWARE_FIELDS, Plan

CONFIG, PLAN, METRICS, CHECKPOINTS = 'config.json', 'plan.json', 'metrics.jsonl', 'checkpoints'


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that readers see the old content or the new one, whatever happens."""
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, None where there is no file.

    Raises:
      UserError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f'workdir: {path} cannot be read: {error}') from error
    if not isinstance(content, dict):
        raise UserError(f'workdir: {path} does not hold a JSON object')
    return content


def read_config(workdir: Path) -> Any:
    """Returns the complete config of the job in `workdir`.

    Raises:
      UserError: there is none.
    """
    values = read_json(workdir / CONFIG)
    if values is None:
        raise UserError(f'workdir={str(workdir)!r}: holds no job (no {CONFIG}); train one first')
    return config_lib.complete(config_lib.Config(values))


def planned_devices(workdir: Path) -> int | None:
    """Returns how many devices the job in `workdir` used last, None where there is no job."""
    plan = read_json(workdir / PLAN) or {}
    devices = plan.get('num_devices')
    return devices if isinstance(devices, int) else None


def check(workdir: Path, config: Any, plan: Plan, allow_plan_change: bool) -> None:
    """Checks that this job may write to `workdir`; writes nothing that stays.

    Raises:
      UserError: it cannot be written, or holds another job: names the fields that differ.
    """
    existing = workdir
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f'workdir={str(workdir)!r}: {existing} is not a folder; name another')
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f'workdir={str(workdir)!r}: cannot be written ({error.strerror}); name another'
        ) from error
    there = read_json(workdir / CONFIG)
    if there is None:
        if any(workdir.glob(f'{CHECKPOINTS}/*')) or (workdir / METRICS).exists():
            raise UserError(
                f'workdir={str(workdir)!r}: holds checkpoints or metrics but no {CONFIG}, so what made '
                'them is not known; name another workdir'
            )
        return
    differing = _differences(there, read_json(workdir / PLAN) or {}, config, plan)
    if differing and not allow_plan_change:
        raise UserError(
            f'workdir={str(workdir)!r}: holds a job with another config or plan: '
            f'{"; ".join(differing)}. Name another workdir, undo the change, or continue this job with '
            'the change by --allow_plan_change'
        )


def _differences(old_config: dict[str, Any], old_plan: dict[str, Any], config: Any, plan: Plan) -> list[str]:
    new_config = json.loads(config_lib.to_json(config))
    lines = [
        f'config.{key} was {old_config[key]!r} and is {value!r}'
        for key, value in new_config.items()
        if key in old_config and key not in config_lib.RUN_FIELDS and old_config[key] != value
    ]
    if lines:
        return lines
    hardware: tuple[str, ...] = HARDWARE_FIELDS + ('warnings',)
    if not config.shards:  # 0 means as many as the hardware takes
        hardware += ('shards', 'examples_per_shard')
    return [
        f'{key} was {old_plan[key]!r} and is {value!r}'
        for key, value in plan.to_dict().items()
        if key in old_plan and key not in hardware and old_plan[key] != value
    ]


def claim(workdir: Path, config: Any, plan: Plan) -> None:
    """Creates the workdir and writes config and plan into it."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / CONFIG, config_lib.to_json(config))
    write_atomically(workdir / PLAN, plan.to_json())
