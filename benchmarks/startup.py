"""How long until it trains, and how much memory does it take?

(a) Wall time from the command `train` to the first completed step, as seen from outside: until the
row of step 1 stands in metrics.jsonl (which is written while step 2 is under way, so the figure is
too high by a step). Divided by the time of a process that only imports jax, flax, optax and
orbax.checkpoint and compiles the same two programs, initialisation and train step. In turns, files cached.

(b) Peak resident memory of a whole `train` process with evaluation, checkpoints and report.

    python benchmarks/startup.py [--data_dir=DIR] [--devices=8] [--rounds=7] [--epochs=1]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

TARGET_RATIO, TARGET_GB = 1.3, 1.5
MEMORY_DEVICES = (4, 8)


def train_command(args: argparse.Namespace, workdir: Path, devices: int, *overrides: str) -> list[str]:
    return [
        *(sys.executable, '-m', 'parallel_train', 'train', f'--config={measure.RECIPE}'),
        *(f'--data_dir={args.data_dir}', f'--workdir={workdir}', f'--devices={devices}', *overrides),
    ]


def start(command: list[str], output: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=measure.ROOT, stdout=output, stderr=subprocess.STDOUT, text=True)


def fail(command: list[str], output: str) -> None:
    sys.exit(f'error: {" ".join(command[1:])} failed:\n{output}')


def seconds_to_first_step(args: argparse.Namespace) -> float:
    """Returns the seconds from starting `train` to its first row, then ends it."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile('w+') as output:
        workdir = Path(folder) / 'run'
        rows = workdir / 'metrics.jsonl'
        command = train_command(args, workdir, args.devices, '--config.log_every_steps=1')
        begin = time.perf_counter()
        process = start(command, output)
        while not (rows.exists() and rows.stat().st_size):
            if process.poll() is not None:
                output.seek(0)
                fail(command, output.read())
            time.sleep(0.005)
        seconds = time.perf_counter() - begin
        process.kill()
        process.wait()
    return seconds


def seconds_of_reference(args: argparse.Namespace) -> float:
    """Returns the seconds from starting the reference to its last line."""
    command = [sys.executable, __file__, '--reference', f'--devices={args.devices}']
    begin = time.perf_counter()
    process = start(command, subprocess.PIPE)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == 'compiled\n':
            break
    seconds = time.perf_counter() - begin
    process.kill()
    process.wait()
    if not lines or lines[-1] != 'compiled\n':
        fail(command, ''.join(lines))
    return seconds


def reference(devices: int) -> None:
    """Imports the libraries and compiles what `train` compiles before its first step; no data."""
    import flax  # noqa: F401
    import jax
    import numpy as np
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    from jax.sharding import NamedSharding

    from parallel_train import batches, config, mesh, plan, schedule, state, step

    recipe = config.complete(config.load(measure.RECIPE))
    examples, shape = recipe.num_train_examples, tuple(recipe.input_shape)
    mesh.start_devices(devices)
    over = mesh.make_mesh(devices)
    planned = plan.make_plan(recipe, examples, recipe.num_eval_examples, devices)
    rate = schedule.create_learning_rate_fn(recipe, planned.peak_learning_rate, planned.steps_per_epoch)
    shapes = {
        'images': ((examples, *shape), np.uint8),
        'labels': ((examples,), np.int32),
        'order': ((planned.steps_per_epoch, planned.batch_size), np.int32),
    }
    specs = batches.specs(dict.fromkeys(shapes))  # type: ignore[arg-type]
    data = {
        name: jax.ShapeDtypeStruct(*shapes[name], sharding=NamedSharding(over, specs[name]))
        for name in shapes
    }
    initial = state.initialise(recipe, rate, over)
    step.make_train_step(recipe, planned, over).lower(initial, data).compile()
    print('compiled', flush=True)


def measure_memory(args: argparse.Namespace, devices: int) -> dict[str, Any]:
    """Trains to the end; returns the peak memory in GB and what the process says of its time."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile('w+') as output:
        epochs = f'--config.num_epochs={args.epochs}'
        command = train_command(args, Path(folder) / 'run', devices, epochs)
        process = start(command, output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        fail(command, text)
    # The kernel counts in KiB on Linux, in bytes on macOS.
    peak = usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9
    spent = re.search(r'^time: (.*)$', text, re.MULTILINE)
    return {'devices': devices, 'peak_gb': peak, 'time': spent.group(1) if spent else ''}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data_dir')
    parser.add_argument('--devices', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--epochs', type=float, default=1.0)
    parser.add_argument('--reference', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reference:
        return reference(args.devices)
    args.data_dir = measure.data_dir_of(args.data_dir)
    facts = measure.environment(('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'))
    measure.show_environment(facts)

    things = {
        'train': lambda: seconds_to_first_step(args),
        'reference': lambda: seconds_of_reference(args),
    }
    measure.interleave(1, things)  # fills the file cache
    values = measure.interleave(args.rounds, things)
    ratio = measure.ratio(values['train'], values['reference'])
    rows = [
        ['`train` to the first completed step', measure.Spread.of(values['train']).text('.2f')],
        ['imports and compilation alone', measure.Spread.of(values['reference']).text('.2f')],
        [f'ratio (target ≤ {TARGET_RATIO})', ratio.text('.2f')],
    ]
    title = f'Start-up, {args.devices} devices, {args.rounds} rounds: median (quartiles)'
    print(measure.table(title, ['', 's'], rows), flush=True)

    memory = [measure_memory(args, devices) for devices in MEMORY_DEVICES]
    rows = [[f'{m["devices"]} devices', f'{m["peak_gb"]:.2f}', m['time']] for m in memory]
    title = f'Peak memory of `train`, {args.epochs:g} epochs of Fashion-MNIST (target ≤ {TARGET_GB} GB)'
    print(measure.table(title, ['', 'GB', 'time, as it says'], rows))
    measure.write_results(
        'startup', facts, {'devices': args.devices, 'ratio': ratio, 'rounds': values, 'memory': memory}
    )
    return None


if __name__ == '__main__':
    main()
