"""The supervisor of a job on this machine: output, faults, signals, restarts; of small programs."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, Result, environment

LAUNCH = ROOT / 'launch'
Start = Callable[[list[str]], subprocess.Popen[str]]
# Runs local.py's own `main`, with the program at the front of the arguments in the place of ours.
WITH_PROGRAM = f"""
import sys
sys.path.insert(0, {str(LAUNCH)!r})
import local
sys.exit(local.main(sys.argv[2:], [sys.executable, sys.argv[1]]))
"""
# What every small program knows: its flags, its number, a folder to meet the others in.
PREAMBLE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

flags = dict(argument[2:].partition('=')[::2] for argument in sys.argv[2:] if argument.startswith('--'))
me = int(flags.get('process_id', 0))
folder = Path(__file__).parent


def tell(name):
    (folder / f'{name}.new').write_text(str(os.getpid()))
    (folder / f'{name}.new').rename(folder / name)


def wait_for(*names):
    while not all((folder / name).exists() for name in names):
        time.sleep(0.01)


def start_number():
    'How often this process was started, counting from 1.'
    count = len(list(folder.glob(f'start-{me}-*'))) + 1
    (folder / f'start-{me}-{count}').touch()
    return count


def error(text):
    print(text, file=sys.stderr)
"""


def supervisor(tmp_path: Path, body: str, *flags: str, processes: int = 2, restarts: int = 0) -> list[str]:
    """Returns the command that runs `body` in so many processes."""
    program = tmp_path / 'program.py'
    program.write_text(PREAMBLE + body)
    ours = [f'--processes={processes}', '--devices_per_process=2', f'--max_restarts={restarts}']
    return [sys.executable, '-c', WITH_PROGRAM, str(program), *ours, '--', 'work', *flags]


def run(command: list[str], cwd: Path | None = None) -> Result:
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def wait_until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def background() -> Iterator[Start]:
    """Starts a supervisor in a process group of its own, as a shell would; ends what is left."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(
                command, stdout=pipe, stderr=pipe, text=True, env=environment(), start_new_session=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_lines_stay_whole_and_carry_their_process(tmp_path: Path) -> None:
    body = """
for number in range(300):
    for stream, name in ((1, 'out'), (2, 'err')):
        line = f'{name} {number} {"x" * (number * 37 % 5000)}.\\n'.encode()
        cut = number * 7 % len(line)
        os.write(stream, line[:cut])
        os.write(stream, line[cut:])
os.write(1, b'out 300 .')  # no end of line
"""
    command = supervisor(tmp_path, body, processes=3)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    seen: dict[tuple[str, str], list[int]] = {}
    for line in done.stdout.splitlines():
        match = re.fullmatch(r'\[(\d)\] (out|err) (\d+) (x*)\.', line)
        assert match, line[:200]
        assert len(match[4]) == (0 if match[3] == '300' else int(match[3]) * 37 % 5000)
        seen.setdefault((match[1], match[2]), []).append(int(match[3]))
    wanted = {(str(p), s): list(range(301 if s == 'out' else 300)) for p in range(3) for s in ('out', 'err')}
    assert seen == wanted


def test_arguments_arrive_unharmed_and_processes_can_meet(tmp_path: Path) -> None:
    awkward = ['--config=a b.py', '--x=\'"$HOME" `ls` \\', '--y=', '--z=new\nline', '--ü=*', '--', '--a=;|&']
    result = run(supervisor(tmp_path, 'print(json.dumps(sys.argv[1:]))', *awkward, processes=3))
    assert result.code == 0, result.stderr
    lines = sorted(result.stdout.splitlines())
    heard = [json.loads(line.partition(' ')[2]) for line in lines]
    assert [line[:4] for line in lines] == ['[0] ', '[1] ', '[2] ']
    assert all(arguments[: len(awkward) + 1] == ['work', *awkward] for arguments in heard)
    ours = [dict(a[2:].split('=') for a in arguments[len(awkward) + 1 :]) for arguments in heard]
    assert [flags.pop('process_id') for flags in ours] == ['0', '1', '2']
    assert ours[0] == ours[1] == ours[2]
    address = ours[0].pop('coordinator')
    assert re.fullmatch(r'127\.0\.0\.1:\d+', address)
    assert ours[0] == {'devices': '6', 'num_processes': '3'}


def test_one_process_needs_no_coordinator(tmp_path: Path) -> None:
    result = run(supervisor(tmp_path, 'print(sys.argv[1:])', processes=1))
    assert (result.code, result.stdout) == (0, "[0] ['work', '--devices=2']\n")


def test_the_true_program_from_another_folder(tmp_path: Path, recipe: Path) -> None:
    command = [sys.executable, str(LAUNCH / 'local.py'), '--processes=1', '--devices_per_process=4', '--']
    sizes = ['--config.num_train_examples=1200', '--config.num_eval_examples=300']
    result = run([*command, 'plan', f'--config={recipe}', *sizes, f'--data_dir={tmp_path}'], cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert re.search(r'^\[0\]   global batch +48 = 4 devices × 12 examples', result.stdout, re.MULTILINE)


def test_a_user_error_of_the_true_program_is_the_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, str(LAUNCH / 'local.py'), '--processes=1', '--devices_per_process=1']
    result = run([*command, '--max_restarts=2', '--', 'plan', '--config=missing.py'], cwd=tmp_path)
    assert result.code == 2
    assert result.stderr.splitlines()[-1].startswith('error: config')


def test_one_failure_ends_the_others_and_is_shown_last(tmp_path: Path) -> None:
    body = """
if me == 1:
    wait_for('ready-0', 'ready-2')
    raise ValueError('the first cause')
signal.signal(signal.SIGTERM, signal.SIG_IGN if me == 0 else lambda *_: sys.exit('ended for another'))
tell(f'ready-{me}')
time.sleep(1000)
"""
    start = time.monotonic()
    result = run(supervisor(tmp_path, body, processes=3))
    assert result.code == 1
    assert time.monotonic() - start < 20  # process 0 is deaf: it is killed
    assert '[2] ended for another' in result.stderr
    *_, last = result.stderr.partition('[local] process 1 ended with exit code 1; ')
    assert last.startswith('the last lines of its stderr:\nTraceback')
    assert last.endswith('ValueError: the first cause\n')


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
def test_who_only_followed_is_not_the_cause(tmp_path: Path) -> None:
    body = """
def alive(pid):
    try:
        return 'zombie' not in Path(f'/proc/{pid}/status').read_text()
    except OSError:
        return False

if me == 1:
    tell('pid')
    wait_for('watching')
    error('last words')
    os.kill(os.getpid(), signal.SIGKILL)
wait_for('pid')
peer = (folder / 'pid').read_text()
tell('watching')
while alive(peer):
    pass
error('a peer is gone')
os.abort()
"""
    for _ in range(3):
        for file in tmp_path.iterdir():
            file.unlink()
        result = run(supervisor(tmp_path, body))
        assert result.code == 128 + signal.SIGKILL
        assert result.stderr.endswith(
            '[local] process 1 was killed by SIGKILL; the last lines of its stderr:\nlast words\n'
        )


def test_a_verdict_that_comes_late_is_the_cause(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
tell(f'ready-{me}')
wait_for('ready-0', 'ready-1')
if me == 0:
    sys.exit('a peer is gone')
time.sleep(0.5)
error('error: data_dir: is missing')
sys.exit(2)
"""
    result = run(supervisor(tmp_path, body, restarts=3))
    assert result.code == 2
    assert result.stderr.splitlines()[-1] == 'error: data_dir: is missing'
    assert 'starting again' not in result.stderr


def test_who_was_told_of_a_failure_is_not_the_cause(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
tell(f'ready-{me}')
wait_for('ready-0', 'ready-1', 'ready-2')
if me != 1:
    error('error: process 1 (some-host) failed: the first cause; the last completed step is 7')
    sys.exit(1)
time.sleep(1)
raise ValueError('the first cause')
"""
    result = run(supervisor(tmp_path, body, processes=3))
    assert result.code == 1
    *_, last = result.stderr.partition('[local] process 1 ended with exit code 1; ')
    assert last.endswith('ValueError: the first cause\n')


def test_a_process_that_ends_well_waits_for_the_others(tmp_path: Path) -> None:
    result = run(supervisor(tmp_path, "time.sleep(2 * me)\nprint('done')", processes=2))
    assert (result.code, result.stdout, result.stderr) == (0, '[0] done\n[1] done\n', '')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_never_restarts(
    tmp_path: Path, background: Start, number: signal.Signals
) -> None:
    body = """
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
tell(f'ready-{me}')
while not got:
    time.sleep(0.01)
time.sleep(1)  # a second one would come now
print([signal.Signals(number).name for number in got])
sys.exit(75)
"""
    process = background(supervisor(tmp_path, body, restarts=5))
    wait_until(lambda: all((tmp_path / f'ready-{i}').exists() for i in range(2)))
    os.killpg(process.pid, number)  # as a terminal does: to all of the group, which is ours alone
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 75
    assert sorted(stdout.splitlines()) == [f"[{i}] ['{number.name}']" for i in range(2)]
    assert f'[local] {number.name}: passed on to all processes' in stderr
    assert 'starting again' not in stderr


def test_a_second_signal_kills(tmp_path: Path, background: Start) -> None:
    body = """
signal.signal(signal.SIGINT, lambda *_: tell(f'heard-{me}'))
tell(f'ready-{me}')
while True:
    time.sleep(0.01)
"""
    process = background(supervisor(tmp_path, body, restarts=5))
    for name in ('ready', 'heard'):
        wait_until(lambda name=name: all((tmp_path / f'{name}-{i}').exists() for i in range(2)))
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=3) == 130
    assert not any(runs(int((tmp_path / f'ready-{i}').read_text())) for i in range(2))


def test_faults_and_preemptions_start_again(tmp_path: Path) -> None:
    body = """
number = start_number()
print(f'start {number} at {flags["coordinator"]}')
if me == 1 and number == 1:
    wait_for('start-0-1')
    os.kill(os.getpid(), signal.SIGKILL)
if number == 1:
    time.sleep(1000)
sys.exit(75 if number == 2 else 0)
"""
    result = run(supervisor(tmp_path, body, restarts=3))
    assert result.code == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith('[local]')]
    wanted = [
        r'\[local\] process 1 was killed by SIGKILL; starting again: 2 restarts left, \d+\.\d s lost .*',
        r'\[local\] process [01] ended with exit code 75; starting again: 1 restart left, \d+\.\d s lost .*',
    ]
    assert len(said) == 2 and all(map(re.fullmatch, wanted, said)), said
    assert len(set(re.findall(r'start 3 at (\S+)', result.stdout))) == 1


@pytest.mark.parametrize(('code', 'starts'), [(1, 3), (75, 3), (2, 1), (3, 1), (4, 1)])
def test_restarts_are_counted_and_a_verdict_has_none(tmp_path: Path, code: int, starts: int) -> None:
    result = run(supervisor(tmp_path, f'start_number()\nsys.exit({code})', processes=1, restarts=2))
    assert result.code == code
    assert len(list(tmp_path.glob('start-0-*'))) == starts


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path, background: Start) -> None:
    if sys.platform != 'linux':
        pytest.skip('only Linux ends a process with its parent')
    process = background(supervisor(tmp_path, "tell(f'pid-{me}')\ntime.sleep(1000)", processes=3))
    files = [tmp_path / f'pid-{index}' for index in range(3)]
    wait_until(lambda: all(file.exists() for file in files))
    process.kill()
    wait_until(lambda: not any(runs(int(file.read_text())) for file in files), 5)


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    body = """
child = subprocess.Popen(['sleep', '1000'])  # holds our stdout and stderr open
(folder / f'pid-{me}').write_text(str(child.pid))
tell(f'ready-{me}')
wait_for('ready-0', 'ready-1')
sys.exit(3 * me)
"""
    start = time.monotonic()
    result = run(supervisor(tmp_path, body))
    assert result.code == 3
    assert time.monotonic() - start < 10
    assert not any(runs(int((tmp_path / f'pid-{index}').read_text())) for index in range(2))


def test_a_job_that_nobody_watches_saves_and_ends(tmp_path: Path, background: Start) -> None:
    body = """
def save(*_):
    tell(f'saved-{me}')
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
tell(f'ready-{me}')
wait_for('ready-0', 'ready-1')
while True:
    print('a line')
    time.sleep(0.01)
"""
    process = background(supervisor(tmp_path, body))
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=20) == 75
    assert all((tmp_path / f'saved-{index}').exists() for index in range(2))
    process.stdout = None


def test_colours_on_a_terminal_only(tmp_path: Path) -> None:
    command = supervisor(tmp_path, "print('hello')")
    assert '\x1b' not in run(command).stdout
    master, slave = pty.openpty()
    env = {**environment(), 'TERM': 'xterm'}
    env.pop('NO_COLOR', None)
    done = subprocess.run(command, stdout=slave, stderr=slave, env=env, timeout=60, check=False)
    os.close(slave)
    assert done.returncode == 0
    shown = os.read(master, 4096).decode()
    os.close(master)
    assert '\x1b[31m[0]\x1b[0m hello' in shown and '\x1b[32m[1]\x1b[0m hello' in shown


def test_each_process_has_its_own_gpus(tmp_path: Path) -> None:
    command = supervisor(tmp_path, "print(os.environ['CUDA_VISIBLE_DEVICES'])")
    env = {k: v for k, v in environment().items() if k != 'JAX_PLATFORMS'}
    for given, wanted in (('0,1,2,3', {'[0] 0,1', '[1] 2,3'}), ('7', {'[0] 7', '[1] 7'})):
        env['CUDA_VISIBLE_DEVICES'] = given
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert set(done.stdout.splitlines()) == wanted


TWO = ['--processes=2', '--devices_per_process=2']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--processes=0', '--devices_per_process=1', '--', 'train'], 'processes=0: must be at least 1'),
        (['--processes=1', '--devices_per_process=0', '--', 'train'], 'devices_per_process=0: must be at'),
        (['--processes=two', '--devices_per_process=1', '--', 'train'], "processes='two': must be a whole"),
        (['--processes=-1', '--devices_per_process=1', '--', 'train'], "processes='-1': must be a whole"),
        ([*TWO, '--max_restarts=x', '--', 'train'], "max_restarts='x': must be a whole number"),
        (['--processes', '2', '--devices_per_process=1', '--', 'train'], "processes='': must be a whole"),
        (['--processes=2', '--', 'train'], 'devices_per_process: is missing'),
        (['--devices_per_process=2', '--', 'train'], 'processes: is missing'),
        ([*TWO, 'train', '--config=x'], '--: is missing'),
        ([*TWO, '--'], 'command: is missing'),
        ([*TWO, '--', '--config=x'], 'command: is missing'),
        ([*TWO, '--restarts=1', '--', 'train'], '--restarts=1: there is no such flag'),
        ([*TWO, 'train', '--', 'train'], 'train: there is no such flag'),
        ([*TWO, '--', 'train', '--devices=8'], '--devices=8: follows from'),
        ([*TWO, '--', 'train', '--process_id=1'], '--process_id=1: follows from'),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    result = run([sys.executable, str(LAUNCH / 'local.py'), *arguments])
    assert (result.code, result.stdout) == (2, '')
    assert result.stderr.startswith(f'error: {message}') and result.stderr.count('\n') == 1
