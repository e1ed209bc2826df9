"""`train`'s own loop, in a process of its own: what the peers of `peers.py` are compared with.

    python benchmarks/peer_ours.py --data_dir=DIR --devices=8 --batch_size=256 --warmup=20 --steps=100

prints a line of JSON. Without --devices: as many as `train` would use, measured where not yet known.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import measure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--data_dir')
    parser.add_argument('--devices', type=int)
    parser.add_argument('--batch_size', type=int, default=256)
    parser.add_argument('--warmup', type=int, default=20)
    parser.add_argument('--steps', type=int, default=100)
    args = parser.parse_args()
    config = measure.recipe(batch_size=args.batch_size)
    data_dir = measure.data_dir_of(args.data_dir)
    devices = measure.choose_devices(config, data_dir, args.devices)
    result: dict[str, float] = {'devices': devices}
    if args.steps:
        with tempfile.TemporaryDirectory() as folder:
            loop = measure.open_loop(config, data_dir, devices, Path(folder))
            loop.stretch(args.warmup)
            result['images_per_second'] = loop.stretch(args.steps)
            loop.close()
    print(json.dumps(result))


if __name__ == '__main__':
    main()
