"""Which charts does a scaling experiment have, and what do they show?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from parallel_train.drawing import LIGHT, frame, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_MARKERS = 'osD^v'  # one for each number of processes


def speed_figure(rows: Sequence[Row], mode: str) -> Figure:
    """Images/s over devices, both axes logarithmic: measured with quartiles, predicted, and the ideal."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    figure, axes = frame(f'{mode.capitalize()} scaling, images/s')
    axes.set_xscale('log', base=2)
    axes.set_yscale('log', base=2)
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
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
    axes.set_xlabel('devices', fontsize=11, color=LIGHT['muted'])
    legend(axes)
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
    """The losses of strong scaling's first steps, one line a size, drawn over one another."""
    figure, axes = frame('Losses of the first steps')
    steps = range(1, len(rows[0]['losses']) + 1)
    # The widest lies lowest, so that one can see how many there are where they coincide.
    for i, row in enumerate(rows):
        shade = 1 - 0.7 * i / max(len(rows) - 1, 1)
        name = f'{row["num_devices"]}' + (f'/{row["num_processes"]}' if row['num_processes'] > 1 else '')
        width = 1.4 + 1.6 * (len(rows) - 1 - i)
        axes.plot(steps, row['losses'], color=LIGHT['train'], alpha=shade, linewidth=width, label=name)
    axes.set_xlabel('step', fontsize=11, color=LIGHT['muted'])
    place: dict[str, Any] = {'loc': 'upper right', 'frameon': False, 'fontsize': 11}
    axes.legend(title='devices', title_fontsize=11, labelcolor=LIGHT['ink'], **place)
    return figure
