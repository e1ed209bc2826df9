"""How did a run go? One self-contained page, `report.html`, and `plots/*.png` beside it."""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parallel_train import drawing, plots
from parallel_train import workdir as workdir_lib
from parallel_train.files import write_atomically
from parallel_train.metrics import read_rows
from parallel_train.page import escape, page_of
from parallel_train.paths import opened
from parallel_train.plots import Row, Samples

EMPTY = '\u2013'  # stands for None and for nothing
MAX_SAMPLES = 40  # keeps the page small whatever the images are
TIME_COLORS = {
    'step': '#0072b2',
    'compile': '#e69f00',
    'data wait': '#d55e00',
    'eval': '#009e73',
    'save': '#cc79a7',
    'start-up': '#8b949e',
}  # Okabe and Ito (2008), told apart in every common form of colour blindness


@dataclass(frozen=True)
class Summary:
    """What the run itself knows and its files do not.

    title: the page's heading; results: label to text, the large tiles ('test accuracy': '0.9251');
    seconds: part of the run to wall seconds ('step', 'compile', 'data wait', 'eval', 'save',
    'start-up'); environment: label to text (versions, device kind); command: how the run was started,
    '' for one rebuilt from the config; parameters_sha256: what a run that computes the same ends with.
    """

    title: str
    results: Mapping[str, str]
    seconds: Mapping[str, float]
    environment: Mapping[str, str]
    command: str = ''
    parameters_sha256: str = ''


def write_report(
    workdir: Path,
    summary: Summary,
    rate: Callable[[int], float],
    samples: Samples | None = None,
) -> Path:
    """Writes `report.html` and `plots/*.png` from config.json, plan.json and metrics.jsonl.

    `rate(step)` is the learning rate after `step` completed updates. Every file is written whole or
    not at all. Returns the page's path.
    """
    workdir = opened('workdir', workdir)
    config = json.loads((workdir / 'config.json').read_text())
    plan = json.loads((workdir / 'plan.json').read_text())
    rows = read_rows(workdir)
    figures = {
        'schedule': plots.schedule_figure(plan, rate),
        'loss': plots.curve_figure(rows, 'loss', 'Loss', plan),
        'accuracy': plots.curve_figure(rows, 'accuracy', 'Accuracy', plan),
        'throughput': plots.throughput_figure(rows, plan),
    }
    charts = {
        name: f'<figure class="chart">{drawing.to_svg(figure, name, f"Chart: {name}")}</figure>'
        for name, figure in figures.items()
    }
    if samples is not None and not len(samples.images):
        samples = None
    if samples is not None:
        samples = replace(samples, images=samples.images[:MAX_SAMPLES])
        figures['samples'] = plots.samples_figure(samples)
    (workdir / 'plots').mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        write_atomically(workdir / 'plots' / f'{name}.png', drawing.to_png(figure))
    sections = [
        _header(summary, config, plan),
        tiles(summary.results),
        _warnings(plan.get('warnings') or [], rows),
        section('Schedule', _pair(charts['schedule'], _boundary_table(plan, rate))),
        section('Learning curves', _pair(charts['loss'], charts['accuracy']) + _best_line(rows)),
        section('Speed', _pair(charts['throughput'], _time_spent(summary.seconds, rows))),
        section('Plan', pairs_table({k: v for k, v in plan.items() if k != 'warnings'})),
        _sample_grid(samples),
        section('Config', pairs_table(config)),
        section('Environment', pairs_table(summary.environment)),
        section('Reproduce', _reproduce(summary.command, config, summary.parameters_sha256)),
    ]
    page = page_of(summary.title, ''.join(sections))
    write_atomically(workdir / workdir_lib.REPORT, page)
    return workdir / workdir_lib.REPORT


def _number(value: Any) -> str:
    """A JSON value as a reader wants it, unescaped: 60,000 and 0.02 and (28, 28, 1)."""
    if isinstance(value, bool) or value is None:
        return {True: 'yes', False: 'no', None: EMPTY}[value]
    if isinstance(value, int):
        return f'{value:,}'
    if isinstance(value, float):
        return f'{value:.6g}'
    if isinstance(value, Mapping):
        return ' · '.join(f'{key}: {_number(item)}' for key, item in value.items()) or EMPTY
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ' · '.join(_number(item) for item in value) or EMPTY
    return str(value) if value != '' else EMPTY


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f'{minutes} min {rest:02} s'
    return f'{minutes // 60} h {minutes % 60:02} min'


def section(title: str, body: str) -> str:
    return f'<section><h2>{title}</h2>{body}</section>' if body else ''


def _pair(left: str, right: str) -> str:
    return f'<div class="pair">{left}{right}</div>'


def _header(summary: Summary, config: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    epochs = plan['num_steps'] / plan['steps_per_epoch']
    devices = plan.get('num_devices')
    facts = [
        f'{plan["num_train_examples"]:,} training examples',
        f'{epochs:.4g} epochs of {plan["steps_per_epoch"]:,} steps',
        f'{plan["batch_size"]:,} examples a step',
        *([f'{devices:,} device{"s" if devices > 1 else ""}'] if devices else []),
    ]
    model, dataset = (
        escape(config.get('model', 'a model')),
        escape(config.get('dataset', 'a dataset')),
    )
    return (
        f'<header><h1>{escape(summary.title)}</h1>'
        f'<p class="lead"><b>{model}</b> trained on <b>{dataset}</b></p>'
        f'<p class="muted">{" · ".join(facts)}</p></header>'
    )


def tiles(results: Mapping[str, str]) -> str:
    tiles = ''.join(
        f'<div><dd>{escape(value)}</dd><dt>{escape(label)}</dt></div>' for label, value in results.items()
    )
    return f'<dl class="tiles">{tiles}</dl>' if tiles else ''


def _warnings(warnings: Sequence[str], rows: Sequence[Row]) -> str:
    broken = [row for row in rows if not all(map(_finite, (row.get('loss'), row.get('grad_norm', 0))))]
    if broken:
        first = f'{broken[0]["split"]} row at step {broken[0]["step"]:,}'
        text = f'Loss or gradient norm is not finite in {len(broken):,} rows, first in the {first}.'
        warnings = [*warnings, text]
    items = ''.join(f'<li>{escape(warning)}</li>' for warning in warnings)
    return f'<aside class="warnings"><h2>Warnings</h2><ul>{items}</ul></aside>' if items else ''


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _boundary_table(plan: Mapping[str, Any], rate: Callable[[int], float]) -> str:
    rates = plan.get('learning_rate_at', {})
    lines = []
    for step, name in [(0, 'start'), *plots.boundary_marks(plan)]:
        value = rates.get(str(step))
        value = rate(step) if value is None else value
        epoch = step / plan['steps_per_epoch']
        cells = (name, f'{step:,}', f'{epoch:.4g}', f'{float(value):.4g}')
        late = ' class="muted"' if step > plan['num_steps'] else ''
        lines.append(f'<tr{late}>' + ''.join(f'<td>{escape(cell)}</td>' for cell in cells) + '</tr>')
    head = '<tr><th>boundary</th><th>step</th><th>epoch</th><th>rate</th></tr>'
    body = f'<thead>{head}</thead><tbody>{"".join(lines)}</tbody>'
    return f'<div><table class="rows">{body}</table></div>'


def _best_line(rows: Sequence[Row]) -> str:
    parts = []
    for key, word in (('loss', 'lowest'), ('accuracy', 'highest')):
        steps, values = plots.column(rows, 'eval', key)
        best = plots.best_row(key, values)
        if best is not None:
            where = f'at step {steps[best]:,.0f}'
            parts.append(f'{word} eval {key} <b>{values[best]:.4f}</b> {where}')
    if not parts:
        return '<p class="muted note">No evaluation yet.</p>'
    text = ' · '.join(parts)
    return f'<p class="muted note">{text[0].upper()}{text[1:]}.</p>'


def _time_spent(seconds: Mapping[str, float], rows: Sequence[Row]) -> str:
    parts = {name: max(float(value), 0.0) for name, value in seconds.items() if _finite(value)}
    total = sum(parts.values())
    order = [*(k for k in TIME_COLORS if k in parts), *(k for k in parts if k not in TIME_COLORS)]
    bar, legend = [], []
    for name in order if total else []:
        color, share = TIME_COLORS.get(name, TIME_COLORS['start-up']), 100 * parts[name] / total
        if share >= 0.05:
            bar.append(f'<i style="background:{color};flex-grow:{share:.3f}"></i>')
        legend.append(
            f'<tr><td><i style="background:{color}"></i>{escape(name)}</td>'
            f'<td>{_duration(parts[name])}</td><td>{share:.1f} %</td></tr>'
        )
    waits = plots.column(rows, 'train', 'data_wait_fraction')[1]
    waits = waits[np.isfinite(waits)]
    note = ''
    if len(waits):
        note = f'Waiting for data, median of the steps: {100 * float(np.median(waits)):.2g} %.'
        note = f'<p class="muted note">{note}</p>'
    if not legend:
        return f'<div>{note}</div>'
    return (
        f'<div class="time"><h3>Where {_duration(total)} went</h3>'
        f'<div class="bar" role="img" aria-label="Shares of the time, see the table">{"".join(bar)}'
        f'</div><table class="rows"><tbody>{"".join(legend)}</tbody></table>{note}</div>'
    )


def pairs_table(values: Mapping[str, Any]) -> str:
    lines = ''.join(
        f'<div><dt>{escape(key)}</dt><dd>{escape(_number(value))}</dd></div>' for key, value in values.items()
    )
    return f'<dl class="pairs">{lines}</dl>' if lines else ''


def _sample_grid(samples: Samples | None) -> str:
    if samples is None:
        return ''
    cells, right = [], 0
    for i, image in enumerate(samples.images):
        label, guess = int(samples.labels[i]), int(samples.predictions[i])
        right += label == guess
        name, chance = escape(samples.name(guess)), f'{100 * float(samples.probabilities[i]):.0f} %'
        truth = '' if label == guess else f'<em>is {escape(samples.name(label))}</em>'
        cross, kind = ('', '') if label == guess else ('✗ ', ' class="wrong"')
        cells.append(
            f'<figure{kind}><img src="{_data_url(image)}" alt="{escape(samples.name(label))}" />'
            f'<figcaption><b>{cross}{name}</b>{truth}<span>{chance}</span></figcaption></figure>'
        )
    count = len(samples.images)
    note = (
        f'<p class="muted note">{right} of these {count} are right; '
        'each shows the prediction and its probability, a wrong one also what it is.</p>'
    )
    return section('Test images', f'<div class="samples">{"".join(cells)}</div>{note}')


def _data_url(image: np.ndarray) -> str:
    """A uint8 image [h, w, c] as a data: URL: PNG as it is, or a JPEG of at most 144 pixels."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image if image.shape[-1] == 3 else image[..., 0]))
    out, kind = io.BytesIO(), 'png' if max(picture.size) <= 64 else 'jpeg'
    picture.thumbnail((144, 144))
    picture.save(out, format=kind)
    return f'data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}'


def _reproduce(command: str, config: Mapping[str, Any], parameters_sha256: str) -> str:
    if not command:
        given = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in config.items()
            if value is not None
        }
        words = [
            'python -m parallel_train train',
            '--workdir=NEW_DIR',
            '--config=configs/default.py',
        ]
        words += [shlex.quote(f'--config.{key}={value}') for key, value in given.items()]
        command = ' '.join(words)
    digest = f' sha256 of the parameters: {parameters_sha256}.' if parameters_sha256 else ''
    return f'<pre>{escape(command)}</pre><p class="muted note">The config in full is above.{digest}</p>'
