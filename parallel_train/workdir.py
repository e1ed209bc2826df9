"""What lies in a workdir, and may this job use it?"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from parallel_train import config as config_lib
from parallel_train.errors import UserError
from parallel_train.files import check_writable
from parallel_train.plan import HARDWARE_FIELDS, Plan

# What a checkpoint means depends on these, and every version has written them. Where a field that came
# later is missing, its default holds, which must mean what was done before there was such a field.
_ALWAYS_WRITTEN = (
    'seed', 'model', 'dataset', 'train_split', 'eval_split', 'input_shape', 'num_classes', 'batch_size',
    'num_epochs', 'schedule', 'learning_rate', 'optimizer',
)  # fmt: skip
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
      UserError: it cannot be written, or holds another job: names the fields that differ.
    """
    check_writable('workdir', workdir)
    there = _find_config(workdir)
    if there is None:
        if any(workdir.glob(f'{CHECKPOINTS}/*')) or (workdir / METRICS).exists():
            raise UserError(
                f'workdir={str(workdir)!r}: holds checkpoints or metrics but no {CONFIG}, so what made '
                'them is not known; name another workdir'
            )
        return
    old, new = (json.loads(config_lib.to_json(c)) for c in (there, config))
    _refuse_differences(workdir, old, new, config_lib.RUN_FIELDS, 'config.', allow_plan_change)


def check_plan(workdir: Path, config: Any, plan: Plan, allow_plan_change: bool) -> None:
    """Checks that the job in `workdir`, if there is one, has this plan, but for the hardware.

    Raises:
      UserError: names the fields that differ.
    """
    hardware: tuple[str, ...] = (*HARDWARE_FIELDS, 'warnings')
    if not config.shards:  # 0 means as many as the hardware takes
        hardware += ('shards', 'examples_per_shard')
    there = read_json(workdir / PLAN) or {}
    _refuse_differences(workdir, there, plan.to_dict(), hardware, '', allow_plan_change)


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


def claim(workdir: Path, config: Any, plan: Plan) -> None:
    """Creates the workdir and writes config and plan into it."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / CONFIG, config_lib.to_json(config))
    write_atomically(workdir / PLAN, plan.to_json())
