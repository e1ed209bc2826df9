"""A plain Flax training loop on one device, written as in Flax's MNIST and learning-rate-schedule guides.

A peer of `peers.py`, which runs it in a process of its own, with the environment as it is:

    python benchmarks/peer_flax.py DATA.npz --batch_size=256 --warmup=20 --steps=100

prints a line of JSON. DATA.npz holds uint8 'images' [n, 28, 28, 1] and int32 'labels' [n].
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(features=32, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=64, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(features=256)(x)
        x = nn.relu(x)
        return nn.Dense(features=10)(x)


@jax.jit
def apply_model(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    """Gradients, loss and accuracy of one batch."""

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        logits: Any = state.apply_fn({'params': params}, images)
        one_hot = jax.nn.one_hot(labels, 10)
        return jnp.mean(optax.softmax_cross_entropy(logits=logits, labels=one_hot)), logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return grads, loss, jnp.mean(jnp.argmax(logits, -1) == labels)


@jax.jit
def update_model(state: TrainState, grads: Any) -> TrainState:
    return state.apply_gradients(grads=grads)


def train(
    state: TrainState, images: np.ndarray, labels: np.ndarray, batch_size: int, steps: int
) -> TrainState:
    """Trains `steps` steps in an order that is drawn anew each epoch."""
    rng = np.random.default_rng(0)
    done, epoch_loss, epoch_accuracy = 0, [], []
    while done < steps:
        order = rng.permutation(len(images))[: len(images) // batch_size * batch_size]
        for batch in order.reshape(-1, batch_size)[: steps - done]:
            grads, loss, accuracy = apply_model(state, images[batch], labels[batch])
            state = update_model(state, grads)
            epoch_loss.append(loss)
            epoch_accuracy.append(accuracy)
            done += 1
        np.mean(jax.device_get(epoch_loss)), np.mean(jax.device_get(epoch_accuracy))
    return jax.block_until_ready(state)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('data')
    parser.add_argument('--batch_size', type=int, default=256)
    parser.add_argument('--warmup', type=int, default=20)
    parser.add_argument('--steps', type=int, default=100)
    args = parser.parse_args()
    data = np.load(args.data)
    images, labels = np.float32(data['images']) / 255, data['labels']

    model = CNN()
    params = model.init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))['params']
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(1e-3, 0.9))
    state = train(state, images, labels, args.batch_size, args.warmup)
    start = time.perf_counter()
    train(state, images, labels, args.batch_size, args.steps)
    seconds = time.perf_counter() - start
    print(json.dumps({'images_per_second': args.steps * args.batch_size / seconds}))


if __name__ == '__main__':
    main()
