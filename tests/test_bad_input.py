"""What a user who got something wrong is told: exit code 2, one message, nothing written."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Result, environment, run_cli, run_ok, snapshot
from tests.test_idx import NAMES, idx_bytes, write_set

DEVICES = 4


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The folder that commands run in; nothing may appear in it."""
    folder = tmp_path / 'here'
    folder.mkdir()
    return folder


def refused(
    here: Path,
    *arguments: str | Path,
    words: Sequence[str | Path] = (),
    env: dict[str, str] | None = None,
) -> str:
    """Runs a command that must be refused, and returns its message, which holds all of `words`."""
    before = snapshot(here)
    home = here.parent / 'home'
    base = environment() if env is None else env
    result = run_cli(*arguments, cwd=here, env={**base, 'HOME': str(home)})
    assert result.code == 2, result
    message = checked_message(result)
    for word in words:
        assert str(word) in message, (word, message)
    assert snapshot(here) == before
    assert not home.exists()
    return message


def checked_message(result: Result) -> str:
    assert 'Traceback' not in result.stdout + result.stderr
    assert result.stderr.startswith('error: '), result.stderr
    assert result.stderr.count('error: ') == 1, result.stderr
    for remains in ('invalid literal', 'could not convert', 'Non-boolean'):  # Python's words, not ours
        assert remains not in result.stderr, result.stderr
    return result.stderr.removeprefix('error: ')


# ---------------------------------------------------------------- one config field

FIELDS: dict[str, list[str]] = {
    # Override -> what the message must hold besides field and value.
    'batch_size=0': ['at least 1'],
    'batch_size=-48': ['at least 1'],
    'batch_size=abc': ['whole number'],
    'batch_size=48.5': ['whole number'],
    'batch_size=1e3': ['whole number'],
    'batch_size=': ['whole number'],
    'batch_size=None': ['whole number'],
    'eval_batch_size=0': ['at least 1'],
    'accumulation_steps=0': ['at least 1'],
    'shards=-1': ['at least 0'],
    'num_epochs=0': ['greater than 0'],
    'num_epochs=-1': ['greater than 0'],
    'num_epochs=nan': ['finite'],
    'num_epochs=inf': ['finite'],
    'num_epochs=many': ['number'],
    'warmup_epochs=-0.5': ['at least 0'],
    'warmup_epochs=nan': ['finite'],
    'learning_rate=nan': ['finite'],
    'learning_rate=inf': ['finite'],
    'learning_rate=-inf': ['finite'],
    'learning_rate=-0.1': ['at least 0'],
    'learning_rate=fast': ['number'],
    'reference_batch_size=0': ['at least 1'],
    'learning_rate_scaling=linaer': ['none, linear, sqrt', 'mean linear'],
    'schedule=cosin': ['cosine, cosine_restarts, linear', 'mean cosine'],
    'optimizer=adam': ['sgd, adamw', 'mean adamw'],
    'model=resnet_smal': ['cnn', 'mean resnet_small', 'my_package.my_module:'],
    'loss=softmax_crossentropy': ['mean softmax_cross_entropy'],
    'momentum=1': ['less than 1'],
    'model=:': ['import path'],
    'loss=module:function:more': ['import path'],
    'weight_decay=-1': ['at least 0'],
    'random_flip=maybe': ['True or False'],
    'randaugment_layers=-1': ['at least 0'],
    'randaugment_magnitude=31': ['less than 31'],
    'cutout_size=-1': ['at least 0'],
    'random_erasing=1.5': ['from 0 to 1'],
    'mixup_alpha=-0.1': ['at least 0'],
    'cutmix_alpha=nan': ['finite'],
    'mix_probability=-0.5': ['from 0 to 1'],
    'random_crop_padding=-1': ['at least 0'],
    'random_crop_padding=99999999999': ['at most'],
    'warmup_epochs=1e+308': ['less than'],
    'eval_every_epochs=1e+308': ['less than'],
    'reduction=sum': ['pmean'],
    'gradient_dtype=float16': ['float32, bfloat16'],
    'batch_norm=globl': ['shard, global', 'mean global'],
    'log_every_steps=0': ['at least 1'],
    'eval_every_epochs=-1': ['at least 0'],
    'checkpoint_every_epochs=nan': ['finite'],
    'keep_checkpoints=0': ['at least 1'],
    'seed=-1': ['at least 0'],
    'seed=99999999999999999999': ['at most'],
    'data_placement=gpu': ['auto, device, host'],
    'input_shape=(28,28)': ['height, width, channels'],
    'dataset=': ['name'],
    'bach_size=48': ['no such field', 'mean batch_size'],
    'zzz=1': ['no such field'],
}


@pytest.mark.parametrize('override', FIELDS)
def test_field(here: Path, recipe: Path, data_dir: Path, override: str) -> None:
    field, _, value = override.partition('=')
    flags = [f'--config={recipe}', f'--config.{override}', f'--data_dir={data_dir}', '--workdir=run']
    message = refused(here, 'train', *flags, words=[f'config.{field}', *FIELDS[override]])
    if 'no such field' not in message and value not in ('inf', '-inf', 'nan', ''):
        assert value in message or value in message.replace(', ', ',')


# ---------------------------------------------------------------- what does not fit together

FITS: dict[str, tuple[list[str], list[str]]] = {
    'devices do not divide': (['batch_size=50', 'shards=0'], ['config.batch_size=50', '4 × 1 = 4', '48, 52']),
    'devices × accumulation do not': (
        ['batch_size=44', 'accumulation_steps=3', 'shards=0'],
        ['config.batch_size=44', '4 × 3 = 12', '36, 48'],
    ),
    'shards do not divide': (['batch_size=52'], ['config.batch_size=52', 'shards=8', '48, 56']),
    'devices do not divide shards': (['shards=6'], ['config.shards=6', '4 × 1 = 4', '4, 8']),
    'fewer shards than devices': (['shards=2'], ['config.shards=2', '4']),
    'accumulation does not divide shards': (
        ['shards=12', 'accumulation_steps=2'],
        ['config.shards=12', '4 × 2 = 8', '8, 16'],
    ),
    'larger than the set': (['batch_size=1248'], ['config.batch_size=1248', '1200']),
    'huge': ([f'batch_size={8 * 10**25}'], [f'config.batch_size={8 * 10**25}', '1200']),
    'less than a step': (['num_epochs=0.001'], ['config.num_epochs=0.001', '0.04']),
    'more steps than can be counted': (['num_epochs=1e300'], ['config.num_epochs=1e+300']),
    'more warmup than can be counted': (['warmup_epochs=1e9'], ['config.warmup_epochs=1e+09', 'at most 858']),
    'rate beyond floats': (
        ['learning_rate=1e308', 'learning_rate_scaling=linear', 'reference_batch_size=1'],
        ['config.learning_rate=1e+308', 'not finite', '48/1'],
    ),
    'empty train split': (['train_split=train[:0]'], ['train_split', 'train[:0]', 'no examples']),
    'empty eval split': (['eval_split=test[5:5]'], ['eval_split', 'test[5:5]', 'no examples']),
    'unknown split': (['train_split=trian'], ['train_split', 'trian', 'train (1200), test (300)']),
    'split beyond the end': (['eval_split=test[400:]'], ['eval_split', 'test[400:]', '300']),
    'split that is none': (['train_split=train[['], ['train_split', 'train[[', 'train (1200)']),
    'unknown dataset': (['dataset=fashon_mnist'], ['dataset', 'fashon_mnist', 'fashion_mnist']),
    'dataset that is no name': (['dataset=fashion mnist'], ['dataset', 'fashion mnist']),
    'dataset module': (['dataset=no_such_module:load'], ['dataset', 'no_such_module']),
    'other image shape': (
        ['input_shape=(32,32,3)'],
        ['config.input_shape=(32, 32, 3)', '(28, 28, 1)'],
    ),
    'other classes': (['num_classes=5'], ['config.num_classes=5', '10']),
}


@pytest.mark.parametrize('case', FITS)
def test_plan_that_does_not_fit(here: Path, recipe: Path, data_dir: Path, case: str) -> None:
    overrides, words = FITS[case]
    flags = [f'--config={recipe}', f'--data_dir={data_dir}', f'--devices={DEVICES}']
    refused(here, 'plan', *flags, *(f'--config.{o}' for o in overrides), words=words)


@pytest.mark.parametrize(
    ('devices', 'overrides'),
    [
        (4, ['batch_size=50', 'shards=8']),
        (6, ['batch_size=50', 'shards=24', 'accumulation_steps=2']),
        (4, ['batch_size=1203', 'shards=32']),
        (4, ['batch_size=1300', 'shards=32']),
        (2, ['batch_size=48', 'shards=5']),
        (2, ['batch_size=10', 'shards=16']),
    ],
)
def test_the_named_remedy_is_one(
    here: Path, recipe: Path, data_dir: Path, devices: int, overrides: list[str]
) -> None:
    """Every size that the message offers is accepted when it is given."""
    flags = [f'--config={recipe}', f'--data_dir={data_dir}', f'--devices={devices}']
    given = [f'--config.{o}' for o in overrides]
    message = refused(here, 'plan', *flags, *given)
    field = message.partition('=')[0]
    offered = re.findall(r'\d+', re.split('nearest|at most', message)[1])
    assert field in ('config.batch_size', 'config.shards') and offered
    for size in offered:
        run_ok('plan', *flags, *given, f'--{field}={size}')


def test_train_makes_no_workdir_for_a_plan_that_does_not_fit(
    here: Path, recipe: Path, data_dir: Path
) -> None:
    flags = [f'--config={recipe}', f'--data_dir={data_dir}', '--workdir=run']
    for devices in ('5', '99999999999999999999'):
        refused(here, 'train', *flags, f'--devices={devices}', words=['devices', devices])


@pytest.mark.parametrize('case', ['larger than the set', 'less than a step'])
def test_train_refuses_a_plan_that_fits_no_devices_before_anything_is_written(
    here: Path, recipe: Path, data_dir: Path, tmp_path: Path, case: str
) -> None:
    """Without --devices too, where the split would be decoded first, and the step measured."""
    data = Path(shutil.copytree(data_dir, tmp_path / 'data', ignore=shutil.ignore_patterns('decoded')))
    before, cache = snapshot(data), tmp_path / 'cache'
    cache.mkdir()
    overrides, words = FITS[case]
    flags = [f'--config={recipe}', f'--data_dir={data}', '--workdir=run']
    env = environment(XDG_CACHE_HOME=str(cache))
    refused(here, 'train', *flags, *(f'--config.{o}' for o in overrides), env=env, words=words)
    assert snapshot(data) == before
    assert list(cache.iterdir()) == []


# ---------------------------------------------------------------- the config file

FILES: dict[str, tuple[str, list[str]]] = {
    'empty': ('', ['get_config()']),
    'no get_config': ('learning_rate = 1\n', ['get_config()']),
    'get_config is a value': ('get_config = 3\n', ['get_config()']),
    'syntax error': ('x = 1\ndef get_config(:\n', ['SyntaxError', 'line 2']),
    'bad indentation': ('def get_config():\nreturn 1\n', ['IndentationError', 'line 2']),
    'null bytes': ('\0', ['null bytes']),
    'raises': ('def get_config():\n    raise KeyError("boom")\n', ['KeyError', 'boom', 'line 2']),
    'fails to import': ('import no_such_module\n', ['no_such_module', 'line 1']),
    'exits': ('import sys\nsys.exit(3)\n', ['SystemExit', 'line 2']),
    'takes an argument': ('def get_config(size):\n    pass\n', ['TypeError', 'size']),
    'returns a dict': ('def get_config():\n    return dict(a=1)\n', ['ConfigDict', 'dict']),
    'returns nothing': ('def get_config():\n    pass\n', ['ConfigDict', 'None']),
    'sets an unknown field': (
        'from parallel_train.config import default_config\n'
        'def get_config():\n    c = default_config()\n    c.bach_size = 3\n    return c\n',
        ['bach_size', 'batch_size'],
    ),
    'has an unknown field': (
        'from ml_collections import ConfigDict\n'
        'def get_config():\n    return ConfigDict(dict(bach_size=3))\n',
        ['config.bach_size', 'mean batch_size'],
    ),
    'a string for a number': (
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict(dict(batch_size='48'))\n",
        ["config.batch_size='48'", 'whole number'],
    ),
    'a bool for a number': (
        'from ml_collections import ConfigDict\n'
        'def get_config():\n    return ConfigDict(dict(batch_size=True))\n',
        ['config.batch_size=True', 'whole number'],
    ),
    'a number for a name': (
        'from ml_collections import ConfigDict\n'
        'def get_config():\n    return ConfigDict(dict(model=3, schedule=None))\n',
        ['config.', 'must be one of'],
    ),
    'nan': (
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict(dict(learning_rate=float('nan')))\n",
        ['config.learning_rate=nan', 'finite'],
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', FILES)
def test_config_file(here: Path, tmp_path: Path, case: str) -> None:
    content, words = FILES[case]
    path = tmp_path / 'recipe.py'
    path.write_text(content)
    message = refused(here, 'train', f'--config={path}', '--workdir=run', words=words)
    assert 'config' in message


def test_config_file_that_is_not_there(here: Path, recipe: Path) -> None:
    missing = recipe.with_name('smal.py')
    refused(here, 'plan', f'--config={missing}', words=[missing, 'small.py'])
    refused(here, 'plan', f'--config={recipe.parent}', words=[recipe.parent])
    refused(here, 'plan', words=['config', '--config='])
    message = refused(here, 'plan', '--config=')
    assert "config=''" in message or 'missing' in message or 'needs a value' in message


# ---------------------------------------------------------------- commands and flags

LINES: dict[str, tuple[list[str], list[str]]] = {
    'unknown command': (
        ['trian'],
        ["'trian'", 'prepare, plan, compile, scale, train, doctor, evaluate', 'mean train'],
    ),
    'flag first': (['--config=R', 'plan'], ['come first']),
    'unknown flag': (['plan', '--config=R', '--device=4'], ['--device', 'mean devices']),
    'flag of no likeness': (['plan', '--config=R', '--qqq'], ['--qqq', 'flags: ']),
    'flag of another command': (['plan', '--config=R', '--step=3'], ['--step', 'no such flag here']),
    'field without config.': (['plan', '--config=R', '--batch_size=3'], ['--batch_size']),
    'field without value': (['plan', '--config=R', '--config.seed'], ['config.seed', 'value']),
    'no boolean without value': (['plan', '--config=R', '--noconfig.seed'], ['config.seed', 'value']),
    'unknown boolean': (
        ['plan', '--config=R', '--noconfig.random_flop'],
        ['random_flop', 'mean random_flip'],
    ),
    'boolean twice no': (['plan', '--config=R', '--noconfig.random_flip=True'], ['random_flip']),
    'two configs': (['plan', '--config=R', '--config=R'], ['config', '2 times']),
    'override without config': (['plan', '--config.seed=1'], ['config.seed', '--config=FILE']),
    'words': (['plan', '--config=R', 'extra'], ["'extra'", '--flag=value']),
    'flag and value as two words': (['plan', '--config', 'R'], ['--flag=value']),
    'devices 0': (['plan', '--config=R', '--devices=0'], ['devices=0', 'at least 1']),
    'devices negative': (['plan', '--config=R', '--devices=-2'], ['devices=-2', 'at least 1']),
    'devices no number': (['plan', '--config=R', '--devices=two'], ['devices', 'two', 'whole number']),
    'devices 1.5': (['plan', '--config=R', '--devices=1.5'], ['devices', '1.5', 'whole number']),
    'devices without value': (['plan', '--config=R', '--devices'], ['--devices', 'value']),
    'nothing for a folder': (['plan', '--config=R', '--data_dir='], ["data_dir=''", 'needs a value']),
    'nothing for IDX files': (['prepare', '--config=R', '--from='], ["from=''", 'needs a value']),
    'home of nobody': (['evaluate', '--workdir=~no_such_user/run'], ['~no_such_user/run', 'in full']),
    'json no boolean': (['plan', '--config=R', '--json=maybe'], ['json', 'maybe']),
    'train without workdir': (['train', '--config=R'], ['workdir', '--workdir=']),
    'evaluate without workdir': (['evaluate'], ['workdir', '--workdir=']),
    'evaluate where no job is': (['evaluate', '--workdir=nowhere'], ['nowhere', 'no job']),
}


@pytest.mark.parametrize('case', LINES)
def test_command_line(here: Path, recipe: Path, case: str) -> None:
    line, words = LINES[case]
    refused(
        here, *(word.replace('R', str(recipe)) if word.endswith('R') else word for word in line), words=words
    )


def test_home_is_expanded(here: Path) -> None:
    """Shells hand over the ~ of --workdir=~/run as it stands."""
    refused(here, 'evaluate', '--workdir=~/run', words=[here.parent / 'home' / 'run', 'no job'])


def test_name_that_is_no_text(here: Path) -> None:
    refused(here, 'evaluate', '--workdir=' + os.fsdecode(b'run\xff'), words=['run', 'no job'])


def test_debug_shows_the_traceback(here: Path, recipe: Path, data_dir: Path) -> None:
    flags = [f'--config={recipe}', '--config.batch_size=0', f'--data_dir={data_dir}']
    result = run_cli('plan', *flags, '--debug', cwd=here)
    assert result.code == 2 and 'Traceback' in result.stderr and 'UserError' in result.stderr
    assert result.stderr.splitlines()[-1].startswith('error: config.batch_size=0')


# ---------------------------------------------------------------- models

MODELS: dict[str, list[str]] = {
    'own_models:FiveClasses': ['5', '10', 'labels'],
    'own_models:ColourOnly': ['(28, 28, 1)'],
    'own_models:AssertsShape': ['(28, 28, 1)'],
    'own_models:OfEachPixel': ['logits'],
    'own_models:NeedsWidth': ['width'],
    'own_models:NOT_A_MODEL': ['Linen'],
    'own_models:Tinny': ['mean Tiny'],
    'no_such_module:Model': ['no_such_module', 'PYTHONPATH'],
}


@pytest.mark.parametrize('model', MODELS)
def test_model(here: Path, recipe: Path, data_dir: Path, models_dir: Path, model: str) -> None:
    env = environment(PYTHONPATH=os.pathsep.join([environment()['PYTHONPATH'], str(models_dir)]))
    flags = [f'--config={recipe}', f'--data_dir={data_dir}', '--workdir=run', '--devices=2']
    words = ['config.model', model, *MODELS[model]]
    refused(here, 'train', *flags, f'--config.model={model}', env=env, words=words)


def test_loss_that_is_not_there(here: Path, recipe: Path, data_dir: Path) -> None:
    flags = [f'--config={recipe}', f'--data_dir={data_dir}', '--workdir=run', '--devices=2']
    refused(
        here, 'train', *flags, '--config.loss=parallel_train.losses:mse',
        words=['config.loss', 'parallel_train.losses:mse'],
    )  # fmt: skip


# ---------------------------------------------------------------- workdirs


def test_workdir_is_or_is_in_a_file(here: Path, recipe: Path, data_dir: Path) -> None:
    (here / 'file').write_text('mine')
    flags = [f'--config={recipe}', f'--data_dir={data_dir}', '--devices=2']
    for workdir in (here / 'file', here / 'file' / 'run'):
        refused(here, 'train', *flags, f'--workdir={workdir}', words=[f"workdir='{workdir}'", 'not a folder'])


def test_workdir_cannot_be_written(here: Path, recipe: Path, data_dir: Path) -> None:
    workdir = Path('/proc/no_such_folder/run')  # where not even root may write
    flags = [f'--config={recipe}', f'--data_dir={data_dir}', '--devices=2', f'--workdir={workdir}']
    refused(here, 'train', *flags, words=[f"workdir='{workdir}'", 'cannot be written'])
    if os.geteuid() != 0:
        (here / 'locked').mkdir(mode=0o500)
        refused(here, 'train', *flags[:-1], '--workdir=locked/run', words=['locked/run', 'cannot be written'])


def test_workdir_holds_what_is_not_known(here: Path, recipe: Path, data_dir: Path) -> None:
    flags = [f'--config={recipe}', f'--data_dir={data_dir}', '--devices=2', '--workdir=run']
    (here / 'run').mkdir()
    (here / 'run' / 'metrics.jsonl').write_text('{}\n')
    refused(here, 'train', *flags, words=["workdir='run'", 'another'])
    (here / 'run' / 'config.json').write_text('{"seed": ')
    refused(here, 'train', *flags, words=['workdir', 'config.json', 'cannot be read'])


NOT_OURS: dict[str, tuple[Callable[[dict[str, Any]], object], list[str]]] = {
    'emptied': (lambda config: config.clear(), ['it has no seed, model, dataset']),
    'lacks the model': (lambda config: config.pop('model'), ['it has no model']),
    'lacks the rate': (lambda config: config.pop('learning_rate'), ['it has no learning_rate']),
    'a field that is none': (lambda config: config.update(bach_size=3), ['config.bach_size', 'batch_size']),
    'a dotted field': (lambda config: config.update({'a.b': 3}), ['a.b']),
    'a value that is none': (lambda config: config.update(batch_size='many'), ["config.batch_size='many'"]),
}


@pytest.mark.parametrize('case', NOT_OURS)
def test_config_of_a_workdir_that_this_program_did_not_write(
    here: Path, recipe: Path, data_dir: Path, trained: Path, case: str
) -> None:
    change, words = NOT_OURS[case]
    config = json.loads((trained / 'config.json').read_text())
    change(config)
    (here / 'run').mkdir()
    (here / 'run' / 'config.json').write_text(json.dumps(config))
    words = ["workdir='run'", 'config.json is not what this program wrote', *words]
    flags = ['--workdir=run', f'--data_dir={data_dir}']
    refused(here, 'train', *flags, f'--config={recipe}', '--devices=2', '--allow_plan_change', words=words)
    refused(here, 'evaluate', *flags, words=words)


EVALUATE: dict[str, list[str]] = {
    'learning_rate=0.7': ['config.learning_rate=0.7', '0.05'],
    'batch_size=96': ['config.batch_size=96', '48'],
    'train_split=test': ["config.train_split='test'", "'train'"],
    'nesterov': ['config.nesterov=True', 'False'],
    'input_shape=(28,28,3)': ['config.input_shape=(28, 28, 3)', '(28, 28, 1)'],
}


@pytest.mark.parametrize('override', EVALUATE)
def test_override_that_evaluation_does_not_use(
    here: Path, recipe: Path, data_dir: Path, trained: Path, override: str
) -> None:
    flags = [f'--config={recipe}', f'--config.{override}', f'--workdir={trained}', f'--data_dir={data_dir}']
    words = [*EVALUATE[override], 'no effect', 'eval_batch_size']
    refused(here, 'evaluate', *flags, words=words)


def test_evaluate_asks_for_what_is_not_there(
    here: Path, recipe: Path, data_dir: Path, trained: Path, tmp_path: Path
) -> None:
    flags = [f'--workdir={trained}', f'--data_dir={data_dir}']
    refused(here, 'evaluate', *flags, '--step=7', words=['step=7', '42, 48, 50'])
    refused(
        here,
        'evaluate',
        *flags,
        f'--config={recipe}',
        '--config.model=resnet_small',
        words=['resnet_small', 'cnn'],
    )
    (tmp_path / 'young').mkdir()
    shutil.copy(trained / 'config.json', tmp_path / 'young')
    young = [f'--workdir={tmp_path / "young"}', flags[1]]
    refused(here, 'evaluate', *young, words=['young', 'no checkpoints'])


# ---------------------------------------------------------------- data


@pytest.mark.parametrize('command', ['train', 'plan'])
def test_set_that_is_not_prepared(here: Path, recipe: Path, tmp_path: Path, command: str) -> None:
    flags = [f'--config={recipe}', f'--data_dir={tmp_path / "none"}', '--workdir=run', '--devices=2']
    refused(here, command, *flags, words=['fashion_mnist', tmp_path / 'none', 'prepare'])
    assert not (tmp_path / 'none').exists()


def test_damaged_set(here: Path, recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / 'data'
    shutil.copytree(data_dir, data, ignore=shutil.ignore_patterns('decoded'))
    (path,) = (data / 'fashion_mnist/3.0.1').glob('*-train.array_record*')
    path.write_bytes(path.read_bytes()[:-50_000])
    flags = [f'--config={recipe}', f'--data_dir={data}', '--devices=2']
    words = [path.parent, 'damaged', 'delete', 'prepare']
    for command in ('train', 'prepare'):
        refused(here, command, *flags, '--workdir=run', words=words)


def test_no_source_has_the_set(here: Path, recipe: Path, tmp_path: Path) -> None:
    if Path('/usr/share/datasets/fashion-mnist').is_dir():
        pytest.skip('the system has the files')
    proxies = dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'), 'http://127.0.0.1:9')
    env = environment(PATH='', **proxies)  # no apt-get, no network
    flags = [f'--config={recipe}', f'--data_dir={tmp_path / "none"}']
    words = ['fashion_mnist', tmp_path / 'none', 'apt-get', "TFDS's own download", '--from=DIR']
    refused(here, 'prepare', *flags, env=env, words=words)
    assert not (tmp_path / 'none').exists()


IMAGES = np.zeros((40, 28, 28), np.uint8)
LABELS = np.arange(40).astype(np.uint8) % 10
IDX: dict[str, tuple[str, bytes | None, list[str]]] = {
    'truncated': ('images', idx_bytes(IMAGES)[:-7], ['truncated']),
    'cut in the header': ('images', idx_bytes(IMAGES)[:10], ['truncated']),
    'nothing in it': ('images', b'', ['truncated']),
    'too long': ('labels', idx_bytes(LABELS) + b'x', ['trailing']),
    'labels for images': ('images', idx_bytes(LABELS), ['labels', 'swapped']),
    'images for labels': ('labels', idx_bytes(IMAGES), ['images', 'swapped']),
    'unequal length': ('labels', idx_bytes(LABELS[:39]), ['40 images', '39 labels']),
    'empty set': ('images', idx_bytes(IMAGES[:0]), ['empty']),
    'label of no class': ('labels', idx_bytes(LABELS + (LABELS == 9)), ['label 10', '0..9']),
    'other size': ('images', idx_bytes(np.zeros((40, 32, 32), np.uint8)), ['32', '28']),
    'missing': ('images', None, ['missing', 'train-images-idx3-ubyte']),
    'no IDX file': ('images', b'PK\3\4' + bytes(100), ['not an IDX file']),
}  # fmt: skip


@pytest.mark.parametrize('case', IDX)
def test_idx_files(here: Path, recipe: Path, tmp_path: Path, case: str) -> None:
    kind, content, words = IDX[case]
    source = write_set(tmp_path / 'idx')
    path = source / f'{NAMES["train", kind]}.gz'
    if content is None:
        path.unlink()
    else:
        path.write_bytes(gzip.compress(content))
    flags = [f'--config={recipe}', f'--data_dir={tmp_path / "data"}', f'--from={source}']
    refused(here, 'prepare', *flags, words=[source, *words])
    assert not (tmp_path / 'data').exists()


def test_from_is_no_folder_of_idx_files(here: Path, recipe: Path, tmp_path: Path) -> None:
    flags = [f'--config={recipe}', f'--data_dir={tmp_path / "data"}']
    refused(here, 'prepare', *flags, f'--from={tmp_path / "none"}', words=['--from', 'not a folder'])
    refused(here, 'prepare', *flags, f'--from={here}', words=['--from', 'train-images-idx3-ubyte'])
    assert not (tmp_path / 'data').exists()


def test_from_is_read_although_the_set_is_there(
    here: Path, recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    before = snapshot(data_dir)
    flags = [f'--config={recipe}', f'--data_dir={data_dir}']
    refused(here, 'prepare', *flags, f'--from={tmp_path / "none"}', words=['--from', 'not a folder'])
    other = write_set(tmp_path / 'other')
    refused(here, 'prepare', *flags, f'--from={other}', words=[f'--from={other}', 'other files', data_dir])
    assert snapshot(data_dir) == before


OWN_DATA = """
import numpy as np


def load(split, data_dir, count=96, shape=(28, 28, 1), dtype=np.uint8, low=0, extra=0):
    return {
        'image': np.zeros((count, *shape), dtype),
        'label': np.arange(count + extra) % 10 + low,
        'class_names': [str(i) for i in range(10)],
    }


def empty(split, data_dir):
    return load(split, data_dir, count=0)


def floats(split, data_dir):
    return load(split, data_dir, dtype=np.float32)


def unequal(split, data_dir):
    return load(split, data_dir, extra=1)


def outside(split, data_dir):
    return load(split, data_dir, low=1)


def negative(split, data_dir):
    return load(split, data_dir, low=-1)


def nothing(split, data_dir):
    return None


def other_eval(split, data_dir):
    return load(split, data_dir, shape=(28, 28, 1) if split == 'train' else (32, 32, 3))
"""
OWN: dict[str, list[str]] = {
    'empty': ['empty'],
    'floats': ['uint8', 'float32'],
    'unequal': ['96', '97'],
    'outside': ['labels', '10', '0..9'],
    'negative': ['labels', '-1', '0..9'],
    'nothing': ['NoneType'],
    'lod': ['load'],
}


@pytest.mark.parametrize('function', OWN)
def test_dataset_function(here: Path, recipe: Path, tmp_path: Path, function: str) -> None:
    (tmp_path / 'own_data.py').write_text(OWN_DATA)
    env = environment(PYTHONPATH=os.pathsep.join([environment()['PYTHONPATH'], str(tmp_path)]))
    flags = [f'--config={recipe}', '--devices=2', f'--config.dataset=own_data:{function}']
    refused(here, 'plan', *flags, env=env, words=['dataset', f'own_data:{function}', *OWN[function]])


def test_eval_images_of_another_shape(here: Path, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / 'own_data.py').write_text(OWN_DATA)
    env = environment(PYTHONPATH=os.pathsep.join([environment()['PYTHONPATH'], str(tmp_path)]))
    flags = [f'--config={recipe}', '--devices=2', '--config.dataset=own_data:other_eval', '--workdir=run']
    refused(here, 'train', *flags, env=env, words=['own_data:other_eval', '(28, 28, 1)', '(32, 32, 3)'])


# ---------------------------------------------------------------- the API


def test_more_devices_than_the_running_backend_has(here: Path, recipe: Path, data_dir: Path) -> None:
    """On CPU the command makes as many as are asked for; a program that runs JAX already cannot."""
    code = f"""
import jax
jax.config.update('jax_num_cpu_devices', 2)
jax.devices()
from parallel_train import UserError, config, train_and_evaluate
try:
    train_and_evaluate(config.load({str(recipe)!r}), 'run', {str(data_dir)!r}, devices=8)
except UserError as error:
    print('REFUSED', error)
"""
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=here, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('REFUSED devices=8') and '2' in done.stdout
    assert list(here.iterdir()) == []
