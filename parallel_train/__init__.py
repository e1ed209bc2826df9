"""A data-parallel trainer for JAX that shows its plan first and computes the same on any device count.

The names below are the public API. They are imported when first used, so that importing the package,
or printing a plan, does not wait for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel_train.config import default_config as default_config
    from parallel_train.errors import Diverged as Diverged
    from parallel_train.errors import UserError as UserError
    from parallel_train.load import load_model as load_model
    from parallel_train.mesh import start_devices as start_devices
    from parallel_train.plan import make_plan as make_plan
    from parallel_train.schedule import create_learning_rate_fn as create_learning_rate_fn
    from parallel_train.state import create_train_state as create_train_state
    from parallel_train.step import make_eval_step as make_eval_step
    from parallel_train.step import make_train_step as make_train_step
    from parallel_train.train import train_and_evaluate as train_and_evaluate

__version__ = '0.1.0'

_WHERE = {
    'create_learning_rate_fn': 'schedule',
    'create_train_state': 'state',
    'default_config': 'config',
    'Diverged': 'errors',
    'load_model': 'load',
    'make_eval_step': 'step',
    'make_plan': 'plan',
    'make_train_step': 'step',
    'start_devices': 'mesh',
    'train_and_evaluate': 'train',
    'UserError': 'errors',
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f'parallel_train.{_WHERE[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
