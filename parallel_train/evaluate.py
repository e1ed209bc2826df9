"""How good is it? Exact metrics of the whole eval split: every example counts once."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from parallel_train import batches, order
from parallel_train.dataset import AnySplit, Split
from parallel_train.mesh import put_whole
from parallel_train.pace import most_ahead
from parallel_train.state import TrainState
from parallel_train.step import make_eval_step

_IN_FLIGHT = 8  # batches on the devices at most; fewer where they take long, so that a stop need not wait


class Evaluator:
    """Evaluates states on one split, compiled and loaded once."""

    def __init__(self, split: AnySplit, config: Any, mesh: Mesh, state: TrainState):
        self._split, self._mesh = split, mesh
        self._step = make_eval_step(config, mesh, state.apply_fn)
        # With 'tree' a batch is `shards` chunks, whatever the number of devices.
        parts = config.shards if config.reduction == 'tree' else mesh.size
        self._indices, self._weights = order.eval_batches(
            len(split), config.eval_batch_size, multiple_of=parts
        )
        self._data: batches.Data | None = None
        if isinstance(split, Split) and batches.resident(split, config.data_placement, mesh):
            by_batch = batches.specs({'order': None})['order']  # type: ignore[dict-item]
            self._data = {
                'images': put_whole(mesh, split.images),
                'labels': put_whole(mesh, split.labels),
                'order': put_whole(mesh, self._indices, by_batch),
                'weights': put_whole(mesh, self._weights, by_batch),
            }

    def __call__(
        self,
        state: TrainState,
        interrupted: Callable[[], bool] = lambda: False,
        first_batch: contextlib.AbstractContextManager[Any] = contextlib.nullcontext(),  # noqa: B008, empty
    ) -> dict[str, float] | None:
        """Returns 'loss' and 'accuracy' (means over the split) and 'num_examples'.

        None if `interrupted`, which is asked before each batch, says so. The first batch is computed within
        `first_batch`: it may compile.
        """
        variables = state.evaluated()
        sums: list[dict[str, jax.Array]] = []
        done, ahead, last = 0, 1, time.monotonic()  # batches known to be done; how many more may be under way
        for i, data in enumerate(self._batches()):
            if interrupted():
                return None
            with first_batch if i == 0 else contextlib.nullcontext():
                sums.append(self._step(variables['params'], variables['batch_stats'], data, np.int32(i)))
            while done < len(sums) - ahead:
                jax.block_until_ready(sums[done])
                done, now = done + 1, time.monotonic()
                ahead, last = most_ahead(now - last, _IN_FLIGHT), now
        # Added in float64: the split may be larger than float32 can count.
        fetched = jax.device_get(sums)
        total = {name: float(np.sum(np.array([s[name] for s in fetched], np.float64))) for name in sums[0]}
        num_examples = round(total['examples'])
        assert num_examples == len(self._split), (num_examples, len(self._split))
        return {
            'loss': total['loss'] / total['weight'],
            'accuracy': total['correct'] / total['weight'],
            'num_examples': num_examples,
        }

    def _batches(self) -> Iterable[batches.Data]:
        if self._data is not None:
            return itertools.repeat(self._data, len(self._indices))
        return batches.gather_ahead(self._split, self._indices, self._mesh, self._weights)
