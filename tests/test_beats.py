"""Signs of life, as process 0 of three hears them: who is lost, who is behind, what was said first."""

from __future__ import annotations

import time

import pytest

from parallel_train import processes
from parallel_train.beats import Beats, say_why, why
from parallel_train.errors import FAULT, USER_ERROR
from parallel_train.store import NoAnswer, answers


class Notes:
    """The coordinator's store, in this process."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        return self._said.get(key)

    def put(self, key: str, value: str, again: bool = False) -> None:
        if again or key not in self._said:
            self._said[key] = value


def of_three(monkeypatch: pytest.MonkeyPatch) -> list[Beats]:
    monkeypatch.setattr(processes, 'count', lambda: 3)
    beats = []
    for index in range(3):
        monkeypatch.setattr(processes, 'index', lambda index=index: index)
        beats.append(Beats())
    return beats


def give(beats: list[Beats], store: Notes, now: float, *ticks: int | None) -> None:
    for one, passed in zip(beats, ticks, strict=True):
        if passed is not None:
            one.give(store, now, 0, passed)


def test_who_is_silent_for_too_long_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    beats, store = of_three(monkeypatch), Notes()
    for now in (0.0, 3.0, 6.0):
        give(beats, store, now, 1, 1, 1 if not now else None)
        assert beats[0].lost(store, now, 5.0, 60.0) == (
            f'process 2 ({processes.host()}) is gone or hangs: no sign of life for 6 s' if now == 6 else ''
        )
        assert beats[1].lost(store, now, 5.0, 60.0) == ''  # it listens to process 0 alone
    beats[2].give_last(store)
    give(beats, store, 60.0, 1, 1, None)
    assert beats[0].lost(store, 60.0, 5.0, 60.0) == '' and beats[0].anybody_left(store)
    assert not beats[0].all_others_left(store)
    beats[1].give_last(store)
    assert beats[0].all_others_left(store)


def test_who_has_joined_has_the_time_of_the_start_to_give_a_first_sign(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beats, store = of_three(monkeypatch), Notes()
    for now in range(60):
        give(beats, store, now, 1, 1 if now > 20 else None, None)
        assert bool(beats[0].lost(store, now, 5.0, 50.0)) == (now > 49), now
    assert beats[0].lost(store, 60.0, 5.0, 50.0) == ('process 2 is gone or hangs: no sign of life for 60 s')


def test_nobody_waits_for_the_last_word_of_a_process_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for that of one which fell silent with it, as on one host; but for that of one that lives."""
    monkeypatch.setattr(processes, 'count', lambda: 4)
    monkeypatch.setattr(processes, 'index', lambda: 0)
    first, store = Beats(), Notes()
    others = []
    for index in (1, 2, 3):
        monkeypatch.setattr(processes, 'index', lambda index=index: index)
        others.append(Beats())
    for now in range(10):
        first.give(store, now, 0, 1)
        for other, end in zip(others, (10, 0, 1), strict=True):
            if now <= end:
                other.give(store, now, 0, 1)
        lost = first.lost(store, now, 8.0, 60.0)
        assert bool(lost) == (now > 7), now  # a beat before 8 seconds, for so old may the last sign be
    assert lost.startswith('process 2 ') and not first.all_others_left(store)
    others[0].give_last(store)
    assert first.all_others_left(store)


def test_a_store_that_gives_no_answer_is_not_waited_for() -> None:
    def refuse() -> None:
        raise NoAnswer

    since = time.monotonic()
    assert not answers(refuse, 60.0) and answers(lambda: None, 60.0)
    assert time.monotonic() - since < 30


def test_while_this_process_was_suspended_nobody_was_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    beats, store = of_three(monkeypatch), Notes()
    give(beats, store, 0.0, 1, 1, 1)
    assert beats[0].lost(store, 0.0, 5.0, 60.0) == ''
    beats[0].forgive(100.0)
    assert beats[0].lost(store, 104.0, 5.0, 60.0) == ''
    assert 'no sign of life for 6 s' in beats[0].lost(store, 106.0, 5.0, 60.0)


def test_those_that_run_tell_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    beats, store = of_three(monkeypatch), Notes()
    give(beats, store, 0.0, 7, 9, None)
    assert beats[0].places(store) == [(9, 1, processes.host())]
    give(beats, store, 1.0, 8, 9, 4)
    assert min(beats[0].places(store)) == (4, 2, processes.host())
    beats[2].give_last(store)
    assert beats[0].places(store) == [(9, 1, processes.host())]


def test_what_was_said_first_is_why_the_job_ends() -> None:
    store = Notes()
    assert why(store) is None
    assert say_why(store, 'the disk is full', FAULT) == 'the disk is full'
    assert say_why(store, 'process 1 is gone', USER_ERROR) == 'the disk is full'
    assert why(store) == ('the disk is full', FAULT)
