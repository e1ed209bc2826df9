"""Is the job well, and when does it have to stop?

Threads in every process. One takes the signals, and sees a main thread that no longer moves; the other
tells the other processes that this one lives, hears whether they do, and agrees with them on the step
at which all stop or save. What they end, they end with a message. From the first step on nothing waits
for ever but for a compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from parallel_train import processes
from parallel_train.abort import on_abort
from parallel_train.beats import BEAT, Beats, say_why, why
from parallel_train.ending import Timer, say, say_stacks
from parallel_train.errors import ENDINGS, FAULT, PREEMPTED, USER_ERROR, UserError
from parallel_train.signals import Signals
from parallel_train.store import NoAnswer, Store, answers, open_store

_PERIOD = 0.2  # seconds between two looks
_SUSPENDED = 4.0  # seconds between two looks that mean that this process was stopped meanwhile
_LONGER = 6.0  # times --stall_timeout: what a save may take, to a slow disk
_LAST_WORDS = 3.0  # seconds to tell the others why the job ends, and for them to read it from process 0


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds after which a process counts as lost, and a main thread as stuck (0: never)."""

    heartbeat_timeout: float = 60.0
    stall_timeout: float = 600.0
    start_timeout: float = processes.START_TIMEOUT  # for all processes to come

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name == 'stall_timeout' else 5
            if not (math.isfinite(value) and value >= least):
                raise UserError(f'{name}={value:g}: must be a finite number of seconds, at least {least}')


class Lifeline:
    """Watches over one run, from `with` to its end.

    The main thread calls `tick` once a step and once a batch of an evaluation: all processes go
    through the same ticks, so a number of ticks names the same moment everywhere.
    """

    def __init__(self, limits: Limits):
        self._limits, self._save_every = limits, 0.0
        self._process, self._count, self._beats = processes.index(), processes.count(), Beats()
        self._store = open_store('parallel_train/lifeline')
        self._lock = threading.Lock()  # held while the processes agree, so that `tick` waits
        self._ticks, self._moved = 0, time.monotonic()
        self._passed = 0  # moments, and places between two of them: who has passed the fewest is behind
        self._awaits = ('no step', math.inf)  # what a stall lacks, after how many times --stall_timeout
        self._report_only = False
        self._due: tuple[int, str] | None = None  # (tick, what)
        self._round, self._told_ticks, self._over = 0, False, False
        self._nobody_hears = False
        self._timer = Timer()  # for where `_watch` itself cannot run
        self._signals, self._came, self._asked = Signals(), 0, ''
        self._last_save = self._heard = time.monotonic()
        self._ended = threading.Event()
        self._hooks = contextlib.ExitStack()
        self.at_signal = 'saves after the step in flight and stops'
        self.completed = 0  # steps that the devices are known to have completed

    # ------------------------------------------------------------ for the main thread

    def tick(self) -> str | None:
        """Passes a moment; returns 'stop' or 'save' where all processes have agreed to do so now."""
        with self._lock:
            self._ticks, self._passed = self._ticks + 1, self._passed + 1
            self._moved = time.monotonic()
            if self._due and self._ticks >= self._due[0]:
                what, self._due = self._due[1], None
                return what
        return None

    def came_on(self) -> None:
        """Passes a place that all processes come through, between two moments."""
        self._passed += 1

    def steps_are_over(self) -> None:
        """From now on there is nothing to stop any more."""
        self._report_only, self.at_signal = True, 'ends once the report is written'

    def start(self) -> None:
        """From now on the main thread is to pass moments."""
        self._moved = time.monotonic()
        self._awaits = ('no step', 1.0)

    def save_every(self, seconds: float) -> None:
        """From now on all processes are to save every so many seconds; 0 for not at all."""
        self._save_every, self._last_save = seconds, time.monotonic()

    def unwatched(self) -> contextlib.AbstractContextManager[None]:
        """What may take any time, as a compilation does: not taken for a stall."""
        return self._awaiting('no end of it', math.inf)

    def longer(self, what: str) -> contextlib.AbstractContextManager[None]:
        """What may take several times as long as a step, as a save does."""
        return self._awaiting(f'no end of the {what}', _LONGER)

    @contextlib.contextmanager
    def _awaiting(self, end: str, times: float) -> Iterator[None]:
        self._moved = time.monotonic()  # first, as `_watch` reads it last: else what was slow before counts
        before, self._awaits = self._awaits, (end, times)
        try:
            yield
        finally:
            self._moved = time.monotonic()
            self._awaits = before

    def __enter__(self) -> Lifeline:
        self._signals.open()
        self._threads = [threading.Thread(target=self._watch, name='lifeline', daemon=True)]
        if self._store is not None:
            talk = threading.Thread(target=self._talk, args=[self._store], name='lifeline', daemon=True)
            self._threads.append(talk)
        if self._store is not None and self._process:
            self._hooks.enter_context(on_abort(self._aborting))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None and self._store is not None:
            self._tell_of(error)
        self._ended.set()
        self._hooks.close()
        for thread in self._threads:
            thread.join(timeout=5)
        self._timer.stop()
        self._signals.close()

    def _tell_of(self, error: BaseException) -> None:
        """Ends the other processes where this one failed; where it suffers from another, hears from which.

        Does not return unless all processes raise the error by themselves: the others would be waited for.
        """
        if getattr(error, 'on_every_process', False):
            return
        if processes.exchange_failed(error):
            # A collective fails where another process is gone: `_talk` hears of it, says who, and exits.
            time.sleep(self._limits.heartbeat_timeout + 3 * BEAT)
        self._ended.set()  # this process has nothing to hear any more
        first = (str(error).strip() or repr(error)).splitlines()[0]
        code = USER_ERROR if isinstance(error, UserError) else FAULT
        self._end_others(f'process {self._process} ({processes.host()}) failed: {first}', code)
        if not isinstance(error, ENDINGS):
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exception(error)
        say(f'error: {first}')
        self._exit(code)

    # ------------------------------------------------------------ signals, and a main thread that is stuck

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(_PERIOD):
            self._take_signals()
            now, limits = time.monotonic(), self._limits
            if now - looked > _SUSPENDED:  # the whole process was: that is no silence of others, and no stall
                away = now - looked
                self._moved, self._heard = self._moved + away, self._heard + away
                self._beats.forgive(away)
            looked = now
            if self._save_every and self._process == 0 and now - self._last_save > self._save_every:
                self._asked, self._last_save = self._asked or 'save', now
            if self._store is None and self._asked and self._due is None:
                with self._lock:
                    self._settle(self._ticks + 1, self._asked)
            if self._store is not None and now - self._heard > limits.heartbeat_timeout:
                silent = now - self._heard
                self._nobody_hears = True  # so there is nobody to take leave of
                self._end(f'process 0, the coordinator, is gone or hangs: no answer for {silent:.0f} s')
            (lacking, times), still = self._awaits, now - self._moved
            self._timer.set(times * limits.stall_timeout)
            if still > times * limits.stall_timeout > 0:
                self.fail(f'{self._furthest_behind()} hangs: {lacking} for {still:.0f} s')

    def _furthest_behind(self) -> str:
        """Returns which process has come least far: all others may wait for it."""
        places = [(self._passed, self._process, processes.host())]
        self._tell(lambda store: places.extend(self._beats.places(store)))
        _, process, host = min(places)
        return f'process {process} ({host})'

    def _take_signals(self) -> None:
        for number in self._signals.received():
            self._came += 1
            name = signal.Signals(number).name
            if self._came > 1:
                say(f'{name} again: ends at once, without saving')
                os._exit(128 + number)
            self._asked = 'stop'
            say(f'{name}: {self.at_signal}; again: ends at once')

    def _settle(self, tick: int, what: str) -> None:
        """All are to do `what` at `tick`."""
        if (
            what == 'stop' and tick == 1 and not self._report_only
        ):  # no process has made a step: it may compile for long yet
            say('stopped before the first step; nothing to save')
            self._exit(PREEMPTED)
        self._due = (tick, what)
        if what == self._asked:
            self._asked = ''

    # ------------------------------------------------------------ the other processes

    def _talk(self, store: Store) -> None:
        next_beat = 0.0
        while not self._ended.wait(_PERIOD / 10 if self._told_ticks else _PERIOD):
            now = time.monotonic()
            try:
                if now >= next_beat:
                    next_beat = now + BEAT
                    self._beat(store, now)
                self._agree(store)
                self._heard = time.monotonic()
            except NoAnswer:
                continue  # `_watch` ends the job if this lasts
        with contextlib.suppress(NoAnswer):
            self._beats.give_last(store)

    def _beat(self, store: Store, now: float) -> None:
        self._beats.give(store, now, self.completed, self._passed)
        if told := why(store):
            message, code = told
            self._end(message, code, stacks=code == FAULT)
        limits = self._limits
        if lost := self._beats.lost(store, now, limits.heartbeat_timeout, limits.start_timeout):
            self.fail(lost)

    def _agree(self, store: Store) -> None:
        """Settles when all do what one asks for: at the first tick that no process has passed."""
        if self._due is not None or self._over:
            return
        here = f'round/{self._round}'
        if self._asked:
            store.put(f'{here}/ask', self._asked)
        what = store.get(f'{here}/ask')
        if what is None:
            return
        if not self._told_ticks:
            self._lock.acquire()  # the main thread passes no tick until all have told theirs
            self._told_ticks = True
        store.put(f'{here}/at/{self._process}', str(self._ticks))  # again, should the store not have heard
        if self._process == 0:
            ticks = [store.get(f'{here}/at/{process}') for process in range(self._count)]
            if None not in ticks:
                store.put(f'{here}/go', str(max(int(tick) for tick in ticks if tick) + 1))
        # A process that has come to the end of its run tells no ticks any more: all come to theirs.
        over = self._beats.anybody_left(store)
        go = store.get(f'{here}/go')  # after `over`: what was settled before somebody left holds
        if go is not None or over:
            if go is not None:
                self._settle(int(go), what)
            self._over = over
            self._round, self._told_ticks = self._round + 1, False
            self._lock.release()

    def _aborting(self) -> None:
        """Says why, before this process ends: JAX aborts it where the connection to process 0 breaks."""
        if not self._end_others(f'process {self._process} ({processes.host()}) was aborted', FAULT):
            self._end('process 0, the coordinator, is gone')

    def fail(self, message: str) -> None:
        """Ends the whole job, by what was said first where another ends it at the same time."""
        self._end(self._end_others(message, FAULT) or message)

    def _end_others(self, message: str, code: int) -> str:
        """Tells the others why the job ends; returns what was said first, '' where nobody hears."""
        said = ['']
        self._tell(lambda store: said.append(say_why(store, message, code)))
        return said[-1]

    def _tell(self, words: Callable[[Store], None]) -> bool:
        """Talks to the others once more, if there are any; whether they were heard."""
        store = self._store
        return store is not None and not self._nobody_hears and answers(lambda: words(store), _LAST_WORDS)

    def _end(self, message: str, code: int = FAULT, stacks: bool = True) -> None:
        """Ends this process, telling where it stood."""
        if stacks:
            say_stacks()
        say(f'error: {message}; the last completed step known here is {self.completed:,}')
        self._exit(code)

    def _exit(self, code: int) -> None:
        """Ends this process at once; process 0, where the store is, when the others have read why."""
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        self._tell(self._say_goodbye)
        os._exit(code)

    def _say_goodbye(self, store: Store) -> None:
        self._beats.give_last(store)
        while self._process == 0 and not self._beats.all_others_left(store):
            time.sleep(_PERIOD / 10)
