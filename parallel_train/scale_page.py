"""How does the speed scale? One self-contained page, `scale.html`, and `plots/*.png` beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel_train import drawing, scale_plots, show_scale
from parallel_train.files import write_atomically
from parallel_train.finish import command
from parallel_train.page import escape, page_of
from parallel_train.report import pairs_table, section, tiles

Row = Mapping[str, Any]
PAGE = 'scale.html'


def write_page(folder: Path, results: Mapping[str, Any]) -> Path:
    """Writes the page and the plots from what scale.json holds; returns the page's path."""
    by_mode = {
        mode: [row for row in results['measurements'] if row['mode'] == mode] for mode in ('weak', 'strong')
    }
    figures = {mode: scale_plots.speed_figure(rows, mode) for mode, rows in by_mode.items() if rows}
    if by_mode['strong']:
        figures['losses'] = scale_plots.losses_figure(by_mode['strong'])
    (folder / 'plots').mkdir(exist_ok=True)
    charts = {}
    for name, figure in figures.items():
        charts[name] = f'<figure class="chart">{drawing.to_svg(figure, name, f"Chart: {name}")}</figure>'
        write_atomically(folder / 'plots' / f'{name}.png', drawing.to_png(figure))
    config, machine = results['config'], results['machine']
    title = f'Scaling of {config["model"]} on {config["dataset"]}'
    body = [
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(machine["device_kind"])}, '
        f'{results["steps"]} steps a stretch</p></header>',
        tiles(_largest(by_mode)),
        _notes(show_scale.notes(results)),
        *(_mode_section(mode, rows, charts) for mode, rows in by_mode.items() if rows),
        section('Machine', pairs_table(machine)),
        section('Config', pairs_table(config)),
        section('Reproduce', f'<pre>{escape(command())}</pre>' if command() else ''),
    ]
    write_atomically(folder / PAGE, page_of(title, ''.join(body)))
    return folder / PAGE


def _largest(by_mode: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    told = {}
    for mode, rows in by_mode.items():
        if rows:
            row = rows[-1]
            told[f'images/s, {row["num_devices"]} devices, {mode}'] = f'{row["examples_per_second"]:,.0f}'
            told[f'× {row["compared_with"]["num_devices"]} device, {mode}'] = f'{row["speedup"]:.2f}'
    return told


def _notes(notes: Sequence[str]) -> str:
    items = ''.join(f'<li>{escape(note)}</li>' for note in notes)
    return f'<aside class="warnings"><h2>What the figures are</h2><ul>{items}</ul></aside>' if items else ''


def _mode_section(mode: str, rows: Sequence[Row], charts: Mapping[str, str]) -> str:
    drawn = charts[mode] + (charts['losses'] if mode == 'strong' else '')
    tables = ''.join(_table(rows, columns) for columns in show_scale.columns_of(mode))
    note = f'<p class="muted note">{show_scale.WHAT[mode].capitalize()}. Medians (quartiles).</p>'
    return section(f'{mode.capitalize()} scaling', f'<div class="pair">{drawn}</div>{note}{tables}')


def _table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    head = ''.join(f'<th>{escape(name)}</th>' for name in columns)
    lines = ''.join(
        '<tr>' + ''.join(f'<td>{escape(text(row))}</td>' for text in columns.values()) + '</tr>'
        for row in rows
    )
    return f'<table class="rows note"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
