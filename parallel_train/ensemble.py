"""How good are the snapshots of a run together?

The snapshots are the checkpoints at the ends of the cycles of `schedule='cosine_restarts'`. Together they
predict the mean of their probabilities (Loshchilov & Hutter 2017, section 4.3; Huang et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from parallel_train import workdir as workdir_lib
from parallel_train.checkpoint import open_checkpoints
from parallel_train.errors import UserError
from parallel_train.state import TrainState


def snapshots(workdir: Path) -> list[int]:
    """Returns the steps of the snapshots that the run in `workdir` has made so far.

    Raises:
      UserError: there are fewer than two, or one of them is gone.
    """
    with open_checkpoints(workdir, read_only=True) as checkpoints:
        there = checkpoints.steps()
    planned = (workdir_lib.read_json(workdir / workdir_lib.PLAN) or {}).get('snapshot_steps', [])
    steps = [step for step in planned if there and step <= there[-1]]
    lost = [step for step in steps if step not in there]
    if lost:
        raise UserError(
            f'ensemble: {workdir} has lost the snapshots of step {", ".join(map(str, lost))}; it has '
            f'{", ".join(map(str, there))}. Use --step to evaluate these one by one'
        )
    if len(steps) < 2:
        raise UserError(
            f'ensemble: {workdir} holds {len(steps)} snapshots, which are made at the ends of cycles; train '
            "with config.schedule='cosine_restarts', to the end of two cycles at least"
        )
    return steps


def together(states: Sequence[TrainState]) -> TrainState:
    """Returns a state that can be evaluated as one model: the mean of the given ones' probabilities.

    Its logits are the logarithm of that mean, whose softmax is the mean again: every loss on logits is that
    of the mean prediction.
    """
    variables = [state.evaluated() for state in states]
    apply_one = states[0].apply_fn

    def apply(given: dict[str, Any], images: jax.Array, **options: Any) -> tuple[jax.Array, dict[str, Any]]:
        logits = []
        for name in given['params']:
            one = {kind: of_all[name] for kind, of_all in given.items()}
            outputs, _ = apply_one(one, images, **options)
            logits.append(jax.nn.log_softmax(outputs.astype(jnp.float32)))
        return jax.nn.logsumexp(jnp.stack(logits), axis=0) - math.log(len(logits)), {}

    def by_number(kind: str) -> dict[str, Any]:
        return {str(i): one[kind] for i, one in enumerate(variables) if one[kind]}

    return states[0].replace(
        apply_fn=apply, params=by_number('params'), batch_stats=by_number('batch_stats'), ema=None
    )
