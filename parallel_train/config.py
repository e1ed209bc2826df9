"""How is a config read and completed?

The fields, their defaults and what they mean stand in `configs/default.py` and nowhere else; what each may
hold, in config_fields.py. What fields mean together (does the batch divide?) is the plan's business.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import config_dict

from parallel_train import config_fields
from parallel_train.errors import UserError

Config: TypeAlias = config_dict.ConfigDict


@functools.cache
def _defaults_json() -> str:
    here = Path(__file__).resolve().parent
    # Beside the package in a checkout, inside it in an installed wheel (see setup.cfg).
    for folder in (here.parent / 'configs', here / 'configs'):
        if (folder / 'default.py').is_file():
            return load(folder / 'default.py').to_json()
    raise FileNotFoundError(f'configs/default.py is neither beside nor in {here}')


def default_config() -> Config:
    """Returns a new config with every field at its default: where a recipe starts."""
    values = json.loads(_defaults_json())
    return Config({k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def load(path: str | Path) -> Config:
    """Runs the config file at `path` and returns what its `get_config()` returns, as it stands.

    A config file is Python code: load only files that you trust.

    Raises:
      UserError: the file is missing, does not run, or gives no ConfigDict.
    """
    if not str(path):
        raise UserError("config='': needs a value, --config=FILE")
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path('configs')
        there = sorted(p.name for p in folder.glob('*.py')) if folder.is_dir() else []
        known = f'; {folder} holds {", ".join(there)}' if there else ''
        raise UserError(f'config={str(path)!r}: there is no such file{known}')
    spec = importlib.util.spec_from_file_location('parallel_train_config_file', path)
    if spec is None or spec.loader is None:
        raise UserError(f'config={str(path)!r}: must be a Python file whose name ends in .py')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, 'get_config', None)
        config = get_config() if callable(get_config) else None
    except (Exception, SystemExit) as error:
        where = ''
        if not isinstance(error, SyntaxError):  # whose own message gives the line
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
            where = f' (line {lines[-1]})' if lines else ''
        raise UserError(
            f'config={str(path)!r}: the file does not run{where}: {type(error).__name__}: {error}'
        ) from error
    if not callable(get_config):
        raise UserError(f'config={str(path)!r}: the file must define a function get_config()')
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f'config={str(path)!r}: get_config() must return an ml_collections ConfigDict, '
            f'not {type(config).__name__}'
        )
    return config


def complete(config: Config) -> Config:
    """Returns a copy of `config` with the fields that it leaves out at their defaults, all checked.

    Raises:
      UserError: names the first field that is unknown or holds what it may not hold.
    """
    full = default_config()
    for key in config:
        if key not in full:
            raise UserError(f'config.{key}: there is no such field{config_fields.nearest(key, list(full))}')
        value = config[key]
        problem = config_fields.CHECKS[key](value)
        if problem:
            raise UserError(f'config.{key}={value!r}: {problem}')
        with full.ignore_type():
            full[key] = type(full[key])(value)
    return full.lock()


def with_dataset(config: Config, input_shape: Sequence[int], num_classes: int) -> Config:
    """Returns a copy of a complete config with what the dataset says of the model's input and output."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.input_shape = tuple(input_shape)
        config.num_classes = num_classes
    return config


def import_object(field: str, path: str) -> Any:
    """Returns the object that the import path `package.module:name` of config field `field` names.

    Raises:
      UserError: the module cannot be imported, or has no such name.
    """
    module_name, _, name = path.partition(':')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f'config.{field}={path!r}: cannot import {module_name} ({type(error).__name__}: {error}); '
            'it must be importable from here: install it or put its folder on PYTHONPATH'
        ) from error
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith('_')]
        raise UserError(
            f'config.{field}={path!r}: {module_name} has no {name!r}{config_fields.nearest(name, public)}'
        )
    return getattr(module, name)


def to_json(config: Config) -> str:
    """Returns the config as it is kept in `workdir/config.json`: a flat JSON object, keys in order."""
    return json.dumps(config.to_dict(), indent=2) + '\n'
