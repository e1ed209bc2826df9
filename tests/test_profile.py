"""`--profile_steps`: a trace of real steps, in one process and in two, and what is said of it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel_train.errors import UserError
from parallel_train.profile_shares import Operation, Shares, covered, read_operations, shares
from parallel_train.profiling import Profiler, Steps, parse
from tests.conftest import ROOT, environment, read_rows, run_cli, run_ok, without_timing
from tests.test_scale import things  # noqa: F401, a fixture

# ruff: noqa: F811, the fixture again
FIRST, LAST = 3, 7
SESSION = f'profile/plugins/profile/steps_{FIRST}_{LAST}'
LINE = re.compile(
    r'^(?:\[0\] )?profile(?: of process \d)?: compute ([\d.]+)%, collectives ([\d.]+)%, data ([\d.]+)%, '
    r'host ([\d.]+)%$',
    re.MULTILINE,
)


def train_line(things: Path, workdir: Path, *more: str) -> list[str]:
    # Logs before, inside and after the steps that are traced.
    flags = ['--config.log_every_steps=2', '--config.eval_every_epochs=0']
    return ['train', f'--config={things / "recipe.py"}', f'--workdir={workdir}', *flags, *more]


@pytest.fixture(scope='module')
def env(things: Path) -> dict[str, str]:
    return environment(PYTHONPATH=os.pathsep.join([str(things), str(ROOT)]))


def check_trace(folder: Path, process: int) -> dict[str, Any]:
    """Checks the files of a process and returns its summary."""
    trace = folder / f'process_{process}.xplane.pb'
    operations = read_operations(trace)
    assert len({operation.device for operation in operations}) == 2
    reductions = [operation for operation in operations if operation.is_collective]
    assert len(reductions) == 2 * (LAST - FIRST)  # a device and step
    with gzip.open(folder / f'process_{process}.trace.json.gz', 'rt') as file:
        events = json.load(file)['traceEvents']  # Chrome's format, which Perfetto reads
    assert any('all-reduce' in str(event.get('name')) for event in events)
    summary = json.loads((folder / f'process_{process}.json').read_text())
    parts = [summary[name] for name in ('compute', 'collectives', 'data', 'host')]
    assert sum(parts) == pytest.approx(1) and min(parts) >= 0 and summary['compute'] > 0
    return summary


def check_xprof_opens(trace: Path) -> None:
    """What XProf's trace viewer is given holds the exchanges; where XProf is installed."""
    if importlib.util.find_spec('xprof') is None:
        return
    from xprof.convert import raw_to_tool_data

    viewed, _ = raw_to_tool_data.xspace_to_tool_data([str(trace)], 'trace_viewer', {})
    assert sum('all-reduce' in str(event.get('name')) for event in json.loads(viewed)['traceEvents']) > 0


def test_a_trace_of_some_steps_which_changes_no_number(
    things: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    plain = run_ok(*train_line(things, tmp_path / 'plain', '--devices=2'), env=env)
    traced = run_ok(
        *train_line(things, tmp_path / 'traced', '--devices=2', f'--profile_steps={FIRST}:{LAST}'), env=env
    )
    summary = check_trace(tmp_path / 'traced' / SESSION, 0)
    found = LINE.search(traced.stdout)
    assert found, traced.stdout
    assert float(found[1]) == pytest.approx(100 * summary['compute'], abs=0.06)
    assert str((tmp_path / 'traced' / SESSION).resolve()) in traced.stdout
    check_xprof_opens(tmp_path / 'traced' / SESSION / 'process_0.xplane.pb')
    rows = [without_timing(read_rows(tmp_path / name)) for name in ('plain', 'traced')]
    assert rows[0] == rows[1]
    digests = [re.search('sha256.*', result.stdout) for result in (plain, traced)]
    assert digests[0] and digests[1] and digests[0][0] == digests[1][0]
    assert not (tmp_path / 'plain' / 'profile').exists()
    assert sorted(path.name for path in (tmp_path / 'traced' / 'profile').iterdir()) == ['plugins']

    # The same command after the end, as a launcher gives it once more.
    again = run_ok(
        *train_line(things, tmp_path / 'traced', '--devices=2', f'--profile_steps={FIRST}:{LAST}'), env=env
    )
    assert 'already complete' in again.stdout


@pytest.mark.slow
def test_every_process_writes_its_trace(things: Path, tmp_path: Path, env: dict[str, str]) -> None:
    line = train_line(things, tmp_path / 'run', f'--profile_steps={FIRST}:{LAST}')
    local = [
        sys.executable,
        str(ROOT / 'launch' / 'local.py'),
        '--processes=2',
        '--devices_per_process=2',
        '--',
    ]
    done = subprocess.run([*local, *line], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for process in (0, 1):
        check_trace(tmp_path / 'run' / SESSION, process)
    assert len(LINE.findall(done.stdout)) == 2, done.stdout


@pytest.mark.parametrize('text', ['', '5', '5:', ':5', '5:5', '7:5', '-1:5', 'a:b', '1:2:3', '1.5:2'])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match='profile_steps='):
        parse(text)


@pytest.mark.parametrize(
    ('steps', 'shown'), [('10:10', "'10:10'"), ('20:1000', '20:1000: the run has 32 steps')]
)
def test_bad_ranges_are_refused(
    things: Path, tmp_path: Path, env: dict[str, str], steps: str, shown: str
) -> None:
    line = train_line(things, tmp_path / 'run', '--devices=2', f'--profile_steps={steps}')
    result = run_cli(*line, env=env)
    assert result.code == 2, result
    assert result.stderr.startswith(f'error: profile_steps={shown}')
    assert not (tmp_path / 'run').exists()


def test_a_trace_that_cannot_be_kept_is_not_why_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profiler = Profiler(Steps(0, 4), tmp_path, 0)
    profiler.switch(None, 0, 0.0)
    monkeypatch.setattr('parallel_train.profiling.shutil.rmtree', full_disk)
    profiler.close()
    assert 'warning: the trace that was cut short is not kept: no room' in capsys.readouterr().err


def full_disk(*args: Any) -> None:
    raise OSError('no room')


def test_when_a_trace_begins_and_ends(tmp_path: Path) -> None:
    def due(steps: Steps | None, start: int) -> list[int]:
        profiler = Profiler(steps, tmp_path, start)
        return [step for step in range(20) if profiler.is_due(step)]

    assert due(None, 0) == []
    assert due(Steps(0, 4), 0) == [0, 4]
    assert due(Steps(5, 9), 3) == [5, 9]
    assert due(Steps(5, 9), 7) == [7, 9]  # the rest of them, after a resume
    assert due(Steps(5, 9), 9) == []
    said: list[str] = []
    Profiler(Steps(5, 9), tmp_path, 9).tell(said.append)
    assert said == ['profile: steps 5 to 9 lie before this start']


# ---------------------------------------------------------------- arithmetic


def test_covered() -> None:
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_shares_of_two_devices() -> None:
    """One computes 6 of 10 s, 2 of them beside its all-reduce of 4; the other 8, and none of the exchange."""
    operations = [
        Operation('0', 'fusion.1', 0, 6),
        Operation('0', 'all-reduce.3', 4, 8),
        Operation('1', 'dot.2', 0, 5),
        Operation('1', 'fusion', 3, 8),
    ]
    found = shares(operations, seconds=10, waited_seconds=0.5)
    assert found == Shares(compute=0.7, collectives=0.1, data=0.05, host=pytest.approx(0.15))
    assert found.text() == 'compute 70.0%, collectives 10.0%, data 5.0%, host 15.0%'
    assert shares(operations, 10, waited_seconds=9) == Shares(0.7, 0.1, pytest.approx(0.2), 0.0)
    assert shares([], 10, 1) is None
