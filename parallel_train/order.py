"""Which examples stand in which step?

A pure function of (seed, epoch, step), whatever the hardware: nothing to save, nothing to restore.
Each epoch is a fresh permutation of the whole split; step k of it takes the k-th run of
`batch_size` examples, and a device its contiguous slice of those. The tail that fills no batch is
dropped, another tail each epoch.
"""

from __future__ import annotations

import numpy as np


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns the order of the examples in epoch `epoch` (from 0): int32 [num_examples].

    Made from the raw words of the counter-based generator Philox (Salmon et al. 2011), whose stream
    NumPy promises never to change, sorted; NumPy's own `permutation` has no such promise. Equal
    words, 1 pair in 2**64, keep their order.
    """
    words = np.random.Philox(key=seed, counter=[0, 0, 0, epoch]).random_raw(num_examples)
    return np.argsort(words, kind='stable').astype(np.int32)


def epoch_batches(seed: int, epoch: int, num_examples: int, batch_size: int) -> np.ndarray:
    """Returns the examples of every step of an epoch: int32 [steps_per_epoch, batch_size]."""
    steps = num_examples // batch_size
    order = epoch_order(seed, epoch, num_examples)
    return order[: steps * batch_size].reshape(steps, batch_size)


def eval_batches(num_examples: int, batch_size: int, multiple_of: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns batches that hold every example exactly once, padded to a multiple of the devices.

    Returns:
      Indices, int32 [eval_steps, padded], and weights, float32 of that shape: 1 for an example, 0 for
      padding (which repeats example 0). `padded` is batch_size, or the split's size where that is
      less, rounded up to `multiple_of`.
    """
    per_step = min(batch_size, num_examples)
    steps = -(-num_examples // per_step)
    padded = -(-per_step // multiple_of) * multiple_of
    indices = np.zeros((steps, padded), np.int32)
    weights = np.zeros((steps, padded), np.float32)
    for step in range(steps):
        examples = np.arange(step * per_step, min((step + 1) * per_step, num_examples))
        indices[step, : len(examples)] = examples
        weights[step, : len(examples)] = 1
    return indices, weights
