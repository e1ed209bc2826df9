"""How is a run drawn? One matplotlib figure a chart, as PNG file and as SVG inside the report.

Figures are drawn in the colours of `LIGHT`. In the SVG each of these becomes a CSS variable of the
same name, so that one drawing serves light and dark pages; the PNG keeps them, on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Samples:
    """Images with what the model said of them.

    images: uint8 [k, h, w, c]; labels, predictions: k class numbers; probabilities: k floats in
    [0, 1], the model's probability of its own prediction; class_names: by class number.
    """

    images: np.ndarray
    labels: Sequence[int]
    predictions: Sequence[int]
    probabilities: Sequence[float]
    class_names: Sequence[str]

    def name(self, number: int) -> str:
        return self.class_names[number] if 0 <= number < len(self.class_names) else str(number)


def column(rows: Sequence[Row], split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (float64; NaN where a row has none) of one field over one split's rows."""
    found = [row for row in rows if row.get('split') == split]
    values = [row.get(key) for row in found]
    numbers = [float(value) if isinstance(value, int | float) else np.nan for value in values]
    return np.array([row['step'] for row in found], float), np.array(numbers, float)


def best_row(key: str, values: np.ndarray) -> int | None:
    """The index of the best finite value: the highest accuracy, the lowest of anything else."""
    finite = np.isfinite(values)
    if not finite.any():
        return None
    if key == 'accuracy':
        return int(np.argmax(np.where(finite, values, -np.inf)))
    return int(np.argmin(np.where(finite, values, np.inf)))


def boundary_marks(plan: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(step, what happens there) for each boundary of the schedule and the last step, in order."""
    names: dict[int, list[str]] = {}
    warmup, decay = int(plan['warmup_steps']), int(plan['decay_steps'])
    if warmup > 0:
        names.setdefault(warmup, []).append('warmup ends')
    if decay > 0:
        names.setdefault(warmup + decay, []).append('decay ends')
    names.setdefault(int(plan['num_steps']), []).append('last step')
    for step in plan.get('boundaries', ()):
        if step > 0:
            names.setdefault(int(step), ['rate changes'])
    return [(step, ' = '.join(names[step])) for step in sorted(names)]


def schedule_figure(plan: Mapping[str, Any], rate: Callable[[int], float]) -> Figure:
    """The learning rate over the run; what lies beyond the last step is dashed."""
    marks = boundary_marks(plan)
    last, end = int(plan['num_steps']), marks[-1][0]
    figure, axes = _chart('Learning rate', plan, end)
    # Both sides of each boundary, so that a jump is drawn as one.
    edges = [step + side for step, _ in marks for side in (-1, 0)]
    steps = np.unique(np.clip([*np.linspace(0, end, 240).astype(int), *edges], 0, end))
    rates = np.array([rate(int(step)) for step in steps], float)
    epochs = steps / plan['steps_per_epoch']
    done = steps <= last
    axes.plot(epochs[done], rates[done], color=LIGHT['train'], linewidth=2)
    axes.plot(epochs[steps >= last], rates[steps >= last], '--', color=LIGHT['train'])
    finite = rates[np.isfinite(rates)]
    top = max(finite, default=0.0) or 1.0
    rows = 1 + len(marks[:4])
    axes.set_ylim(0, top * (1.04 + 0.085 * rows))  # room for the labels above the curve
    for row, (step, name) in enumerate(marks):
        at = step / plan['steps_per_epoch']
        axes.axvline(at, color=LIGHT['muted'], linewidth=0.9, dashes=(2, 2.5))
        axes.scatter([at], [rate(step)], s=22, color=LIGHT['train'], zorder=3, clip_on=False)
        if row < 4:
            right = step <= end / 2
            height = 0.985 - 0.075 * row
            _note(
                axes,
                at,
                height,
                f'{SPACE}{name}, {step:,}{SPACE}',
                'left' if right else 'right',
                'top',
            )
    return figure


def curve_figure(rows: Sequence[Row], key: str, title: str, plan: Mapping[str, Any]) -> Figure:
    """One metric of the train and eval rows over epochs, the best eval row ringed."""
    figure, axes = _chart(title, plan, max([plan['num_steps'], *(row['step'] for row in rows)]))
    per_epoch = plan['steps_per_epoch']
    drawn = {split: column(rows, split, key) for split in ('train', 'eval')}
    for split, (steps, values) in drawn.items():
        _line(axes, steps / per_epoch, values, split, points=split == 'eval' and len(steps) <= 60)
    steps, values = drawn['eval']
    best = best_row(key, values)
    if best is not None:
        at = steps[best] / per_epoch
        ring: dict[str, Any] = {
            's': 90,
            'facecolors': 'none',
            'edgecolors': LIGHT['ink'],
            'linewidths': 1.3,
            'clip_on': False,
        }
        axes.scatter([at], [values[best]], label=f'best {values[best]:.4f}', zorder=4, **ring)
    _focus(axes, key, *(values for _, values in drawn.values()))
    _mark_broken(axes, drawn, per_epoch)
    _legend(axes)
    if not len(drawn['train'][0]) + len(drawn['eval'][0]):
        _nothing(axes)
    return figure


def throughput_figure(rows: Sequence[Row], plan: Mapping[str, Any]) -> Figure:
    """Examples per second of the train rows, from zero, with their median."""
    figure, axes = _chart(
        'Examples per second', plan, max([plan['num_steps'], *(row['step'] for row in rows)])
    )
    steps, values = column(rows, 'train', 'examples_per_second')
    finite = values[np.isfinite(values)]
    _line(axes, steps / plan['steps_per_epoch'], values, 'train', name='train steps')
    if not len(finite):
        _nothing(axes)
        return figure
    median = float(np.median(finite))
    style: dict[str, Any] = {'color': LIGHT['muted'], 'linewidth': 0.9, 'dashes': (2, 2.5)}
    axes.axhline(median, label=f'median {median:,.0f}', zorder=1.5, **style)
    axes.set_ylim(0, max(1.15 * float(np.quantile(finite, 0.99)), 1e-9))
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:,.12g}')
    _legend(axes)
    return figure


def samples_figure(samples: Samples) -> Figure:
    """The test images in a grid, each with its prediction; wrong ones crossed, with the truth."""
    from matplotlib.figure import Figure

    count = len(samples.images)
    columns = max(1, min(8, count))
    lines = max(1, -(-count // columns))
    figure = Figure(figsize=(columns * 84 / 72, lines * 108 / 72))
    for i, image in enumerate(samples.images):
        axes = figure.add_subplot(lines, columns, i + 1)
        axes.imshow(image[..., 0] if image.shape[-1] != 3 else image, cmap='gray', vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        wrong = samples.predictions[i] != samples.labels[i]
        label = samples.name(samples.predictions[i])
        text = f'✗ {label}\nis {samples.name(samples.labels[i])}' if wrong else f'{label}\n'
        color = LIGHT['bad'] if wrong else LIGHT['ink']
        # Class names are data: a dollar sign in one is not the start of a formula.
        axes.set_xlabel(text, fontsize=8, color=color, parse_math=False, labelpad=3)
        axes.spines[:].set(color=color if wrong else LIGHT['line'], linewidth=2 if wrong else 0.8)
    gap: dict[str, Any] = {'left': 0.01, 'right': 0.99, 'wspace': 0.12, 'hspace': 0.12}
    figure.subplots_adjust(top=1 - 4 / (lines * 108), bottom=26 / (lines * 108), **gap)
    return figure


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


def _chart(title: str, plan: Mapping[str, Any], last_step: int) -> tuple[Figure, Axes]:
    """An empty chart over [0, last_step], the x axis in epochs with the steps in a row beneath."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    axes = figure.add_axes((0.125, 0.17, 0.85, 0.695))
    figure.text(0, 0.985, title, fontsize=13.5, fontweight='bold', color=LIGHT['ink'], va='top')
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.spines['bottom'].set(color=LIGHT['muted'], linewidth=0.9)
    axes.grid(axis='y', color=LIGHT['line'], linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(axis='y', length=0, labelsize=11.5, labelcolor=LIGHT['muted'])
    axes.tick_params(axis='x', color=LIGHT['muted'], labelsize=11.5, labelcolor=LIGHT['ink'])
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


def _line(
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


def _focus(axes: Axes, key: str, train: np.ndarray, evaluated: np.ndarray) -> None:
    """Limits that show where the run spends its time: the first steep rows may lie outside."""
    train = train[np.isfinite(train)]
    evaluated = evaluated[np.isfinite(evaluated)]
    values = np.concatenate([train, evaluated])
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if key == 'loss' and low > 0 and high / low > 60:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale('log')
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 1e4 else (1,)))
        axes.yaxis.set_major_formatter(lambda value, _: f'{value:.4g}')
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis='y', which='minor', length=0)
        return
    outside = ''
    if len(train) >= 12:
        usual = np.quantile(train, [0.03, 0.97])
        if key == 'accuracy' and low < (bottom := min([usual[0], *evaluated])) - 0.02:
            outside, low = f'first rows from {low:.2f}', float(bottom)
        if key == 'loss' and high > (top := max([usual[1], *evaluated])) * 1.1:
            outside, high = f'first rows from {high:.2f}', float(top)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    top = high + pad
    axes.set_ylim(low - pad, min(top, 1.005) if key == 'accuracy' and high <= 1 else top)
    if outside:
        side = ('bottom', 0.03) if key == 'accuracy' else ('top', 0.97)
        _note(axes, None, side[1], outside, 'right', side[0])


def _mark_broken(axes: Axes, drawn: Mapping[str, tuple[np.ndarray, np.ndarray]], per_epoch: int) -> None:
    """Crosses along the bottom where a value is not finite, and in words where that begins."""
    steps = np.concatenate([s[~np.isfinite(values)] for s, values in drawn.values()])
    if not len(steps):
        return
    steps = np.unique(steps)
    shown = steps[np.linspace(0, len(steps) - 1, min(len(steps), 40)).astype(int)] / per_epoch
    floor = axes.get_xaxis_transform()
    heights = np.full(len(shown), 0.04)
    axes.scatter(shown, heights, marker='x', s=30, color=LIGHT['bad'], transform=floor, zorder=5)
    axes.axvline(shown[0], color=LIGHT['bad'], linewidth=0.9)
    # Whatever comes after is rarely drawn, so the words have room there, as far as they fit.
    right = shown[0] < 0.6 * axes.get_xlim()[1]
    text = f'{SPACE}first not finite: step {steps[0]:,.0f}{SPACE}'
    _note(axes, shown[0], 0.85, text, 'left' if right else 'right', 'top', 'bad')


def _note(
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


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        place: dict[str, Any] = {'loc': 'lower right', 'bbox_to_anchor': (1.015, 1.0), 'ncols': 3}
        style: dict[str, Any] = {'frameon': False, 'fontsize': 11, 'labelcolor': LIGHT['ink']}
        axes.legend(handlelength=1.1, columnspacing=1.2, handletextpad=0.5, **place, **style)


def _nothing(axes: Axes) -> None:
    axes.set_yticks([])
    style: dict[str, Any] = {'fontsize': 12, 'color': LIGHT['muted'], 'transform': axes.transAxes}
    axes.text(0.5, 0.5, 'no rows yet', ha='center', va='center', **style)
