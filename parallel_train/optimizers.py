"""How does a gradient become an update?"""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
import optax.contrib

# As published, where the config says 0.
_BETA2 = {'lion': 0.99}
_EPSILON = {'lamb': 1e-6}
# Update RMS of Muon that fits rates and decays made for AdamW (Liu et al. 2025, section 2.2, equation 4).
_MUON_RMS = 0.2


def create_optimizer(config: Any, learning_rate_fn: Any) -> optax.GradientTransformation:
    """Returns the optax optimizer that the config describes, on the given schedule (or rate).

    With g the gradient, clipped first to `gradient_clip_norm` by the norm of the whole, w an array of
    parameters, η the rate, λ `weight_decay`, β `momentum`:

    - sgd: as in the guide, `optax.sgd(learning_rate_fn, momentum)`; g + λw goes into the momentum.
    - adamw (Loshchilov & Hutter 2019, algorithm 2): Adam's direction + λw, times η.
    - lars (You et al. 2017, algorithm 1, with the norm of the sum for the sum of the norms): g + λw times
      `trust_coefficient` · ‖w‖ / ‖g + λw‖ and η goes into the momentum.
    - lamb (You et al. 2020, algorithm 2): u = Adam's direction + λw, times ‖w‖ / ‖u‖ and η.
    - lion (Chen et al. 2023, program 1): the sign of a mean of g and momentum, + λw, times η.
    - muon (Jordan et al. 2024): the momentum of each array that Flax names `kernel`, made orthogonal and
      scaled by 0.2·√(longer side) so that rates made for AdamW fit (Liu et al. 2025); + λw, times η. All else
      (norms, biases, embeddings) gets Adam's direction. (Its authors leave the last layer to Adam too.)

    λ is 0 for norms and biases unless `decay_norm_and_bias`; LARS and LAMB never scale theirs.
    """
    rule = _update_rule(config, learning_rate_fn)
    if not config.gradient_clip_norm:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip_norm), rule)


def kernels(params: Any) -> Any:
    """Returns which arrays are neither biases nor scales of norms: a tree of bools."""
    return jax.tree.map_with_path(_is_kernel, params)


def _is_kernel(path: Any, x: jax.Array) -> bool:
    # By name too: the biases of attention heads have two dimensions.
    return x.ndim > 1 and _names(path)[-1] not in ('bias', 'scale')


def _names(path: Any) -> list[str]:
    return ['', *(jax.tree_util.keystr((key,), simple=True) for key in path)]


def _update_rule(config: Any, rate: Any) -> optax.GradientTransformation:
    name, momentum, decay = config.optimizer, config.momentum, config.weight_decay
    decayed = None if config.decay_norm_and_bias else kernels
    beta2 = config.beta2 or _BETA2.get(name, 0.999)
    epsilon = config.epsilon or _EPSILON.get(name, 1e-8)
    if name == 'adamw':
        return optax.adamw(rate, b1=momentum, b2=beta2, eps=epsilon, weight_decay=decay, mask=decayed)
    if name == 'lion':
        return optax.lion(rate, b1=momentum, b2=beta2, weight_decay=decay, mask=decayed)
    if name == 'lars':
        trust = config.trust_coefficient
        return optax.lars(
            rate, decay, decayed or True, trust, 0.0, kernels, momentum, nesterov=config.nesterov
        )
    if name == 'lamb':
        # `optax.lamb`, but that it scales norms and biases too.
        return optax.chain(
            optax.scale_by_adam(momentum, beta2, epsilon),
            optax.add_decayed_weights(decay, decayed),
            optax.masked(optax.scale_by_trust_ratio(), kernels),
            optax.scale_by_learning_rate(rate),
        )
    if name == 'muon':
        # `optax.contrib.muon`, but with plain Adam, and one decay for all.
        orthogonal = optax.contrib.scale_by_muon(
            beta=momentum, eps=epsilon, weight_dimension_numbers=_axes_of_matrices
        )
        return optax.chain(
            optax.partition(
                {
                    'matrix': optax.chain(orthogonal, optax.stateless(_scaled_by_shape)),
                    'other': optax.scale_by_adam(0.9, beta2, epsilon),
                },
                lambda params: jax.tree.map_with_path(
                    lambda path, x: 'matrix' if _is_matrix(path, x) else 'other', params
                ),
            ),
            optax.add_decayed_weights(decay, decayed),
            optax.scale_by_learning_rate(rate),
        )
    assert name == 'sgd', name
    sgd = optax.sgd(rate, momentum, nesterov=config.nesterov)
    return optax.chain(optax.add_decayed_weights(decay, decayed), sgd) if decay else sgd


def _is_matrix(path: Any, x: jax.Array) -> bool:
    return x.ndim > 1 and _names(path)[-1] == 'kernel'


def _axes(path: Any, x: jax.Array) -> Any:
    """Returns which axes of a kernel are the inputs of its matrix, and which the outputs."""
    # Flax's kernels have the outputs last, one axis but for queries, keys and values: heads × features.
    inputs = 1 if _names(path)[-2] in ('query', 'key', 'value') else x.ndim - 1
    return optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, x.ndim)))


def _axes_of_matrices(params: Any) -> Any:
    return jax.tree.map_with_path(_axes, params)


def _scaled_by_shape(updates: Any, _: Any) -> Any:
    """Gives orthogonal matrices the RMS of Adam's updates: times 0.2 · √(longer side)."""

    def scaled(path: Any, x: jax.Array) -> jax.Array:
        inputs = math.prod(x.shape[axis] for axis in _axes(path, x).reduction_axis)
        return x * (_MUON_RMS * math.sqrt(max(inputs, x.size // inputs)))

    return jax.tree.map_with_path(scaled, updates)
