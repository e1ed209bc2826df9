"""How does the speed change with the number of devices? The story of a scaling experiment, top to bottom.

Each size is measured in processes of its own, the sizes in turns: whatever else the machine does hits all of
them alike, and a ratio is formed within a round. On a CPU the processes stay, idle, while others have their
turn. An accelerator belongs to one process at a time, so there they are started for each turn.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel_train import config as config_lib
from parallel_train import scale_figures, workdir
from parallel_train.errors import UserError
from parallel_train.examples import unit_of
from parallel_train.files import check_writable, write_atomically
from parallel_train.scale_processes import Group, gpus_of_each
from parallel_train.scale_sizes import Experiment, Size, config_of
from parallel_train.sizes import Sizes

RESULTS = 'scale.json'
Results = dict[str, Any]  # what scale.json holds


def run_scale(
    config: Any,
    sizes: Sizes,
    experiment: Experiment,
    folder: Path,
    data_dir: Path,
    say: Callable[[str], None],
) -> Results:
    """Measures what is not measured yet, and writes scale.json, scale.html and plots/*.png into `folder`.

    Args:
      config: a complete config, with the dataset's `input_shape` and `num_classes`.
      sizes: of the dataset.
      experiment: the sizes, and how often each is measured.
      folder: the workdir.
      data_dir: where the dataset was prepared.
      say: shows a line of progress.

    Returns:
      What scale.json holds; docs/scaling.md says what the fields mean.

    Raises:
      UserError: there are fewer devices, the model fails, or the workdir holds something else; nothing was
        written.
    """
    check_writable('workdir', folder)
    machine = _find_machine(config, experiment)
    results = _results_so_far(folder, config, machine, experiment)
    with workdir.hold(folder):
        missing = _missing_rounds(experiment, results)
        if missing:
            say(f'measuring {len(missing)} sizes in turns: {"; ".join(size.name for size in missing)}')
            _measure(config, sizes, experiment, missing, results, folder, data_dir, say)
        _write(folder, results, experiment)
        from parallel_train.scale_page import write_page

        write_page(folder, results)
    return results


def _find_machine(config: Any, experiment: Experiment) -> dict[str, Any]:
    """Returns what a process of its own says of this machine, whose devices we leave alone ourselves."""
    request = {
        'config': config.to_dict(),
        'most_devices': max(size.num_devices for size in experiment.sizes),
        'most_processes': max(size.num_processes for size in experiment.sizes),
    }
    with Group(request) as group:
        return group.ready()


def _results_so_far(folder: Path, config: Any, machine: dict[str, Any], experiment: Experiment) -> Results:
    """Returns what `folder` holds of this experiment, or an empty one.

    Raises:
      UserError: it holds another job, or measurements of another config, machine or number of steps.
    """
    new: Results = {
        'config': json.loads(config_lib.to_json(config)),
        'machine': machine,
        'steps': experiment.steps,
        'measurements': [],
        'facts': {},
        'turns': [],
    }
    for name in (workdir.CONFIG, workdir.METRICS, workdir.CHECKPOINTS):
        if (folder / name).exists():
            raise UserError(f'workdir={str(folder)!r}: holds a job of `train` ({name}); name another workdir')
    old = workdir.read_json(folder / RESULTS)
    if old is None:
        return new
    if set(old) < set(new):
        raise UserError(
            f'workdir={str(folder)!r}: its {RESULTS} is not what this program wrote; name another workdir'
        )
    differing = [f'steps were {old["steps"]} and are {new["steps"]}'] if old['steps'] != new['steps'] else []
    for what, prefix in (('config', 'config.'), ('machine', 'the machine: ')):
        differing += [
            f'{prefix}{name} was {old[what].get(name)!r} and is {value!r}'
            for name, value in new[what].items()
            if old[what].get(name) != value
        ]
    if differing:
        raise UserError(
            f'workdir={str(folder)!r}: holds measurements of something else: {"; ".join(differing)}. Name '
            'another workdir, or undo the change'
        )
    return {name: old[name] for name in new}


def _missing_rounds(experiment: Experiment, results: Results) -> dict[Size, int]:
    """Returns how many rounds each size still needs, without those that need none.

    What others are compared with takes turns with them, however often it was measured before.
    """
    missing = {
        size: max(experiment.rounds - len(scale_figures.turns_of(size, results['turns'])), 0)
        for size in experiment.sizes
    }
    most = max(missing.values())
    for sizes in experiment.modes.values():
        missing[sizes[0]] = most
    return {size: count for size, count in missing.items() if count}


def _measure(
    config: Any,
    sizes: Sizes,
    experiment: Experiment,
    missing: dict[Size, int],
    results: Results,
    folder: Path,
    data_dir: Path,
    say: Callable[[str], None],
) -> None:
    """Lets the sizes take turns, every other round in reverse; results are on disk after each turn."""
    session = time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())
    stays = results['machine']['platform'] == 'cpu'
    unit = unit_of(sizes.input_shape)
    with contextlib.ExitStack() as stack:
        waiting: dict[Size, Group] = {}

        def start(size: Size) -> Group:
            request = {
                'config': config_of(config, sizes, size, experiment.steps, experiment.rounds).to_dict(),
                'size': {'num_devices': size.num_devices},
                'steps': experiment.steps,
                'data_dir': str(data_dir),
            }
            several = size.num_processes > 1 and not stays
            environments = gpus_of_each(size.num_processes, size.num_devices) if several else ()
            group = stack.enter_context(Group(request, size.num_processes, environments))
            facts = group.ready()
            if size.key not in results['facts']:
                say(f'{size.name}: compiled and warm after {facts["warm_up_seconds"]:.0f} s')
            results['facts'][size.key] = facts
            return group

        if stays:
            waiting = {size: start(size) for size in missing}
        for i in range(max(missing.values())):
            in_turn = [size for size, count in missing.items() if i < count]
            for size in in_turn if i % 2 == 0 else reversed(in_turn):
                group = waiting[size] if stays else start(size)
                turn = group.turn(backwards=i % 2 == 1)
                if not stays:
                    stack.close()
                results['turns'].append({'size': size.key, 'session': session, 'round': i, **turn})
                _write(folder, results, experiment)
                rate = size.batch_size / turn['fed']
                say(f'round {i + 1} of {max(missing.values())}: {size.name}: {rate:,.0f} {unit}/s')


def _write(folder: Path, results: Results, experiment: Experiment) -> None:
    results['measurements'] = scale_figures.measurements(experiment, results['turns'], results['facts'])
    write_atomically(folder / RESULTS, json.dumps(results, indent=1) + '\n')
