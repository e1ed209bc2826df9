"""The convolution and the pooling of the built-in models compute what JAX's do."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel_train.mesh import start_devices
from parallel_train.models.conv import conv_general_dilated, for_cpu
from parallel_train.models.pool import avg_pool_2x2

start_devices(8)


def gradients(conv: Any, x: jax.Array, kernel: jax.Array, **kwargs: Any) -> Any:
    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = conv(x, kernel, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **kwargs)
        return jnp.sum(jnp.sin(y))

    return jax.value_and_grad(loss, (0, 1))(x, kernel)


@pytest.mark.parametrize('examples', [1, 8, 13, 200])
@pytest.mark.parametrize('strides', [(1, 1), (2, 2)])
def test_values_and_gradients_are_those_of_jax(examples: int, strides: tuple[int, int]) -> None:
    """Up to rounding: sums of up to 200 × 81 float32 products, added in another order."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(examples, 9, 9, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 5)), jnp.float32)
    arguments = {'window_strides': strides, 'padding': 'SAME'}
    with for_cpu(True):
        ours = gradients(conv_general_dilated, x, kernel, **arguments)
    theirs = gradients(jax.lax.conv_general_dilated, x, kernel, **arguments)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(b))))


def test_mapped_over_data_alone_the_kernel_gradient_is_the_sum() -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 10, 6, 6, 2)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)

    def total(conv: Any, kernel: jax.Array) -> jax.Array:
        def one(x: jax.Array) -> jax.Array:
            return jnp.sum(
                jnp.sin(conv(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')))
            )

        return jnp.sum(jax.vmap(one)(x))

    with for_cpu(True):
        ours = jax.grad(lambda k: total(conv_general_dilated, k))(kernel)
        program = jax.jit(jax.grad(lambda k: total(conv_general_dilated, k))).lower(kernel).as_text()
    theirs = jax.grad(lambda k: total(jax.lax.conv_general_dilated, k))(kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(theirs))))
    assert 'feature_group_count = 3' not in program and 'batch_group_count = 3' not in program


@pytest.mark.parametrize(('height', 'width'), [(28, 28), (5, 8), (7, 3)])
def test_pooling_is_that_of_flax(height: int, width: int) -> None:
    """Up to the rounding of a sum of four."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, height, width, 4)), jnp.float32)

    def both(pool: Any) -> Any:
        return pool(x), jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))(x)

    with for_cpu(True):
        ours = both(avg_pool_2x2)
        assert 'reduce_window' not in jax.jit(avg_pool_2x2).lower(x).as_text()
    theirs = both(lambda x: nn.avg_pool(x, (2, 2), strides=(2, 2)))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert 'reduce_window' in jax.jit(lambda x: avg_pool_2x2(x)).lower(x).as_text()
