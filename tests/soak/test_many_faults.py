"""Killed and stopped again and again, each time on other hardware: does the run end as if it had not been?

    SOAK_SEED=7 python -m pytest -s tests/soak/test_many_faults.py

The guide's CNN on Fashion-MNIST. The seed decides what happens when; it is printed, so that a failure can be
repeated. SOAK_FAULTS is how many faults: three SIGKILLs to each SIGTERM.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from parallel_train.dataset import default_data_dir
from parallel_train.prepared import find_prepared
from tests.conftest import (
    ROOT,
    Job,
    Result,
    checkpoint_steps,
    cli,
    environment,
    read_rows,
    restore,
    run_cli,
    run_ok,
    without_timing,
)
from tests.test_processes import HEARTBEAT, Processes, free_port

SEED = int(os.environ.get('SOAK_SEED', '0'))
FAULTS = int(os.environ.get('SOAK_FAULTS', '40'))
BATCH_SIZE, STEPS_PER_EPOCH, EPOCHS = 64, 200, 3
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
CHECKPOINT_EVERY = 4
HARDWARE = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8), (4, 4), (4, 8)]  # processes, devices
MORE_FLAGS = [
    f'--config.train_split=train[:{BATCH_SIZE * STEPS_PER_EPOCH}]',
    '--config.eval_split=test[:2000]',
    f'--config.batch_size={BATCH_SIZE}',
    f'--config.num_epochs={EPOCHS}',
    f'--config.checkpoint_every_steps={CHECKPOINT_EVERY}',
    '--config.log_every_steps=5',
    '--config.shards=8',
    '--config.reduction=tree',
    '--config.divergence_check_steps=20',
]  # the main recipe, but shorter
STOP_SECONDS = 10  # from SIGTERM to the end of the last process
PATIENCE = 400  # seconds for anything, on a machine that does other work too


@dataclasses.dataclass(frozen=True)
class Fault:
    """What ends one life of the run."""

    signal: signal.Signals
    moment: str  # 'starting' | 'running' | 'saving'
    step: int  # running, saving: after, or during, a save of this step or a later one
    delay: float  # from 0 to 1: of a second after that; of the time that a start takes
    processes: int
    devices: int
    victim: int | None  # which process; None: all at once

    def __str__(self) -> str:
        whom = 'all' if self.victim is None else f'process {self.victim}'
        when = self.moment if self.moment == 'starting' else f'{self.moment} from step {self.step}'
        return f'{self.processes} x {self.devices // self.processes}: {self.signal.name} to {whom}, {when}'


def draw_faults(seed: int, count: int) -> list[Fault]:
    """Returns the faults of a run, which follow from the seed alone."""
    chance = random.Random(seed)
    terms = count // 4
    signals = [signal.SIGKILL] * (count - terms) + [signal.SIGTERM] * terms
    chance.shuffle(signals)
    faults: list[Fault] = []
    hardware = (0, 0)
    for i, number in enumerate(signals):
        hardware = chance.choice([other for other in HARDWARE if other != hardware])
        # A quarter of the kills come before the first step, so the others have to go further.
        moments = ['running', 'saving', 'running', 'starting'] if number == signal.SIGKILL else ['running']
        step = int(0.9 * NUM_STEPS * (i + chance.random()) / count)
        moment = chance.choice(moments)
        victim: int | None = chance.randrange(hardware[0])
        if moment == 'starting' or chance.random() < 0.3:
            victim = None  # all; one that does not come at the start is waited for, by design
        faults.append(Fault(number, moment, step, chance.random(), *hardware, victim))
    return faults


@dataclasses.dataclass(frozen=True)
class Life:
    """One start of the job, and how it ended."""

    results: list[Result]
    seconds: float  # from the start to the end of the last process
    ending: float  # of these, from the fault on
    resumed: int | None  # step; None: ended before it said so

    @property
    def codes(self) -> list[int]:
        return [result.code for result in self.results]


def launch(job: Job, workdir: Path, folder: Path, processes: int, devices: int) -> Processes:
    line = [*job.train(workdir, devices=devices), *MORE_FLAGS]
    if processes == 1:
        return Processes(folder, [cli(*line)], job.env)
    line += [
        f'--coordinator=127.0.0.1:{free_port()}',
        f'--num_processes={processes}',
        f'--heartbeat_timeout={HEARTBEAT}',
    ]
    return Processes(folder, [cli(*line, f'--process_id={i}') for i in range(processes)], job.env)


def live(job: Job, workdir: Path, folder: Path, fault: Fault, start_seconds: float) -> Life:
    """Starts the job, does to it what `fault` says when its moment has come, and waits for its end."""
    before = max(checkpoint_steps(workdir), default=0) if workdir.exists() else 0
    left = saves_under_way(workdir)  # by a process that was killed: nobody goes on with them
    started = time.monotonic()
    processes = launch(job, workdir, folder, fault.processes, fault.devices)
    try:
        if fault.moment == 'starting':
            time.sleep(fault.delay * start_seconds)
        else:
            target = max(before + 1, fault.step)
            if fault.moment == 'saving':
                processes.wait_until(lambda: begun_save(workdir, target, left), PATIENCE)
            else:
                processes.wait_until(lambda: whole_save(workdir, target), PATIENCE)
            time.sleep(0 if fault.moment == 'saving' else fault.delay / 4)
        struck = time.monotonic()
        everybody = range(fault.processes)
        for victim in everybody if fault.victim is None else [fault.victim]:
            processes.all[victim].send_signal(fault.signal)
        results = processes.results(PATIENCE)
    finally:
        processes.close()
    ended = time.monotonic()
    said = re.search(r'resuming from step ([\d,]+)', results[0].stdout)
    resumed = int(said[1].replace(',', '')) if said else None
    return Life(results, ended - started, ended - struck, resumed)


def whole_save(workdir: Path, step: int) -> bool:
    return max(checkpoint_steps(workdir), default=0) >= step


def saves_under_way(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / 'checkpoints').glob('*tmp*')}


def begun_save(workdir: Path, step: int, left: set[str]) -> bool:
    """Whether a save from `step` on is under way; if none is seen, for they are quick, two saves later."""
    names = saves_under_way(workdir) - left
    begun = [int(name.split('.')[0]) for name in names if name.split('.')[0].isdigit()]
    return any(there >= step for there in begun) or whole_save(workdir, step + 2 * CHECKPOINT_EVERY)


def check(fault: Fault, life: Life) -> None:
    """Every process ended as it should: by the signal, saved, or told of another that is gone."""
    for index, result in enumerate(life.results):
        if fault.signal == signal.SIGTERM:
            assert result.code == 75, (fault, index, result)
            assert life.ending < STOP_SECONDS, (fault, life.ending, result)
        elif fault.victim in (None, index):
            assert result.code == -signal.SIGKILL, (fault, index, result)
        else:
            assert result.code not in (0, 75), (fault, index, result)


@pytest.fixture(scope='module')
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The main recipe on Fashion-MNIST: as it lies in TFDS's default folder, else prepared."""
    recipe, data_dir = ROOT / 'configs/fashion_mnist.py', default_data_dir(None)
    if find_prepared('fashion_mnist', data_dir) is None:
        data_dir = tmp_path_factory.mktemp('fashion') / 'tfds'
        done = run_cli('prepare', f'--config={recipe}', f'--data_dir={data_dir}', timeout=900)
        if done.code:
            pytest.skip(f'Fashion-MNIST cannot be had here: {done.stderr.strip()[:300]}')
    return Job(recipe, data_dir, environment())


def test_faults_can_be_repeated() -> None:
    faults = draw_faults(SEED, 40)
    assert faults == draw_faults(SEED, 40) != draw_faults(SEED + 1, 40)
    assert [fault.signal for fault in faults].count(signal.SIGTERM) == 10
    assert {fault.devices for fault in faults} == {1, 2, 4, 8}
    assert {fault.processes for fault in faults} == {1, 2, 4}
    pairs = list(zip(faults, faults[1:], strict=False))
    assert all((a.processes, a.devices) != (b.processes, b.devices) for a, b in pairs)
    assert {fault.moment for fault in faults} == {'starting', 'running', 'saving'}


@pytest.mark.slow
def test_a_run_through_many_faults(job: Job, tmp_path: Path) -> None:
    print(f'\nSOAK_SEED={SEED} SOAK_FAULTS={FAULTS}')
    began = time.monotonic()
    run_ok(*job.train(tmp_path / 'undisturbed', devices=2), *MORE_FLAGS, timeout=1800, env=job.env)
    undisturbed = time.monotonic() - began
    print(f'undisturbed, 1 x 2 devices: {NUM_STEPS} steps in {undisturbed:.1f} s', flush=True)

    workdir, lives = tmp_path / 'run', []
    start_seconds: dict[int, float] = {}  # number of processes -> that a start takes, at least
    for i, fault in enumerate(draw_faults(SEED, FAULTS)):
        before = max(checkpoint_steps(workdir), default=0) if workdir.exists() else 0
        life = live(job, workdir, tmp_path / f'life{i}', fault, start_seconds.get(fault.processes, 5.0))
        after = max(checkpoint_steps(workdir), default=0) if workdir.exists() else 0
        print(
            f'{i + 1:3} {fault}; steps {before} to {after}, {life.seconds:.1f} s, '
            f'of which {life.ending:.1f} s after the fault; exit codes {life.codes}',
            flush=True,
        )
        check(fault, life)
        # Nothing that was whole is lost.
        assert life.resumed in (before or None, None), (fault, before, life)
        assert after >= before
        if fault.moment != 'starting':
            assert life.resumed == (before or None)
            seconds = life.seconds - life.ending
            start_seconds[fault.processes] = min(start_seconds.get(fault.processes, seconds), seconds)
        lives.append((fault, life))

    last = run_last(job, workdir, tmp_path)
    disturbed = sum(life.seconds for _, life in lives) + last
    assert without_timing(read_rows(workdir)) == without_timing(read_rows(tmp_path / 'undisturbed'))
    got, want = restore(workdir, NUM_STEPS), restore(tmp_path / 'undisturbed', NUM_STEPS)
    assert got.keys() == want.keys()
    assert not [name for name in want if got[name].tobytes() != want[name].tobytes()]
    show(lives, undisturbed, disturbed)


def run_last(job: Job, workdir: Path, folder: Path) -> float:
    """Lets the run come to its end; returns the seconds of that."""
    began = time.monotonic()
    processes = launch(job, workdir, folder / 'last', 2, 4)
    try:
        results = processes.results(1800)
    finally:
        processes.close()
    assert [result.code for result in results] == [0, 0], results
    return time.monotonic() - began


def show(lives: list[tuple[Fault, Life]], undisturbed: float, disturbed: float) -> None:
    """Prints the figures."""
    count = len(lives)
    print(
        f'{count} faults, all survived: the final checkpoint and metrics.jsonl are those of the run without'
    )
    for number, moment in sorted({(fault.signal, fault.moment) for fault, _ in lives}):
        chosen = [life for fault, life in lives if (fault.signal, fault.moment) == (number, moment)]
        endings = sorted(life.ending for life in chosen)
        middle, longest = endings[len(endings) // 2], endings[-1]
        print(
            f'  {len(chosen)} times {number.name} while {moment}: all processes ended after '
            f'{middle:.1f} s (median), {longest:.1f} s (longest)'
        )
    print(losses(undisturbed, disturbed, count))


def losses(undisturbed: float, disturbed: float, count: int) -> str:
    """Returns what so many faults cost, in seconds from the first start to the end."""
    return (
        f'{undisturbed:.1f} s without faults, {disturbed:.1f} s with {"them" if count > 1 else "one"}: '
        f'{(disturbed - undisturbed) / count:.1f} s lost a fault; goodput {undisturbed / disturbed:.2f}'
    )
