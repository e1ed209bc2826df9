"""How fast can this machine multiply? The largest float32 GFLOP/s of a matrix product, numpy's or JAX's.

    python benchmarks/bound.py [--seconds=1]

prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

SIZES = (1024, 2048, 4096)


def gflops(multiply: Callable[[], Any], size: int, seconds: float) -> float:
    """Returns the GFLOP/s of the fastest call within so many seconds."""
    multiply()
    best, end = float('inf'), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        multiply()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def main() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    parser = argparse.ArgumentParser()
    parser.add_argument('--seconds', type=float, default=1.0)
    seconds = parser.parse_args().seconds
    dot = jax.jit(jnp.dot)
    results = {}
    for size in SIZES:
        a, b = np.random.default_rng(0).normal(size=(2, size, size)).astype(np.float32)
        c, d = jnp.asarray(a), jnp.asarray(b)
        results[f'numpy {size}'] = gflops(lambda a=a, b=b: np.dot(a, b), size, seconds)
        results[f'jax {size}'] = gflops(lambda c=c, d=d: dot(c, d).block_until_ready(), size, seconds)
    print(json.dumps({'gflops': max(results.values()), 'of': results}))


if __name__ == '__main__':
    main()
