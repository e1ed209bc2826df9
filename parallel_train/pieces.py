"""Which rate does one piece of a schedule give? In Python floats, and as an optax schedule."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax
    import optax


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of a schedule, from step `begin` on for `length` steps; both may be fractions.

    Within the piece, with s = step - begin and t = s / length, held between 0 and 1:

    - constant: start.
    - linear: start + (end - start)·t.
    - polynomial: end + (start - end)·(1 - t)**bend.
    - cosine: end + (start - end)·(1 + cos πt)/2 (Loshchilov & Hutter 2017, equation 5, one cycle).
    - rsqrt: start / √(1 + s/bend), `bend` in steps; it goes on after `length` (Zhai et al. 2022).
    """

    name: str  # as a person reads it
    shape: str  # 'constant' | 'linear' | 'polynomial' | 'cosine' | 'rsqrt'
    begin: float
    length: float
    start: float
    end: float
    bend: float = 1.0

    def rate(self, step: float) -> float:
        """Returns the rate at `step`, in the units of the learning rate."""
        if self.shape == 'constant':
            return self.start
        if self.shape == 'rsqrt':
            return self.start / math.sqrt(1 + max(step - self.begin, 0.0) / self.bend)
        t = min(max((step - self.begin) / self.length, 0.0), 1.0)
        if self.shape == 'linear':
            return self.start + (self.end - self.start) * t
        if self.shape == 'polynomial':
            return self.end + (self.start - self.end) * (1 - t) ** self.bend
        assert self.shape == 'cosine', self.shape
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t)) / 2


def in_optax(piece: Piece) -> optax.Schedule:
    """Returns the piece as a function of the steps since its begin, in float32."""
    import jax.numpy as jnp
    import optax

    def reciprocal_root(steps: jax.Array) -> jax.Array:
        return piece.start / jnp.sqrt(1 + jnp.maximum(steps, 0) / piece.bend)

    if piece.shape == 'constant':
        return optax.constant_schedule(piece.start)
    if piece.shape == 'rsqrt':
        return reciprocal_root
    # The length is an int wherever it is whole, as optax declares; fractions work as well.
    length: int = piece.length  # type: ignore[assignment]
    if piece.shape == 'linear':
        return optax.linear_schedule(piece.start, piece.end, transition_steps=length)
    if piece.shape == 'polynomial':
        return optax.polynomial_schedule(piece.start, piece.end, piece.bend, transition_steps=length)
    assert piece.shape == 'cosine', piece.shape
    lowest = piece.end / piece.start if piece.start else 0.0
    return optax.cosine_decay_schedule(piece.start, decay_steps=length, alpha=lowest)
