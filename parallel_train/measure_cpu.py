"""How long does the step take on this machine's CPU, and would steps of other sizes have told?

A CPU has no data sheet to predict from, so it is calibrated on the same model at other batch sizes. The batch
in question has no part in that: prediction and measurement are independent but for the machine.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from parallel_train.batch_fit import mixes
from parallel_train.compiled import Compiled, compile_step
from parallel_train.examples import is_tokens
from parallel_train.plan import Plan, make_plan
from parallel_train.roofline import Prediction, fit_cpu
from parallel_train.schedule import create_learning_rate_fn
from parallel_train.sizes import Sizes
from parallel_train.state import initialise
from parallel_train.stepper import stepper

_ROUNDS, _SECONDS_PER_ROUND = 15, 0.2  # short turns: what else the machine does hits all alike
_CALIBRATION_SIZES = 2


@dataclasses.dataclass(frozen=True)
class Measured:
    """The step as measured (median of the rounds), and as the other batch sizes predict it."""

    seconds: float
    predicted: Prediction


def measure_on_cpu(
    config: Any, sizes: Sizes, mesh: Mesh, compiled: Compiled, say: Callable[[str], None]
) -> Measured | None:
    """Runs the step and two of other batch sizes in turns; None if no two others fit.

    Args:
      config: a complete config.
      sizes: of its dataset.
      mesh: of CPU devices.
      compiled: its step for this mesh.
      say: shows a line of progress.
    """
    others: list[Compiled] = []
    for batch_size in other_batch_sizes(config, compiled.plan):
        if len(others) < _CALIBRATION_SIZES and batch_size <= sizes.num_train_examples:
            changed = config.copy_and_resolve_references().unlock()
            changed.batch_size = batch_size
            plan = make_plan(changed, sizes.num_train_examples, sizes.num_eval_examples, mesh.size)
            other = compile_step(changed, sizes, plan, mesh, compiled.limit_bytes)
            others += [other] if other.fits else []
    if len(others) < _CALIBRATION_SIZES:
        return None
    batch_sizes = [other.plan.batch_size for other in others]
    say(f'measuring batches of {compiled.plan.batch_size}, and of {batch_sizes} to predict it from')
    measured, *seconds = _measure_in_turns(config, sizes, mesh, [compiled, *others])
    model = fit_cpu([other.flops * mesh.size for other in others], seconds)
    return Measured(measured, model.predict(compiled.flops * mesh.size))


def other_batch_sizes(config: Any, plan: Plan) -> list[int]:
    """Returns batch sizes around the plan's, nearest first, that its shards and devices allow."""
    examples, least = plan.examples_per_shard, 2 if mixes(config) else 1
    around = [examples // 2, examples * 2, examples // 4, examples * 4, examples * 3]
    return [plan.shards * count for count in dict.fromkeys(around) if count >= least]


def _measure_in_turns(
    config: Any, sizes: Sizes, mesh: Mesh, programs: list[Compiled]
) -> list[float]:  # fmt: skip
    """Returns the median seconds of a step of each program; they take turns, so that drift hits all."""
    steppers = [_stepper(config, sizes, mesh, program) for program in programs]
    counts = []
    for run in steppers:
        run(1)  # pages in, threads started
        counts.append(max(1, round(_SECONDS_PER_ROUND / run(1))))
    rounds = []
    for i in range(_ROUNDS):
        order = range(len(steppers)) if i % 2 == 0 else reversed(range(len(steppers)))
        rounds.append({j: steppers[j](counts[j]) for j in order})
    return [statistics.median(seconds[j] for seconds in rounds) for j in range(len(steppers))]


def _stepper(config: Any, sizes: Sizes, mesh: Mesh, compiled: Compiled) -> Callable[[int], float]:
    """Returns a function that runs so many steps on noise and returns the seconds of one."""
    plan, (state_shapes, data_shapes) = compiled.plan, compiled.arguments
    learning_rate_fn = create_learning_rate_fn(config, plan.peak_learning_rate, plan.steps_per_epoch)
    fresh = initialise(config, learning_rate_fn, mesh)
    # The same arrays in the very structure that the program was compiled for.
    state = jax.tree.unflatten(jax.tree.structure(state_shapes), jax.tree.leaves(fresh))
    values = sizes.num_classes if is_tokens(sizes.input_shape) else 256
    below = {
        'image': values, 'images': values, 'label': sizes.num_classes, 'labels': sizes.num_classes,
        'index': sizes.num_train_examples, 'order': sizes.num_train_examples,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    data = {
        name: jax.device_put(rng.integers(0, below[name], x.shape, dtype=x.dtype), x.sharding)
        for name, x in data_shapes.items()
    }

    return stepper(compiled.program, state, data)
