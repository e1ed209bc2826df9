"""The layers that several of the models share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn

# He et al. 2015, by the size of the output: what Goyal et al. 2017 (section 5.1) and torchvision use.
_HE_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def conv(features: int, kernel: int, stride: int = 1, *, dtype: Any) -> nn.Conv:
    """A square convolution without bias, padded alike on all sides, computed in `dtype`."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=(kernel - 1) // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=_HE_INIT,
    )


def batch_norm(*, train: bool, dtype: Any, scale_init: Any = nn.initializers.ones) -> nn.BatchNorm:
    """BatchNorm whose statistics are float32 and whose result is `dtype`.

    Goyal et al. 2017, section 5.1: ε = 1e-5, running averages that keep 0.9.
    """
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, scale_init=scale_init
    )


def repeated(block: Callable[..., nn.Module], remat: bool) -> Callable[..., nn.Module]:
    """Returns what makes the blocks of a model, of a module class that is called as `block(...)(x)`.

    With `remat` a block keeps its input alone for the backward pass, which computes the rest again. The
    blocks have the names that Flax gives them without, so that the parameters are the same.
    """
    if not remat:
        return block
    numbers, again = itertools.count(), nn.remat(block)  # type: ignore[type-var]
    return lambda *args: again(*args, name=f'{block.__name__}_{next(numbers)}')
