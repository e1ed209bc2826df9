"""What is minimised?

A loss is a function `loss(logits, batch) -> (losses, weights)`: one loss and one weight for each
example, both float32 of the same shape, [batch] (or [batch, ...] where an example has several
predictions). The step minimises sum(losses × weights) / sum(weights) over the *global* batch. A loss that
takes `label_smoothing=` is given it in training; evaluations are without.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def softmax_cross_entropy(
    logits: jax.Array, batch: dict[str, Any], label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of softmax(logits) against integer labels, every example with weight 1.

    Args:
      logits: [batch, num_classes]; computed on in float32.
      batch: 'label' is int [batch].
      label_smoothing: ε; a label counts 1 - ε, and ε is spread evenly over all classes, its own among them
        (Szegedy et al. 2016, section 7).
    """
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    if label_smoothing:
        of_all_classes = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * of_all_classes
    return losses, jnp.ones_like(losses)


def next_byte_cross_entropy(logits: jax.Array, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of softmax(logits) against the bytes of a text, every byte with weight 1.

    Zeros, which no text holds, fill the last row of a split and have weight 0.

    Args:
      logits: [batch, length, num_classes], of the byte at each place given those before it; computed on in
        float32.
      batch: 'label' is int [batch, length], the bytes themselves.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch['label'])
    return losses, (batch['label'] != 0).astype(jnp.float32)
