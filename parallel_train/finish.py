"""What came of it? The last lines that a person sees, and the report."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from parallel_train import augment
from parallel_train import workdir as workdir_lib
from parallel_train.clock import Clock
from parallel_train.dataset import AnySplit
from parallel_train.examples import is_tokens, unit_of
from parallel_train.machine import environment
from parallel_train.metrics import Row, read_rows
from parallel_train.paths import absolute
from parallel_train.plan import Plan
from parallel_train.recorder import Recorder
from parallel_train.report import Samples, Summary, write_report
from parallel_train.say import print_flushed
from parallel_train.state import TrainState, create_model, eval_flags

_SAMPLES_FROM = 500  # examples of the eval split that the samples are picked from; fewer, where they are
_PIXELS = 2**23  # more than so many pixels
_SAMPLES, _WRONG = 24, 8


def finish(
    workdir: Path,
    config: Any,
    plan: Plan,
    rows: list[Row],
    state: TrainState,
    eval_split: AnySplit,
    clock: Clock,
    recorder: Recorder,
) -> None:
    """Prints the results and writes the report."""
    seconds = dict(clock.seconds)
    seconds['step'] = max(clock.total() - sum(seconds.values()), 0.0)
    results = _results(config, plan, rows, recorder)
    digest = parameters_sha256(state)
    for name, text in {**results, 'sha256 of the parameters': digest}.items():
        print_flushed(f'{name}: {text}')
    spent = sorted(seconds.items(), key=lambda item: -item[1])
    print_flushed('time: ' + ', '.join(f'{name} {value:.1f} s' for name, value in spent))
    summary = Summary(
        title=f'{config.model} on {config.dataset}',
        results=results,
        seconds=seconds,
        environment=environment(),
        command=command(),
        parameters_sha256=digest,
    )
    report = write_report(workdir, summary, plan.rate, _samples(config, state, eval_split))
    print_flushed(f'report: {absolute(report)}')


def say_complete(workdir: Path, step: int, say: Callable[[str], None]) -> None:
    """Prints the results of a run that was finished before."""
    evaluations = [row for row in read_rows(workdir) if row['split'] == 'eval']
    accuracy = f', eval accuracy {evaluations[-1]["accuracy"]:.4f}' if evaluations else ''
    say(f'already complete at step {step:,}{accuracy}; report: {absolute(workdir / workdir_lib.REPORT)}')


def _results(config: Any, plan: Plan, rows: list[Row], recorder: Recorder) -> dict[str, str]:
    evaluations = [row for row in rows if row['split'] == 'eval']
    results = {}
    if evaluations:
        last = evaluations[-1]
        results[f'{config.eval_split} accuracy'] = f'{last["accuracy"]:.4f}'
        results[f'{config.eval_split} loss'] = f'{last["loss"]:.4f}'
    if recorder.step_seconds:
        rate = recorder.steps_seen * plan.batch_size / recorder.step_seconds
        results[f'{unit_of(config.input_shape)}/s'] = f'{rate:,.0f}'
    results['devices'] = f'{plan.num_devices} × {jax.devices()[0].device_kind}'
    return results


def parameters_sha256(state: TrainState) -> str:
    """Returns a digest of all parameters, their names, shapes and bits: equal if and only if they are."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(state.params)):
        digest.update(f'{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n'.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def command() -> str:
    """Returns the command line of this process, as one would type it; '' if it was not the CLI."""
    import shlex

    if Path(sys.argv[0]).name not in ('__main__.py', 'parallel-train'):
        return ''
    return shlex.join(['python', '-m', 'parallel_train', *sys.argv[1:]])


def _samples(config: Any, state: TrainState, split: AnySplit) -> Samples | None:
    """Picks test images with predictions: up to `_WRONG` wrong ones, the others as they come."""
    if is_tokens(config.input_shape):
        return None
    count = min(_SAMPLES_FROM, len(split), max(_SAMPLES, _PIXELS // math.prod(split.image_shape)))
    images, labels = split.read(np.arange(count))
    model, one = create_model(config), jax.devices()[0]
    variables = jax.device_put(jax.device_get(state.evaluated()), one)

    def probabilities_of(variables: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply(
            variables, augment.normalise(images, config.pixel_mean, config.pixel_std), **eval_flags(model)
        )
        return jax.nn.softmax(logits)

    probabilities = np.asarray(jax.jit(probabilities_of)(variables, images))
    predictions = probabilities.argmax(-1)
    wrong = np.flatnonzero(predictions != labels)[:_WRONG]
    right = np.flatnonzero(predictions == labels)[: _SAMPLES - len(wrong)]
    chosen = np.sort(np.concatenate([wrong, right]))
    return Samples(
        images=images[chosen],
        labels=labels[chosen],
        predictions=predictions[chosen],
        probabilities=probabilities.max(-1)[chosen],
        class_names=split.class_names,
    )
