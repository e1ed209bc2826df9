"""How fast is the training loop beside its peers, and beside what the machine can multiply?

Peers: a plain single-device Flax loop as in Flax's guides, and PyTorch DDP with the same model,
optimizer, batch and cores. Each measurement is a process of its own, which warms up and then times
a fixed number of steps; the processes take turns, and ratios are formed within each round.

    python benchmarks/peers.py [--data_dir=DIR] [--rounds=5] [--steps=100] [--torch_python=PYTHON]

PyTorch is optional: `pip install 'parallel_train[bench]'`, or name an interpreter that has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
from pieces import MFLOP_AN_IMAGE

TARGETS = {'flax': 2.2, 'torch': 1.4}
BATCH_SIZE = 256
HERE = Path(__file__).parent


def child(script: str, *flags: str, python: str = sys.executable) -> dict[str, Any]:
    """Runs a script beside this file to its end and returns the JSON of its last line."""
    done = subprocess.run([python, str(HERE / script), *flags], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f'error: {script} {" ".join(flags)} ended with exit code {done.returncode}')
    return json.loads(done.stdout.splitlines()[-1])


def has_torch(python: str) -> bool:
    return subprocess.run([python, '-c', 'import torch'], stderr=subprocess.DEVNULL).returncode == 0


def write_data(data_dir: Path, file: Path) -> None:
    """Writes the training images for the peers, who know nothing of TFDS."""
    import numpy as np

    from parallel_train import dataset

    split = dataset.load_split('fashion_mnist', 'train', data_dir)
    np.savez(file, images=split.images, labels=split.labels)


def make_processes(args: argparse.Namespace, counts: list[int], data: Path) -> dict[str, Callable[[], float]]:
    """Returns for each contestant a function that runs it once and gives images/s."""
    common = [f'--batch_size={BATCH_SIZE}', f'--warmup={args.warmup}', f'--steps={args.steps}']

    def rate(script: str, *flags: str, python: str = sys.executable) -> Callable[[], float]:
        return lambda: child(script, *flags, *common, python=python)['images_per_second']

    folder = [f'--data_dir={args.data_dir}']
    things = {f'ours, {n} devices': rate('peer_ours.py', *folder, f'--devices={n}') for n in counts}
    things['flax, 1 device'] = rate('peer_flax.py', str(data))
    if has_torch(args.torch_python):
        for name, flags in {
            'torch DDP, 2 processes × 1 thread': ('--processes=2', '--threads=1'),
            'torch, 1 process × 2 threads': ('--processes=1', '--threads=2'),
        }.items():
            things[name] = rate('peer_torch.py', str(data), *flags, python=args.torch_python)
    else:
        print(
            "torch is not installed, so it is not compared: pip install 'parallel_train[bench]', or name "
            'an interpreter that has it by --torch_python'
        )
    return things


def print_rates(values: dict[str, list[float]], ours: str, gflops: float) -> dict[str, Any]:
    """Prints every contestant's rate and what ours is of it; returns the same."""
    results = {}
    bound = gflops * 1e3 / MFLOP_AN_IMAGE
    for name, rates in values.items():
        results[name] = {
            'images_per_second': measure.Spread.of(rates),
            'ours_over_it': measure.ratio(values[ours], rates),
            'share_of_bound': measure.Spread.of(rates).median / bound,
            'rounds': rates,
        }
    rows = [
        [
            name,
            result['images_per_second'].text(),
            result['ours_over_it'].text('.2f'),
            f'{result["share_of_bound"]:.0%}',
        ]
        for name, result in results.items()
    ]
    rows.append(['matrix-product bound', f'{bound:,.0f}', '', '100%'])
    title = f'Batch {BATCH_SIZE}, CNN, float32: median (quartiles); ours is: {ours}'
    print(measure.table(title, ['', 'images/s', 'ours ÷ it', 'of the bound'], rows))
    print(f'bound: {gflops:,.0f} GFLOP/s of matrix product / {MFLOP_AN_IMAGE:.1f} MFLOP an image')
    return results


def print_targets(results: dict[str, Any]) -> dict[str, Any]:
    """Prints what was to be reached, and what was; of several torch set-ups the fastest counts."""
    reached = {}
    for peer, target in TARGETS.items():
        rivals = {name: result for name, result in results.items() if name.startswith(peer)}
        if rivals:
            best = max(rivals, key=lambda name: rivals[name]['images_per_second'].median)
            reached[peer] = {'peer': best, 'target': target, 'ratio': rivals[best]['ours_over_it']}
    for found in reached.values():
        verdict = 'reached' if found['ratio'].median >= found['target'] else 'MISSED'
        print(f'ours ÷ {found["peer"]}: {found["ratio"].text(".2f")}, target ≥ {found["target"]}: {verdict}')
    return reached


def print_pieces(taken_apart: dict[str, Any], gflops: float) -> None:
    """Prints where the time of a step goes, and how far each piece is from the bound."""
    pieces = dict(taken_apart['pieces'])
    whole = pieces.pop('the whole step')

    def row(name: str, ms: float, mflop: float) -> list[str]:
        rate = mflop * BATCH_SIZE / ms  # MFLOP a ms is GFLOP/s
        speed = [f'{rate:,.0f}', f'{rate / gflops:.0%}'] if mflop else ['', '']
        return [name, f'{ms:.2f}', f'{ms / whole["ms"]:.0%}', *speed]

    rows = [row(name, piece['ms'], piece['mflop_an_image']) for name, piece in pieces.items()]
    rows.append(row('sum of the pieces', sum(piece['ms'] for piece in pieces.values()), MFLOP_AN_IMAGE))
    rows.append(row('the whole step', whole['ms'], MFLOP_AN_IMAGE))
    ideal = MFLOP_AN_IMAGE * BATCH_SIZE / gflops
    rows.append(row('the same products at the bound', ideal, MFLOP_AN_IMAGE))
    title = f'Where a step goes: pieces compiled apart, {taken_apart["devices"]} devices, batch {BATCH_SIZE}'
    print(measure.table(title, ['piece', 'ms', 'of the step', 'GFLOP/s', 'of the bound'], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data_dir')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--warmup', type=int, default=20)
    parser.add_argument('--torch_python', default=sys.executable, help='an interpreter that has torch')
    args = parser.parse_args()
    args.data_dir = measure.data_dir_of(args.data_dir)
    facts = measure.environment(('jax', 'jaxlib', 'flax', 'optax', 'numpy'))
    if has_torch(args.torch_python):
        command = [args.torch_python, '-c', 'import torch; print(torch.__version__)']
        facts['torch'] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    measure.show_environment(facts)
    chosen = child('peer_ours.py', f'--data_dir={args.data_dir}', '--steps=0')['devices']
    print(f'`train` would use {chosen} devices', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / 'data.npz'
        write_data(args.data_dir, data)
        things = make_processes(args, sorted({4, 8, chosen}), data)
        gflops = child('bound.py')['gflops']
        values = measure.interleave(args.rounds, things)
    taken_apart = child('pieces.py', f'--devices={chosen}', f'--batch_size={BATCH_SIZE}')
    gflops = max(gflops, child('bound.py')['gflops'])
    results = print_rates(values, f'ours, {chosen} devices', gflops)
    reached = print_targets(results)
    print_pieces(taken_apart, gflops)
    measure.write_results(
        'peers',
        facts,
        {
            'chosen_devices': chosen,
            'targets': reached,
            'gflops': gflops,
            'mflop_an_image': MFLOP_AN_IMAGE,
            'rates': results,
            'where_a_step_goes': taken_apart,
        },
    )


if __name__ == '__main__':
    main()
