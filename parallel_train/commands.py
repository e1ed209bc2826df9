"""What does each command do?"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from parallel_train.errors import FAULT, OK, DoesNotFit, UserError
from parallel_train.paths import expanded, opened, opened_here

if TYPE_CHECKING:
    from parallel_train.lifeline import Limits


@dataclasses.dataclass(frozen=True)
class Flag:
    kind: str  # 'string' | 'integer' | 'float' | 'boolean'
    text: str


FLAGS = {
    'workdir': Flag('string', 'folder of the run: checkpoints, metrics, report'),
    'data_dir': Flag('string', 'folder of TFDS datasets (default: TFDS_DATA_DIR, ~/tensorflow_datasets)'),
    'devices': Flag('integer', 'devices to use; on CPU, XLA devices to make'),
    'debug': Flag('boolean', 'show tracebacks of user errors'),
    'from': Flag('string', 'prepare: folder with images (train/CLASS/FILE), or with the four IDX files'),
    'json': Flag('boolean', 'plan, evaluate, compile, scale, doctor: JSON alone on stdout'),
    'step': Flag('integer', 'evaluate: which checkpoint (default: the latest)'),
    'ensemble': Flag('boolean', "evaluate: the run's snapshots, each and together"),
    'raw': Flag('boolean', 'evaluate: the parameters themselves, not their moving averages'),
    'skip_nonfinite': Flag('integer', 'train: leave out up to so many steps that are not finite'),
    'profile_steps': Flag('string', 'train: write a trace of these steps, such as 100:110, into the workdir'),
    'coordinator': Flag('string', 'HOST:PORT of process 0, in a job of several processes'),
    'num_processes': Flag('integer', 'how many processes the job has'),
    'process_id': Flag('integer', 'which of them this is, from 0'),
    'start_timeout': Flag('float', 'seconds to wait for all processes to come (300)'),
    'heartbeat_timeout': Flag('float', 'seconds without a sign of life of a process that end the job (60)'),
    'stall_timeout': Flag('float', 'seconds without a step after which a process is stuck (600; 0: never)'),
    'topology': Flag('string', 'compile: for which hardware, such as v5e:2x4,v5p:4x4x4,cpu:8'),
    'fit': Flag('boolean', 'compile: search the largest batch that fits'),
    'device_counts': Flag('string', 'scale: how many devices to measure on, such as 1,2,4,8'),
    'mode': Flag('string', 'scale: weak, strong or weak,strong (default: both)'),
    'processes': Flag('string', 'scale: in how many processes, such as 1,2 (default: 1)'),
    'steps': Flag('integer', 'scale: timed steps in a stretch (50)'),
    'rounds': Flag('integer', 'scale: how many turns each size has (5)'),
    'allow_plan_change': Flag('boolean', 'train: continue a job although its config or plan changed'),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Command:
    summary: str
    run: Callable[[Any, Any], int | None]  # config (None if not given), flag values -> exit code (None: 0)
    flags: Sequence[str]
    needs_config: bool = True


def define_flags(values: flags.FlagValues, names: Sequence[str]) -> None:
    define = {
        'string': flags.DEFINE_string,
        'integer': flags.DEFINE_integer,
        'float': flags.DEFINE_float,
        'boolean': flags.DEFINE_boolean,
    }
    for name in names:
        flag = FLAGS[name]
        default = False if flag.kind == 'boolean' else None
        define[flag.kind](name, default, flag.text, flag_values=values)  # type: ignore[operator]


def _workdir(values: Any) -> Path:
    if not values.workdir:
        raise UserError('workdir: is missing; name a folder for the run, --workdir=DIR')
    return opened('workdir', values.workdir)


def prepare(config: Any, values: Any) -> None:
    from parallel_train import dataset
    from parallel_train import prepare as prepare_lib

    data_dir = dataset.default_data_dir(values.data_dir)
    source = expanded('from', values['from'].value) if values['from'].value else None
    splits = tuple(dict.fromkeys((config.train_split, config.eval_split)))
    prepare_lib.prepare(config.dataset, data_dir, source, splits=splits)
    for split in splits:
        examples = dataset.open_split(config, split, data_dir)
        print(f'{split}: {len(examples):,} examples of {examples.image_shape}')


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
    processes = 1 if values.num_processes is None else values.num_processes
    planned = make_plan(config, sizes.num_train_examples, sizes.num_eval_examples, count, processes)
    if values.json:
        print(planned.to_json(), end='')
    else:
        print(plan_table(planned, config, sizes.source))


def _join_job(values: Any) -> Limits:
    """Joins the job of several processes that flags or environment tell of; returns the time limits."""
    from parallel_train import cluster
    from parallel_train.lifeline import Limits

    given = {
        name: values[name].value
        for name in ('start_timeout', 'heartbeat_timeout', 'stall_timeout')
        if name in values and values[name].value is not None
    }
    limits = Limits(**given)
    found = cluster.find_cluster(values.coordinator, values.num_processes, values.process_id)
    if found:
        from parallel_train import processes

        say = (lambda _: None) if getattr(values, 'json', False) else print
        processes.start(found, limits.heartbeat_timeout, limits.start_timeout, say)
    return limits


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


def scale(config: Any, values: Any) -> None:
    workdir = opened_here('workdir', _workdir(values))
    from parallel_train import config as config_lib
    from parallel_train import dataset, scale_sizes
    from parallel_train.scale import run_scale
    from parallel_train.show_scale import scale_table

    if not values.device_counts:
        raise UserError('device_counts: is missing; name some, such as --device_counts=1,2,4,8')
    if values.devices is not None:
        raise UserError(f'devices={values.devices}: scale takes the numbers of devices from --device_counts')
    data_dir = dataset.default_data_dir(values.data_dir)
    sizes = dataset.find_sizes(config, data_dir)
    config = config_lib.with_dataset(config, sizes.input_shape, sizes.num_classes)
    experiment = scale_sizes.plan_experiment(
        config,
        sizes,
        scale_sizes.modes_of('weak,strong' if values.mode is None else values.mode),
        scale_sizes.numbers('device_counts', values.device_counts),
        scale_sizes.numbers('processes', '1' if values.processes is None else values.processes),
        50 if values.steps is None else values.steps,
        5 if values.rounds is None else values.rounds,
    )
    dataset.open_split(config, config.train_split, data_dir, training=True)  # decoded once, by one process
    results = run_scale(
        config, sizes, experiment, workdir, data_dir, lambda line: print(line, file=sys.stderr, flush=True)
    )
    if values.json:
        print(json.dumps(results, indent=1))
    else:
        print(scale_table(results))
        print(f'\npage: {(workdir / "scale.html").resolve()}')


def train(config: Any, values: Any) -> None:
    workdir = _workdir(values)
    skip = values.skip_nonfinite or 0
    if skip < 0:
        raise UserError(f'skip_nonfinite={skip}: must be at least 0')
    limits = _join_job(values)
    from parallel_train.train import train_and_evaluate

    train_and_evaluate(
        config,
        workdir,
        values.data_dir,
        values.devices,
        values.allow_plan_change,
        skip,
        limits,
        values.profile_steps,
    )


# What `evaluate --config` may change: on what and how it is evaluated, not what was trained.
_OF_EVALUATION = (
    'dataset', 'eval_split', 'eval_batch_size', 'data_placement', 'crop_fraction', 'max_corrupt_examples',
)  # fmt: skip


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


def doctor(config: Any, values: Any) -> int:
    from parallel_train import config as config_lib
    from parallel_train import dataset
    from parallel_train import doctor as doctor_lib

    _join_job(values)
    given = {
        'data_dir': dataset.default_data_dir(values.data_dir),
        'workdir': _workdir(values) if values.workdir else None,
        'devices': values.devices,
    }
    config = config_lib.default_config() if config is None else config
    fit = doctor_lib.diagnose(config, given, values.json, colours=sys.stdout.isatty() and not values.json)
    return OK if fit else FAULT


def evaluate(config: Any, values: Any) -> None:
    workdir = _workdir(values)
    from parallel_train import dataset, ensemble
    from parallel_train import workdir as workdir_lib
    from parallel_train.devices import choose_devices
    from parallel_train.evaluate import Evaluator
    from parallel_train.load import load_state
    from parallel_train.mesh import make_mesh, replicated

    trained = workdir_lib.read_config(workdir)
    if config is None:
        workdir_lib.check_no_own_code(workdir, trained)
    else:
        _check_evaluate_config(config, trained, values, workdir)
        with trained.unlocked():
            for field in _OF_EVALUATION:
                trained[field] = config[field]
    data_dir = dataset.default_data_dir(values.data_dir)
    split = dataset.open_split(trained, trained.eval_split, data_dir)
    shape, classes = split.image_shape, split.num_classes
    if shape != tuple(trained.input_shape) or classes > trained.num_classes:
        raise UserError(
            f'config.dataset={trained.dataset!r}: has examples {shape} in {classes} classes, but the model '
            f'in {workdir} takes {tuple(trained.input_shape)} and knows {trained.num_classes}'
        )
    sizes = dataset.Sizes(0, len(split), shape, classes, '')
    count = choose_devices(trained, sizes, values.devices, workdir, lambda _: None, measure=False)
    if trained.reduction == 'tree' and trained.shards % count:
        raise UserError(
            f"devices={count}: must divide config.shards={trained.shards} with config.reduction='tree'; use "
            f'--devices={math.gcd(count, trained.shards)}'
        )
    mesh = make_mesh(count)
    states = [
        load_state(trained, workdir, replicated(mesh), step, averages=not values.raw)
        for step in _steps_to_evaluate(workdir, values)
    ]
    evaluator = Evaluator(split, trained, mesh, states[0])
    rows = [{'split': 'eval', 'step': int(state.step), **_whole(evaluator(state))} for state in states]
    for row in [] if values.json else rows:
        print(f'{trained.eval_split} at step {row["step"]:,}: {_figures(row)}')
    result = rows[0]
    if values.ensemble:
        together = ensemble.together(states)
        result = {'split': 'eval', 'step': rows[-1]['step'], 'snapshots': rows}
        result |= _whole(Evaluator(split, trained, mesh, together)(together))
        if not values.json:
            print(f'{trained.eval_split}, the {len(rows)} snapshots together: {_figures(result)}')
    if values.json:
        print(json.dumps(result))


def _steps_to_evaluate(workdir: Path, values: Any) -> Sequence[int | None]:
    """Returns the steps of the checkpoints that `evaluate` is asked for; None is the latest."""
    from parallel_train import ensemble

    if not values.ensemble:
        return [values.step]
    if values.step is not None:
        raise UserError(
            f'step={values.step}: an ensemble is of all snapshots; leave out --step or --ensemble'
        )
    return ensemble.snapshots(workdir)


def _whole(metrics: dict[str, float] | None) -> dict[str, float]:
    assert metrics is not None  # nothing interrupts it
    return metrics


def _figures(row: dict[str, Any]) -> str:
    return f'accuracy {row["accuracy"]:.4f}, loss {row["loss"]:.4f}, on all {row["num_examples"]:,} examples'


_JOB_FLAGS = ('coordinator', 'num_processes', 'process_id', 'start_timeout')
_PROCESS_FLAGS = (*_JOB_FLAGS, 'heartbeat_timeout', 'stall_timeout')

COMMANDS = {
    'prepare': Command(
        'get the dataset into --data_dir, from local files or by download',
        prepare, ('data_dir', 'from', 'debug', 'workdir', 'devices'),
    ),
    'plan': Command(
        'print the plan; writes nothing',
        plan, ('devices', 'num_processes', 'json', 'data_dir', 'workdir', 'debug'),
    ),
    'compile': Command(
        'compile the train step for hardware that is not here; says whether it fits',
        compile_step, ('topology', 'fit', 'json', 'data_dir', 'workdir', 'devices', 'debug'),
    ),
    'scale': Command(
        'measure how the speed changes with the number of devices; table, JSON, plots, page',
        scale,
        (
            'device_counts', 'mode', 'processes', 'steps', 'rounds', 'workdir', 'data_dir', 'json', 'devices',
            'debug',
        ),
    ),
    'train': Command(
        'train, evaluate and checkpoint into --workdir; resumes by itself',
        train,
        (
            'workdir', 'data_dir', 'devices', 'allow_plan_change', 'skip_nonfinite', 'profile_steps',
            *_PROCESS_FLAGS, 'debug',
        ),
    ),
    'doctor': Command(
        'self-test of this machine or job, one line a check',
        doctor, ('workdir', 'data_dir', 'devices', 'json', *_JOB_FLAGS, 'debug'), needs_config=False,
    ),
    'evaluate': Command(
        'exact metrics of a checkpoint on the eval split',
        evaluate,
        ('workdir', 'data_dir', 'devices', 'step', 'ensemble', 'raw', 'json', 'debug'),
        needs_config=False,
    ),
}  # fmt: skip
