"""What machine is this?"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
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


# With `reduction='tree'` the bits of a result depend on these, besides code and config (tree.py).
BITS_DEPEND_ON = ('jax', 'jaxlib', 'flax', 'optax', 'device kind', 'CPU instructions', 'threads of XLA (CPU)')


def _instructions() -> str:
    """Returns the machine and a digest of its CPU's instruction sets, for which XLA compiles."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith(('flags', 'Features')):
                words = ' '.join(sorted(line.partition(':')[2].split()))
                return f'{platform.machine()}, {hashlib.sha256(words.encode()).hexdigest()[:8]}'
    return platform.machine()


def environment() -> dict[str, str]:
    """Returns what a result may depend on besides the code: versions, devices, system."""
    import jax

    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    return {
        'Python': platform.python_version(),
        **{name: version(name) for name in packages},
        'device kind': f'{jax.devices()[0].device_kind} ({jax.default_backend()})',
        'CPU instructions': _instructions() if jax.default_backend() == 'cpu' else '',
        'threads of XLA (CPU)': os.environ.get('NPROC', str(cores()))
        if jax.default_backend() == 'cpu'
        else '',
        'processes': str(jax.process_count()),
        'system': platform.platform(),
    }


def keep_freed_memory() -> None:
    """Lets glibc's malloc keep what is freed, of any size, instead of giving it back to the kernel.

    XLA's CPU client takes and frees its temporary arrays in every step. By malloc's defaults (mallopt(3))
    large blocks go back at once, and the next step takes a page fault for each 4 KiB that it touches: a
    twentieth of a step of the guide's CNN. Does nothing where the environment sets malloc up, or where
    it is not glibc's.
    """
    if any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25)  # the most of older versions
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 1 << 26)  # threads' heaps are of 64 MiB and would be given back one by one
