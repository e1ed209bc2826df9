"""How does a chart look: colours, axes, lines, words; as PNG file and as SVG inside the report?

Charts are drawn in the colours of `LIGHT`. In the SVG each of these becomes a CSS variable of the
same name, so that one drawing serves light and dark pages; the PNG keeps them, on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and orange stay apart in every common colour blindness; `bad` always comes with a cross.
LIGHT = {
    'ink': '#1f2328',
    'muted': '#68707a',
    'line': '#dfe2e6',
    'train': '#2468a8',
    'eval': '#d9771e',
    'bad': '#b8195f',
}
DARK = {
    'ink': '#e7e9ec',
    'muted': '#9aa3ad',
    'line': '#343a41',
    'train': '#74b3ee',
    'eval': '#f2a552',
    'bad': '#ff7fab',
}
WIDTH, HEIGHT = 440, 280  # CSS pixels of an SVG at its natural size
MAX_POINTS = 400  # more than a chart of this width can show
SPACE = '\u00a0'  # SVG drops plain spaces at the ends of a text


def frame(title: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty chart with a title, `height` CSS pixels high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((0.125, 0.17, 0.85, 0.695))
    figure.text(0, 0.985, title, fontsize=13.5, fontweight='bold', color=LIGHT['ink'], va='top')
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.spines['bottom'].set(color=LIGHT['muted'], linewidth=0.9)
    axes.grid(axis='y', color=LIGHT['line'], linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(axis='y', length=0, labelsize=11.5, labelcolor=LIGHT['muted'])
    axes.tick_params(axis='x', color=LIGHT['muted'], labelsize=11.5, labelcolor=LIGHT['ink'])
    return figure, axes


def chart(title: str, plan: Mapping[str, Any], last_step: int) -> tuple[Figure, Axes]:
    """An empty chart over [0, last_step], the x axis in epochs with the steps in a row beneath."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = frame(title)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:.4g}')
    end = max(last_step, 1) / plan['steps_per_epoch']
    axes.set_xlim(-0.012 * end, 1.015 * end)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(0, end)
    ticks = [tick for tick in ticks if 0 <= tick <= end * 1.0001]
    axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    small: dict[str, Any] = {
        'fontsize': 10,
        'color': LIGHT['muted'],
        'va': 'center',
        'clip_on': False,
    }
    for tick in ticks:
        text = f'{round(tick * plan["steps_per_epoch"]):,}'
        axes.text(tick, -0.165, text, transform=axes.get_xaxis_transform(), ha='center', **small)
    for height, text in ((-0.075, 'epoch'), (-0.165, 'step')):
        axes.text(-0.045, height, text, transform=axes.transAxes, ha='right', **small)
    return figure, axes


def line(
    axes: Axes, x: np.ndarray, y: np.ndarray, role: str, *, points: bool = False, name: str = ''
) -> None:
    """A line of at most MAX_POINTS points; more are drawn as means of bins, their range a band."""
    if not len(x):
        return
    if len(x) > MAX_POINTS:
        bins = np.array_split(np.where(np.isfinite(y), y, np.nan), MAX_POINTS)
        kept = [part[np.isfinite(part)] for part in bins]
        x = np.array([part.mean() for part in np.array_split(x, MAX_POINTS)])
        low, y, high = np.array([(p.min(), p.mean(), p.max()) if len(p) else (np.nan,) * 3 for p in kept]).T
        axes.fill_between(x, low, high, color=LIGHT[role], alpha=0.18, linewidth=0)
    else:
        y = np.where(np.isfinite(y), y, np.nan)
    alone = np.isfinite(y).sum() == 1
    style: dict[str, Any] = {'marker': 'o', 'markersize': 4} if points or alone else {}
    label = name or role
    axes.plot(x, y, color=LIGHT[role], linewidth=1.8, label=label, solid_joinstyle='round', **style)


def note(
    axes: Axes,
    x: float | None,
    height: float,
    text: str,
    side: str,
    vertical: str,
    role: str = 'muted',
) -> None:
    """Small text at epoch x (None: at the right edge) and a height in fractions of the axes."""
    transform = axes.transAxes if x is None else axes.get_xaxis_transform()
    at = 0.985 if x is None else x
    style: dict[str, Any] = {'fontsize': 10.5, 'color': LIGHT[role], 'transform': transform}
    axes.text(at, height, text, ha=side, va=vertical, **style)


def legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        place: dict[str, Any] = {'loc': 'lower right', 'bbox_to_anchor': (1.015, 1.0), 'ncols': 3}
        style: dict[str, Any] = {'frameon': False, 'fontsize': 11, 'labelcolor': LIGHT['ink']}
        axes.legend(handlelength=1.1, columnspacing=1.2, handletextpad=0.5, **place, **style)


def no_rows(axes: Axes) -> None:
    axes.set_yticks([])
    style: dict[str, Any] = {'fontsize': 12, 'color': LIGHT['muted'], 'transform': axes.transAxes}
    axes.text(0.5, 0.5, 'no rows yet', ha='center', va='center', **style)


def to_png(figure: Figure) -> bytes:
    """A PNG of the figure on white, 200 pixels to the inch."""
    out = io.BytesIO()
    figure.savefig(out, format='png', dpi=200, facecolor='white', bbox_inches='tight', pad_inches=0.14)
    return out.getvalue()


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element to stand inside a page: the page's font and colours, own ids.

    `name` is put before each id, so that several stand on one page; `description` must be escaped.
    """
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': name, 'path.simplify': True}):
        figure.savefig(out, format='svg', transparent=True, metadata={'Date': None})
    svg = out.getvalue()
    svg = svg[svg.index('<svg') :]
    svg = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>', '', svg, flags=re.DOTALL)
    svg = re.sub(r' width="[^"]*pt" height="[^"]*pt"', '', svg, count=1)
    svg = re.sub(r" font-family: [^;\"]*;?|font: '?[\d.]+px [^;\"]*;?", '', svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{name}-', svg)
    for role, color in LIGHT.items():
        svg = svg.replace(color, f'var(--{role})')
    return svg.replace('<svg', f'<svg role="img" aria-label="{description}"', 1)
