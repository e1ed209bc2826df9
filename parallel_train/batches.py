"""How do the examples of a step reach the devices?

A dataset that fits lies whole on every device, as uint8, and the step gathers its batch by index:
the host sends an epoch's order once an epoch and nothing in between. A larger one is gathered by
threads on the host, some steps ahead, and each device gets its slice; so is one whose images are read
and decoded for each step (stream.py).

Either way a step is given a dict of arrays ("data"), from which `local_batch` makes a device's batch
inside the step: 'image', 'label', 'index' (which example of the split), for evaluation 'weight'.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel_train import order, processes
from parallel_train.dataset import AnySplit, Split
from parallel_train.mesh import is_cpu, put, put_whole
from parallel_train.plan import Plan
from parallel_train.reduce import DATA_AXIS
from parallel_train.stream import BATCHES_AT_ONCE, StreamedSplit

Data = dict[str, jax.Array]

_STEPS_AHEAD = 4

# How each array is cut over the devices: on the devices, the dataset is whole and the order is cut
# along the batch; from the host, everything is.
_SPECS = {
    'images': P(),
    'labels': P(),
    'order': P(None, DATA_AXIS),
    'weights': P(None, DATA_AXIS),
    'image': P(DATA_AXIS),
    'label': P(DATA_AXIS),
    'index': P(DATA_AXIS),
    'weight': P(DATA_AXIS),
}


def specs(data: Data) -> dict[str, P]:
    """Returns how each array of `data` is cut over the mesh."""
    return {name: _SPECS[name] for name in data}


def local_batch(data: Data, row: jax.Array, part: tuple[jax.Array, int] | None = None) -> Data:
    """Returns a device's examples of one step, inside the step.

    Args:
      data: this device's part of what a feed gave.
      row: which step of the epoch (or of the evaluation), int32 scalar.
      part: (i, n) for the i-th of n equal parts of them alone.
    """

    def of_part(array: jax.Array) -> jax.Array:
        if part is None:
            return array
        size = array.shape[0] // part[1]
        return jax.lax.dynamic_slice_in_dim(array, part[0] * size, size)

    if 'order' not in data:
        return jax.tree.map(of_part, data)
    index = of_part(data['order'][row])
    batch = {'image': data['images'][index], 'label': data['labels'][index], 'index': index}
    if 'weights' in data:
        batch['weight'] = of_part(data['weights'][row])
    return batch


def fits_on_device(split: Split, mesh: Mesh) -> bool:
    """Whether a quarter of a device's memory holds the split (on CPU: of this machine's, for all)."""
    if is_cpu(mesh):
        import psutil

        return may_stay(split.images.nbytes * mesh.local_mesh.size, psutil.virtual_memory().total)
    stats = mesh.local_mesh.devices.flat[0].memory_stats() or {}  # JAX knows those of this process alone
    return may_stay(split.images.nbytes, stats.get('bytes_limit', 0))


def may_stay(num_bytes: int, memory_bytes: int) -> bool:
    """Whether a dataset of that size may lie in a memory of that size: it takes a quarter at most."""
    return num_bytes <= memory_bytes / 4


def resident(split: Split, placement: str, mesh: Mesh) -> bool:
    """Whether the split lives on the devices, as `config.data_placement` says; every process asks at once."""
    if placement == 'auto':  # by the memory of process 0, as all must run the same program
        return bool(processes.share(lambda: fits_on_device(split, mesh)))
    return placement == 'device'


class ResidentFeed:
    """The dataset on the devices; `at(step)` costs nothing but once an epoch."""

    def __init__(self, split: Split, config: Any, plan: Plan, mesh: Mesh):
        self._config, self._plan, self._mesh = config, plan, mesh
        self._epoch = -1
        self._data = {
            'images': put_whole(mesh, split.images),
            'labels': put_whole(mesh, split.labels),
        }
        self.wait_seconds = 0.0

    def at(self, step: int) -> Data:
        """Returns the data of the update that completes step `step + 1`."""
        epoch = step // self._plan.steps_per_epoch
        if epoch != self._epoch:
            plan = self._plan
            rows = order.epoch_batches(self._config.seed, epoch, plan.num_train_examples, plan.batch_size)
            self._data = {**self._data, 'order': put_whole(self._mesh, rows, _SPECS['order'])}
            self._epoch = epoch
        return self._data

    def close(self) -> None:
        pass


class HostFeed:
    """The dataset on the host; `at(step)` waits for a batch that threads gathered ahead of time."""

    def __init__(self, split: AnySplit, config: Any, plan: Plan, mesh: Mesh):
        self._split, self._config, self._plan, self._mesh = split, config, plan, mesh
        self._epoch = -1
        self._rows = np.zeros((0, 0), np.int32)
        self._stream: Iterator[Data] | None = None
        self.wait_seconds = 0.0

    def _row(self, step: int) -> np.ndarray:
        plan = self._plan
        epoch, row = divmod(step, plan.steps_per_epoch)
        if epoch != self._epoch:
            self._rows = order.epoch_batches(
                self._config.seed, epoch, plan.num_train_examples, plan.batch_size
            )
            self._epoch = epoch
        return self._rows[row]

    def at(self, step: int) -> Data:
        """Returns the data of the update that completes step `step + 1`; steps come in order."""
        if self._stream is None:
            steps = range(step, self._plan.num_steps)
            epochs = (later // self._plan.steps_per_epoch for later in steps)
            self._stream = gather_ahead(self._split, map(self._row, steps), self._mesh, epochs=epochs)
        start = time.perf_counter()
        data = next(self._stream)
        self.wait_seconds += time.perf_counter() - start
        return data

    def close(self) -> None:
        self._stream = None  # which ends its threads


def make_feed(split: AnySplit, config: Any, plan: Plan, mesh: Mesh) -> ResidentFeed | HostFeed:
    """Returns where the train step takes its data from."""
    if isinstance(split, Split) and resident(split, config.data_placement, mesh):
        return ResidentFeed(split, config, plan, mesh)
    return HostFeed(split, config, plan, mesh)


def gather_ahead(
    split: AnySplit,
    rows: Iterable[np.ndarray],
    mesh: Mesh,
    weights: Iterable[np.ndarray] | None = None,
    epochs: Iterable[int] | None = None,
) -> Iterator[Data]:
    """Yields what `gather` gives for each row of examples, threads being a few rows ahead."""
    ahead: collections.deque[Future[Data]] = collections.deque()
    pool = ThreadPoolExecutor(BATCHES_AT_ONCE, thread_name_prefix='feed')
    try:
        rest = (itertools.repeat(None) if weights is None else weights), epochs or itertools.repeat(0)
        for row, weight, epoch in zip(rows, *rest):  # noqa: B905, rows decide
            ahead.append(pool.submit(gather, split, row, mesh, weight, epoch))
            if len(ahead) > _STEPS_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def gather(split: AnySplit, examples: np.ndarray, mesh: Mesh, weights: Any = None, epoch: int = 0) -> Data:
    """Puts the given examples on the mesh, each device its slice; only this process's are read."""
    cut = P(DATA_AXIS)
    if isinstance(split, Split):
        images, labels = (lambda i: split.images[examples[i]]), (lambda i: split.labels[examples[i]])
        label_shape = (len(examples), *split.labels.shape[1:])
    else:
        images, labels = _read_local(split, examples, mesh, epoch)
        label_shape = examples.shape
    image_shape = (len(examples), *split.image_shape)
    data = {
        'image': put(mesh, image_shape, cut, lambda i: images(i[0])),
        'label': put(mesh, label_shape, cut, lambda i: labels(i[0])),
        'index': put(mesh, examples.shape, cut, lambda i: examples[i[0]]),
    }
    if weights is not None:
        data['weight'] = put_whole(mesh, weights, cut)
    return data


def _read_local(
    split: StreamedSplit, examples: np.ndarray, mesh: Mesh, epoch: int
) -> tuple[Callable[[slice], np.ndarray], Callable[[slice], np.ndarray]]:
    """Reads the slices of a batch that belong to this process's devices, all at once.

    Returns functions from such a slice to its images and to its labels.
    """
    places = NamedSharding(mesh, P(DATA_AXIS)).addressable_devices_indices_map(examples.shape).values()
    slices = sorted({index[0].indices(len(examples))[:2] for index in places if index is not None})
    images, labels = split.read(np.concatenate([examples[start:stop] for start, stop in slices]), epoch)
    lengths = [stop - start for start, stop in slices]
    where = dict(zip(slices, itertools.accumulate(lengths, initial=0), strict=False))

    def part_of(array: np.ndarray) -> Callable[[slice], np.ndarray]:
        def part(wanted: slice) -> np.ndarray:
            start, stop, _ = wanted.indices(len(examples))
            return array[where[start, stop] : where[start, stop] + stop - start]

        return part

    return part_of(images), part_of(labels)
