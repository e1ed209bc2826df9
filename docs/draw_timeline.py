"""Draws docs/profile.png: what each device did in a few steps, from a trace of `--profile_steps`.

python docs/draw_timeline.py WORKDIR/profile/plugins/profile/steps_100_110/process_0.xplane.pb [--steps=3]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    from parallel_train.drawing import LIGHT, frame, legend, to_png
    from parallel_train.profile_shares import read_operations

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('trace', type=Path)
    parser.add_argument('--steps', type=int, default=3)
    args = parser.parse_args()
    operations = read_operations(args.trace)
    devices = sorted({operation.device for operation in operations})
    # A step ends on a device with its update, after its last collective: the next one's begins there.
    ends = [sorted(o.end for o in operations if o.device == device and o.is_collective) for device in devices]
    first = min(each[0] for each in ends)
    last = max(each[min(args.steps, len(each) - 1)] for each in ends)
    figure, axes = frame(f'{args.steps} steps on {len(devices)} devices', height=60 + 44 * len(devices))
    for row, device in enumerate(devices):
        for collective, name, role in ((False, 'compute', 'train'), (True, 'all-reduce', 'eval')):
            bars = [
                ((o.begin - first) * 1e3, (o.end - o.begin) * 1e3)
                for o in operations
                if o.device == device and o.is_collective == collective and o.end > first and o.begin < last
            ]
            label = name if row == 0 else ''
            axes.broken_barh(bars, (row - 0.34, 0.68), color=LIGHT[role], linewidth=0, label=label)
    axes.set_xlim(0, (last - first) * 1e3)
    axes.set_ylim(len(devices) - 0.5, -0.5)
    axes.set_yticks(range(len(devices)), [f'device {device.split()[-1]}' for device in devices])
    axes.grid(visible=False)
    axes.set_xlabel('milliseconds', fontsize=11, color=LIGHT['muted'])
    legend(axes)
    (ROOT / 'docs' / 'profile.png').write_bytes(to_png(figure))


if __name__ == '__main__':
    main()
