"""What do SyncBN and narrow gradients cost on this CPU? The step with each option ÷ the step without.

The recipe is `fashion_mnist_resnet.py` (8 BatchNorms), a batch of it resident on the devices; all take turns
in one process, ratios are formed within each round. What an interconnect saves or loses is not seen here:
XLA's CPU devices share the memory, and add bfloat16 in float32.

    python benchmarks/options.py [--data_dir=DIR] [--rounds=7] [--devices=4] [--steps=8]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

OPTIONS: dict[str, dict[str, Any]] = {
    'default': {},
    'batch_norm=global': {'batch_norm': 'global'},
    'gradient_dtype=bfloat16': {'gradient_dtype': 'bfloat16'},
}


def stepper(options: dict[str, Any], data_dir: Path, devices: int, steps: int) -> Callable[[], float]:
    """Returns a function that takes so many steps on one batch and returns images/s."""
    import jax
    import numpy as np

    from parallel_train import config as config_lib
    from parallel_train import dataset
    from parallel_train.batches import gather
    from parallel_train.mesh import make_mesh
    from parallel_train.plan import make_plan
    from parallel_train.state import initialise
    from parallel_train.step import make_train_step

    config = config_lib.load(measure.ROOT / 'configs' / 'fashion_mnist_resnet.py')
    config = config_lib.complete(config.copy_and_resolve_references().unlock())
    with config.unlocked():
        config.update({**options, 'shards': 2 * devices})
    split = dataset.load_split(config.dataset, config.train_split, data_dir)
    mesh = make_mesh(devices)
    step = make_train_step(config, make_plan(config, len(split.images), 1, devices), mesh)
    data = gather(split, np.arange(config.batch_size, dtype=np.int32), mesh)
    state = initialise(config, 1e-3, mesh)

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state = step(state, data)
        jax.block_until_ready(state.step)
        return steps * config.batch_size / (time.perf_counter() - start)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data_dir')
    parser.add_argument('--devices', type=int, default=4)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--steps', type=int, default=8, help='steps in one turn')
    args = parser.parse_args()
    facts = measure.environment(('jax', 'jaxlib', 'flax', 'optax', 'numpy'))
    measure.show_environment(facts)
    data_dir = measure.data_dir_of(args.data_dir)
    measure.choose_devices(measure.recipe(), data_dir, args.devices)
    things = {name: stepper(options, data_dir, args.devices, args.steps) for name, options in OPTIONS.items()}
    measure.interleave(1, things)  # compiles
    values = measure.interleave(args.rounds, things)
    ratios = {name: measure.ratio(rates, values['default']) for name, rates in values.items()}
    rows = [[name, measure.Spread.of(values[name]).text(), ratios[name].text('.3f')] for name in things]
    title = f'{args.devices} devices, batch 128, {args.rounds} rounds: median (quartiles)'
    print(measure.table(title, ['option', 'images/s', '÷ default'], rows))
    measure.write_results('options', facts, {'devices': args.devices, 'ratios': ratios, 'rounds': values})


if __name__ == '__main__':
    main()
