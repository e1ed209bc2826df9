"""How is a trained model used elsewhere?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from parallel_train import workdir as workdir_lib
from parallel_train.checkpoint import open_checkpoints
from parallel_train.paths import opened
from parallel_train.state import TrainState, abstract_state, create_model
from parallel_train.trusted import check_no_own_code


def load_model(
    workdir: str | os.PathLike[str], step: int | None = None, averages: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads the model of a run for use elsewhere: `logits = model.apply(variables, images)`.

    Args:
      workdir: the run's.
      step: which checkpoint, by completed steps; the latest if None.
      averages: the moving averages, where the run kept any (`ema_decay`), as its evaluations used them;
        False: the parameters themselves.

    Returns:
      The Linen module, and its variables ('params', and 'batch_stats' if it has any) on the first
      device. Images are float32 in [0, 1], [batch, height, width, channels]; of a run with `pixel_mean` or
      `pixel_std`, minus the one, divided by the other. Tokens are int32 [batch, length].

    Raises:
      UserError: the workdir holds no such checkpoint, or a model of its own code.
    """
    workdir = opened('workdir', workdir)
    config = workdir_lib.read_config(workdir)
    check_no_own_code(workdir, config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    variables = load_state(config, workdir, here, step, averages).evaluated()
    return create_model(config), {name: value for name, value in variables.items() if value}


def load_state(
    config: Any, workdir: Path, sharding: Any, step: int | None, averages: bool = True
) -> TrainState:
    """Returns the state of a checkpoint of `workdir`, laid out as `sharding` says, for use in evaluations.

    Without the optimizer's, and without the moving averages if they are not asked for.
    """
    with open_checkpoints(workdir, read_only=True) as checkpoints:
        state = checkpoints.restore(abstract_state(config, lambda _: 0.0), sharding, step)
    return state.replace(opt_state=None, ema=state.ema if averages else None)
