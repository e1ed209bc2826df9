"""What a person sees while it runs: rows as lines or as a bar, and when it will be over."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from typing import Any

import pytest

from parallel_train.config import default_config
from parallel_train.plan import make_plan
from parallel_train.progress import Progress
from tests.conftest import ROOT, environment

PLAN = make_plan(default_config(), 12_800, 100, 1)  # 100 steps an epoch, 1,000 in all


def row(step: int, rate: float, **changes: Any) -> dict[str, Any]:
    values = {'split': 'train', 'step': step, 'epoch': step / 100, 'loss': 0.5, 'accuracy': 0.8}
    return {**values, 'learning_rate': 0.1, 'examples_per_second': rate, **changes}


def left(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return re.findall(r'(\S+) left$', capsys.readouterr().out, re.MULTILINE)


def test_time_left_is_that_of_recent_rows(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(PLAN, from_step=0)
    for step in range(50, 501, 50):  # slow at first, as on a machine that was busy: 2 s a step
        progress.show(row(step, rate=64))
    for step in range(550, 1001, 50):  # now 10 steps a second
        progress.show(row(step, rate=1280))
    shown = left(capsys)
    assert shown[0] == '0:31:40'  # 950 steps of 2 s
    assert shown[14] == '0:00:25'  # step 750: 5 of the last 9 rows are quick
    assert shown[-1] == '0:00:00'


def test_time_left_is_right_from_the_first_row_after_a_resume(capsys: pytest.CaptureFixture[str]) -> None:
    """However long start-up and compilation took, and however many steps were trained before."""
    progress = Progress(PLAN, from_step=900)
    progress.show(row(900, rate=0))  # the row that was due where the run was cut off
    progress.show(row(910, rate=128))
    assert left(capsys) == ['-:--:--', '0:01:30']


def test_one_slow_row_changes_little(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(PLAN, from_step=0)
    for step, rate in ((100, 1280), (200, 1280), (300, 12.8), (400, 1280)):
        progress.show(row(step, rate))
    assert left(capsys) == ['0:01:30', '0:01:20', '0:01:10', '0:01:00']


def test_only_the_first_process_shows(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(PLAN, from_step=0, enabled=False)
    progress.show(row(50, 1280))
    progress.say('line')
    progress.close()
    assert capsys.readouterr().out == ''


def test_a_terminal_gets_a_bar() -> None:
    code = """
from tests.test_progress import PLAN, row
from parallel_train.progress import Progress
progress = Progress(PLAN, from_step=400)
for step in (450, 500):
    progress.show(row(step, rate=1280))
    progress._bar.refresh()
progress.close()
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 160))
    process = subprocess.Popen(
        [sys.executable, '-c', code], cwd=ROOT, env=environment(), stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written = b''
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # how Linux tells that the other end is closed
        pass
    assert process.wait() == 0, written.decode()
    os.close(ours)
    text = written.decode()
    assert re.search(
        r'50% .*step 500  loss 0.500  acc 0.800  rate 0.1  1,280 images/s  0:00:50 left', text
    ), text
