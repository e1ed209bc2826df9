"""How is a trained model used elsewhere?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from parallel_train import workdir as workdir_lib
from parallel_train.checkpoint import open_checkpoints
from parallel_train.state import TrainState, abstract_state, create_model


def load_model(workdir: str | os.PathLike[str], step: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Loads the model of a run for use elsewhere: `logits = model.apply(variables, images)`.

    Args:
      workdir: the run's.
      step: which checkpoint, by completed steps; the latest if None.

    Returns:
      The Linen module, and its variables ('params', and 'batch_stats' if it has any) on the first
      device. Images are float32 in [0, 1], [batch, height, width, channels]; of a run with `pixel_mean` or
      `pixel_std`, minus the one, divided by the other.

    Raises:
      UserError: the workdir holds no such checkpoint, or a model of its own code.
    """
    workdir = Path(workdir)
    config = workdir_lib.read_config(workdir)
    workdir_lib.check_no_own_code(workdir, config)
    state = load_state(config, workdir, jax.sharding.SingleDeviceSharding(jax.devices()[0]), step)
    variables = {'params': state.params}
    if state.batch_stats:
        variables['batch_stats'] = state.batch_stats
    return create_model(config), variables


def load_state(config: Any, workdir: Path, sharding: Any, step: int | None) -> TrainState:
    """Returns the state of a checkpoint of `workdir`, laid out as `sharding` says."""
    with open_checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(abstract_state(config, lambda _: 0.0), sharding, step)
