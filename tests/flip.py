"""The command line with a fault: `python -m tests.flip STEP DEVICE train ...` flips a bit after STEP steps.

In the copy of the parameters on the DEVICE-th device of the job. Prints how many steps were dispatched.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np


def flip_bit(array: jax.Array, device: int, word: int = 0, bit: int = 0) -> jax.Array:
    """Returns a replicated array in which the copy on the `device`-th of its devices has a bit flipped."""
    target = list(array.sharding.mesh.devices.flat)[device]  # type: ignore[attr-defined]
    copies = []
    for shard in array.addressable_shards:
        copy = np.array(shard.data)
        if shard.device == target:
            copy.reshape(-1).view(np.uint32)[word] ^= np.uint32(1 << bit)
        copies.append(jax.device_put(copy, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, copies)


def main() -> int:
    from parallel_train import cli
    from parallel_train import train as train_lib

    step, device = int(sys.argv[1]), int(sys.argv[2])
    do_what_is_due = train_lib.do_what_is_due

    def with_fault(state: Any, run: Any) -> Any:
        print(f'dispatched {run.step}', flush=True)
        state = do_what_is_due(state, run)
        if run.step == step:
            leaves, tree = jax.tree.flatten(state.params)
            leaves[0] = flip_bit(leaves[0], device, bit=3)
            state = state.replace(params=jax.tree.unflatten(tree, leaves))
        return state

    train_lib.do_what_is_due = with_fault
    return cli.main(['parallel_train', *sys.argv[3:]])


if __name__ == '__main__':
    sys.exit(main())
