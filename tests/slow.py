"""The command line, slow in one place: `python -m tests.slow PLACE NUMBER train ...`. The places:

`evaluation`: each batch of the evaluation after NUMBER steps is told, and comes a tenth of a second late.
`save`: the checkpoint of NUMBER steps is not whole before the run has begun to stop; until then steps
are slow, and told.
`disk`: the checkpoint of the first NUMBER steps takes 20 seconds.
`dead_disk`: it is never whole, and a save may take no longer than twice --stall_timeout.
`dead_restore`: the latest checkpoint cannot be read to its end.
`lock`: the loader of batch NUMBER hangs in C code that keeps Python's lock (the GIL).
`report`: it is told when the report is begun, which takes NUMBER seconds longer.
`files`: process NUMBER does not see the report yet, as on a network file system.
`check`: process NUMBER never ends to check the job.
`imports`: process 1 takes NUMBER seconds more from its joining to its first sign of life.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel_train import batches, checkpoint, cli, commands, ending, evaluate, lifeline, processes
from parallel_train import train as train_lib

BATCH, STEP = 'a batch of the evaluation', 'a step while the checkpoint is not whole'
REPORT = 'the report is begun'


def slow_evaluation(step: int) -> None:
    do_what_is_due, batches_of = train_lib.do_what_is_due, evaluate.Evaluator._batches
    now = 0

    def noting_the_step(state: Any, run: Any) -> Any:
        nonlocal now
        now = run.step
        return do_what_is_due(state, run)

    def late(evaluator: evaluate.Evaluator) -> Iterator[Any]:
        for data in batches_of(evaluator):
            if now == step:
                print(BATCH, flush=True)
                time.sleep(0.1)
            yield data

    train_lib.do_what_is_due, evaluate.Evaluator._batches = noting_the_step, late


def slow_save(step: int) -> None:
    do_what_is_due, stop, rename = train_lib.do_what_is_due, train_lib.stop, os.rename
    released = threading.Event()

    def held(source: Any, target: Any, **options: Any) -> None:
        if Path(target).name == str(step):  # Orbax's last act for a checkpoint, in a thread of its own
            released.wait()
        rename(source, target, **options)

    def slow_steps(state: Any, run: Any) -> Any:
        if run.step > step and not released.is_set():
            print(STEP, flush=True)
            time.sleep(0.2)  # else the next save would wait for this one before anybody can stop the run
        return do_what_is_due(state, run)

    def stopping(state: Any, run: Any) -> Any:
        threading.Timer(0.5, released.set).start()  # when the run waits for the save
        return stop(state, run)

    train_lib.do_what_is_due, train_lib.stop, os.rename = slow_steps, stopping, held


def slow_disk(step: int, seconds: float = 20.0) -> None:
    rename = os.rename

    def late(source: Any, target: Any, **options: Any) -> None:
        if Path(target).name == str(step):
            time.sleep(seconds)
        rename(source, target, **options)

    os.rename = late


def dead_disk(step: int) -> None:
    lifeline._LONGER = 2.0
    slow_disk(step, 10_000.0)


def dead_restore(_: int) -> None:
    lifeline._LONGER = 2.0
    checkpoint.Checkpoints.restore_latest = lambda *args: time.sleep(10_000)


def dead_lock(batch: int) -> None:
    ending._MARGIN = 4.0
    gather, calls = batches.gather, itertools.count()

    def gather_or_keep_the_lock(*args: Any, **options: Any) -> Any:
        if next(calls) == batch:
            ctypes.PyDLL(None).sleep(10_000)
        return gather(*args, **options)

    batches.gather = gather_or_keep_the_lock


def slow_report(seconds: int) -> None:
    finish = train_lib.finish

    def late(*args: Any) -> None:
        print(REPORT, flush=True)
        time.sleep(seconds)
        finish(*args)

    train_lib.finish = late


def slow_files(process: int) -> None:
    exists = Path.exists

    def exists_here(path: Path, **options: Any) -> bool:
        return exists(path, **options) and not (path.name == 'report.html' and processes.index() == process)

    Path.exists = exists_here


def dead_check(process: int) -> None:
    check_job = train_lib.check_job

    def check(*args: Any) -> Any:
        if processes.index() == process:
            time.sleep(10_000)
        return check_job(*args)

    train_lib.check_job = check


def slow_imports(seconds: int) -> None:
    join = commands._join_job

    def join_and_import(values: Any) -> Any:
        limits = join(values)
        time.sleep(seconds if processes.index() == 1 else 0)
        return limits

    commands._join_job = join_and_import


PLACES = {
    'evaluation': slow_evaluation,
    'save': slow_save,
    'disk': slow_disk,
    'dead_disk': dead_disk,
    'dead_restore': dead_restore,
    'lock': dead_lock,
    'report': slow_report,
    'files': slow_files,
    'check': dead_check,
    'imports': slow_imports,
}


def main() -> int:
    PLACES[sys.argv[1]](int(sys.argv[2]))
    return cli.main(['parallel_train', *sys.argv[3:]])


if __name__ == '__main__':
    sys.exit(main())
