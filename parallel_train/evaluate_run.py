"""How good is a finished run? What `evaluate` does."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel_train import dataset, ensemble, trusted
from parallel_train import workdir as workdir_lib
from parallel_train.devices import choose_devices
from parallel_train.errors import UserError
from parallel_train.evaluate import Evaluator
from parallel_train.load import load_state
from parallel_train.mesh import make_mesh, replicated
from parallel_train.sizes import Sizes

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


def evaluate_run(config: Any, values: Any, workdir: Path) -> None:
    """Prints the exact metrics of a run's checkpoint, or of its snapshots, on the eval split.

    Args:
      config: what to evaluate on, where it is not what the run was trained with; None for that.
      values: the flags.
      workdir: the run's folder.

    Raises:
      UserError: workdir, config, dataset or devices are wrong; or the workdir's config names code that is not
        executed on its word.
    """
    trained = workdir_lib.read_config(workdir)
    if config is not None:
        _check_evaluate_config(config, trained, values, workdir)
        with trained.unlocked():
            for field in _OF_EVALUATION:
                trained[field] = config[field]
    trusted.check_no_own_code(workdir, trained, given=config)
    trusted.check_functions(trained, given=config)
    data_dir = dataset.default_data_dir(values.data_dir)
    split = dataset.open_split(trained, trained.eval_split, data_dir)
    shape, classes = split.image_shape, split.num_classes
    if shape != tuple(trained.input_shape) or classes > trained.num_classes:
        raise UserError(
            f'config.dataset={trained.dataset!r}: has examples {shape} in {classes} classes, but the model '
            f'in {workdir} takes {tuple(trained.input_shape)} and knows {trained.num_classes}'
        )
    sizes = Sizes(0, len(split), shape, classes, '')
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
