"""tpu_vm.sh and tpu_worker.sh, with a stand-in for gcloud that records calls and runs commands here."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Result

SCRIPT = ROOT / 'launch' / 'tpu_vm.sh'
WORKERS = 2
# Does what gcloud does with its arguments: a command is cut at spaces, and ssh joins it again. The file
# `state` beside it says what to answer, look by look.
GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys

here = pathlib.Path(__file__).parent
with open(here / 'calls', 'a') as calls:
    calls.write(json.dumps(sys.argv[1:]) + '\\n')
assert sys.argv[1:4] == ['compute', 'tpus', 'queued-resources']
action, *rest = sys.argv[4:]
flags = dict(a.partition('=')[::2] for a in rest if a.startswith('--'))
state = here / 'state'
if action == 'describe':
    if not state.exists():
        sys.exit('ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource not found')
    first, *later = state.read_text().split()
    print(first)
    if later:
        state.write_text(' '.join(later))
elif action == 'create':
    state.write_text('ACCEPTED PROVISIONING ACTIVE')
elif action == 'delete':
    state.unlink()
elif action == 'scp':
    for worker in range({WORKERS}):
        home = here / f'worker{{worker}}'
        home.mkdir(exist_ok=True)
        (home / rest[1].partition(':')[2]).write_bytes(pathlib.Path(rest[0]).read_bytes())
elif action == 'ssh':
    command = ' '.join(flags['--command'].split(' '))
    running = [
        subprocess.Popen(
            ['bash', '-c', command],
            cwd=here / f'worker{{worker}}',
            env={{**os.environ, 'HOME': str(here / f'worker{{worker}}'), 'WORKER': str(worker)}},
        )
        for worker in range({WORKERS})
    ]
    codes = [process.wait() for process in running]
    sys.exit(next((code for code in codes if code), 0))
"""
# In the place of the workers' Python: shows what it was given; ends as the worker's file `codes` says, start
# by start, or waits for SIGTERM.
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time

if sys.argv[1:3] == ['-m', 'pip'] or '-c' in sys.argv[1:2]:
    sys.exit()
here = pathlib.Path(os.environ['HOME'])
print(json.dumps(sys.argv[1:]), flush=True)
codes = here / 'codes'
code, *later = codes.read_text().split() if codes.exists() else ['0']
codes.write_text(' '.join(later) or '0')
if code == 'wait':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (here / 'waits').write_text(str(os.getpid()))
    time.sleep(100)
sys.exit(int(code))
"""


@dataclasses.dataclass(frozen=True)
class Cloud:
    """The stand-in for gcloud, and what it was asked for."""

    folder: Path

    def command(self, action: str, *flags: str) -> list[str]:
        return [str(SCRIPT), action, '--name=my-tpu', '--zone=z', '--poll_seconds=0', *flags]

    def env(self) -> dict[str, str]:
        return {
            **os.environ,
            'PATH': f'{self.folder}:{os.environ["PATH"]}',
            'PYTHON': str(self.folder / 'python'),
        }

    def run(self, action: str, *flags: str) -> Result:
        done = subprocess.run(
            self.command(action, *flags),
            env=self.env(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def calls(self) -> list[list[str]]:
        file = self.folder / 'calls'
        return [json.loads(line)[3:] for line in file.read_text().splitlines()] if file.exists() else []

    def actions(self) -> list[str]:
        """Returns what was asked for, in order; looks at the state left out, ssh told apart."""
        named = {'run': 'run', 'install': 'install', 'stop': 'stop', 'logs': 'logs'}
        result = []
        for action, *rest in self.calls():
            if action == 'ssh':
                command = next(a for a in rest if a.startswith('--command='))
                words = shlex.split(command.partition('=')[2])
                action = named.get(words[2], 'unpack') if len(words) > 2 else command
            if action != 'describe':
                result.append(action)
        return result

    def will_end_with(self, *codes: str) -> None:
        for worker in range(WORKERS):
            home = self.folder / f'worker{worker}'
            home.mkdir(exist_ok=True)
            (home / 'codes').write_text(' '.join(codes))


CREATE = ('--accelerator_type=v5litepod-8', '--runtime_version=v2-alpha-tpuv5-lite')


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    """A cloud whose workers need no installation: their environment stands in for a true one."""
    for name, text in (('gcloud', GCLOUD), ('python', PYTHON), ('sudo', '#!/bin/sh\nexit 1\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    # setup.sh finds this environment made already.
    for worker in range(WORKERS):
        venv = tmp_path / f'worker{worker}' / 'parallel_train' / '.venv'
        (venv / 'bin').mkdir(parents=True)
        (venv / 'bin' / 'python').symlink_to(tmp_path / 'python')
        wanted = 'cat "$1/setup.cfg" "$1/constraints.txt" | cksum | tr " " -'
        done = subprocess.run(['bash', '-c', wanted, '-', ROOT], capture_output=True, text=True, check=True)
        (venv / f'.installed-{done.stdout.strip()}-tpu,gcs').touch()
    return Cloud(tmp_path)


def test_run_from_nothing_to_nothing_with_awkward_arguments(cloud: Cloud) -> None:
    awkward = ['--config=a  b.py', '--x=\'"$HOME" `ls` \\ ;&|', '--y=', '--z=new\nline', '--*=?', '--ü=é']
    create = [
        *CREATE,
        '--spot',
        '--slices=2',
        '--project=p',
        '--create_flag=--network=my net',
        '--setup=true',
    ]
    result = cloud.run('run', *create, '--ssh_flag=--tunnel-through-iap', '--', 'train', *awkward)
    assert result.code == 0, result.stderr
    assert cloud.actions() == ['create', 'scp', 'unpack', 'install', 'run', 'delete']
    shown = [line.split(' ', 1)[1] for line in result.stdout.splitlines() if line.endswith(']')]
    assert [json.loads(line) for line in shown] == [
        ['-u', '-m', 'parallel_train', 'train', *awkward]
    ] * WORKERS
    created = next(call for call in cloud.calls() if call[0] == 'create')
    wanted = [
        '--node-count=2',
        '--node-prefix=my-tpu',
        '--spot',
        '--network=my net',
        '--zone=z',
        '--project=p',
    ]
    assert created[1] == 'my-tpu' and set(wanted) <= set(created)
    for call in cloud.calls():
        if call[0] in ('ssh', 'scp'):
            assert {'--node=all', '--worker=all', '--batch-size=all', '--tunnel-through-iap'} <= set(call)
    assert 'BILLED' not in result.stderr


def test_the_checkout_travels_without_what_git_ignores(cloud: Cloud) -> None:
    assert cloud.run('run', *CREATE, '--', 'train').code == 0
    there = cloud.folder / 'worker1' / 'parallel_train'
    assert (there / 'configs' / 'default.py').read_bytes() == (ROOT / 'configs' / 'default.py').read_bytes()
    assert not (there / '.git').exists() and not list(there.rglob('__pycache__'))


def test_restarts_after_75_and_faults_then_final(cloud: Cloud) -> None:
    cloud.will_end_with('75', '1', '0')
    result = cloud.run('run', *CREATE, '--', 'train')
    assert result.code == 0
    assert cloud.actions().count('run') == 3 and cloud.actions().count('install') == 1
    assert 'exit code 75; starting again (restart 1 of at most 20)' in result.stderr


@pytest.mark.parametrize(('code', 'runs'), [('2', 1), ('3', 1), ('75', 3)])
def test_final_codes_and_the_limit(cloud: Cloud, code: str, runs: int) -> None:
    cloud.will_end_with(*[code] * 5)
    result = cloud.run('run', *CREATE, '--max_restarts=2', '--', 'train')
    assert result.code == int(code)
    assert cloud.actions().count('run') == runs
    assert cloud.actions()[-1] == 'delete'


def test_a_preempted_resource_is_made_anew(cloud: Cloud) -> None:
    cloud.will_end_with('1', '0')
    (cloud.folder / 'state').write_text('ACTIVE SUSPENDING SUSPENDED')
    result = cloud.run('run', *CREATE, '--', 'train')
    assert result.code == 0, result.stderr
    before = ['scp', 'unpack', 'install', 'run']
    assert cloud.actions() == [*before, 'delete', 'create', *before, 'delete']


def test_what_it_did_not_create_stays_and_it_says_so(cloud: Cloud) -> None:
    (cloud.folder / 'state').write_text('ACTIVE')
    result = cloud.run('run', '--', 'train')
    assert result.code == 0
    assert 'delete' not in cloud.actions()
    assert 'MAY STILL BE THERE, AND IS THEN BILLED' in result.stderr
    assert f'{SCRIPT} delete --name=my-tpu --zone=z' in result.stderr


@pytest.mark.parametrize('flag', ['--keep', '--max_restarts=0'])
def test_keep_and_faults_say_what_is_left(cloud: Cloud, flag: str) -> None:
    cloud.will_end_with('1')
    if flag != '--keep':  # whatever fails on the way: here the installation, for want of root
        shutil.rmtree(cloud.folder / 'worker0')
        (cloud.folder / 'worker0').write_text('not a folder')
    result = cloud.run('run', *CREATE, flag, '--max_restarts=0', '--', 'train')
    assert result.code != 0
    assert 'delete' not in cloud.actions()
    assert 'BILLED' in result.stderr


def test_stop_saves_and_is_final(cloud: Cloud) -> None:
    cloud.will_end_with('wait', '0')
    with subprocess.Popen(
        cloud.command('run', *CREATE, '--', 'train'),
        env=cloud.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        wait_for_workers(cloud)
        stopped = cloud.run('stop')
        assert stopped.code == 0 and stopped.stdout.count('stopped, exit code 75') == WORKERS
        _, errors = running.communicate(timeout=30)
    assert running.returncode == 143
    assert cloud.actions().count('run') == 1 and 'starting again' not in errors


def test_a_lost_connection_does_not_end_the_job(cloud: Cloud) -> None:
    cloud.will_end_with('wait')
    with subprocess.Popen(
        cloud.command('run', *CREATE, '--', 'train'),
        env=cloud.env(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as running:
        wait_for_workers(cloud)
        os.killpg(running.pid, signal.SIGINT)  # Ctrl-C ends script, gcloud and the shells that it had open
        _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert 'BILLED' in errors and ' logs --name=my-tpu' in errors and ' stop --name=my-tpu' in errors
    with subprocess.Popen(
        cloud.command('run', '--', 'train'), env=cloud.env(), stdout=subprocess.PIPE
    ) as again:
        assert again.stdout
        first = again.stdout.readline()
        assert json.loads(first.split(b' ', 1)[1])[3:] == ['train']
        assert cloud.run('stop').code == 0
    assert again.returncode == 143
    assert cloud.run('logs').code == 143


def wait_for_workers(cloud: Cloud) -> None:
    end = time.monotonic() + 60
    while not all((cloud.folder / f'worker{index}' / 'waits').exists() for index in range(WORKERS)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_dry_run_prints_and_asks_for_nothing(cloud: Cloud) -> None:
    result = cloud.run('run', *CREATE, '--dry_run', '--', 'train', '--config=a b')
    assert result.code == 0, result.stderr
    assert cloud.calls() == []
    printed = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith('gcloud')]
    assert [words[4] for words in printed] == ['create', 'scp', 'ssh', 'ssh', 'ssh', 'delete']
    remote = next(word for word in printed[4] if word.startswith('--command=')).partition('=')[2]
    assert shlex.split(remote)[2:] == ['run', 'train', '--config=a b']


@pytest.mark.skipif(
    'google-cloud-sdk' not in os.path.realpath(shutil.which('gcloud') or ''),
    reason='the Cloud SDK is not here',
)
def test_the_true_gcloud_knows_every_command(cloud: Cloud) -> None:
    flags = [*CREATE, '--spot', '--slices=2', '--project=p', '--create_flag=--network=n', '--setup=true']
    shown = cloud.run('run', *flags, '--ssh_flag=--tunnel-through-iap', '--dry_run', '--', 'train').stdout
    shown += cloud.run('status', '--dry_run').stdout
    commands = [line for line in shown.splitlines() if line.startswith('gcloud')]
    assert len(commands) == 7
    for command in commands:
        words = shlex.split(command)
        # Its parser refuses what it does not know before it asks for a login; `--help` would accept anything.
        check = [*words[:4], words[4], *words[5:], '--this-flag-is-unknown']
        done = subprocess.run(check, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 2 and 'unrecognized arguments' in done.stderr, done.stderr
        complaint = done.stderr.partition('unrecognized arguments:')[2].partition('To search')[0].split()
        assert complaint[0] == '--this-flag-is-unknown', done.stderr


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['fly', '--name=a', '--zone=z'], "action 'fly': must be"),
        ([], "action '': must be"),
        (['status', '--zone=z'], "name='': must be"),
        (['status', '--name=My TPU', '--zone=z'], "name='My TPU': must be"),
        (['status', '--name=a'], 'zone: is missing'),
        (['status', '--name=a', '--zone=z', '--colour=red'], '--colour: there is no such flag'),
        (['status', '--name', 'a'], '--name: is no flag with a value'),
        (['run', '--name=a', '--zone=z'], 'command: is missing'),
        (['run', '--name=a', '--zone=z', '--', '--config=x'], 'command: is missing'),
        (['run', '--name=a', '--zone=z', '--slices=0', '--', 'train'], 'slices=0: must be'),
        (['run', '--name=a', '--zone=z', '--max_restarts=-1', '--', 'train'], 'max_restarts=-1: must be'),
        (['run', '--name=a', '--zone=z', '--', 'train'], 'accelerator_type: is missing'),
        (['stop', '--name=a', '--zone=z', '--', 'train'], 'train: only run takes a command'),
    ],
)
def test_bad_input_is_one_line(cloud: Cloud, arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [str(SCRIPT), *arguments], env=cloud.env(), capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith(f'error: {message}') and done.stderr.count('\n') == 1
    assert all(call[0] == 'describe' for call in cloud.calls())
