"""How long does one step take?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax


def stepper(step: Callable[[Any, Any], Any], state: Any, data: Any) -> Callable[[int], float]:
    """Returns a function that makes so many steps on the same data and returns the seconds of one.

    Args:
      step: `step(state, data) -> state`, which may take its state for good.
      state: to start from; each call goes on from where the last one ended.
      data: what each step takes.
    """

    def run(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state = step(state, data)
        jax.block_until_ready(state.step)
        return (time.perf_counter() - start) / steps

    return run
