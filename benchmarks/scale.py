"""Does `scale` measure what `overhead.py` measures? Images/s of the one ÷ images/s of the other.

`scale`'s step with the real feed against `train`'s own loop, and its step on a resident batch against the
bare compiled step: the same batch, devices and data. `scale`'s process and this one take turns; the ratio is
formed within each round. They agree where 1 lies between the quartiles of the ratio, or the ratio's distance
from 1 is less than what either moves from round to round.

    python benchmarks/scale.py [--data_dir=DIR] [--devices=N] [--rounds=9] [--batch_size=256]
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import measure
import overhead


def open_scale(config: Any, data_dir: Path, devices: int, steps: int) -> Any:
    """Returns the processes that `scale` measures this size in."""
    from parallel_train import config as config_lib
    from parallel_train.scale_processes import Group
    from parallel_train.sizes import find_sizes

    sizes = find_sizes(config, data_dir)
    config = config_lib.with_dataset(config, sizes.input_shape, sizes.num_classes)
    return Group({
        'config': config.to_dict(),
        'size': {'num_devices': devices},
        'steps': steps,
        'data_dir': str(data_dir),
    })  # fmt: skip


def agrees(ratio: measure.Spread, *parts: measure.Spread) -> bool:
    """Whether a ratio is 1 within its own spread or that of what it is made of."""
    widest = max((part.high - part.low) / part.median for part in parts)
    return ratio.low <= 1 <= ratio.high or abs(ratio.median - 1) <= widest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data_dir')
    parser.add_argument('--devices', type=int, help='default: what `train` would use')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--batch_size', type=int, default=256)
    parser.add_argument('--images', type=int, default=12_800, help='images in one stretch')
    args = parser.parse_args()
    facts = measure.environment(('jax', 'jaxlib', 'flax', 'optax', 'numpy'))
    measure.show_environment(facts)
    data_dir = measure.data_dir_of(args.data_dir)
    config = measure.recipe(batch_size=args.batch_size)
    devices = measure.choose_devices(config, data_dir, args.devices)
    steps = args.images // args.batch_size
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        loop = measure.open_loop(config, data_dir, devices, Path(folder))
        stack.callback(loop.close)
        bare = overhead.bare_step(loop, config, data_dir)
        group = stack.enter_context(open_scale(config, data_dir, devices, steps))
        group.ready()
        values: dict[str, list[float]] = {name: [] for name in ('loop', 'bare', 'fed', 'resident')}
        for i in range(-1, args.rounds):  # the first compiles
            theirs = i % 2 == 0
            turn = group.turn(backwards=False) if theirs else {}
            rates = {'loop': loop.stretch(steps), 'bare': bare(steps)}
            turn = turn or group.turn(backwards=True)
            if i >= 0:
                for name, rate in rates.items():
                    values[name].append(rate)
                for name in ('fed', 'resident'):
                    values[name].append(args.batch_size / turn[name])
    spreads = {name: measure.Spread.of(each) for name, each in values.items()}
    ratios = {
        'with the feed': (measure.ratio(values['fed'], values['loop']), 'fed', 'loop'),
        'resident batch': (measure.ratio(values['resident'], values['bare']), 'resident', 'bare'),
    }
    rows = [
        [
            name,
            spreads[ours].text(),
            spreads[theirs].text(),
            ratio.text('.3f'),
            'yes' if agrees(ratio, spreads[ours], spreads[theirs]) else 'NO',
        ]
        for name, (ratio, ours, theirs) in ratios.items()
    ]
    title = f'scale against overhead.py, {devices} devices, batch {args.batch_size}, {args.rounds} rounds'
    print(measure.table(title, ['', 'scale, images/s', 'overhead.py', 'ratio', 'within the spread'], rows))
    found = {name: ratio for name, (ratio, _, _) in ratios.items()}
    measure.write_results('scale', facts, {'devices': devices, 'ratios': found, 'rounds': values})


if __name__ == '__main__':
    main()
