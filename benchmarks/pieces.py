"""Where does a step's time go? The CNN's step taken apart: each piece compiled and timed by itself.

    python benchmarks/pieces.py [--devices=8] [--batch_size=256] [--rounds=5] [--calls=20]

prints a line of JSON: for each piece, ms for the whole batch over all devices at once and MFLOP an
image; the bare step the same way. A piece reads its inputs from memory and writes its output there,
so the pieces add up to more than a step in which they are fused, and show where to look.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import measure

# Multiply-adds × 2 of one image, the border's products with padding left out: a 3×3 window on
# 28×28 pixels has 82² products inside the image, on 14×14 pixels 40².
CONV_1 = 2 * 82**2 * 32 / 1e6
CONV_2 = 2 * 40**2 * 32 * 64 / 1e6
DENSE = 2 * (3136 * 256 + 256 * 10) / 1e6
# Each is computed forward, for its kernel's gradient and, but for the first, its input's.
MFLOP_AN_IMAGE = 2 * CONV_1 + 3 * CONV_2 + 3 * DENSE


def make_pieces() -> dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], float]]:
    """Returns for each piece a function of arrays, their shapes (-1: the batch), and MFLOP an image."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from parallel_train.losses import softmax_cross_entropy
    from parallel_train.models.conv import conv_general_dilated
    from parallel_train.models.pool import avg_pool_2x2

    def conv(x: Any, kernel: Any) -> Any:
        return conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    def relu_pool(x: Any, bias: Any) -> Any:
        return avg_pool_2x2(nn.relu(x + bias))

    def head(x: Any, kernel_1: Any, kernel_2: Any) -> Any:
        logits = nn.relu(x @ kernel_1) @ kernel_2
        losses, _ = softmax_cross_entropy(logits, {'label': jnp.zeros(len(x), jnp.int32)})
        return jnp.sum(losses)

    def backward(function: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def gradient(output_gradient: Any, *args: Any) -> Any:
            return jax.vjp(function, *args)[1](output_gradient)[argument]

        return gradient

    x1, y1, k1 = (-1, 28, 28, 1), (-1, 28, 28, 32), (3, 3, 1, 32)
    x2, y2, k2 = (-1, 14, 14, 32), (-1, 14, 14, 64), (3, 3, 32, 64)
    x3, k3, k4 = (-1, 3136), (3136, 256), (256, 10)
    p2 = (-1, 7, 7, 64)
    return {
        'conv 1 forward': (conv, [x1, k1], CONV_1),
        'conv 1 kernel gradient': (backward(conv, 1), [y1, x1, k1], CONV_1),
        'bias, relu, pool 1 forward': (relu_pool, [y1, (32,)], 0),
        'bias, relu, pool 1 backward': (backward(relu_pool, 0), [x2, y1, (32,)], 0),
        'conv 2 forward': (conv, [x2, k2], CONV_2),
        'conv 2 kernel gradient': (backward(conv, 1), [y2, x2, k2], CONV_2),
        'conv 2 input gradient': (backward(conv, 0), [y2, x2, k2], CONV_2),
        'bias, relu, pool 2 forward': (relu_pool, [y2, (64,)], 0),
        'bias, relu, pool 2 backward': (backward(relu_pool, 0), [p2, y2, (64,)], 0),
        'dense layers and loss, both ways': (jax.grad(head, (0, 1, 2)), [x3, k3, k4], 3 * DENSE),
    }


def time_calls(call: Callable[[], Any], calls: int) -> float:
    """Returns ms a call, of several that are queued one after the other."""
    import jax

    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls * 1e3


def compile_piece(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], batch_size: int, mesh: Any
) -> Callable[[], Any]:
    """Returns a call of the piece on all devices at once, each on its part of the batch."""
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from parallel_train.mesh import is_cpu, put_whole
    from parallel_train.models.conv import for_cpu
    from parallel_train.reduce import DATA_AXIS

    cut = [P(DATA_AXIS) if shape[0] == -1 else P() for shape in shapes]
    rng = np.random.default_rng(0)
    arrays = [
        put_whole(
            mesh, rng.normal(size=[batch_size if n == -1 else n for n in shape]).astype(np.float32), spec
        )
        for shape, spec in zip(shapes, cut, strict=True)
    ]

    def local(*args: Any) -> Any:
        return jax.tree.map(lambda x: x[None], function(*args))  # each device's own result

    mapped = jax.shard_map(local, mesh=mesh, in_specs=tuple(cut), out_specs=P(DATA_AXIS), check_vma=False)
    with for_cpu(is_cpu(mesh)):
        compiled = jax.jit(mapped).lower(*arrays).compile()
    return lambda: compiled(*arrays)


def optimizer_piece(config: Any, mesh: Any) -> Callable[[], Any]:
    """Returns a call of the all-reduce of the gradients and the update of the state."""
    import jax
    from jax.sharding import PartitionSpec as P

    from parallel_train import reduce
    from parallel_train.state import initialise

    state = initialise(config, 1e-3, mesh)
    grads = initialise(config, 1e-3, mesh).params

    def update(state: Any, grads: Any) -> Any:
        return state.apply_gradients(grads=reduce.sum_over_devices(reduce.to_local(grads)))

    mapped = jax.shard_map(update, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    compiled = jax.jit(mapped, donate_argnums=0).lower(state, grads).compile()

    def call() -> Any:
        nonlocal state
        state = compiled(state, grads)
        return state.step

    return call


def step_piece(config: Any, mesh: Any) -> Callable[[], Any]:
    """Returns a call of the whole bare step."""
    import numpy as np

    from parallel_train.batches import gather
    from parallel_train.dataset import Split
    from parallel_train.plan import make_plan
    from parallel_train.state import initialise
    from parallel_train.step import make_train_step

    size, rng = config.batch_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (size, 28, 28, 1), dtype=np.uint8)
    split = Split(images, rng.integers(0, 10, size, dtype=np.int32), ())
    data = gather(split, np.arange(size, dtype=np.int32), mesh)
    step = make_train_step(config, make_plan(config, size, 1, mesh.size), mesh)
    state = initialise(config, 1e-3, mesh)

    def call() -> Any:
        nonlocal state
        state = step(state, data)
        return state.step

    return call


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--devices', type=int, default=8)
    parser.add_argument('--batch_size', type=int, default=256)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--calls', type=int, default=20)
    args = parser.parse_args()
    from parallel_train.mesh import make_mesh, start_devices

    start_devices(args.devices)
    mesh, config = make_mesh(args.devices), measure.recipe(batch_size=args.batch_size)
    pieces = make_pieces()
    calls = {name: compile_piece(f, shapes, args.batch_size, mesh) for name, (f, shapes, _) in pieces.items()}
    calls['all-reduce and optimizer'] = optimizer_piece(config, mesh)
    calls['the whole step'] = step_piece(config, mesh)
    things = {name: lambda call=call: time_calls(call, args.calls) for name, call in calls.items()}
    measure.interleave(1, things)
    values = measure.interleave(args.rounds, things)
    mflop = {name: m for name, (_, _, m) in pieces.items()} | {'the whole step': MFLOP_AN_IMAGE}
    result = {
        name: {'ms': measure.Spread.of(ms).median, 'mflop_an_image': mflop.get(name, 0.0)}
        for name, ms in values.items()
    }
    print(json.dumps({'devices': args.devices, 'batch_size': args.batch_size, 'pieces': result}))


if __name__ == '__main__':
    main()
