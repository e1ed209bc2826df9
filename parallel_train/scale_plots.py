"""Which charts does a scaling experiment have, and what do they show?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from parallel_train.drawing import LIGHT, frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_MARKERS = 'osD^v'  # one for each number of processes


def speed_figure(rows: Sequence[Row], mode: str) -> Figure:
    """Images/s over devices, both axes logarithmic: measured with quartiles, predicted, and the ideal."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    figure, axes = frame(f'{mode.capitalize()} scaling: images/s')
    axes.set_xscale('log', base=2)
    axes.set_yscale('log')
    first = rows[0]
    devices = sorted({row['num_devices'] for row in rows})
    per_device = first['examples_per_second'] / first['num_devices']
    ideal = [per_device * n for n in devices]
    axes.plot(devices, ideal, '--', color=LIGHT['muted'], linewidth=1.3, label='ideal')
    for marker, count in zip(_MARKERS, sorted({row['num_processes'] for row in rows}), strict=False):
        mine = [row for row in rows if row['num_processes'] == count]
        name = 'measured' if count == 1 else f'in {count} processes'
        _measured(axes, mine, marker, name, filled=count == 1)
    predicted = [row for row in rows if row['predicted_examples_per_second'] and row['num_processes'] == 1]
    axes.plot(
        [row['num_devices'] for row in predicted],
        [row['predicted_examples_per_second'] for row in predicted],
        'x', color=LIGHT['eval'], markersize=8, markeredgewidth=2, label='predicted', zorder=4,
    )  # fmt: skip
    axes.xaxis.set_major_locator(FixedLocator(devices))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
    axes.set_xlabel('devices', fontsize=11, color=LIGHT['muted'])
    _legend(axes, 'upper left')
    return figure


def _measured(axes: Axes, rows: Sequence[Row], marker: str, name: str, filled: bool) -> None:
    values = [row['examples_per_second'] for row in rows]
    low, high = zip(*(row['quartiles']['examples_per_second'] for row in rows), strict=True)
    errors = [
        [v - q for v, q in zip(values, low, strict=True)],
        [q - v for v, q in zip(values, high, strict=True)],
    ]
    axes.errorbar(
        [row['num_devices'] for row in rows], values, errors, fmt=f'-{marker}', color=LIGHT['train'],
        linewidth=1.8, markersize=5, capsize=3.5, capthick=1.4, elinewidth=1.4, label=name,
        markerfacecolor=LIGHT['train'] if filled else 'none', zorder=3,
    )  # fmt: skip


def losses_figure(rows: Sequence[Row]) -> Figure:
    """The losses of strong scaling's first steps, and beneath how far each size's are from the smallest's.

    On a logarithmic axis: sizes without a difference have no line there.
    """
    figure, axes = frame('Loss, and by how much it differs')
    axes.set_yscale('log')
    first, *others = rows
    steps = range(1, len(first['losses']) + 1)
    axes.plot(steps, first['losses'], color=LIGHT['train'], linewidth=1.8, label='loss')
    for i, row in enumerate(others):
        differences = [abs(a - b) or math.nan for a, b in zip(row['losses'], first['losses'], strict=True)]
        name = f'{row["num_devices"]} devices'
        if row['num_processes'] > 1:
            name = f'{row["num_devices"]} in {row["num_processes"]} processes'
        style: dict[str, Any] = {'markersize': 3.5, 'linewidth': 0.8, 'alpha': 1 - 0.6 * i / len(others)}
        marker = f'-{_MARKERS[i % len(_MARKERS)]}'
        axes.plot(steps, differences, marker, color=LIGHT['eval'], label=name, **style)
    axes.set_xlabel('step', fontsize=11, color=LIGHT['muted'])
    axes.minorticks_off()
    _legend(axes, 'upper right', anchor=(1.0, 0.85), ncols=2)
    return figure


def _legend(axes: Axes, place: str, anchor: tuple[float, float] | None = None, ncols: int = 1) -> None:
    style: dict[str, Any] = {'frameon': False, 'fontsize': 11, 'labelcolor': LIGHT['ink']}
    style |= {'loc': place, 'bbox_to_anchor': anchor, 'ncols': ncols, 'handlelength': 1.6}
    axes.legend(**style)
