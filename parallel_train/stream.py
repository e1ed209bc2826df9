"""How are images read that differ in size, or do not fit in memory?

By index, for each batch anew: records → decode and crop → batch. What lies in memory are the batches in
flight, as records and as pixels. Nothing is remembered between them but which images are corrupt: any step
can be the first.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from parallel_train.decode import open_records, reading
from parallel_train.errors import UserError
from parallel_train.machine import cores
from parallel_train.pixels import Corrupt, Decoder, View
from parallel_train.prepared import Prepared, unreadable

BATCHES_AT_ONCE = 4  # that are read at the same time, each in a thread of the caller's
_READERS, _READ_AT_ONCE = 16, 16  # threads, and the records that one reads in turn
_NAMED = 5  # corrupt images in a message
_SAMPLED = 64  # records that tell whether two processes see the same split
_log = logging.getLogger(__name__)


def shape_of(config: Any) -> tuple[int, ...]:
    """The shape of one image as it is read."""
    return config.image_size, config.image_size, 3


def given_classes(config: Any) -> int:
    """How many classes a set has whose labels are plain integers. UserError if the config does not say."""
    if not config.num_classes:
        raise UserError(
            'config.num_classes=0: the labels of this set are plain integers, so it does not say how many '
            'classes there are; set config.num_classes'
        )
    return int(config.num_classes)


def check_fields(config: Any, of_function: bool) -> None:
    """Raises UserError for fields that `image_size` forbids, or that mean nothing without it."""
    size = config.image_size
    if not size:
        if config.random_resized_crop:
            raise UserError('config.random_resized_crop=True: needs config.image_size, the size of the crops')
        return
    given = tuple(config.input_shape)
    if given and given != shape_of(config):
        raise UserError(
            f'config.input_shape={given}: contradicts config.image_size={size}; set it to '
            f'{shape_of(config)}, or leave it out'
        )
    if of_function:
        raise UserError(
            f'config.image_size={size}: is for prepared sets, and the function {config.dataset} gives images '
            'of one size; set it to 0'
        )
    if config.data_placement == 'device':
        raise UserError(
            f"config.data_placement='device': images of config.image_size={size} are read for each step; use "
            "'auto' or 'host'"
        )


class StreamedSplit:
    """The examples of a split of which only those asked for are read and decoded.

    Attributes:
      image_shape: (size, size, 3), of what is read.
      class_names: one a class; the numbers themselves where the set has no names.
    """

    def __init__(self, prepared: Prepared, split: str, config: Any, training: bool):
        self._prepared, self._ranges = prepared, prepared.ranges(split)
        self._ends = list(itertools.accumulate(stop - start for _, start, stop in self._ranges))
        self._sources = {named: open_records(prepared.path, named) for named, _, _ in self._ranges}
        seed = config.seed if training and config.random_resized_crop else None
        self._view, self._training = View(config.image_size, config.crop_fraction, seed), training
        self._max_corrupt, self._corrupt = config.max_corrupt_examples, dict[int, str]()
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix='read')
        self._decoder: Decoder | None = None
        self.image_shape = shape_of(config)
        num_classes = prepared.features.num_classes or given_classes(config)
        self.class_names = prepared.class_names or tuple(map(str, range(num_classes)))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def read(self, examples: np.ndarray, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns images, uint8 [n, size, size, 3], and labels, int32 [n], of the given examples.

        An image that does not decode is left out: in training the next one of the split that does stands
        in for it, in evaluation a black one, so that every label counts.

        Args:
          examples: int32 [n], which examples of the split.
          epoch: decides with seed and example what is random.

        Raises:
          UserError: more images than `config.max_corrupt_examples` do not decode; a record is damaged.
        """
        wanted, places = np.unique(examples, return_inverse=True)
        if len(wanted) < len(examples):  # the padding of an evaluation: one example, many times
            images, labels = self.read(wanted, epoch)
            return images[places], labels[places]
        images, labels = self._decoded(examples, self._records(examples), epoch)
        self._check_labels(examples, labels)
        return images, labels.astype(np.int32)

    def digest(self) -> str:
        """Tells splits apart without reading all of them: their size, the set's metadata, some records."""
        some = np.linspace(0, len(self) - 1, min(_SAMPLED, len(self))).astype(int)
        crc = zlib.crc32(b''.join(map(_canonical, self._records(some))))
        return f'{len(self)}, {self._prepared.fingerprint}, {crc:08x}'

    def name_of(self, example: int) -> str:
        """Returns where an example lies, as TFDS counts: `train[17]`."""
        named, index = self._place(example)
        return f'{named}[{index}]'

    def _place(self, example: int) -> tuple[str, int]:
        part = bisect.bisect_right(self._ends, example)
        named, start, stop = self._ranges[part]
        return named, stop - (self._ends[part] - example)

    def _records(self, examples: Sequence[int] | np.ndarray) -> list[bytes]:
        """Reads the records of some examples, in several threads, which wait for the disk.

        One by one: ArrayRecord's reader takes three times the CPU time a record when asked for many.
        """

        def read(part: Sequence[int]) -> list[bytes]:
            records = []
            for example in part:
                named, index = self._place(int(example))
                with reading(self._prepared.path, named):
                    records.append(self._sources[named][index])
            return records

        parts = [examples[start : start + _READ_AT_ONCE] for start in range(0, len(examples), _READ_AT_ONCE)]
        return list(itertools.chain.from_iterable(self._readers.map(read, parts)))

    def _decoded(
        self, examples: np.ndarray, records: list[bytes], epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decodes examples; where one is corrupt, halves them until it is found."""
        try:
            return self._loaded_decoder()(records, examples, epoch)
        except Corrupt:
            half = len(examples) // 2
            if not half:
                return self._instead_of(int(examples[0]), records[0], epoch)
        parts = [self._decoded(examples[at], records[at], epoch) for at in (slice(half), slice(half, None))]
        images, labels = map(np.concatenate, zip(*parts, strict=True))
        return images, labels

    def _instead_of(self, example: int, record: bytes, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns what stands in for an example that does not decode."""
        label = self._leave_out(example, record)
        if not self._training:
            return np.zeros((1, *self.image_shape), np.uint8), np.array([label])
        for later in range(example + 1, example + len(self)):
            other = later % len(self)
            records = self._records([other])
            try:
                return self._loaded_decoder()(records, np.array([example]), epoch)
            except Corrupt:
                self._leave_out(other, records[0])
        raise self._too_many()

    def _loaded_decoder(self) -> Decoder:
        """TensorFlow is imported when the first image is wanted, once."""
        with self._lock:
            self._decoder = self._decoder or Decoder(self._view, math.ceil(cores() / BATCHES_AT_ONCE))
            return self._decoder

    def _leave_out(self, example: int, record: bytes) -> int:
        """Counts and names an image that does not decode; returns its label. UserError if too many."""
        label, file_name, reason = self._loaded_decoder().explain(record)
        name = self.name_of(example)
        if label is None:
            raise unreadable(self._prepared.path, f'the record of {name}', ValueError(reason))
        name += self._origin(label, file_name)
        with self._lock:
            known = example in self._corrupt
            self._corrupt[example] = name
        if not known:
            instead = 'the next one stands in' if self._training else 'it counts as a black image'
            _log.warning('%s: %s does not decode, %s (%s)', self._prepared.name, name, instead, reason)
        if len(self._corrupt) > self._max_corrupt:
            raise self._too_many()
        return label

    def _origin(self, label: int, file_name: str) -> str:
        """Where an example came from, as ` (rings/017.jpg)`; nothing if the set stores no file names."""
        if not file_name:
            return ''
        known = 0 <= label < len(self._prepared.class_names)
        origin = f'{self._prepared.class_names[label]}/{file_name}' if known else file_name
        return f' ({origin if origin.isprintable() else ascii(origin)})'

    def _too_many(self) -> UserError:
        some = ', '.join(name for _, name in sorted(self._corrupt.items())[:_NAMED])
        more = f' and {len(self._corrupt) - _NAMED} more' if len(self._corrupt) > _NAMED else ''
        return UserError(
            f'config.max_corrupt_examples={self._max_corrupt}: {len(self._corrupt)} images of '
            f'{self._prepared.name} do not decode, {some}{more}: repair the set, or allow more'
        )

    def _check_labels(self, examples: np.ndarray, labels: np.ndarray) -> None:
        bad = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(bad):
            raise UserError(
                f'{self._prepared.name}: {self.name_of(int(examples[bad[0]]))} has label {labels[bad[0]]}, '
                f'outside 0..{self.num_classes - 1}: this split has no labels, or config.num_classes is wrong'
            )


def _canonical(record: bytes) -> bytes:
    """A record with its features in order, which is any when a set is prepared; as it is if damaged."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # TensorFlow's own, without TensorFlow

    try:
        return bytes(tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True))
    except DecodeError:
        return record
