"""Over which examples does BatchNorm take its statistics? A shard's, or all of the global batch (SyncBN).

A model needs no field for it: while it is called in the train step, each `flax.linen.BatchNorm` in it that
names no axis of its own gets the axes along which the shards lie, and averages its means and squares over
them. Gradients flow through that exchange, so that N devices compute what one computes with a single shard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn

from parallel_train.reduce import BATCH_AXES


@contextlib.contextmanager
def over_global_batch(wanted: bool) -> Iterator[None]:
    """What is called within takes BatchNorm's statistics over the global batch, if `wanted`."""

    def synced(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        norm = context.module
        if not _is_batch_norm(context) or norm.axis_name is not None:
            return call(*args, **kwargs)
        # The same variables under another module, whose call comes by here again, with an axis.
        return norm.clone(parent=norm.scope, axis_name=BATCH_AXES)(*args, **kwargs)

    with nn.intercept_methods(synced) if wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Gives the names of the BatchNorms that are called within, once it is left."""
    found: list[str] = []

    def count(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if _is_batch_norm(context):
            found.append('/'.join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(count):
        yield found


def _is_batch_norm(context: Any) -> bool:
    return isinstance(context.module, nn.BatchNorm) and context.method_name == '__call__'
