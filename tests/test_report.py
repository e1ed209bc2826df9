"""Does the report hold what the run did, whatever the run was, in one page that loads nothing?"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from parallel_train.errors import UserError
from parallel_train.report import Samples, Summary, write_report

STEPS_PER_EPOCH = 234
SUMMARY = Summary(
    title='Fashion-MNIST <script>alert(1)</script>',
    results={'test accuracy': '0.9251', 'images/s': '11,790'},
    seconds={
        'compile': 6.0,
        'data wait': 0.5,
        'step': 180.0,
        'eval': 5.0,
        'save': 1.0,
        'start-up': 7.5,
    },
    environment={'jax': '0.10.2', 'device kind': 'cpu & "friends"'},
    command='python -m parallel_train train --config=configs/fashion_mnist.py',
    parameters_sha256='7248c84026feb918' * 4,
)
CHARTS = ['schedule', 'loss', 'accuracy', 'throughput']


def make_rate(warmup: int, decay: int, peak: float = 0.1) -> Callable[[int], float]:
    def rate(step: int) -> float:
        if step < warmup:
            return peak * step / warmup
        if not decay:
            return peak
        return peak * 0.5 * (1 + math.cos(math.pi * min((step - warmup) / decay, 1.0)))

    return rate


def train_row(step: int, **changes: Any) -> dict[str, Any]:
    epoch = step / STEPS_PER_EPOCH
    row = {
        'split': 'train',
        'step': step,
        'epoch': epoch,
        'loss': 0.12 + 1.9 * math.exp(-2 * epoch),
        'accuracy': 0.96 - 0.6 * math.exp(-2 * epoch),
        'learning_rate': 0.1,
        'grad_norm': 1.2,
        'examples_per_second': 11_800 + 150 * math.sin(step),
        'data_wait_fraction': 0.002,
    }
    return row | changes


def eval_row(step: int, **changes: Any) -> dict[str, Any]:
    epoch = step / STEPS_PER_EPOCH
    loss = 0.2 + 0.3 * math.exp(-epoch) + 0.002 * max(0.0, epoch - 8)
    row = {'split': 'eval', 'step': step, 'epoch': epoch, 'loss': loss}
    return row | {'accuracy': 0.925 - 0.1 * math.exp(-epoch), 'num_examples': 10_000} | changes


def full_run(num_steps: int = 2340, every: int = 50) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, num_steps + 1):
        if step % every == 0 or step == num_steps:
            rows.append(train_row(step))
        if step % STEPS_PER_EPOCH == 0 or step == num_steps:
            rows.append(eval_row(step))
    return rows


def report(
    workdir: Path,
    rows: list[dict[str, Any]],
    *,
    num_steps: int = 2340,
    warmup: int = 234,
    decay: int | None = None,
    samples: Samples | None = None,
    summary: Summary = SUMMARY,
    **plan: Any,
) -> str:
    """Writes a workdir and its report; returns the page."""
    decay = num_steps - warmup if decay is None else decay
    rate = make_rate(warmup, decay)
    boundaries = sorted({warmup, warmup + decay} - {0}) if decay else []
    numbers = {
        'num_train_examples': 60_000,
        'num_eval_examples': 10_000,
        'batch_size': 256,
        'num_devices': 8,
        'steps_per_epoch': STEPS_PER_EPOCH,
        'dropped_examples_per_epoch': 96,
        'num_steps': num_steps,
        'warmup_steps': warmup,
        'decay_steps': decay,
        'boundaries': boundaries,
        'learning_rate_at': {str(step): rate(step) for step in [*boundaries, num_steps]},
    }
    config = {'model': 'cnn', 'dataset': 'fashion_mnist', 'learning_rate': 0.1, 'note': '<b>&</b>'}
    config |= {'input_shape': [28, 28, 1], 'num_train_examples': None}
    (workdir / 'config.json').write_text(json.dumps(config))
    (workdir / 'plan.json').write_text(json.dumps(numbers | plan))
    lines = [json.dumps(row) + '\n' for row in rows]
    (workdir / 'metrics.jsonl').write_text(''.join(lines))
    path = write_report(workdir, summary, rate, samples)
    assert path == workdir / 'report.html'
    assert not list(workdir.rglob('*.tmp'))
    return path.read_text()


def page_text(page: str) -> str:
    """The page's visible text; fails where the page is not well-formed."""
    body = ElementTree.fromstring(page.removeprefix('<!doctype html>')).find('body')
    assert body is not None
    return ' '.join(' '.join(body.itertext()).split())


def check_loads_nothing(page: str) -> None:
    for address in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert address.startswith(('#', 'data:')), address
    assert all(address.startswith('#') for address in re.findall(r'url\(([^)]*)\)', page))
    assert '<script' not in page
    assert '@import' not in page
    assert '<link' not in page


def check_ids(page: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)


def check_png(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert('L'))
    assert min(pixels.shape) > 100
    assert np.ptp(pixels) > 100, 'blank'


def make_samples(count: int, size: int = 28, channels: int = 1) -> Samples:
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, channels), np.uint8)
    labels = [i % 3 for i in range(count)]
    predictions = [2 if i == 1 else label for i, label in enumerate(labels)]
    return Samples(images, labels, predictions, [0.875] * count, ['Coat', '$hirt & <tie>', 'Bag'])


def test_whole_run(tmp_path: Path) -> None:
    page = report(tmp_path, full_run(), samples=make_samples(12), warnings=['the rate <is> high'])
    text = page_text(page)
    order = [
        'Fashion-MNIST <script>alert(1)</script>',
        'cnn trained on fashion_mnist',
        '60,000 training examples · 10 epochs of 234 steps · 256 examples a step · 8 devices',
        '0.9251 test accuracy',
        'the rate <is> high',
        'warmup ends 234 1 0.1',
        'decay ends = last step 2,340 10 0',
        'Lowest eval loss',
        'Where 3 min 20 s went',
        'step 3 min 00 s 90.0 %',
        'dropped_examples_per_epoch 96',
        '✗ Bag is $hirt & <tie> 88 %',
        '11 of these 12 are right',
        'note <b>&</b>',
        'device kind cpu & "friends"',
        SUMMARY.command,
    ]
    places = [text.find(part) for part in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)
    best = min(eval_row(step)['loss'] for step in range(234, 2341, 234))
    assert f'best {best:.4f}' in text
    check_loads_nothing(page)
    check_ids(page)
    assert page.count('<svg') == 4
    for name in [*CHARTS, 'samples']:
        check_png(tmp_path / 'plots' / f'{name}.png')


def test_names_that_are_no_text(tmp_path: Path) -> None:
    summary = replace(SUMMARY, command='train --workdir=run\udcff\x07')
    assert 'train --workdir=run\ufffd\ufffd' in page_text(report(tmp_path, full_run(), summary=summary))


def test_colors_follow_the_page(tmp_path: Path) -> None:
    page = report(tmp_path, full_run())
    for svg in re.findall(r'<svg.*?</svg>', page, re.DOTALL):
        assert 'var(--ink)' in svg
        # A fixed colour would vanish on either the light or the dark page.
        assert not re.findall(r'(?:fill|stroke): #', svg)
        assert 'DejaVu' not in svg
    assert 'prefers-color-scheme:dark' in page


def test_same_run_same_page(tmp_path: Path) -> None:
    assert report(tmp_path, full_run()) == report(tmp_path, full_run())


def test_decay_beyond_the_last_step(tmp_path: Path) -> None:
    text = page_text(report(tmp_path, full_run(351), num_steps=351, decay=234))
    assert 'warmup ends 234 1 0.1 last step 351 1.5 0.05 decay ends 468 2 0' in text


@pytest.mark.parametrize(('warmup', 'decay'), [(0, 0), (0, 2340), (234, 0)])
def test_other_schedules(tmp_path: Path, warmup: int, decay: int) -> None:
    page = report(tmp_path, full_run(), warmup=warmup, decay=decay)
    assert ('warmup ends' in page_text(page)) == (warmup > 0)
    check_png(tmp_path / 'plots' / 'schedule.png')


def test_schedule_with_more_pieces(tmp_path: Path) -> None:
    text = page_text(report(tmp_path, full_run(), decay=0, boundaries=[234, 700, 1400, 1800, 2000]))
    assert text.count('rate changes 700 2.991') == 1
    assert 'rate changes 2,000' in text


@pytest.mark.parametrize(
    'rows',
    [
        [],
        [train_row(50)],
        [eval_row(0)],
        [train_row(50), train_row(100)],
        [train_row(50, loss=1.0), train_row(100, loss=1.0), eval_row(100, accuracy=1.0)],
        [train_row(50, loss=math.nan, accuracy=None, examples_per_second=math.inf)],
    ],
    ids=['none', 'one', 'eval', 'two', 'flat', 'nan'],
)
def test_few_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    page = report(tmp_path, rows)
    text = page_text(page)
    assert ('No evaluation yet' in text) == all(row['split'] == 'train' for row in rows)
    speeds = [row.get('examples_per_second', math.nan) for row in rows]
    assert ('no rows yet' in text) == (not any(map(math.isfinite, speeds)))
    for name in CHARTS:
        check_png(tmp_path / 'plots' / f'{name}.png')


def test_not_finite(tmp_path: Path) -> None:
    rows = full_run()
    for row in rows:
        if row['step'] >= 1200:
            row['loss'] = math.nan if row['split'] == 'eval' else math.inf
    text = page_text(report(tmp_path, rows))
    broken = sum(row['step'] >= 1200 for row in rows)
    assert f'not finite in {broken} rows, first in the train row at step 1,200' in text
    assert 'first not finite: step 1,200' in text
    assert 'Lowest eval loss' in text
    assert 'at step 1,170' in text


def test_many_rows_stay_small(tmp_path: Path) -> None:
    rows = [train_row(step) for step in range(1, 100_001)]
    page = report(tmp_path, rows, num_steps=100_000, samples=make_samples(200, size=300, channels=3))
    assert len(page) < 2_000_000
    assert f'of these {page.count("<img")} are right' in page_text(page)


def test_last_line_cut_short(tmp_path: Path) -> None:
    page = report(tmp_path, full_run())
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"split": "train", "st')
    write_report(tmp_path, SUMMARY, make_rate(234, 2106))
    assert (tmp_path / 'report.html').read_text() == page
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('\n' + json.dumps(train_row(2340)) + '\n')
    with pytest.raises(UserError, match='is no row of metrics'):
        write_report(tmp_path, SUMMARY, make_rate(234, 2106))


def test_command_from_config(tmp_path: Path) -> None:
    summary = Summary(title='run', results={}, seconds={}, environment={})
    text = page_text(report(tmp_path, full_run(), summary=summary))
    assert '--config.model=cnn --config.dataset=fashion_mnist' in text
    assert "'--config.note=<b>&</b>' '--config.input_shape=(28, 28, 1)'" in text
    assert '--config.num_train_examples' not in text


def test_import_is_light() -> None:
    code = (
        'import sys, parallel_train.report; '
        'heavy = {"matplotlib", "PIL", "jax", "tensorflow"} & set(sys.modules); '
        'assert not heavy, heavy'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_the_digest_of_the_parameters_stands_where_a_run_is_repeated(tmp_path: Path) -> None:
    page = report(tmp_path, full_run())
    tiles, reproduce = (
        page.partition('class="tiles"')[2].partition('</dl>')[0],
        page.partition('>Reproduce<')[2],
    )
    assert SUMMARY.parameters_sha256 in reproduce and SUMMARY.parameters_sha256 not in tiles
