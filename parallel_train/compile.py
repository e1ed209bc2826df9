"""What will the train step need, and how long may it take, on hardware that is not here?

Each topology is compiled in a process of its own (`compile_child.py`): the compilers for TPUs and for
many CPU devices each want the process to themselves, and libtpu writes to its log as it likes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from parallel_train.errors import UserError
from parallel_train.plan import Plan, make_plan
from parallel_train.sizes import Sizes
from parallel_train.topologies import Topology

Row = dict[str, Any]

# libtpu finds out about the machine that it runs on, and complains where that is no TPU.
_CHILD_ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # nothing runs on a TPU here, so several may compile at a time
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_STDERR_LOG_LEVEL': '3',
    'TF_CPP_MIN_LOG_LEVEL': '3',
}


class CompilerFailed(RuntimeError):
    """A compiler crashed. `rows` are of the topologies for which none did."""

    def __init__(self, message: str, rows: Sequence[Row] = ()):
        super().__init__(message)
        self.rows = list(rows)


def compile_for(config: Any, sizes: Sizes, topologies: Sequence[Topology], fit: bool) -> list[Row]:
    """Compiles the config's train step for each topology; progress goes to stderr.

    Args:
      config: a complete config, with the dataset's `input_shape` and `num_classes`.
      sizes: of the dataset.
      topologies: the hardware.
      fit: instead of the config's batch, find the largest that fits, with as many examples in a shard.

    Returns:
      One row a topology, as `compile --json` shows it; docs/foresight.md says what the fields mean.

    Raises:
      UserError: batch and devices do not fit together, the model fails, libtpu is not installed, or the step
        is not one program (`reduction='tree'`).
      CompilerFailed: a compiler crashed; it has the rows of the others.
    """
    if config.reduction != 'pmean':
        raise UserError(
            f'config.reduction={config.reduction!r}: its step is several programs, and the compiler takes '
            'one; use --config.reduction=pmean'
        )
    if fit:
        make_plan(config, sizes.num_train_examples, sizes.num_eval_examples, 1)  # shards divide the batch
    plans = {t.name: None if fit else _plan(config, sizes, t) for t in topologies}
    for topology in topologies:
        if not topology.is_cpu and not _has_libtpu():
            raise UserError(
                f'topology={topology.name!r}: needs libtpu, the compiler for TPUs, which is not installed; '
                "install the extra: pip install 'parallel-train[tpu]'"
            )
    rows, failures = [], []
    for topology in topologies:
        try:
            if plans[topology.name] is None and not fit:
                rows.append(_row_of_too_few_shards(config, sizes, topology))
            else:
                rows.append(_run_child(config, sizes, topology, fit))
        except CompilerFailed as failure:
            failures.append(str(failure))
    if failures:
        raise CompilerFailed('\n'.join(failures), rows)
    return rows


def _plan(config: Any, sizes: Sizes, topology: Topology) -> Plan | None:
    """Returns the plan on that hardware, None where it has more devices than the config has shards."""
    turns = topology.num_devices * config.accumulation_steps
    if 0 < config.shards < turns:
        return None
    return make_plan(config, sizes.num_train_examples, sizes.num_eval_examples, topology.num_devices)


def _row_of_too_few_shards(config: Any, sizes: Sizes, topology: Topology) -> Row:
    turns = topology.num_devices * config.accumulation_steps
    batch = turns * (config.batch_size // config.shards)
    serves = {'batch_size': batch, 'shards': turns} if batch <= sizes.num_train_examples else None
    remedy = f'--config.batch_size={batch} --config.shards={turns} would serve' if serves else (
        'even one shard a device is more than the train split holds'
    )  # fmt: skip
    return {
        'topology': topology.name,
        'num_devices': topology.num_devices,
        'fits': False,
        'why': f'{config.shards} shards are too few for {turns} devices × accumulation steps; {remedy}',
        'serves': serves,
        **dict.fromkeys((
            'hbm_bytes', 'hbm_limit_bytes', 'flops_per_step', 'collectives', 'compile_seconds',
            'predicted_step_seconds', 'predicted_efficiency', 'bound',
        )),
    }  # fmt: skip


def _has_libtpu() -> bool:
    return 'TPU_LIBRARY_PATH' in os.environ or importlib.util.find_spec('libtpu') is not None


def _run_child(config: Any, sizes: Sizes, topology: Topology, fit: bool) -> Row:
    request = {
        'config': config.to_dict(),
        'sizes': dataclasses.asdict(sizes),
        'topology': topology.name,
        'fit': fit,
    }
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, **_CHILD_ENVIRONMENT, 'PYTHONPATH': path}
    command = [sys.executable, '-m', 'parallel_train.compile_child']
    with tempfile.TemporaryFile('w+') as log:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert child.stdin and child.stdout
            print(json.dumps(request), file=child.stdin, flush=True)
            row = _listen(child.stdout, topology.name)
            code = child.wait()
        finally:
            child.kill()  # an interrupted parent leaves none behind
            child.wait()
        if row is None:
            log.seek(0)
            remedy = '' if topology.is_cpu or code != -signal.SIGSEGV else (
                '. Another version of libtpu may do: pip install --upgrade --no-deps libtpu'
            )  # fmt: skip
            message = f'{topology.name}: the compiler ended with code {code}{remedy}\n{log.read()[-4000:]}'
            raise CompilerFailed(message)
    return row


def _listen(messages: IO[str], name: str) -> Row | None:
    """Shows what the child says and returns its row; None if it ended without one."""
    for line in messages:
        message = json.loads(line)
        if 'error' in message:
            raise UserError(message['error'])
        if 'row' in message:
            return message['row']
        print(f'{name}: {message["say"]}', file=sys.stderr, flush=True)
    return None
