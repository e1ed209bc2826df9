"""What machine is this?"""

from __future__ import annotations

import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path


def cores() -> int:
    """Returns how many CPU cores this process may use (a Slurm task has fewer than its node)."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_dir() -> Path:
    """Returns the folder for what can be computed again; it may not be there yet."""
    asked = os.environ.get('XDG_CACHE_HOME')
    if asked:
        return Path(asked) / 'parallel_train'
    try:
        return Path.home() / '.cache' / 'parallel_train'
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f'parallel_train-{os.getuid()}'


def environment() -> dict[str, str]:
    """Returns what a result may depend on besides the code: versions, devices, system."""
    import jax

    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    return {
        'Python': platform.python_version(),
        **{name: version(name) for name in packages},
        'device kind': f'{jax.devices()[0].device_kind} ({jax.default_backend()})',
        'processes': str(jax.process_count()),
        'system': platform.platform(),
    }
