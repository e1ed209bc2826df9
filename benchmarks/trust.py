"""What does trust cost? `reduction='tree'` ÷ `pmean`, the loop with guards ÷ without, a save ÷ a step.

The guards: a step that is not finite is not applied (update.py), the devices' copies of the state are
compared every 500 steps, as by default (replicas.py), the host stays within seconds of the devices and
asks at every step whether to stop (pace.py, lifeline.py). Without them: the same loop, every update applied.
All take turns in one process, in short stretches in an order that chance decides: what is to be seen is
smaller than the machine's drift. Ratios are formed within each round. As few stretches meet a comparison of
the devices' copies, its time is measured by itself and spread over its steps. A save: the seconds from when
the devices have nothing left to do until the host may give them the next step, over those of a step. The
first save of a process also compiles, and does not count.

    python benchmarks/trust.py [--data_dir=DIR] [--rounds=60] [--devices=4,8] [--images=2048]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import measure
from overhead import bare_step

TREE_TARGET, GUARDS_TARGET, SAVE_TARGET = 0.85, 0.99, 1.0
CHECK_EVERY = 500


def without_guards(config: Any, data_dir: Path, devices: int, workdir: Path) -> measure.Loop:
    """Returns the loop with a step that applies whatever it computed, and a host that asks nothing."""
    import jax
    import jax.numpy as jnp
    import optax

    def apply_update(state: Any, sums: Any, plan: Any, skip_nonfinite: int) -> Any:
        weight = sums['weight']
        measured = {
            'loss': sums['loss'] / weight,
            'accuracy': sums['correct'] / weight,
            'grad_norm': optax.global_norm(sums['grads']) / weight,
            'updates': jnp.ones((), jnp.float32),
        }
        grads = jax.tree.map(lambda g: g / weight, sums['grads'])
        stats = jax.tree.map(lambda s: s / plan.shards, sums['batch_stats'])
        state = state.apply_gradients(grads=grads, batch_stats=stats)
        return state.replace(sums=jax.tree.map(jnp.add, state.sums, measured))

    loop = measure.open_loop(config, data_dir, devices, workdir)
    with mock.patch('parallel_train.step.apply_update', apply_update):
        loop.stretch(2)  # compiles
    loop.run.pace.after = lambda state, step: None
    loop.run.must_stop = lambda: False
    return loop


def over_step(loop: measure.Loop, rounds: int, steps: int, what: Callable[[], Any]) -> list[float]:
    """Returns how many steps' time `what` takes once the devices have nothing left to do."""
    ratios = []
    for _ in range(rounds + 1):
        seconds_per_step = loop.run.plan.batch_size / loop.stretch(steps)
        start = time.perf_counter()
        what()
        ratios.append((time.perf_counter() - start) / seconds_per_step)
        loop.run.checkpoints.wait()
    return ratios[1:]  # the first compiles


def measure_devices(devices: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from parallel_train.train import save

    data_dir, steps = measure.data_dir_of(args.data_dir), args.images // 256
    configs = {
        'pmean': measure.recipe(divergence_check_steps=0),
        'tree': measure.recipe(divergence_check_steps=0, reduction='tree'),
        'guarded': measure.recipe(divergence_check_steps=0),
    }
    loops = {
        name: measure.open_loop(config, data_dir, devices, folder / f'{name}{devices}')
        for name, config in configs.items()
    }
    guarded, run = loops['guarded'], loops['guarded'].run
    bare = {name: bare_step(loops[name], configs[name], data_dir) for name in ('pmean', 'tree')}
    unguarded = without_guards(configs['pmean'], data_dir, devices, folder / f'unguarded{devices}')
    things = {
        'pmean': lambda: bare['pmean'](steps),
        'tree': lambda: bare['tree'](steps),
        'guarded': lambda: guarded.stretch(steps),
        'unguarded': lambda: unguarded.stretch(steps),
    }
    measure.interleave(1, things)  # compiles
    values = measure.interleave(args.rounds, things, shuffled=True)

    def compare() -> None:
        run.replicas.check(guarded.state, run.step)
        run.replicas.settle()

    saves = over_step(guarded, 7, min(steps, 8), lambda: save(guarded.state, run))
    comparison = measure.Spread.of(over_step(guarded, 7, min(steps, 8), compare))
    share = comparison.median / CHECK_EVERY
    for loop in reversed([*loops.values(), unguarded]):  # the last to take the signals first
        loop.close()
    return {
        'devices': devices,
        'images_per_second': {name: measure.Spread.of(rates) for name, rates in values.items()},
        'tree_over_pmean': measure.ratio(values['tree'], values['pmean']),
        'comparison_over_step': comparison,
        'guarded_over_unguarded': measure.ratio(
            [rate / (1 + share) for rate in values['guarded']], values['unguarded']
        ),
        'save_over_step': measure.Spread.of(saves),
        'rounds': values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data_dir')
    parser.add_argument('--devices', default='4,8')
    parser.add_argument('--rounds', type=int, default=60)
    parser.add_argument('--images', type=int, default=2048, help='images in one stretch')
    args = parser.parse_args()
    counts = [int(count) for count in args.devices.split(',')]
    facts = measure.environment(('jax', 'jaxlib', 'flax', 'optax', 'numpy'))
    measure.show_environment(facts)
    measure.choose_devices(measure.recipe(), measure.data_dir_of(args.data_dir), max(counts))
    with tempfile.TemporaryDirectory() as folder:
        results = [measure_devices(count, args, Path(folder)) for count in counts]
    rows = [
        [
            result['devices'],
            *[result['images_per_second'][name].text() for name in ('pmean', 'tree')],
            result['tree_over_pmean'].text('.3f'),
            result['guarded_over_unguarded'].text('.3f'),
            result['comparison_over_step'].text('.2f'),
            result['save_over_step'].text('.2f'),
        ]
        for result in results
    ]
    rows.append(['target', '', '', f'≥ {TREE_TARGET}', f'≥ {GUARDS_TARGET}', '', f'≤ {SAVE_TARGET:g}'])
    header = [
        'devices',
        'pmean, images/s',
        'tree, images/s',
        'tree ÷ pmean',
        'guarded ÷ unguarded loop',
        'comparison ÷ step',
        'save ÷ step',
    ]
    print(measure.table(f'Batch 256, {args.rounds} rounds: median (quartiles)', header, rows))
    measure.write_results('trust', facts, {'images': args.images, 'results': results})


if __name__ == '__main__':
    main()
