"""How far may the host run ahead of the devices?

Far enough that they never wait for it, and not so far that a stop has to wait for steps without end: about
three seconds of steps. Where one takes longer, none waits behind the one in flight: the devices lose the
moment that it takes to dispatch the next. It also tells which steps are known to be completed.
"""

from __future__ import annotations

import collections
import time

import jax

from parallel_train.state import TrainState

_MARKS, _SECONDS_APART = 3, 1.0
_SECONDS_AHEAD = _MARKS * _SECONDS_APART

# A copy: the state itself is donated to the next step.
_copy = jax.jit(lambda step: step + 0)


def most_ahead(seconds: float, most: int) -> int:
    """Returns how many, up to `most`, may be under way when the next is dispatched, if each takes so long."""
    return min(most, int(_SECONDS_AHEAD / max(seconds, 1e-9)))


class Pace:
    """Sets a mark about once a second, and waits for the mark of three seconds ago."""

    def __init__(self, step: int):
        self.completed = step
        self._marks: collections.deque[tuple[int, jax.Array]] = collections.deque()
        self._next, self._every, self._ahead = step + 1, 1, _MARKS
        self._last = time.monotonic()

    def after(self, state: TrainState, step: int) -> None:
        """To be called once `step` updates are dispatched, with the state that they give."""
        if step < self._next:
            return
        self._marks.append((step, _copy(state.step)))
        while len(self._marks) > self._ahead:
            done, mark = self._marks.popleft()
            mark.block_until_ready()
            now = time.monotonic()
            self._ahead = most_ahead(now - self._last, _MARKS)
            seconds_per_step = max(now - self._last, 1e-9) / (done - self.completed)
            self._every = max(1, min(2 * self._every, int(_SECONDS_APART / seconds_per_step)))
            self.completed, self._last = done, now
        self._next = step + self._every
