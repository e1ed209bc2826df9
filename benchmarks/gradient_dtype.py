"""What does `gradient_dtype='bfloat16'` change? The gradient's error; the loss curve, against other seeds.

The guide's CNN on Fashion-MNIST, 4 devices. Each seed is trained twice, with gradients exchanged as float32
and as bfloat16; the difference of the two is set against the standard deviation over seeds. XLA's CPU devices
add bfloat16 in float32, but the parts, and the sum, are rounded as on accelerators.

    python benchmarks/gradient_dtype.py [--data_dir=DIR] [--seeds=3] [--devices=4] [--steps=234]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import measure

DTYPES = ('float32', 'bfloat16')


def train(seed: int, dtype: str, data_dir: Path, devices: int, steps: int) -> dict[str, Any]:
    """Returns the loss of each tenth of the run, and the loss on the test split at its end."""
    import jax

    from parallel_train import dataset
    from parallel_train.batches import ResidentFeed
    from parallel_train.evaluate import Evaluator
    from parallel_train.mesh import make_mesh
    from parallel_train.plan import make_plan
    from parallel_train.schedule import create_learning_rate_fn
    from parallel_train.state import initialise, take_sums
    from parallel_train.step import make_train_step

    config = measure.recipe(
        seed=seed, gradient_dtype=dtype, batch_size=128, learning_rate=0.1, num_epochs=steps / 468,
        warmup_epochs=0.1,
    )  # fmt: skip
    train_split, test_split = (dataset.load_split(config.dataset, s, data_dir) for s in ('train', 'test'))
    mesh = make_mesh(devices)
    plan = make_plan(config, len(train_split.images), len(test_split.images), devices)
    rate = create_learning_rate_fn(config, plan.peak_learning_rate, plan.steps_per_epoch)
    state, feed = initialise(config, rate, mesh), ResidentFeed(train_split, config, plan, mesh)
    step, curve, tenth = make_train_step(config, plan, mesh), [], -(-plan.num_steps // 10)
    for i in range(plan.num_steps):
        state = step(state, feed.at(i))
        if (i + 1) % tenth == 0 or i + 1 == plan.num_steps:
            state, sums = take_sums(state, mesh)
            curve.append(float(sums['loss'] / sums['updates']))
    evaluation = Evaluator(test_split, config, mesh, state)(state)
    assert evaluation is not None
    jax.clear_caches()
    return {'curve': curve, 'test_loss': evaluation['loss'], 'test_accuracy': evaluation['accuracy']}


def error_of_gradient(data_dir: Path, devices: int) -> float:
    """Returns ‖bfloat16 - float32‖ / ‖float32‖ of the first step's gradient."""
    import jax
    import numpy as np
    import optax

    from parallel_train import dataset
    from parallel_train.batches import ResidentFeed
    from parallel_train.mesh import make_mesh
    from parallel_train.plan import make_plan
    from parallel_train.state import initialise
    from parallel_train.step import make_train_step

    updates = []
    for dtype in DTYPES:
        config = measure.recipe(gradient_dtype=dtype)
        split, mesh = dataset.load_split(config.dataset, 'train', data_dir), make_mesh(devices)
        plan = make_plan(config, len(split.images), 1, devices)
        state = initialise(config, 1.0, mesh).replace(tx=optax.sgd(1.0))
        state = state.replace(opt_state=state.tx.init(state.params))
        before = jax.device_get(state.params)
        feed = ResidentFeed(split, config, plan, mesh)
        after = jax.device_get(make_train_step(config, plan, mesh)(state, feed.at(0)).params)
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        updates.append(np.concatenate([(np.float64(b) - a).ravel() for b, a in pairs]))
    return float(np.linalg.norm(updates[1] - updates[0]) / np.linalg.norm(updates[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data_dir')
    parser.add_argument('--devices', type=int, default=4)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=234)
    args = parser.parse_args()
    facts = measure.environment(('jax', 'jaxlib', 'flax', 'optax', 'numpy'))
    measure.show_environment(facts)
    data_dir = measure.data_dir_of(args.data_dir)
    measure.choose_devices(measure.recipe(), data_dir, args.devices)
    error = error_of_gradient(data_dir, args.devices)
    print(f'error of the gradient: {error:.2e} of its norm', flush=True)
    runs = {
        (seed, dtype): train(seed, dtype, data_dir, args.devices, args.steps)
        for seed in range(args.seeds)
        for dtype in DTYPES
    }
    seeds, names = range(args.seeds), [f'tenth {i + 1}' for i in range(len(runs[0, 'float32']['curve']))]
    columns = {
        name: [[runs[s, d]['curve'][i] for s in seeds] for d in DTYPES] for i, name in enumerate(names)
    }
    columns['test loss'] = [[runs[s, d]['test_loss'] for s in seeds] for d in DTYPES]
    columns['test accuracy'] = [[runs[s, d]['test_accuracy'] for s in seeds] for d in DTYPES]
    rows = []
    for name, (wide, narrow) in columns.items():
        difference = statistics.mean(abs(a - b) for a, b in zip(wide, narrow, strict=True))
        rows.append([
            name, f'{statistics.mean(wide):.4f}', f'{statistics.mean(narrow):.4f}', f'{difference:.4f}',
            f'{statistics.stdev(wide):.4f}',
        ])  # fmt: skip
    header = ['mean loss of', 'float32', 'bfloat16', 'difference, same seed', 'deviation over seeds']
    print(measure.table(f'{args.seeds} seeds, {args.steps} steps, {args.devices} devices', header, rows))
    results = {'gradient_error': error, 'runs': {f'{s} {d}': run for (s, d), run in runs.items()}}
    measure.write_results('gradient_dtype', facts, results)


if __name__ == '__main__':
    main()
