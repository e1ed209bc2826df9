"""What machine is this?"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version


def cores() -> int:
    """Returns how many CPU cores this process may use (a Slurm task has fewer than its node)."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
