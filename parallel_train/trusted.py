"""Which code may the config in a workdir name? The workdir is data, perhaps somebody else's."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parallel_train import config_fields
from parallel_train.config import import_object
from parallel_train.dataset import is_import_path
from parallel_train.errors import UserError
from parallel_train.paths import is_remote

# Of this program's functions, those that are made to be named.
_OURS = {*config_fields.BUILT_IN_LOSSES.values(), 'parallel_train.text:folder'}


def check_no_own_code(workdir: Path, config: Any, given: Any = None) -> None:
    """Checks that a config from `workdir` names no code in that folder: nothing there is executed.

    Args:
      workdir: the folder.
      config: from there.
      given: the user's own, if there is one: what it names too is not looked at.

    Raises:
      UserError: it does, where Python looks for modules in the workdir.
    """
    for field in ('model', 'loss', 'dataset'):
        module = config[field].partition(':')[0].partition('.')[0]
        if ':' not in config[field] or not module.isidentifier() or is_remote(workdir):
            continue
        if _also_given(field, config, given):
            continue
        spec = None
        with contextlib.suppress(ValueError):  # a module that was made without one
            spec = importlib.util.find_spec(module)  # of the top: it imports nothing
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        if any(place and Path(place).resolve().is_relative_to(workdir.resolve()) for place in places):
            raise UserError(
                f'config.{field}={config[field]!r}: {module} lies in the workdir {workdir} itself, from '
                'which nothing is executed; give the config that names it, --config=FILE, or move it away'
            )


def check_functions(config: Any, given: Any = None) -> None:
    """Checks that the loss and the dataset that a config from a workdir names may be called.

    They are called with words of that config: Python's own `shutil:rmtree`, with a path; `cProfile:run`, with
    code. Such functions lie in Python's library and in installed packages, so that nothing there is called.

    Args:
      config: from a workdir.
      given: the user's own, if there is one: what it names too may be called, whatever it is.

    Raises:
      UserError: one of them is no function of a module of the user's own.
    """
    for field in ('loss', 'dataset'):
        name = config[field]
        names_code = is_import_path(name) if field == 'dataset' else name not in config_fields.BUILT_IN_LOSSES
        if not names_code or name in _OURS or _also_given(field, config, given):
            continue
        module = name.partition(':')[0]
        top = module.partition('.')[0]
        if top == __package__ or _is_installed(top):
            reason = f'{top} is an installed module'
        elif not _is_function_of(top, import_object(field, name)):
            reason = f'it is no Python function of {module} itself'
        else:
            continue
        raise UserError(
            f"config.{field}={name!r}: {reason}, which is not called on a workdir's word alone; give the "
            'config that names it, --config=FILE'
        )


def _also_given(field: str, config: Any, given: Any) -> bool:
    return given is not None and given[field] == config[field]


def _is_function_of(package: str, found: Any) -> bool:
    """Whether it was defined there, not imported into it; decorated perhaps."""
    inner = inspect.unwrap(found)
    return inspect.isfunction(inner) and str(inner.__module__).partition('.')[0] == package


def _is_installed(module: str) -> bool:
    """Whether a top-level module came with Python or with an installer; imports nothing."""
    if module in sys.stdlib_module_names:
        return True
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # made without a spec: `__main__`, or a module that nobody can place
        return True
    if spec is None:  # not there at all, as the import will say
        return False
    places: Sequence[str | None] = spec.submodule_search_locations or [spec.origin]
    return any(place is None or _is_of_installer(Path(place).parent) for place in places)


def _is_of_installer(folder: Path) -> bool:
    for path in _names(folder):
        if {'site-packages', 'dist-packages'} & set(path.parts) or any(path.glob('*.dist-info')):
            return True
        if any(path.is_relative_to(sysconfig.get_path(name)) for name in ('stdlib', 'platstdlib')):
            return True
    return False


def _names(folder: Path) -> Iterator[Path]:
    """The folder as it is named, and as it is without links: either may tell."""
    yield folder.absolute()
    yield folder.resolve()
