"""A convolution whose kernel gradient is quick on CPUs."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
from jax.custom_batching import custom_vmap

# XLA's CPU kernel gradient is fastest on so few examples at a time, which stay in cache.
_EXAMPLES = 8
_MOST_PARTS = 16  # each is an operation more to compile


_for_cpu = contextvars.ContextVar('_for_cpu', default=False)


@contextlib.contextmanager
def for_cpu(wanted: bool) -> Iterator[None]:
    """What is traced within is for a CPU, if `wanted`. Other compilers do better without help."""
    token = _for_cpu.set(wanted)
    try:
        yield
    finally:
        _for_cpu.reset(token)


def is_for_cpu() -> bool:
    """Returns whether what is traced now is for a CPU."""
    return _for_cpu.get()


def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for the argument of this name of `flax.linen.Conv`.

    The same numbers up to rounding. Within `for_cpu`, as in the train step on CPUs, the gradient of the
    kernel is computed a few examples at a time.
    """
    if not is_for_cpu():
        return jax.lax.conv_general_dilated(lhs, rhs, *args, **kwargs)

    def forward(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(lhs, rhs, *args, **kwargs)

    def kernel_gradient(lhs: jax.Array, rhs: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.vjp(lambda rhs: forward(lhs, rhs), rhs)[1](gradient)[0]

    @custom_vmap
    def in_parts(lhs: jax.Array, rhs: jax.Array, gradient: jax.Array) -> jax.Array:
        size = max(_EXAMPLES, -(-len(lhs) // _MOST_PARTS))
        parts = [
            kernel_gradient(lhs[i : i + size], rhs, gradient[i : i + size]) for i in range(0, len(lhs), size)
        ]
        return functools.reduce(jax.numpy.add, parts)

    @in_parts.def_vmap
    def in_parts_mapped(axis_size: int, batched: list[bool], *args: jax.Array) -> tuple[jax.Array, bool]:
        # Mapped, XLA would make one grouped convolution of it, which is many times slower on CPUs.
        rows = [[x[i] if b else x for x, b in zip(args, batched, strict=True)] for i in range(axis_size)]
        return jax.numpy.stack([in_parts(*row) for row in rows]), True

    @jax.custom_vjp
    def convolve(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return forward(lhs, rhs)

    def backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        lhs, rhs = saved
        lhs_gradient = jax.vjp(lambda lhs: forward(lhs, rhs), lhs)[1](gradient)[0]
        return lhs_gradient, in_parts(lhs, rhs, gradient)

    convolve.defvjp(lambda lhs, rhs: (forward(lhs, rhs), (lhs, rhs)), backward)
    return convolve(lhs, rhs)
