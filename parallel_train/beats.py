"""Which processes of the job live, which of them is furthest behind, and why does one end the job?

Each leaves a sign of life in the store every second, a last one when it ends well, else word of why.
"""

from __future__ import annotations

import json

from parallel_train import processes
from parallel_train.store import Store

BEAT = 1.0  # seconds between two signs of life
_GONE = 'gone'  # the last sign of life of a process that has ended well

Place = tuple[int, int, str]  # how far, process, its host


class Beats:
    """The signs of life of a job, as one process gives and hears them."""

    def __init__(self) -> None:
        self._process, self._count = processes.index(), processes.count()
        self._heard: dict[int, tuple[str | None, float]] = {}  # process -> its last sign, since when
        self._given_up: set[int] = set()  # those lost, and those that fell silent with them
        self._forgiven = 0.0  # seconds that count for nobody's silence; times of `_heard` are without them
        # Process 0 watches all; the others watch process 0.
        self._watched = range(self._count) if self._process == 0 else range(1)

    def give(self, store: Store, now: float, completed: int, passed: int) -> None:
        """Says that this process lives, and how far it is: updates completed, places passed."""
        beat = [now, completed, processes.host(), passed]  # with `now` no two are alike
        store.put(f'beat/{self._process}', json.dumps(beat), again=True)

    def give_last(self, store: Store) -> None:
        """Says that this process ends, and that nobody is to wait for it."""
        store.put(f'beat/{self._process}', _GONE, again=True)

    def lost(self, store: Store, now: float, timeout: float, start_timeout: float) -> str:
        """Returns in words which process has been silent for `timeout` seconds; '' if none.

        Less a beat: so much may have passed before its last sign was heard. One that has joined may be slow
        to import what it needs, as from a network file system: until its first sign it has `start_timeout`.
        """
        now -= self._forgiven
        lost = ''
        for process in self._watched:
            beat = store.get(f'beat/{process}')
            if process not in self._heard or beat != self._heard[process][0]:
                self._heard[process] = (beat, now)
                self._given_up.discard(process)
            silent = now - self._heard[process][1]
            limit = start_timeout if beat is None else timeout
            if beat != _GONE and silent > limit / 2:
                self._given_up.add(process)
            if beat != _GONE and silent > limit - BEAT and not lost:
                where = f' ({json.loads(beat)[2]})' if beat else ''
                lost = f'process {process}{where} is gone or hangs: no sign of life for {silent:.0f} s'
        return lost

    def forgive(self, seconds: float) -> None:
        """Takes the last `seconds` for nobody's silence, as this process did not listen."""
        self._forgiven += seconds

    def anybody_left(self, store: Store) -> bool:
        """Whether a process has come to the end of its run."""
        return any(store.get(f'beat/{process}') == _GONE for process in range(self._count))

    def all_others_left(self, store: Store) -> bool:
        """Whether all have come to their end but those that are lost, for whom nobody is to wait."""
        others = set(range(self._count)) - {self._process} - self._given_up
        return all(store.get(f'beat/{process}') == _GONE for process in others)

    def places(self, store: Store) -> list[Place]:
        """Returns how far the others are, of those that run: the least is furthest behind."""
        others = (process for process in range(self._count) if process != self._process)
        beats = [(process, store.get(f'beat/{process}')) for process in others]
        told = [(process, json.loads(beat)) for process, beat in beats if beat not in (None, _GONE)]
        return [(passed, process, host) for process, (_, _, host, passed) in told]


def say_why(store: Store, message: str, code: int) -> str:
    """Says why the job ends, and with which exit code; returns the message of whoever said so first."""
    store.put('end', json.dumps([message, code]))
    return (why(store) or (message, code))[0]


def why(store: Store) -> tuple[str, int] | None:
    """Returns why the job ends, and with which exit code; None while nobody ends it."""
    told = store.get('end')
    return None if told is None else (json.loads(told)[0], json.loads(told)[1])
