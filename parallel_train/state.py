"""What changes from step to step? The model's variables, their averages, the optimizer's, running sums."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.training import train_state
from jax.sharding import Mesh

from parallel_train import config as config_lib
from parallel_train import config_fields
from parallel_train.errors import UserError
from parallel_train.examples import is_tokens, kind
from parallel_train.mesh import replicated
from parallel_train.optimizers import create_optimizer

# The generator is pinned: others give other numbers when they are mapped over shards.
KEY_IMPL = 'threefry2x32'
GUIDE_INPUT_SHAPE = (28, 28, 1)  # what the guide trains on, where a config does not say
GUIDE_NUM_CLASSES = 10


class TrainState(train_state.TrainState):
    """Flax's TrainState with what a step needs besides. All arrays are replicated.

    `step` is an int32 scalar, the number of completed updates. `batch_stats` is the model's collection
    of this name, {} if it has none. `key` is the raw data (uint32 [2]) of the key that dropout and
    augmentation are derived from. `sums` are float32 scalars, sums over the updates since they were
    last taken: 'loss', 'accuracy', 'grad_norm', and 'updates', their number. `skipped` (int32) counts the
    steps whose loss or gradient was not finite (update.py). `ema`: moving averages of 'params' and
    'batch_stats' with `ema_decay` of the config, None if that is 0.
    """

    batch_stats: Any = None
    key: jax.Array = None  # type: ignore[assignment]
    sums: dict[str, jax.Array] = None  # type: ignore[assignment]
    skipped: jax.Array = None  # type: ignore[assignment]
    ema: Any = None
    ema_decay: float = struct.field(pytree_node=False, default=0.0)

    def evaluated(self) -> dict[str, Any]:
        """Returns the 'params' and 'batch_stats' that evaluations use: the averages, if there are any."""
        return self.ema or {'params': self.params, 'batch_stats': self.batch_stats}


def zero_sums() -> dict[str, jax.Array]:
    return {name: jnp.zeros((), jnp.float32) for name in ('loss', 'accuracy', 'grad_norm', 'updates')}


def create_model(config: Any) -> nn.Module:
    """Returns the Linen module that `config.model` names.

    The class is called with `num_classes`, `dtype` and `remat` of the config where it has such fields.

    Raises:
      UserError: it cannot be imported, or gives no Linen module.
    """
    path = config_fields.BUILT_IN_MODELS.get(config.model, config.model)
    factory = config_lib.import_object('model', path)
    if not _makes_models(factory):  # nothing else is called: the path may come from a workdir's config
        raise UserError(
            f'config.model={config.model!r}: must name a Linen module class or a Python function that makes '
            f'one, not {getattr(factory, "__name__", factory)!r}'
        )
    known = {
        'num_classes': config.num_classes or GUIDE_NUM_CLASSES,
        'dtype': jnp.dtype(config.dtype),
        'remat': config.remat,
    }
    fields = {name: value for name, value in known.items() if name in inspect.signature(factory).parameters}
    for name, without in (('dtype', 'float32'), ('remat', False)):
        if name not in fields and config[name] != without:
            raise UserError(
                f'config.{name}={config[name]!r}: {config.model} has no field {name}; use {without}'
            )
    try:
        model = factory(**fields)
    except TypeError as error:
        raise UserError(
            f'config.model={config.model!r}: cannot be made without other arguments ({error}); give its '
            'fields defaults, or name a function that makes it'
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f'config.model={config.model!r}: must give a flax.linen Module, not {type(model).__name__}'
        )
    return model


def _makes_models(factory: Any) -> bool:
    if isinstance(factory, type):
        return issubclass(factory, nn.Module)
    return inspect.isfunction(factory) or isinstance(factory, functools.partial)


def takes_train(model: nn.Module) -> bool:
    """Whether the model is called with `train=`, as models with BatchNorm or dropout are."""
    return 'train' in inspect.signature(type(model).__call__).parameters


def eval_flags(model: nn.Module) -> dict[str, Any]:
    """Returns the keyword arguments that call the model as in evaluation."""
    return {'train': False} if takes_train(model) else {}


def create_train_state(rng: jax.Array, config: Any, learning_rate_fn: Any) -> TrainState:
    """Creates the initial state, as the function of this name in Flax's guide does.

    Args:
      rng: the key that the parameters are initialised from.
      config: needs the guide's fields alone; what it leaves out has its default.
      learning_rate_fn: an optax schedule, or a rate.

    Returns:
      A state on the default device. `apply_fn` is the model's `apply`, as in Flax.

    Raises:
      UserError: the model does not take examples of the config's input shape.
    """
    config = config_lib.complete(config)
    model = create_model(config)
    shape = tuple(config.input_shape) or GUIDE_INPUT_SHAPE
    try:
        dtype = jnp.int32 if is_tokens(shape) else jnp.float32
        variables = model.init(rng, jnp.ones((1, *shape), dtype), **eval_flags(model))
    except Exception as error:  # whatever the model says to an image that it does not take
        raise UserError(
            f'config.model={config.model!r}: does not take {kind(shape)} of shape {shape}: '
            f'{type(error).__name__}: {error}'
        ) from error
    key = jax.random.key(config.seed, impl=KEY_IMPL)
    averaged = {name: variables.get(name, {}) for name in ('params', 'batch_stats')}
    return TrainState.create(
        apply_fn=model.apply,
        params=variables['params'],
        tx=create_optimizer(config, learning_rate_fn),
        batch_stats=variables.get('batch_stats', {}),
        # Another stream than that of the parameters, which callers derive from the seed as well.
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
        sums=zero_sums(),
        skipped=jnp.zeros((), jnp.int32),
        # Copies: one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, averaged) if config.ema_decay else None,
        ema_decay=config.ema_decay,
    ).replace(step=jnp.zeros((), jnp.int32))  # an array: a Python int would compile the step twice


def abstract_state(config: Any, learning_rate_fn: Any) -> TrainState:
    """Returns the state's shapes and dtypes; nothing is computed or allocated."""
    return jax.eval_shape(lambda: create_train_state(init_key(config), config, learning_rate_fn))


def init_key(config: Any) -> jax.Array:
    """Returns the key that a run's parameters are initialised from."""
    return jax.random.key(config.seed, impl=KEY_IMPL)


def initialise(config: Any, learning_rate_fn: Any, mesh: Mesh) -> TrainState:
    """Creates the initial state replicated over the mesh, each device computing its own copy.

    (A copy put on the devices could share the first one's buffer, which the step's donation frees.)
    """
    create = jax.jit(
        lambda key: create_train_state(key, config, learning_rate_fn),
        out_shardings=replicated(mesh),
    )
    return create(init_key(config))


@functools.cache
def _taking_sums(mesh: Mesh) -> Callable[..., tuple[Any, Any]]:
    # `skipped` goes on in the state, which the next step frees: hence a copy.
    return jax.jit(lambda skipped: (zero_sums(), skipped + 0), out_shardings=replicated(mesh))


def take_sums(state: TrainState, mesh: Mesh) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state with its running sums at zero; and the sums, with 'skipped'. Waits for nothing."""
    zeros, skipped = _taking_sums(mesh)(state.skipped)
    return state.replace(sums=zeros), {**state.sums, 'skipped': skipped}


def saved_parts(state: TrainState) -> dict[str, Any]:
    """Returns the arrays of a state: what a checkpoint holds."""
    names = [f.name for f in dataclasses.fields(state) if f.metadata.get('pytree_node', True)]
    return {name: getattr(state, name) for name in names if getattr(state, name) is not None}
