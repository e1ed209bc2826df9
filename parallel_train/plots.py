"""Which charts does a run have, and what do they show? One matplotlib figure a chart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel_train.drawing import LIGHT, SPACE, chart, legend, line, no_rows, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    for step in plan.get('snapshot_steps', ()):
        names.setdefault(int(step), ['cycle ends'])
    for step in plan.get('boundaries', ()):
        if step > 0:
            names.setdefault(int(step), ['rate changes'])
    return [(step, ' = '.join(names[step])) for step in sorted(names)]


def schedule_figure(plan: Mapping[str, Any], rate: Callable[[int], float]) -> Figure:
    """The learning rate over the run; what lies beyond the last step is dashed."""
    marks = boundary_marks(plan)
    last, end = int(plan['num_steps']), marks[-1][0]
    figure, axes = chart('Learning rate', plan, end)
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
            note(
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
    figure, axes = chart(title, plan, max([plan['num_steps'], *(row['step'] for row in rows)]))
    per_epoch = plan['steps_per_epoch']
    drawn = {split: column(rows, split, key) for split in ('train', 'eval')}
    for split, (steps, values) in drawn.items():
        line(axes, steps / per_epoch, values, split, points=split == 'eval' and len(steps) <= 60)
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
    legend(axes)
    if not len(drawn['train'][0]) + len(drawn['eval'][0]):
        no_rows(axes)
    return figure


def throughput_figure(rows: Sequence[Row], plan: Mapping[str, Any]) -> Figure:
    """Examples per second of the train rows, from zero, with their median."""
    figure, axes = chart(
        'Examples per second', plan, max([plan['num_steps'], *(row['step'] for row in rows)])
    )
    steps, values = column(rows, 'train', 'examples_per_second')
    finite = values[np.isfinite(values)]
    line(axes, steps / plan['steps_per_epoch'], values, 'train', name='train steps')
    if not len(finite):
        no_rows(axes)
        return figure
    median = float(np.median(finite))
    style: dict[str, Any] = {'color': LIGHT['muted'], 'linewidth': 0.9, 'dashes': (2, 2.5)}
    axes.axhline(median, label=f'median {median:,.0f}', zorder=1.5, **style)
    axes.set_ylim(0, max(1.15 * float(np.quantile(finite, 0.99)), 1e-9))
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:,.12g}')
    legend(axes)
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
        note(axes, None, side[1], outside, 'right', side[0])


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
    note(axes, shown[0], 0.85, text, 'left' if right else 'right', 'top', 'bad')
