"""What does the loop cost? Images/s of `train`'s step loop ÷ images/s of the bare compiled step.

The loop is `train`'s own (`train_epoch`: feed, recorder, log rows, TensorBoard events), on real data
that lies on the devices. The bare step is the same program, called again and again on one resident
batch. The two take turns in one process, on the same devices; the ratio is formed within each round.

    python benchmarks/overhead.py [--data_dir=DIR] [--devices=N] [--rounds=15] [--batch_sizes=256,64,32]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

TARGET, TARGET_BATCH = 0.97, 256


def bare_step(loop: measure.Loop, config: Any, data_dir: Path) -> Callable[[int], float]:
    """Returns a function that calls the bare step so many times and returns images/s."""
    import numpy as np

    from parallel_train import dataset
    from parallel_train.batches import gather
    from parallel_train.mesh import make_mesh
    from parallel_train.state import initialise
    from parallel_train.step import make_train_step

    plan = loop.run.plan
    mesh = make_mesh(plan.num_devices)
    split = dataset.load_split(config.dataset, config.train_split, data_dir)
    data = gather(split, np.arange(plan.batch_size, dtype=np.int32), mesh)
    step = make_train_step(config, plan, mesh)
    state = initialise(config, plan.peak_learning_rate, mesh)

    def stretch(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state = step(state, data)
        measure.wait_for(state)
        return steps * plan.batch_size / (time.perf_counter() - start)

    return stretch


def measure_batch_size(
    batch_size: int, args: argparse.Namespace, devices: int, workdir: Path
) -> dict[str, Any]:
    data_dir = measure.data_dir_of(args.data_dir)
    config = measure.recipe(batch_size=batch_size)
    loop = measure.open_loop(config, data_dir, devices, workdir)
    bare = bare_step(loop, config, data_dir)
    steps = args.images // batch_size
    things = {'loop': lambda: loop.stretch(steps), 'bare': lambda: bare(steps)}
    measure.interleave(1, things)  # compiles
    values = measure.interleave(args.rounds, things)
    loop.close()
    return {
        'batch_size': batch_size,
        'ratio': measure.ratio(values['loop'], values['bare']),
        'loop_images_per_second': measure.Spread.of(values['loop']),
        'bare_images_per_second': measure.Spread.of(values['bare']),
        'rounds': values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data_dir')
    parser.add_argument('--devices', type=int, help='default: what `train` would use at batch 256')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--images', type=int, default=12_800, help='images in one stretch')
    parser.add_argument('--batch_sizes', default='256,64,32')
    args = parser.parse_args()
    facts = measure.environment(('jax', 'jaxlib', 'flax', 'optax', 'numpy'))
    measure.show_environment(facts)
    data_dir = measure.data_dir_of(args.data_dir)
    devices = measure.choose_devices(measure.recipe(), data_dir, args.devices)
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure_batch_size(int(size), args, devices, Path(folder) / size)
            for size in args.batch_sizes.split(',')
        ]
    rows = [
        [
            result['batch_size'],
            result['loop_images_per_second'].text(),
            result['bare_images_per_second'].text(),
            result['ratio'].text('.3f'),
            f'≥ {TARGET}' if result['batch_size'] == TARGET_BATCH else '',
        ]
        for result in results
    ]
    title = f'Overhead of the loop, {devices} devices, {args.rounds} rounds: median (quartiles)'
    print(measure.table(title, ['batch', 'loop, images/s', 'bare step, images/s', 'ratio', 'target'], rows))
    measure.write_results('overhead', facts, {'devices': devices, 'images': args.images, 'results': results})


if __name__ == '__main__':
    main()
