"""May this job run here? What can be known before devices are used, and before anything is written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import sys
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from parallel_train import config as config_lib
from parallel_train import dataset, processes
from parallel_train import workdir as workdir_lib
from parallel_train.config_fields import BUILT_IN_LOSSES, BUILT_IN_MODELS
from parallel_train.forward import check_model_and_loss
from parallel_train.plan import make_plan
from parallel_train.sizes import Sizes, find_sizes
from parallel_train.stream import StreamedSplit

_SAMPLED = 64  # images whose pixels are compared between processes


@dataclasses.dataclass(frozen=True)
class Job:
    """What was asked for, checked: a complete config, and its dataset."""

    config: Any
    sizes: Sizes
    train_split: dataset.AnySplit
    eval_split: dataset.AnySplit
    devices: int | None

    @functools.cached_property  # of a streamed split it reads records
    def digests(self) -> dict[str, str]:
        """What tells the splits from others, by which split it is: `workdir.WHICH_DATA`."""
        splits = (self.train_split, self.eval_split)
        return dict(zip(workdir_lib.WHICH_DATA, map(_digest, splits), strict=True))


def check_job(
    config: Any, workdir: Path, data_dir: Path, devices: int | None, allow_plan_change: bool
) -> Job:
    """Returns the job that the arguments of `train_and_evaluate` describe.

    Raises:
      UserError: config, model, loss, dataset, plan or workdir are wrong; the message names what.
    """
    config = config_lib.complete(config)
    sizes = find_sizes(config, data_dir)
    config = config_lib.with_dataset(config, sizes.input_shape, sizes.num_classes)
    check_model_and_loss(config)
    workdir_lib.check(workdir, config, allow_plan_change)
    # Before the dataset is decoded and devices are measured, which both write. A plan that fits any number of
    # devices fits one a process.
    make_plan(
        config,
        sizes.num_train_examples,
        sizes.num_eval_examples,
        processes.count() if devices is None else devices,
        processes.count(),
    )
    train_split = dataset.open_split(config, config.train_split, data_dir, training=True)
    eval_split = dataset.open_split(config, config.eval_split, data_dir)
    return Job(config, sizes, train_split, eval_split, devices)


def facts(job: Job) -> dict[str, Any]:
    """Returns what must be equal on all processes of a job."""
    return {
        'code of parallel_train': code_version(),
        'jax': version('jax'),
        'jaxlib': version('jaxlib'),
        'flax': version('flax'),
        'optax': version('optax'),
        'devices': job.devices,
        **{f'config.{name}': value for name, value in job.config.to_dict().items()},
        **own_code(job.config),
        **{f'{name} of {job.config.dataset!r} (shape, digests)': text for name, text in job.digests.items()},
    }


@functools.cache
def code_version() -> str:
    """Returns a digest of this package's source files."""
    here = Path(__file__).parent
    code = hashlib.sha256()
    for file in sorted(here.rglob('*.py')):
        code.update(str(file.relative_to(here)).encode() + file.read_bytes())
    return code.hexdigest()[:12]


def own_code(config: Any) -> dict[str, str]:
    """Returns digests of the user's code that this process imported: of what the config names by import path.

    With whatever else of the same packages is loaded by now, as a model's layers are.
    """
    named = [BUILT_IN_MODELS.get(config.model, config.model), BUILT_IN_LOSSES.get(config.loss, config.loss)]
    if dataset.is_import_path(config.dataset):
        named.append(config.dataset)
    packages = {path.partition(':')[0].partition('.')[0] for path in named} - {__package__}
    digests = {}
    for name in sorted(name for name in sys.modules if name.partition('.')[0] in packages):
        file = getattr(sys.modules[name], '__file__', None) or ''
        if file.endswith('.py'):
            with contextlib.suppress(OSError):  # as of one in a zip file
                digests[f'code of {name}'] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
    return digests


def _digest(split: dataset.AnySplit) -> str:
    """Tells splits apart without reading all of them: their sizes, all labels, some images."""
    if isinstance(split, StreamedSplit):
        return split.digest()
    some = np.linspace(0, len(split.images) - 1, _SAMPLED).astype(int)
    pixels = np.ascontiguousarray(split.images[some])
    labels = np.ascontiguousarray(split.labels)
    return f'{split.images.shape}, {zlib.crc32(labels.tobytes()):08x}, {zlib.crc32(pixels.tobytes()):08x}'
