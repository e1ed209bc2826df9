"""What the README says can be typed, works; so do the scripts in launch/ and the recipes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from parallel_train import config as config_lib
from parallel_train.plan import make_plan
from tests.conftest import ROOT, environment, run_ok

README = (ROOT / 'README.md').read_text()
# What makes a command quick here and leaves it the same command.
QUICK = '--config.num_epochs=1 --config.warmup_epochs=0.5 --config.batch_size=64 --config.log_every_steps=5'


def commands() -> list[list[str]]:
    found = re.findall(r'^    python -m parallel_train (.*)$', README, re.MULTILINE)
    return [shlex.split(command) for command in found]


def blocks() -> list[str]:
    return re.findall(r'```python\n(.*?)```', README, re.DOTALL)


@pytest.mark.slow
def test_commands_of_the_readme(tmp_path: Path, data_dir: Path) -> None:
    """In their order, from a folder with the README's own files; on the small set, and few steps."""
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    programs = []
    for block in blocks():
        name = re.match(r'# (\w+\.py)\n', block)
        if name:
            (tmp_path / name[1]).write_text(block)
        else:
            programs.append(block)
    ran = []
    for command in commands():
        flags = [f'--data_dir={data_dir}']
        if command[0] == 'train':
            own_devices = any(flag.startswith('--devices=') for flag in command)
            flags += QUICK.split() + ([] if own_devices else ['--devices=2'])
        run_ok(*command, *flags, cwd=tmp_path)
        ran.append(command[0])
    assert ran.count('train') >= 3 and {'plan', 'evaluate'} <= set(ran)
    [program] = programs
    done = subprocess.run(
        [sys.executable, '-c', program + '\nprint(logits.shape)'],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == '(1, 10)', done.stderr


def test_the_same_bits_as_the_readme_shows_them(tmp_path: Path, data_dir: Path) -> None:
    """In a shell, on the small set."""
    [loop] = re.findall(r'^    (for n in 1 8; do .*; done)$', README, re.MULTILINE)
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    assert ' python -m parallel_train train ' in loop
    flags = f'--config.batch_size=64 --config.num_epochs=0.3 --data_dir={shlex.quote(str(data_dir))}'
    loop = loop.replace(' python ', f' {shlex.quote(sys.executable)} ').replace(
        '--config.num_epochs=0.1', flags
    )
    done = subprocess.run(
        ['bash', '-c', loop], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    one, eight = re.findall(r'^sha256 of the parameters: (\w{64})$', done.stdout, re.MULTILINE)
    assert one == eight, done
    plans = [json.loads((tmp_path / f'runs/tree_{n}/plan.json').read_text()) for n in (1, 8)]
    assert [plan['num_devices'] for plan in plans] == [1, 8]


def test_links_of_the_readme_and_docs() -> None:
    for page in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), ROOT / 'benchmarks' / 'README.md']:
        for target in re.findall(r'\]\((?!http)([^)#]+)\)', page.read_text()):
            assert (page.parent / target).exists(), f'{page.name}: {target}'


def test_quickstart_in_a_folder_of_any_name(tmp_path: Path, data_dir: Path) -> None:
    """The script itself, with the environment that these tests run in instead of one of its own."""
    prefix = Path(sys.prefix)
    if not list(prefix.glob('.installed-*')):
        pytest.skip('needs an environment made by launch/test.sh, else it would install packages')
    checkout = tmp_path / "a checkout's [copy] ü"
    for part in ('launch', 'configs', 'parallel_train', 'setup.cfg', 'constraints.txt'):
        take = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        checkout.mkdir(exist_ok=True)
        take(ROOT / part, checkout / part)
    data = shutil.copytree(data_dir, tmp_path / 'the data')
    command = [
        checkout / 'launch' / 'quickstart.sh', f'--data_dir={data}', f'--workdir={tmp_path / "a run"}',
        '--devices=2', *QUICK.split(),
    ]  # fmt: skip
    env = environment(VENV=str(prefix), CDPATH=str(tmp_path))
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'test accuracy' in done.stdout and (tmp_path / 'a run' / 'report.html').exists()


def test_quickstart_without_what_it_needs(tmp_path: Path) -> None:
    """One line that says what is missing; nothing is made."""
    programs, bash = tmp_path / 'bin', str(shutil.which('bash'))
    programs.mkdir()
    for name in ('cat', 'cksum', 'touch'):
        (programs / name).symlink_to(str(shutil.which(name)))
    venv, absent = tmp_path / 'venv', tmp_path / 'no python'
    for changes, words in (
        ({'PATH': str(programs)}, 'error: Python 3.11 or 3.12 is needed, and PATH has neither'),
        ({'PATH': str(tmp_path)}, f'error: there is no cat on PATH={tmp_path}'),
        (
            {'PATH': str(programs), 'PYTHON': str(absent)},
            f'error: PYTHON={absent}: is not Python 3.11 or 3.12',
        ),
    ):
        for script in ('quickstart.sh', 'test.sh'):
            env = {'HOME': str(tmp_path), 'VENV': str(venv), **changes}
            done = subprocess.run(
                [bash, str(ROOT / 'launch' / script)], env=env, capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stdout) == (2, ''), done
            assert done.stderr.startswith(words) and done.stderr.count('\n') == 1, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bin']


def test_python_that_was_asked_for_is_taken(tmp_path: Path) -> None:
    python = tmp_path / 'my python' / 'python3'
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    command = ['bash', '-c', f'source {shlex.quote(str(ROOT / "launch" / "setup.sh"))}; find_python']
    env = environment(PYTHON=str(python))
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(python)), done


@pytest.mark.parametrize('script', sorted((ROOT / 'launch').glob('*.sh')) + [ROOT / '.ci' / 'run'])
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(['bash', '-n', str(script)], check=True)


@pytest.mark.parametrize('recipe', sorted((ROOT / 'configs').glob('*.py')), ids=lambda path: path.stem)
def test_recipes_plan_on_any_devices(recipe: Path) -> None:
    config = config_lib.complete(config_lib.load(recipe))
    for devices in (1, 2, 4):
        assert make_plan(config, 60_000, 10_000, devices).warnings == []


def test_architecture_names_every_file() -> None:
    text = (ROOT / 'docs' / 'architecture.md').read_text()
    for path in (ROOT / 'parallel_train').glob('*.py'):
        assert path.name.startswith('__') or f'`{path.name}`' in text, path.name
