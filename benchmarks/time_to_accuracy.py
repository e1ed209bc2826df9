"""How much sooner is the fast recipe at a test accuracy of 0.94 than the ResNet recipe?

Trains both to their ends, one after the other and alone on the machine: the fast recipe with each seed, with
one evaluation at the end as it stands, and the ResNet recipe once, evaluated after every epoch. Time is
what `train` says it spent in steps: compilation, evaluation and saves are apart. To 0.94 the fast recipe
takes the whole of a run, if the mean over seeds is as good; the ResNet recipe the part of its run up
to its first evaluation as good.

    python benchmarks/time_to_accuracy.py [--data_dir=DIR] [--seeds=5] [--devices=4] [--accuracy=0.94]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

TARGET_RATIO = 0.4
FAST = 'configs/fashion_mnist_fast.py'
RESNET = 'configs/fashion_mnist_resnet.py'


def train(args: argparse.Namespace, config: str, *overrides: str) -> dict[str, Any]:
    """Trains to the end; returns the seconds spent in steps and the accuracy of each evaluation, by step."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / 'run'
        flags = [f'--data_dir={args.data_dir}', f'--devices={args.devices}', f'--workdir={workdir}']
        command = [sys.executable, '-m', 'parallel_train', 'train', f'--config={config}', *flags, *overrides]
        done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True)
        spent = re.search(r'^time: .*?\bstep ([\d.,]+) s', done.stdout, re.MULTILINE)
        if done.returncode or not spent:
            sys.exit(f'error: {" ".join(command[1:])} failed:\n{done.stdout}{done.stderr}')
        rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    evaluations = {row['step']: row['accuracy'] for row in rows if row['split'] == 'eval'}
    result = {'step_seconds': float(spent.group(1).replace(',', '')), 'evaluations': evaluations}
    print(
        f'{config} {" ".join(overrides)}: {spent.group(0)}, accuracy {list(evaluations.values())}', flush=True
    )
    return result


def seconds_to(accuracy: float, run: dict[str, Any]) -> float:
    """Returns the seconds in steps up to the first evaluation that is as good, or infinity."""
    last = max(run['evaluations'])
    steps = min((step for step, value in run['evaluations'].items() if value >= accuracy), default=None)
    return float('inf') if steps is None else run['step_seconds'] * steps / last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data_dir')
    parser.add_argument('--devices', type=int, default=4)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--accuracy', type=float, default=0.94)
    args = parser.parse_args()
    args.data_dir = measure.data_dir_of(args.data_dir)
    facts = measure.environment(('jax', 'jaxlib', 'flax', 'optax', 'numpy'))
    measure.show_environment(facts)

    # The one ResNet run stands between the others: the machine's speed drifts.
    seeds = range(args.seeds)
    fast = {seed: train(args, FAST, f'--config.seed={seed}') for seed in seeds[: args.seeds // 2]}
    resnet = train(args, RESNET, '--config.eval_every_epochs=1.0')
    fast |= {seed: train(args, FAST, f'--config.seed={seed}') for seed in seeds[args.seeds // 2 :]}

    last = {seed: run['evaluations'][max(run['evaluations'])] for seed, run in fast.items()}
    mean = statistics.mean(last.values())
    seconds = measure.Spread.of([run['step_seconds'] for run in fast.values()])
    slow = seconds_to(args.accuracy, resnet)
    ratio = seconds.median / slow
    rows = [
        *[[f'fast, seed {s}', f'{fast[s]["step_seconds"]:.0f}', f'{last[s]:.4f}'] for s in sorted(fast)],
        ['fast, median and mean', f'{seconds.median:.0f}', f'{mean:.4f}'],
        [f'ResNet, first evaluation ≥ {args.accuracy:g}', f'{slow:.0f}', ''],
        [
            'ResNet, to its end',
            f'{resnet["step_seconds"]:.0f}',
            f'{resnet["evaluations"][max(resnet["evaluations"])]:.4f}',
        ],
        [f'ratio (target ≤ {TARGET_RATIO}, at a mean ≥ {args.accuracy:g})', f'{ratio:.2f}', ''],
    ]
    print(measure.table('Time in steps and test accuracy', ['', 's', 'accuracy'], rows))
    results = {'ratio': ratio, 'mean_accuracy': mean, 'fast': fast, 'resnet': resnet}
    measure.write_results('time_to_accuracy', facts, results)


if __name__ == '__main__':
    main()
