"""What does the doctor look at?"""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from parallel_train import machine, processes
from parallel_train.files import check_writable
from parallel_train.paths import is_remote

_SKEW = 1.0  # seconds between clocks that are still called equal: rows and files are dated by them
_FILES = 1024
_ALL_REDUCE_MB = 16  # MiB
# Of the largest gradient: float32 sums of a small batch in another order differ by less than this.
_GRADIENT_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Patient:
    """What is examined: a complete config, and the flags of the command."""

    config: Any
    data_dir: Path
    workdir: Path | None
    devices: int | None


@dataclasses.dataclass(frozen=True)
class Finding:
    ok: bool
    text: str
    remedy: str = ''


def versions(patient: Patient) -> Finding:
    """JAX, jaxlib and the plugin of the accelerator fit together."""
    import jax

    del patient
    names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow-datasets', 'numpy')
    plugins = ('jax-cuda12-plugin', 'jax-cuda13-plugin', 'jax-rocm7-plugin', 'libtpu')
    installed = {name: found for name in names + plugins if (found := _version(name))}
    text = ', '.join([f'Python {sys.version.split()[0]}', *(f'{n} {v}' for n, v in installed.items())])
    major, minor = map(int, jax.__version__.split('.')[:2])
    if not (0, 10) <= (major, minor) < (0, 13):
        return Finding(False, text, "install a jax from 0.10 to 0.12: pip install 'jax>=0.10,<0.13'")
    odd = [
        n for n in plugins if n.endswith('-plugin') and installed.get(n, jax.__version__) != jax.__version__
    ]
    if odd:
        return Finding(False, text, f"pip install 'jax[{odd[0].split('-')[1]}]=={jax.__version__}'")
    return Finding(True, text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices(patient: Patient) -> Finding:
    """The devices start, and have memory."""
    import jax
    import psutil

    from parallel_train.mesh import start_devices

    start_devices(patient.devices or processes.count())
    first = jax.devices()[0]
    text = f'{len(jax.devices())} × {first.device_kind}, {len(jax.local_devices())} of them here'
    if first.platform == 'cpu':
        memory = psutil.virtual_memory()
        text += f'; {machine.cores()} cores, {_gib(memory.available)} of {_gib(memory.total)} GiB free'
        enough = memory.available > 2**30
        return Finding(enough, text, 'less than 1 GiB of memory is free: end other programs')
    free = [d.memory_stats()['bytes_limit'] - d.memory_stats()['bytes_in_use'] for d in jax.local_devices()]
    text += f'; at least {_gib(min(free))} GiB free on each'
    return Finding(min(free) > 2**30, text, 'another process holds the memory of a device: end it')


def _gib(size: float) -> str:
    return f'{size / 2**30:.2g}' if size < 2**30 else f'{size / 2**30:.1f}'


def tensorflow(patient: Patient) -> Finding:
    """TensorFlow, which takes all memory of every GPU that it sees, sees none."""
    import jax

    del patient
    if 'tensorflow' not in sys.modules:
        return Finding(True, 'is not imported, so it holds no GPU')
    if jax.default_backend() != 'gpu':
        return Finding(True, 'is imported; there is no GPU that it could hold')
    seen = sys.modules['tensorflow'].config.get_visible_devices('GPU')
    return Finding(
        not seen, f'sees {len(seen)} GPUs', "tf.config.set_visible_devices([], 'GPU') before JAX starts"
    )


def processes_alike(patient: Patient) -> Finding:
    """All processes are here, with equally many devices and the same code."""
    import jax

    from parallel_train.preflight import code_version

    del patient
    mine = {'devices': len(jax.local_devices()), 'kind': jax.devices()[0].device_kind, 'code': code_version()}
    everyone = processes.gather('alike', {**mine, 'host': processes.host()})
    hosts = sorted({told['host'] for told in everyone})
    text = f'{len(everyone)} on {len(hosts)} host{"s" if len(hosts) > 1 else ""} ({", ".join(hosts[:4])})'
    for name in mine:
        values = [told[name] for told in everyone]
        if len(set(values)) > 1:
            return Finding(False, f'{text}; {name} differ: {values}', 'start all processes alike')
    return Finding(True, f'{text}, {mine["devices"]} device{"s" if mine["devices"] > 1 else ""} each')


def clocks(patient: Patient) -> Finding:
    """The hosts' clocks agree."""
    del patient
    processes.gather('clocks, ready', None)  # all are here now
    before = time.time()
    times = processes.gather('clocks', before)
    spent = time.time() - before
    skew = max(times) - min(times)
    if len(times) == 1:
        return Finding(True, time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime()))
    text = f'{skew:.2f} s apart at most (read within {spent:.2f} s)'
    return Finding(skew - spent < _SKEW, text, 'set the clocks by NTP (chronyc makestep)')


def all_reduce(patient: Patient) -> Finding:
    """A sum over all devices is right; and how quick it is."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from parallel_train import reduce
    from parallel_train.mesh import make_mesh

    del patient
    mesh = make_mesh(len(jax.devices()))
    words = _ALL_REDUCE_MB * 2**20 // 4

    def body(x: jax.Array) -> jax.Array:
        own = reduce.to_local(x) + reduce.device_index().astype(jnp.float32)
        return reduce.sum_over_devices(own)

    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P()))
    expected = sum(range(mesh.size)) + mesh.size  # of ones and the devices' numbers: exact in float32
    right = bool(np.all(np.asarray(program(jnp.ones(words))) == expected))
    start, calls = time.perf_counter(), 5
    for _ in range(calls):
        result = program(jnp.ones(words))
    result.block_until_ready()
    seconds = (time.perf_counter() - start) / calls
    # What a ring sends from each device, Patarasuk and Yuan 2009.
    sent = 2 * (mesh.size - 1) / mesh.size * words * 4
    text = f'over {mesh.size} devices {"right" if right else "WRONG"}, {_ALL_REDUCE_MB} MiB'
    text += f' in {seconds * 1e3:.1f} ms'
    if mesh.size > 1:
        text += f', {sent / seconds / 1e9:.2f} GB/s a device'
    return Finding(right, text, 'the network or a device computes wrong sums: do not train here')


def gradients(patient: Patient) -> Finding:
    """One step of the config's model on all devices gives the gradients of one device."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from parallel_train import config as config_lib
    from parallel_train import examples
    from parallel_train.batches import gather
    from parallel_train.dataset import Split
    from parallel_train.mesh import make_mesh
    from parallel_train.plan import make_plan
    from parallel_train.reduce import DATA_AXIS
    from parallel_train.state import initialise
    from parallel_train.step import make_train_step

    count = len(jax.devices())
    batch = 4 * count
    config = patient.config.copy_and_resolve_references().unlock()
    config.update({'batch_size': batch, 'shards': count, 'accumulation_steps': 1})
    config.update({'num_epochs': 2.0, 'schedule': 'constant'})  # others may not fit so few epochs
    config.update({'optimizer': 'sgd', 'momentum': 0.0, 'weight_decay': 0.0, 'reduction': 'pmean'})
    config.update({'gradient_dtype': 'float32'})  # which the tolerance is for
    if not config.input_shape:
        config.update({'input_shape': (28, 28, 1), 'num_classes': 10})
    config = config_lib.complete(config)
    split = Split(*examples.noise(config.input_shape, config.num_classes or 10, batch), ())

    def after_a_step(mesh: Mesh) -> Any:
        plan = make_plan(config, batch, 1, mesh.size)
        data = gather(split, np.arange(batch, dtype=np.int32), mesh)
        before = initialise(config, 1.0, mesh)
        start = jax.device_get(before.params)
        after = jax.device_get(make_train_step(config, plan, mesh)(before, data).params)
        return jax.tree.map(np.subtract, start, after)  # the gradient, at rate 1

    many = jax.tree.leaves(after_a_step(make_mesh(count)))
    one = jax.tree.leaves(after_a_step(Mesh(np.array(jax.local_devices()[:1]), (DATA_AXIS,))))
    scale = max(float(np.max(np.abs(x))) for x in one)
    worst = max(float(np.max(np.abs(a - b))) for a, b in zip(many, one, strict=True)) / scale
    text = f'of {config.model} on {count} devices differ from those of one by {worst:.1e} of the largest'
    return Finding(worst < _GRADIENT_TOLERANCE, text, 'a device or the exchange computes something else')


def data(patient: Patient) -> Finding:
    """The dataset is prepared, and its first, middle and last examples can be read."""
    import numpy as np

    from parallel_train import dataset

    start, told = time.perf_counter(), []
    for name in dict.fromkeys((patient.config.train_split, patient.config.eval_split)):
        split = dataset.open_split(patient.config, name, patient.data_dir)
        split.read(np.array([0, len(split) // 2, len(split) - 1]))
        told.append(f'{name} {len(split):,}')
    seconds = time.perf_counter() - start
    return Finding(True, f'{patient.config.dataset}: {", ".join(told)} examples, opened in {seconds:.2f} s')


def workdir(patient: Patient) -> Finding:
    """The workdir can be written and has room for the checkpoints that are kept."""
    import jax

    from parallel_train.state import abstract_state, saved_parts

    if patient.workdir is None:
        return Finding(True, 'none given (--workdir=DIR), so not checked')
    check_writable('workdir', patient.workdir)
    parts = saved_parts(abstract_state(patient.config, lambda _: 0.0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parts))
    kept = patient.config.keep_checkpoints + 2  # the best, and the one that is being written
    if is_remote(patient.workdir):
        text = f'{patient.workdir}: can be written; {kept} checkpoints take {_gib(kept * size)} GiB'
        return Finding(True, text)
    existing = next(path for path in (patient.workdir, *patient.workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f'{patient.workdir}: {_gib(free)} GiB free; {kept} checkpoints take {_gib(kept * size)}'
    return Finding(free > kept * size, text, 'make room, or lower config.keep_checkpoints')


def compilation_cache(patient: Patient) -> Finding:
    """Where JAX keeps compiled programs, and whether it can."""
    import jax

    del patient
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not folder:
        return Finding(
            True, 'off; JAX_COMPILATION_CACHE_DIR=DIR on a file system that all see saves compiling again'
        )
    if '://' not in folder:
        check_writable('JAX_COMPILATION_CACHE_DIR', Path(folder))
    return Finding(True, folder)


def open_files(patient: Patient) -> Finding:
    """As many files and connections may be open as a job needs."""
    del patient
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f'{soft} may be open (at most {hard}), {len(os.listdir("/proc/self/fd"))} are' if os.path.isdir(
        '/proc/self/fd') else f'{soft} may be open (at most {hard})'  # fmt: skip
    return Finding(soft >= _FILES or soft == resource.RLIM_INFINITY, text, f'ulimit -n {_FILES * 4}')
