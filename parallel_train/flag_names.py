"""Which flags are there? What each command takes stands in commands.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import flags


@dataclasses.dataclass(frozen=True)
class Flag:
    kind: str  # 'string' | 'integer' | 'float' | 'boolean'
    text: str


FLAGS = {
    'workdir': Flag('string', 'folder of the run: checkpoints, metrics, report'),
    'data_dir': Flag('string', 'folder of TFDS datasets (default: TFDS_DATA_DIR, ~/tensorflow_datasets)'),
    'devices': Flag('integer', 'devices to use; on CPU, XLA devices to make'),
    'debug': Flag('boolean', 'show tracebacks of user errors'),
    'from': Flag('string', 'prepare: folder with images (train/CLASS/FILE), or with the four IDX files'),
    'json': Flag('boolean', 'plan, evaluate, compile, scale, doctor: JSON alone on stdout'),
    'step': Flag('integer', 'evaluate: which checkpoint (default: the latest)'),
    'ensemble': Flag('boolean', "evaluate: the run's snapshots, each and together"),
    'raw': Flag('boolean', 'evaluate: the parameters themselves, not their moving averages'),
    'skip_nonfinite': Flag('integer', 'train: leave out up to so many steps that are not finite'),
    'profile_steps': Flag('string', 'train: write a trace of these steps, such as 100:110, into the workdir'),
    'coordinator': Flag('string', 'HOST:PORT of process 0, in a job of several processes'),
    'num_processes': Flag('integer', 'how many processes the job has'),
    'process_id': Flag('integer', 'which of them this is, from 0'),
    'start_timeout': Flag('float', 'seconds to wait for all processes to come (300)'),
    'heartbeat_timeout': Flag('float', 'seconds without a sign of life of a process that end the job (60)'),
    'stall_timeout': Flag('float', 'seconds without a step after which a process is stuck (600; 0: never)'),
    'topology': Flag('string', 'compile: for which hardware, such as v5e:2x4,v5p:4x4x4,cpu:8'),
    'fit': Flag('boolean', 'compile: search the largest batch that fits'),
    'device_counts': Flag('string', 'scale: how many devices to measure on, such as 1,2,4,8'),
    'mode': Flag('string', 'scale: weak, strong or weak,strong (default: both)'),
    'processes': Flag('string', 'scale: in how many processes, such as 1,2 (default: 1)'),
    'steps': Flag('integer', 'scale: timed steps in a stretch (50)'),
    'rounds': Flag('integer', 'scale: how many turns each size has (5)'),
    'allow_plan_change': Flag('boolean', 'train: continue a job although its config or plan changed'),
}  # fmt: skip

JOB_FLAGS = ('coordinator', 'num_processes', 'process_id', 'start_timeout')
PROCESS_FLAGS = (*JOB_FLAGS, 'heartbeat_timeout', 'stall_timeout')


def define_flags(values: flags.FlagValues, names: Sequence[str]) -> None:
    define = {
        'string': flags.DEFINE_string,
        'integer': flags.DEFINE_integer,
        'float': flags.DEFINE_float,
        'boolean': flags.DEFINE_boolean,
    }
    for name in names:
        flag = FLAGS[name]
        default = False if flag.kind == 'boolean' else None
        define[flag.kind](name, default, flag.text, flag_values=values)  # type: ignore[operator]
