"""What the benchmarks share: rounds, ratios, tables, files, and the training loop opened up for a clock."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / 'configs' / 'fashion_mnist.py'
sys.path.insert(0, str(ROOT))  # a checkout that is not installed will do


# ---------------------------------------------------------------- rounds and ratios


@dataclasses.dataclass(frozen=True)
class Spread:
    """Several measurements of one thing: their median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(statistics.median(values), low, high)

    def text(self, form: str = ',.0f') -> str:
        return f'{self.median:{form}} ({self.low:{form}} to {self.high:{form}})'


def interleave(
    rounds: int, things: dict[str, Callable[[], float]], shuffled: bool = False
) -> dict[str, list[float]]:
    """Calls each thing once a round, every other round in reverse order, and collects what they return.

    What is compared thus runs side by side: a machine's speed drifts by more than what is measured.
    `shuffled` draws each round's order instead, for many rounds of what differs by little.
    """
    values: dict[str, list[float]] = {name: [] for name in things}
    rng = random.Random(0)
    for i in range(rounds):
        order = list(things) if i % 2 == 0 else list(reversed(things))
        for name in rng.sample(order, len(order)) if shuffled else order:
            values[name].append(things[name]())
    return values


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """The ratio of two interleaved measurements, formed within each round."""
    return Spread.of([a / b for a, b in zip(of, to, strict=True)])


# ---------------------------------------------------------------- what is printed and kept


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Returns machine, versions and date: what a figure depends on besides the code."""
    return {
        'cpu': _cpu_model(),
        'cores': os.cpu_count(),
        'system': platform.system(),
        'python': platform.python_version(),
        **{name: _version(name) for name in packages},
        'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
        'load_before': round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(':')
        fields.setdefault(name.strip(), value.strip())
    # Virtual machines often name no model; its number tells at least the generation.
    numbers = f'family {fields.get("cpu family", "?")}, model {fields.get("model", "?")}'
    return f'{fields.get("model name", platform.machine())} ({numbers})'


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'not installed'


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns an aligned table; the first column is text, the others are set to the right."""
    cells = [list(map(str, header)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return '  '.join([row[0].ljust(widths[0]), *rest])

    rule = '-' * (sum(widths) + 2 * (len(widths) - 1))
    return '\n'.join(['', title, rule, line(cells[0]), rule, *map(line, cells[1:]), rule])


def show_environment(facts: dict[str, Any]) -> None:
    print(', '.join(f'{name} {value}' for name, value in facts.items()), flush=True)
    if facts['load_before'] > 0.5 * (os.cpu_count() or 1):
        print(f'WARNING: the machine is busy (load {facts["load_before"]}): the figures will be worth little')


def write_results(name: str, facts: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes `results/NAME.json` beside this file."""
    folder = Path(__file__).parent / 'results'
    folder.mkdir(exist_ok=True)
    file = folder / f'{name}.json'
    plain = json.dumps({'environment': facts, **results}, indent=2, default=dataclasses.asdict)
    file.write_text(plain + '\n')
    print(f'\nwritten: {file.relative_to(ROOT)}')


# ---------------------------------------------------------------- the training loop


@dataclasses.dataclass
class Loop:
    """`train`'s own loop, recorder, log and feed on real data, and the state it is at."""

    run: Any
    state: Any
    stack: contextlib.ExitStack

    def stretch(self, steps: int) -> float:
        """Trains to the end of an epoch from `steps` before it; returns images/s.

        The devices go on counting steps from where they are, so their place in the epoch's order is
        another. What the loop shows goes nowhere, but is made.
        """
        from parallel_train.train import train_epoch

        run, plan = self.run, self.run.plan
        run.step = (run.step // plan.steps_per_epoch + 2) * plan.steps_per_epoch - steps
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
            run.recorder.restart(run.step)
            start = time.perf_counter()
            self.state = train_epoch(self.state, run)
            wait_for(self.state)
            seconds = time.perf_counter() - start
        return steps * plan.batch_size / seconds

    def close(self) -> None:
        self.stack.close()


def wait_for(state: Any) -> None:
    import jax

    jax.block_until_ready(state)


def recipe(**overrides: Any) -> Any:
    """Returns the Fashion-MNIST recipe, complete, without evaluation and checkpoints before its end.

    It has more epochs than any benchmark takes, and a low rate, so that no number runs off to where
    arithmetic has another speed, however long one batch is repeated.
    """
    from parallel_train import config as config_lib

    config = config_lib.load(RECIPE)
    config.update({'num_epochs': 1000.0, 'learning_rate': 1e-3, 'batch_size': 256})
    config.update({'eval_every_epochs': 0.0, 'checkpoint_every_epochs': 0.0, **overrides})
    return config_lib.complete(config)


def open_loop(config: Any, data_dir: Path, num_devices: int, workdir: Path) -> Loop:
    """Returns the loop of `train_and_evaluate` for `config`, at step 0, on devices already started."""
    from parallel_train.checkpoint import open_checkpoints
    from parallel_train.clock import Clock
    from parallel_train.lifeline import Lifeline, Limits
    from parallel_train.mesh import make_mesh
    from parallel_train.plan import make_plan
    from parallel_train.preflight import check_job
    from parallel_train.run import open_run
    from parallel_train.schedule import create_learning_rate_fn
    from parallel_train.state import initialise

    workdir.mkdir(parents=True, exist_ok=True)
    job = check_job(config, workdir, data_dir, num_devices, allow_plan_change=False)
    plan = make_plan(job.config, job.sizes.num_train_examples, job.sizes.num_eval_examples, num_devices)
    mesh = make_mesh(num_devices)
    learning_rate_fn = create_learning_rate_fn(job.config, plan.peak_learning_rate, plan.steps_per_epoch)
    state = initialise(job.config, learning_rate_fn, mesh)
    stack = contextlib.ExitStack()
    lifeline = stack.enter_context(Lifeline(Limits()))
    checkpoints = stack.enter_context(open_checkpoints(workdir))
    opened = open_run(job, plan, mesh, workdir, state, checkpoints, lifeline, Clock(), skip_nonfinite=0)
    return Loop(stack.enter_context(opened), state, stack)


def choose_devices(config: Any, data_dir: Path, asked: int | None, workdir: Path | None = None) -> int:
    """Starts JAX as `train` would, and returns how many devices it would use."""
    from parallel_train import devices
    from parallel_train.sizes import find_sizes

    sizes = find_sizes(config, data_dir)
    return devices.choose_devices(config, sizes, asked, workdir, say=lambda _: None)


def data_dir_of(flag: str | None) -> Path:
    """Returns the folder that holds Fashion-MNIST, or ends with what to do about it."""
    from parallel_train import dataset

    folder = dataset.default_data_dir(flag)
    if not (folder / 'fashion_mnist').is_dir():
        sys.exit(
            f'error: no fashion_mnist in {folder}; run `python -m parallel_train prepare '
            f'--config={RECIPE.relative_to(ROOT)} --data_dir={folder}` first'
        )
    return folder
