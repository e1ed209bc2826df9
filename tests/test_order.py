"""Which examples stand in which step."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from parallel_train.order import epoch_batches, epoch_order, eval_batches


def test_an_epoch_holds_every_example_once() -> None:
    for epoch in range(3):
        assert sorted(epoch_order(7, epoch, 1001)) == list(range(1001))


def test_batches_are_the_order_cut_up_and_the_tail_dropped() -> None:
    batches = epoch_batches(seed=1, epoch=2, num_examples=103, batch_size=10)
    assert batches.shape == (10, 10)
    assert batches.ravel().tolist() == epoch_order(1, 2, 103)[:100].tolist()


def test_epochs_and_seeds_differ_and_drop_different_tails() -> None:
    orders = [tuple(epoch_order(seed, epoch, 1000)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6
    tails = [frozenset(order[960:]) for order in orders]
    assert len(set(tails)) == 6


def test_order_never_changes() -> None:
    """A resumed run of last year must see the same examples: these are the values for ever."""
    assert epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    digest = hashlib.sha256(epoch_order(123, 45, 60_000).tobytes()).hexdigest()
    assert digest[:16] == '0dc95f1333656ff4'


def test_order_is_uniform() -> None:
    """Over 2,000 epochs of 5 examples each place holds each example 400 times, ±5 standard deviations."""
    counts = np.zeros((5, 5), int)
    for epoch in range(2000):
        counts[np.arange(5), epoch_order(0, epoch, 5)] += 1
    assert np.abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)


@pytest.mark.parametrize('batch_size', [1, 7, 64, 99, 100, 101, 16_384])
@pytest.mark.parametrize('devices', [1, 3, 8])
def test_eval_batches_hold_every_example_once(batch_size: int, devices: int) -> None:
    indices, weights = eval_batches(100, batch_size, multiple_of=devices)
    assert indices.shape == weights.shape and indices.shape[1] % devices == 0
    assert sorted(indices[weights == 1]) == list(range(100))
    assert weights.sum() == 100
