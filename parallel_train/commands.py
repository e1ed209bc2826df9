"""What does each command do?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from parallel_train.errors import DoesNotFit, UserError
from parallel_train.files import expanded


@dataclasses.dataclass(frozen=True)
class Flag:
    kind: str  # 'string' | 'integer' | 'boolean'
    text: str


FLAGS = {
    'workdir': Flag('string', 'folder of the run: checkpoints, metrics, report'),
    'data_dir': Flag('string', 'folder of TFDS datasets (default: TFDS_DATA_DIR, ~/tensorflow_datasets)'),
    'devices': Flag('integer', 'devices to use; on CPU, XLA devices to make'),
    'debug': Flag('boolean', 'show tracebacks of user errors'),
    'from': Flag('string', 'prepare: folder with the four IDX files'),
    'json': Flag('boolean', 'plan, evaluate, compile: JSON alone on stdout'),
    'step': Flag('integer', 'evaluate: which checkpoint (default: the latest)'),
    'topology': Flag('string', 'compile: for which hardware, such as v5e:2x4,v5p:4x4x4,cpu:8'),
    'fit': Flag('boolean', 'compile: search the largest batch that fits'),
    'allow_plan_change': Flag('boolean', 'train: continue a job although its config or plan changed'),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Command:
    summary: str
    run: Callable[[Any, Any], None]  # config (None if not given), flag values
    flags: Sequence[str]
    needs_config: bool = True


def define_flags(values: flags.FlagValues, names: Sequence[str]) -> None:
    define = {
        'string': flags.DEFINE_string,
        'integer': flags.DEFINE_integer,
        'boolean': flags.DEFINE_boolean,
    }
    for name in names:
        flag = FLAGS[name]
        default = False if flag.kind == 'boolean' else None
        define[flag.kind](name, default, flag.text, flag_values=values)  # type: ignore[operator]


def _workdir(values: Any) -> Path:
    if not values.workdir:
        raise UserError('workdir: is missing; name a folder for the run, --workdir=DIR')
    return expanded('workdir', values.workdir)


def prepare(config: Any, values: Any) -> None:
    from parallel_train import dataset
    from parallel_train import prepare as prepare_lib

    data_dir = dataset.default_data_dir(values.data_dir)
    source = expanded('from', values['from'].value) if values['from'].value else None
    prepare_lib.prepare(config.dataset, data_dir, source)
    for split in dict.fromkeys((config.train_split, config.eval_split)):
        examples = dataset.load_split(config.dataset, split, data_dir)
        print(f'{split}: {len(examples.images):,} images of {examples.images.shape[1:]}')


def plan(config: Any, values: Any) -> None:
    from parallel_train import config as config_lib
    from parallel_train import dataset
    from parallel_train.plan import make_plan
    from parallel_train.show_plan import plan_table

    sizes = dataset.find_sizes(config, dataset.default_data_dir(values.data_dir))
    config = config_lib.with_dataset(config, sizes.input_shape, sizes.num_classes)
    count = values.devices
    if count is None:
        from parallel_train.devices import choose_devices

        workdir = _workdir(values) if values.workdir else None
        count = choose_devices(config, sizes, None, workdir, say=lambda _: None, measure=False)
    planned = make_plan(config, sizes.num_train_examples, sizes.num_eval_examples, count)
    if values.json:
        print(planned.to_json(), end='')
    else:
        print(plan_table(planned, config, sizes.source))


def compile_step(config: Any, values: Any) -> None:
    from parallel_train import config as config_lib
    from parallel_train import dataset, topologies
    from parallel_train.compile import compile_for
    from parallel_train.show_compile import compile_table

    if not values.topology:
        raise UserError('topology: is missing; name some hardware, such as --topology=v5e:2x4,v5e:16x16')
    if values.devices is not None:
        raise UserError(f'devices={values.devices}: compile takes the number of devices from --topology')
    wanted = [topologies.parse(name) for name in dict.fromkeys(map(str.strip, values.topology.split(',')))]
    sizes = dataset.find_sizes(config, dataset.default_data_dir(values.data_dir))
    config = config_lib.with_dataset(config, sizes.input_shape, sizes.num_classes)
    rows = compile_for(config, sizes, wanted, values.fit)
    if values.json:
        print(json.dumps({'topologies': rows}, indent=2))
    else:
        print(compile_table(rows, config, sizes.source))
    misfits = [row['topology'] for row in rows if not row['fits']]
    if misfits:
        raise DoesNotFit(f'does not fit: {", ".join(misfits)}')


def train(config: Any, values: Any) -> None:
    workdir = _workdir(values)
    from parallel_train.train import train_and_evaluate

    train_and_evaluate(config, workdir, values.data_dir, values.devices, values.allow_plan_change)


# What `evaluate --config` may change: on what and how it is evaluated, not what was trained.
_OF_EVALUATION = ('dataset', 'eval_split', 'eval_batch_size', 'data_placement')


def _check_evaluate_config(config: Any, trained: Any, values: Any, workdir: Path) -> None:
    """Refuses another model, and overrides that would change nothing."""
    if config.model != trained.model:
        raise UserError(
            f'config.model={config.model!r}: {workdir} holds a {trained.model!r}; give the config '
            'that it was trained with, or none'
        )
    for field in (name.removeprefix('config.') for name in values if name.startswith('config.')):
        if field not in _OF_EVALUATION and config[field] != trained[field]:
            raise UserError(
                f'config.{field}={config[field]!r}: has no effect on an evaluation, and {workdir} was '
                f'trained with {trained[field]!r}; leave it out. Used are: {", ".join(_OF_EVALUATION)}'
            )


def evaluate(config: Any, values: Any) -> None:
    workdir = _workdir(values)
    from parallel_train import dataset
    from parallel_train import workdir as workdir_lib
    from parallel_train.devices import choose_devices
    from parallel_train.evaluate import Evaluator
    from parallel_train.load import load_state
    from parallel_train.mesh import make_mesh, replicated

    trained = workdir_lib.read_config(workdir)
    if config is not None:
        _check_evaluate_config(config, trained, values, workdir)
        with trained.unlocked():
            for field in _OF_EVALUATION:
                trained[field] = config[field]
    data_dir = dataset.default_data_dir(values.data_dir)
    split = dataset.load_split(trained.dataset, trained.eval_split, data_dir)
    shape, classes = split.images.shape[1:], split.num_classes
    if shape != tuple(trained.input_shape) or classes > trained.num_classes:
        raise UserError(
            f'config.dataset={trained.dataset!r}: has images {shape} in {classes} classes, but the model in '
            f'{workdir} takes {tuple(trained.input_shape)} and knows {trained.num_classes}'
        )
    sizes = dataset.Sizes(0, len(split.images), split.images.shape[1:], split.num_classes, '')
    count = choose_devices(trained, sizes, values.devices, workdir, lambda _: None, measure=False)
    mesh = make_mesh(count)
    state = load_state(trained, workdir, replicated(mesh), values.step)
    result = {
        'split': 'eval',
        'step': int(state.step),
        **Evaluator(split, trained, mesh, state)(state),
    }
    if values.json:
        print(json.dumps(result))
    else:
        print(
            f'{trained.eval_split} at step {result["step"]:,}: accuracy {result["accuracy"]:.4f}, '
            f'loss {result["loss"]:.4f}, on all {result["num_examples"]:,} examples'
        )


COMMANDS = {
    'prepare': Command(
        'get the dataset into --data_dir, from local files or by download',
        prepare, ('data_dir', 'from', 'debug', 'workdir', 'devices'),
    ),
    'plan': Command(
        'print the plan; writes nothing',
        plan, ('devices', 'json', 'data_dir', 'workdir', 'debug'),
    ),
    'compile': Command(
        'compile the train step for hardware that is not here; says whether it fits',
        compile_step, ('topology', 'fit', 'json', 'data_dir', 'workdir', 'devices', 'debug'),
    ),
    'train': Command(
        'train, evaluate and checkpoint into --workdir; resumes by itself',
        train, ('workdir', 'data_dir', 'devices', 'allow_plan_change', 'debug'),
    ),
    'evaluate': Command(
        'exact metrics of a checkpoint on the eval split',
        evaluate, ('workdir', 'data_dir', 'devices', 'step', 'json', 'debug'), needs_config=False,
    ),
}  # fmt: skip
