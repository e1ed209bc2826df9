"""What does each command do?"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel_train.errors import FAULT, OK, DoesNotFit, UserError
from parallel_train.flag_names import JOB_FLAGS, PROCESS_FLAGS
from parallel_train.paths import expanded, opened, opened_here

if TYPE_CHECKING:
    from parallel_train.lifeline import Limits


@dataclasses.dataclass(frozen=True)
class Command:
    summary: str
    run: Callable[[Any, Any], int | None]  # config (None if not given), flag values -> exit code (None: 0)
    flags: Sequence[str]
    needs_config: bool = True


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
    from parallel_train.augment_fit import check_augmentation
    from parallel_train.plan import make_plan
    from parallel_train.show_plan import plan_table
    from parallel_train.sizes import find_sizes

    sizes = find_sizes(config, dataset.default_data_dir(values.data_dir))
    config = config_lib.with_dataset(config, sizes.input_shape, sizes.num_classes)
    check_augmentation(config)
    count, notes = values.devices, list[str]()
    if count is None:
        from parallel_train.devices import choose_devices

        workdir = _workdir(values) if values.workdir else None
        count = choose_devices(config, sizes, None, workdir, say=notes.append, measure=False)
    processes = 1 if values.num_processes is None else values.num_processes
    planned = make_plan(config, sizes.num_train_examples, sizes.num_eval_examples, count, processes)
    if values.json:
        print(planned.to_json(), end='')
    else:
        print('\n'.join([plan_table(planned, config, sizes.source), *notes]))


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
    from parallel_train.compile import CompilerFailed, compile_for
    from parallel_train.show_compile import compile_table
    from parallel_train.sizes import find_sizes

    if not values.topology:
        raise UserError('topology: is missing; name some hardware, such as --topology=v5e:2x4,v5e:16x16')
    if values.devices is not None:
        raise UserError(f'devices={values.devices}: compile takes the number of devices from --topology')
    wanted = [topologies.parse(name) for name in dict.fromkeys(map(str.strip, values.topology.split(',')))]
    sizes = find_sizes(config, dataset.default_data_dir(values.data_dir))
    config = config_lib.with_dataset(config, sizes.input_shape, sizes.num_classes)
    failure = None
    try:
        rows = compile_for(config, sizes, wanted, values.fit)
    except CompilerFailed as failed:  # what the others gave is not lost
        rows, failure = failed.rows, failed
    if values.json:
        print(json.dumps({'topologies': rows}, indent=2))
    elif rows:
        print(compile_table(rows, config, sizes.source))
    if failure:
        raise failure
    misfits = [row['topology'] for row in rows if not row['fits']]
    if misfits:
        raise DoesNotFit(f'does not fit: {", ".join(misfits)}')


def scale(config: Any, values: Any) -> None:
    workdir = opened_here('workdir', _workdir(values))
    from parallel_train import config as config_lib
    from parallel_train import dataset, scale_sizes
    from parallel_train.scale import run_scale
    from parallel_train.show_scale import scale_table
    from parallel_train.sizes import find_sizes

    if not values.device_counts:
        raise UserError('device_counts: is missing; name some, such as --device_counts=1,2,4,8')
    if values.devices is not None:
        raise UserError(f'devices={values.devices}: scale takes the numbers of devices from --device_counts')
    data_dir = dataset.default_data_dir(values.data_dir)
    sizes = find_sizes(config, data_dir)
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


def evaluate(config: Any, values: Any) -> None:
    workdir = _workdir(values)
    from parallel_train.evaluate_run import evaluate_run

    evaluate_run(config, values, workdir)


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
            *PROCESS_FLAGS, 'debug',
        ),
    ),
    'doctor': Command(
        'self-test of this machine or job, one line a check',
        doctor, ('workdir', 'data_dir', 'devices', 'json', *JOB_FLAGS, 'debug'), needs_config=False,
    ),
    'evaluate': Command(
        'exact metrics of a checkpoint on the eval split',
        evaluate,
        ('workdir', 'data_dir', 'devices', 'step', 'ensemble', 'raw', 'json', 'debug'),
        needs_config=False,
    ),
}  # fmt: skip
