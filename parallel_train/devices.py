"""How many devices are used where the user does not say?

All accelerators. On CPU, where the number of XLA devices is ours to choose, the count that is
fastest: more devices than cores can pay, because smaller parts of a batch stay in cache. It is
measured with the real step, once for a model and batch on a machine, and remembered.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from parallel_train import examples, machine, processes
from parallel_train.batch_fit import mixes
from parallel_train.batches import gather
from parallel_train.config_fields import RUN_FIELDS
from parallel_train.dataset import Split
from parallel_train.errors import UserError
from parallel_train.files import write_atomically
from parallel_train.mesh import backend_runs, make_mesh, start_devices, usable_cpu_devices
from parallel_train.plan import make_plan
from parallel_train.sizes import Sizes
from parallel_train.state import initialise
from parallel_train.step import make_train_step
from parallel_train.stepper import stepper
from parallel_train.workdir import planned_devices

_ROUNDS, _SECONDS_PER_ROUND = 5, 0.4
_IRRELEVANT = RUN_FIELDS + (
    'seed', 'dataset', 'train_split', 'eval_split', 'num_train_examples', 'num_eval_examples',
    'num_epochs', 'warmup_epochs', 'schedule', 'learning_rate', 'learning_rate_scaling',
    'reference_batch_size', 'eval_batch_size', 'log_every_steps', 'eval_every_epochs',
    'checkpoint_every_epochs', 'momentum', 'weight_decay',
)  # fmt: skip


def choose_devices(
    config: Any,
    sizes: Sizes,
    asked: int | None,
    workdir: Path | None,
    say: Callable[[str], None],
    measure: bool = True,
) -> int:
    """Starts JAX's backend and returns how many of its devices to use.

    Args:
      config: a complete config.
      sizes: of the dataset.
      asked: what the user asked for; on CPU so many are made. None for the default: all accelerators;
        on CPU what the job in `workdir` used last, where that still fits, else the fastest count.
      workdir: of the run, if it has one.
      say: shows a line to the user.
      measure: if False, a count that was never measured is estimated instead.

    Raises:
      UserError: there are not as many as asked for.
    """
    if asked is not None:
        if asked < 1:
            raise UserError(f'devices={asked}: must be at least 1')
        start_devices(asked, tree_shards(config))
        return make_mesh(asked).size
    if processes.count() > 1:
        return _of_all_processes(config)
    last = planned_devices(workdir) if workdir else None
    fitting = [last] if last and _fits(config, last) else candidates(config)
    if backend_runs() and jax.default_backend() == 'cpu':  # then the devices are what they are
        most = usable_cpu_devices()
        fitting = [count for count in fitting if count <= most] or [1]
    known = remembered(config, sizes)
    count = fitting[0] if len(fitting) == 1 else known if known in fitting else None
    start_devices(count or max(fitting), tree_shards(config))
    if jax.default_backend() != 'cpu':
        return len(jax.devices())
    if count:
        return count
    if measure:
        return fastest(config, sizes, fitting, say)
    count = estimate(config)
    say(f'devices: {count} is an estimate; `train` measures once which number is fastest here')
    return count


def tree_shards(config: Any) -> int:
    """Returns what `start_devices` is to know of the config."""
    return int(config.shards) if config.reduction == 'tree' else 0


def _of_all_processes(config: Any) -> int:
    """Starts the backend of one process of several; on CPU with a device a core, where that fits."""
    fitting = (n for n in range(1, machine.cores() + 1) if _fits(config, n * processes.count()))
    start_devices(processes.count() * max(fitting, default=1), tree_shards(config))
    return len(jax.devices())


def candidates(config: Any, cores: int | None = None) -> list[int]:
    """Returns the device counts worth measuring: powers of two that fit batch and shards.

    From a half to four times the cores; 1 where none of those fits.
    """
    cores = cores or machine.cores()
    fitting = [count for count in (2**k for k in range(11)) if _fits(config, count)]
    return [c for c in fitting if cores / 2 <= c <= 4 * cores] or [max(fitting, default=1)]


def _fits(config: Any, count: int) -> bool:
    turns = count * config.accumulation_steps
    alone = config.batch_size == turns and mixes(config)  # each shard would have one example
    return config.batch_size % turns == 0 and config.shards % turns == 0 and not alone


def remembered(config: Any, sizes: Sizes) -> int | None:
    """Returns the count that was fastest when it was measured, None if it never was."""
    try:
        count = json.loads(_memory_file().read_text())[_key(config, sizes)]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return count if count in candidates(config) else None


def estimate(config: Any) -> int:
    """Returns a count without measuring: the most that fit, up to two a core."""
    cores = machine.cores()
    counts = candidates(config, cores)
    return max((c for c in counts if c <= 2 * cores), default=min(counts))


def fastest(config: Any, sizes: Sizes, counts: list[int], say: Callable[[str], None]) -> int:
    """Measures the step on each of `counts` devices, remembers and returns the fastest count.

    The counts take turns, so that a machine that is busy for a moment is so for all of them.
    """
    say(f'measuring the step on {", ".join(map(str, counts))} XLA CPU devices (once, then remembered)')
    seconds_per_step = {count: _stepper(config, sizes, count) for count in counts}
    rounds = [{count: measure() for count, measure in seconds_per_step.items()} for _ in range(_ROUNDS)]
    rates = {
        count: config.batch_size / statistics.median(seconds[count] for seconds in rounds) for count in counts
    }
    unit = examples.unit_of(sizes.input_shape)
    for count, rate in rates.items():
        say(f'  {count:>3} device{"s" if count > 1 else " "}  {rate:8,.0f} {unit}/s')
    count = max(rates, key=lambda c: rates[c])
    _remember(_key(config, sizes), count)
    return count


def _stepper(config: Any, sizes: Sizes, count: int) -> Callable[[], float]:
    """Returns a function that measures the compiled step, on a resident batch of noise: seconds."""
    batch = config.batch_size
    mesh = make_mesh(count)
    split = Split(*examples.noise(sizes.input_shape, sizes.num_classes, batch), ())
    data = gather(split, np.arange(batch, dtype=np.int32), mesh)
    one_epoch = config.copy_and_resolve_references().unlock()
    # However short the run is, and whatever epochs its schedule asks for.
    one_epoch.num_epochs, one_epoch.schedule = 1.0, 'constant'
    step = make_train_step(config, make_plan(one_epoch, batch, 1, count), mesh)
    run = stepper(step, initialise(config, 0.0, mesh), data)
    run(2)  # the first compiles
    steps = max(1, round(_SECONDS_PER_ROUND / run(1)))
    return lambda: run(steps)


def _memory_file() -> Path:
    return machine.cache_dir() / 'cpu_devices.json'


def _key(config: Any, sizes: Sizes) -> str:
    relevant = {k: v for k, v in config.to_dict().items() if k not in _IRRELEVANT}
    here = [platform.processor(), platform.machine(), machine.cores(), version('jaxlib')]
    what = json.dumps([relevant, sizes.input_shape, sizes.num_classes, here], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _remember(key: str, count: int) -> None:
    file = _memory_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(file.read_text()) if file.exists() else {}
        write_atomically(file, json.dumps({**known, key: count}, indent=2) + '\n')
    except (OSError, ValueError):
        pass  # measured again next time
