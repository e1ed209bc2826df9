"""Draws every schedule as the plan gives it: `python docs/draw_schedules.py` writes docs/schedules.png."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from parallel_train import make_plan
from parallel_train.config import Config
from parallel_train.drawing import LIGHT, to_png

PEAK, EPOCHS, STEPS_PER_EPOCH = 0.1, 30, 50
# What is drawn: a name, and the fields that make it.
SHOWN: list[tuple[str, dict[str, Any]]] = [
    ('constant', {}),
    ('cosine', {'warmup_epochs': 3.0}),
    ('cosine_restarts', {'restart_epochs': 2.0, 'restart_multiplier': 2.0}),
    ('cosine_restarts', {'restart_epochs': 6.0}),
    ('linear', {'warmup_epochs': 3.0}),
    ('polynomial', {'warmup_epochs': 3.0, 'decay_power': 2.0}),
    ('steps', {'warmup_epochs': 3.0, 'decay_epochs': (10.0, 20.0, 26.0), 'decay_factor': 0.4}),
    ('rsqrt', {'warmup_epochs': 3.0, 'cooldown_epochs': 5.0}),
    ('warmup_stable_decay', {'warmup_epochs': 3.0, 'cooldown_epochs': 5.0}),
    ('one_cycle', {'warmup_epochs': 13.0, 'warmup_learning_rate': 0.01}),
    ('one_cycle', {'warmup_epochs': 15.0}),
    ('linear', {'warmup_epochs': 3.0, 'warmup_learning_rate': 0.05, 'end_learning_rate': 0.02}),
]
COLUMNS = 3


def draw() -> Figure:
    """Returns the page: one small chart a schedule, epochs against the rate, snapshots as dots."""
    rows = -(-len(SHOWN) // COLUMNS)
    figure = Figure(figsize=(10.6, 2.35 * rows))
    for i, (name, fields) in enumerate(SHOWN):
        axes = figure.add_subplot(rows, COLUMNS, i + 1)
        config = Config({'warmup_epochs': 0.0, **fields, 'schedule': name, 'num_epochs': float(EPOCHS)})
        config.batch_size, config.learning_rate = 10, PEAK
        plan = make_plan(config, 10 * STEPS_PER_EPOCH, 10, 1)
        # Both sides of a step at which the rate jumps: the rate of an update, until the next one's.
        steps = sorted({*range(plan.num_steps), *(b - 1e-6 for b in plan.boundaries), plan.num_steps - 1e-6})
        axes.plot([s / STEPS_PER_EPOCH for s in steps], [plan.rate(s) for s in steps],
                  color=LIGHT['train'], linewidth=1.8)  # fmt: skip
        ends = [(step - 1e-6) for step in plan.snapshot_steps]
        axes.scatter([s / STEPS_PER_EPOCH for s in ends], [plan.rate(s) for s in ends], s=24,
                     color=LIGHT['eval'], zorder=3, clip_on=False)  # fmt: skip
        axes.set_title(name, loc='left', fontsize=11.5, fontweight='bold', color=LIGHT['ink'], pad=30)
        given = textwrap.fill(', '.join(f'{k}={_short(v)}' for k, v in fields.items()), 44)
        style: dict[str, Any] = {'fontsize': 7.6, 'color': LIGHT['muted']}
        axes.text(0, 1.25, given, va='top', transform=axes.transAxes, linespacing=1.25, **style)
        axes.spines[['top', 'right', 'left']].set_visible(False)
        axes.spines['bottom'].set(color=LIGHT['muted'], linewidth=0.9)
        axes.grid(axis='y', color=LIGHT['line'], linewidth=0.9)
        axes.set_axisbelow(True)
        axes.set(
            xlim=(0, EPOCHS), ylim=(0, PEAK * 1.04), xticks=range(0, EPOCHS + 1, 10), yticks=[0, 0.05, 0.1]
        )
        axes.tick_params(axis='y', length=0, labelsize=9, labelcolor=LIGHT['muted'])
        axes.tick_params(axis='x', color=LIGHT['muted'], labelsize=9, labelcolor=LIGHT['ink'])
    figure.subplots_adjust(hspace=0.88, wspace=0.2)
    return figure


def _short(value: Any) -> str:
    return '(' + ', '.join(f'{v:g}' for v in value) + ')' if isinstance(value, tuple) else f'{value:g}'


if __name__ == '__main__':
    page = Path(__file__).with_name('schedules.png')
    page.write_bytes(to_png(draw()))
    print(page)
