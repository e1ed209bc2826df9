"""The layers that the convolutional networks share."""

from __future__ import annotations

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
