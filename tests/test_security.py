"""Nothing that is read is executed: workdirs, checkpoints, prepared data; and no port is open unasked."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from parallel_train import config as config_lib
from parallel_train import trusted
from parallel_train import workdir as workdir_lib
from parallel_train.dataset import load_split
from parallel_train.errors import UserError
from parallel_train.prepare import prepare
from parallel_train.prepared import find_prepared
from tests.conftest import ROOT, Job, cli, environment, run_cli, run_ok, snapshot
from tests.test_idx import write_set
from tests.test_processes import free_port

EVIL = "open({marker!r}, 'w').close()\nimport flax.linen as nn\n\n\nclass Model(nn.Module):\n    pass\n"


def evil_module(folder: Path, marker: Path) -> None:
    """Writes `evil.py`, which tells by the file `marker` that it was executed."""
    (folder / 'evil.py').write_text(EVIL.format(marker=str(marker)))


class Evil:
    """Unpickled, makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), 'w')


def test_the_pickle_would_do_it(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / 'marker'))).close()
    assert (tmp_path / 'marker').exists()


def test_the_code_neither_unpickles_nor_evaluates() -> None:
    forbidden = {
        'pickle',
        'cloudpickle',
        'dill',
        'shelve',
        'marshal',
        'joblib',
        'eval',
        'exec',
        'allow_pickle',
    }
    forbidden |= {'shell', 'system', 'popen'}
    found = []
    for path in sorted([*(ROOT / 'parallel_train').rglob('*.py'), *(ROOT / 'launch').glob('*.py')]):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str | None] = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition('.')[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or '').partition('.')[0]]
            elif isinstance(node, ast.keyword):
                names = [node.arg]
            elif isinstance(node, ast.Call):
                called = node.func
                names = [called.id if isinstance(called, ast.Name) else getattr(called, 'attr', None)]
            found += [(path.name, node.lineno, name) for name in names if name in forbidden]  # type: ignore[attr-defined]
    assert not found


# Python runs this before anything else, where it is the first `sitecustomize`.
NO_UNPICKLING = """
import _pickle, pickle, traceback


def refuse(*args, **options):
    with open({marker!r}, 'a') as file:
        traceback.print_stack(file=file)
    raise pickle.UnpicklingError('refused')


for module in (pickle, _pickle):
    module.load = module.loads = module.Unpickler = refuse
"""


def test_resuming_and_evaluating_unpickle_nothing(trained: Path, job: Job, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(trained, tmp_path / 'run'))
    steps = sorted(workdir.glob('checkpoints/*'), key=lambda path: int(path.name))
    shutil.rmtree(steps[-1])  # so that there is something to do
    (workdir / 'report.html').unlink()
    marker = tmp_path / 'unpickled'
    (tmp_path / 'sitecustomize.py').write_text(NO_UNPICKLING.format(marker=str(marker)))
    env = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    resumed = run_ok(*job.train(workdir), env=env)
    assert f'resuming from step {steps[-2].name}' in resumed.stdout
    run_ok('evaluate', f'--workdir={workdir}', f'--data_dir={job.data_dir}', '--devices=2', env=env)
    assert not marker.exists(), marker.read_text()


def test_code_in_a_workdir_is_not_executed(trained: Path, job: Job, tmp_path: Path) -> None:
    """Not even by somebody who stands in it, so that Python looks for modules there."""
    workdir = Path(shutil.copytree(trained, tmp_path / 'run'))
    config = json.loads((workdir / 'config.json').read_text())
    (workdir / 'config.json').write_text(json.dumps({**config, 'model': 'evil:Model'}))
    evil_module(workdir, tmp_path / 'marker')
    result = run_cli('evaluate', '--workdir=.', f'--data_dir={job.data_dir}', cwd=workdir)
    assert result.code == 2 and "config.model='evil:Model': evil lies in the workdir" in result.stderr, result
    assert not (tmp_path / 'marker').exists()


@pytest.mark.parametrize('path', ['shutil:rmtree', 'cProfile:run', 'parallel_train.files:check_writable'])
def test_a_workdir_chooses_no_function_that_is_called_with_its_words(
    path: str, trained: Path, job: Job, tmp_path: Path
) -> None:
    workdir, victim = Path(shutil.copytree(trained, tmp_path / 'run')), tmp_path / 'victim'
    victim.mkdir()
    words = f'__import__("os").rmdir({str(victim)!r})' if path == 'cProfile:run' else str(victim)
    config = json.loads((workdir / 'config.json').read_text())
    (workdir / 'config.json').write_text(json.dumps({**config, 'dataset': path, 'eval_split': words}))
    result = run_cli('evaluate', f'--workdir={workdir}', f'--data_dir={job.data_dir}')
    assert result.code == 2 and result.stderr.startswith(f'error: config.dataset={path!r}: '), result
    assert '--config=FILE' in result.stderr and victim.exists()


FUNCTIONS = """
import functools
from shutil import rmtree

from helpers_here import exported


def own(*words):
    pass


@functools.cache
def decorated(*words):
    pass


called = functools.partial(own)
wrapped = functools.cache(rmtree)


class Class:
    def __init__(self, *words):
        pass
"""


@pytest.mark.parametrize('field', ['dataset', 'loss'])
@pytest.mark.parametrize(
    ('path', 'reason'),
    [
        ('functions_here:own', ''),
        ('functions_here:decorated', ''),
        ('helpers_here:exported', ''),
        ('parallel_train.text:folder', ''),
        ('parallel_train.losses:softmax_cross_entropy', ''),
        *[
            (f'functions_here:{name}', 'no Python function of functions_here itself')
            for name in ('rmtree', 'wrapped', 'called', 'Class', 'functools', 'exported')
        ],
        ('functions_here:nothing', "functions_here has no 'nothing'"),
        ('functions_nowhere:own', 'cannot import functions_nowhere'),
        ('installed_here:own', 'installed_here is an installed module'),
        ('installed_there:own', 'installed_there is an installed module'),
        *[
            (path, f'{path.partition(":")[0].partition(".")[0]} is an installed module')
            for path in ('shutil:rmtree', 'os:system', 'this:s', 'numpy.testing:runstring', '__main__:main')
        ],
        ('parallel_train.files:move_folder', 'parallel_train is an installed module'),
    ],
)
def test_functions_that_a_workdir_may_name(
    field: str, path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one's own packages; a user's own config may name any."""
    for name in ('own', 'target', 'site-packages', 'own/helpers_here', 'target/some-1.0.dist-info'):
        (tmp_path / name).mkdir()
    (tmp_path / 'own' / 'functions_here.py').write_text(FUNCTIONS)
    (tmp_path / 'own' / 'helpers_here' / '__init__.py').write_text('from helpers_here.own import exported\n')
    (tmp_path / 'own' / 'helpers_here' / 'own.py').write_text('def exported(*words):\n    pass\n')
    evil_module(tmp_path, tmp_path / 'marker')
    (tmp_path / 'evil.py').rename(tmp_path / 'target' / 'installed_here.py')  # as `pip install --target` does
    evil_module(tmp_path, tmp_path / 'marker')
    (tmp_path / 'evil.py').rename(tmp_path / 'site-packages' / 'installed_there.py')
    for name in ('own', 'target', 'site-packages'):
        monkeypatch.syspath_prepend(str(tmp_path / name))
    for name in ('functions_here', 'helpers_here', 'helpers_here.own'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    config = config_lib.default_config()
    config[field] = path
    if reason:
        with pytest.raises(UserError, match=f'^config.{field}={path!r}: .*{reason}'):
            trusted.check_functions(config)
        trusted.check_functions(config, given=config)
        with pytest.raises(UserError, match=reason):
            trusted.check_functions(config, given=config_lib.default_config())
    else:
        trusted.check_functions(config)
    assert not (tmp_path / 'marker').exists() and 'this' not in sys.modules


def test_a_loss_of_the_workdirs_own_is_refused_beside_a_config_of_the_users_too(
    trained: Path, job: Job, tmp_path: Path
) -> None:
    """The run's own loss is used, whatever the config says."""
    workdir = Path(shutil.copytree(trained, tmp_path / 'run'))
    config = json.loads((workdir / 'config.json').read_text())
    (workdir / 'config.json').write_text(json.dumps({**config, 'loss': 'evil:Model'}))
    evil_module(workdir, tmp_path / 'marker')
    result = run_cli(*job.line('evaluate', '--workdir=.'), cwd=workdir)
    assert result.code == 2 and "config.loss='evil:Model': evil lies in the workdir" in result.stderr, result
    assert not (tmp_path / 'marker').exists()


@pytest.mark.parametrize('key', ['pythonClassName', 'python_class_name', 'type'])
def test_data_do_not_choose_what_is_imported(
    key: str, undecoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TFDS imports the modules of the classes that features.json names."""
    (path,) = undecoded.glob('*/*/features.json')
    features = json.loads(path.read_text())
    features['featuresDict']['features']['more'] = {key: 'evil.Feature', 'content': {}}
    path.write_text(json.dumps(features))
    evil_module(tmp_path, tmp_path / 'marker')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"class 'evil\.Feature', whose module would be imported"):
        load_split('mnist', 'train', undecoded)
    assert not (tmp_path / 'marker').exists()


def test_pickles_among_the_decoded_arrays_are_not_loaded(undecoded: Path, tmp_path: Path) -> None:
    """They are no arrays of numbers, so the records are decoded again."""
    want = np.array(load_split('mnist', 'train', undecoded).images)
    (images,) = undecoded.glob('*/*/decoded/train-*/images.npy')
    np.save(images, np.array([Evil(tmp_path / 'marker')], object), allow_pickle=True)
    got = load_split('mnist', 'train', undecoded)
    assert np.array_equal(got.images, want)
    assert not (tmp_path / 'marker').exists()


@pytest.mark.parametrize('name', ['mnist/..', 'mnist/../mnist', '../mnist', 'mnist/.config', '/mnist'])
def test_names_of_data_sets_stay_in_the_data_dir(name: str, small_mnist: Path) -> None:
    with pytest.raises(UserError, match='neither a TFDS name'):
        find_prepared(name, small_mnist)


def test_the_note_of_a_default_config_stays_in_the_data_dir(undecoded: Path, tmp_path: Path) -> None:
    (undecoded / 'mnist').rename(tmp_path / 'elsewhere')
    note = undecoded / 'mnist' / '.config' / 'metadata.json'
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({'default_config_name': str(tmp_path / 'elsewhere')}))
    with pytest.raises(UserError, match='neither a TFDS name'):
        find_prepared('mnist', undecoded)


@pytest.mark.parametrize('name', ['../../../../outside', 'a/b', '/outside', '..', 'train.x', 'train\n', ''])
def test_splits_of_a_prepared_set_stay_in_its_folder(name: str, undecoded: Path, tmp_path: Path) -> None:
    """The folder of the decoded arrays is named after the split, and so is what is deleted there first."""
    (path,) = undecoded.glob('*/*/dataset_info.json')
    info = json.loads(path.read_text())
    info['splits'].append({**info['splits'][0], 'name': name})
    path.write_text(json.dumps(info))
    for split in ('train', name):
        with pytest.raises(UserError) as caught:
            load_split('mnist', split, undecoded)
        for word in (str(path.parent), repr(name), 'run `prepare` again'):
            assert word in str(caught.value)
    assert not list(undecoded.rglob('decoded')) and [p.name for p in tmp_path.iterdir()] == ['data']


@pytest.mark.parametrize('there', [True, False], ids=['to a file', 'to nothing'])
def test_a_link_in_place_of_the_lock_is_not_followed(there: bool, tmp_path: Path) -> None:
    """Who holds the workdir writes into that file, after emptying it."""
    target, workdir = tmp_path / 'precious', tmp_path / 'run'
    workdir.mkdir()
    (workdir / workdir_lib.LOCK).symlink_to(target)
    if there:
        target.write_text('precious')
    with pytest.raises(UserError, match=r'its \.lock is a link.*; remove it'), workdir_lib.hold(workdir):
        pass
    assert target.exists() == there and (not there or target.read_text() == 'precious')
    (workdir / workdir_lib.LOCK).unlink()
    with workdir_lib.hold(workdir):
        assert f'process {os.getpid()} on' in (workdir / workdir_lib.LOCK).read_text()


@pytest.mark.parametrize('name', ['checkpoints', 'checkpoints/42', 'damaged', 'damaged/50'])
def test_no_folder_is_deleted_through_a_link(name: str, trained: Path, job: Job, tmp_path: Path) -> None:
    """In `checkpoints` what is not kept is, in `damaged` what is replaced."""
    workdir, elsewhere = Path(shutil.copytree(trained, tmp_path / 'run')), tmp_path / 'elsewhere'
    if (workdir / name).exists():
        (workdir / name).rename(elsewhere)
    else:
        (elsewhere / '50').mkdir(parents=True)
        (elsewhere / '50' / 'precious').write_text('precious')
    (workdir / name).parent.mkdir(exist_ok=True)
    (workdir / name).symlink_to(elsewhere)
    before = snapshot(elsewhere)
    flags = ['--config.num_epochs=3', '--config.keep_checkpoints=1', '--allow_plan_change']
    result = run_cli(*job.train(workdir, *flags))
    assert result.code == 2, result
    assert f'error: workdir={str(workdir)!r}: {name} in it is a link' in result.stderr
    assert snapshot(elsewhere) == before
    # What writes nothing may read there.
    run_ok('evaluate', f'--workdir={workdir}', f'--data_dir={job.data_dir}', '--devices=2')


@pytest.mark.parametrize('there', [True, False], ids=['to a file', 'to nothing'])
def test_a_link_in_place_of_the_lock_of_a_set_is_not_followed(there: bool, tmp_path: Path) -> None:
    """Neither where a set is prepared nor where it is decoded: the target would be made, and held."""
    target, data_dir = tmp_path / 'precious', tmp_path / 'data'
    if there:
        target.write_text('precious')
    source = write_set(tmp_path / 'idx')

    def prepare_it() -> None:
        prepare('mnist', data_dir, source, say=lambda line: None)

    for lock, use in (
        ('.preparing-mnist.lock', prepare_it),
        ('mnist/3.0.1/decoded/.train.lock', lambda: load_split('mnist', 'train', data_dir)),
    ):
        link = data_dir / lock
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
        with pytest.raises(UserError, match=rf'{re.escape(str(link))} is a link.*; remove it'):
            use()
        assert target.exists() == there and (not there or target.read_text() == 'precious')
        link.unlink()
        use()
        assert not link.exists()


def test_a_job_of_this_machine_listens_to_this_machine_alone(job: Job, tmp_path: Path) -> None:
    """The coordinator authenticates nobody."""
    flags = [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2', '--process_id=0']
    process = subprocess.Popen(
        cli(*job.train(tmp_path / 'run', *flags)), cwd=ROOT, env=job.env, stderr=subprocess.DEVNULL
    )
    try:
        listening: list[str] = []
        deadline = time.monotonic() + 120
        while not listening and time.monotonic() < deadline:
            time.sleep(0.1)
            sockets = psutil.Process(process.pid).net_connections('inet')
            listening = [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN]
        assert listening and set(listening) <= {'127.0.0.1', '::1', '::ffff:127.0.0.1'}, listening
    finally:
        process.kill()
        process.wait()
