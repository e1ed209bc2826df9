"""What may each field of a config hold? Defaults and meaning stand in `configs/default.py`."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any

_IMPORT_PATH = re.compile(r'\w+(\.\w+)*:\w+')

BUILT_IN_MODELS = {
    'cnn': 'parallel_train.models.cnn:CNN',
    'resnet_small': 'parallel_train.models.resnet_small:ResNetSmall',
    'fast_net': 'parallel_train.models.fast:FastNet',
    'resnet18': 'parallel_train.models.resnet:ResNet18',
    'resnet34': 'parallel_train.models.resnet:ResNet34',
    'resnet50': 'parallel_train.models.resnet:ResNet50',
    'resnet101': 'parallel_train.models.resnet:ResNet101',
    'wide_resnet_16_2': 'parallel_train.models.wide_resnet:WideResNet16x2',
    'wide_resnet_28_10': 'parallel_train.models.wide_resnet:WideResNet28x10',
    'wide_resnet_40_4': 'parallel_train.models.wide_resnet:WideResNet40x4',
    'vit_ti16': 'parallel_train.models.vit:ViTTi16',
    'vit_s16': 'parallel_train.models.vit:ViTS16',
    'vit_b16': 'parallel_train.models.vit:ViTB16',
    'transformer_small': 'parallel_train.models.transformer:TransformerSmall',
}
BUILT_IN_LOSSES = {
    'softmax_cross_entropy': 'parallel_train.losses:softmax_cross_entropy',
    'next_byte_cross_entropy': 'parallel_train.losses:next_byte_cross_entropy',
}
SCHEDULES = (
    'cosine', 'cosine_restarts', 'linear', 'polynomial', 'steps', 'rsqrt', 'warmup_stable_decay', 'one_cycle',
    'constant',
)  # fmt: skip
OPTIMIZERS = ('sgd', 'adamw', 'lars', 'lamb', 'lion', 'muon')
REDUCTIONS = ('pmean', 'tree')

MAX_STEPS = 2**31 - 1  # the state counts them in int32; an epoch has at least one

# Fields that change how a run uses the hardware or reports, but not what it computes: a resume may
# change them freely. `data_placement` and `steps_per_dispatch` give the same examples in the same steps.
RUN_FIELDS = (
    'data_placement',
    'steps_per_dispatch',
    'keep_checkpoints',
    'checkpoint_every_minutes',
    'divergence_check_steps',
    'max_corrupt_examples',
)


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns ' (did you mean X?)' for the known name closest to `name`, or '' if none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f' (did you mean {close[0]}?)' if close else ''


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if value in choices:
            return None
        return f'must be one of: {", ".join(choices)}{nearest(str(value), choices)}'

    return check


def _name_or_import_path(built_in: Sequence[str]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if value in built_in:
            return None
        if isinstance(value, str) and _IMPORT_PATH.fullmatch(value):
            return None
        return (
            f'must be one of: {", ".join(built_in)}, or an import path '
            f'like my_package.my_module:MyName{nearest(str(value), built_in)}'
        )

    return check


def _integer(minimum: int, maximum: float = math.inf) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if is_integer and minimum <= value <= maximum:
            return None
        upper = '' if maximum == math.inf else f' and at most {maximum}'
        return f'must be a whole number of at least {minimum}{upper}'

    return check


def _number(minimum: float, exclusive: bool = False, below: float = math.inf) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            is_number
            and math.isfinite(value)
            and minimum <= value < below
            and (value > minimum or not exclusive)
        ):
            return None
        upper = '' if below == math.inf else f' and less than {below:g}'
        return f'must be a finite number {"greater than" if exclusive else "of at least"} {minimum:g}{upper}'

    return check


def _probability(value: Any) -> str | None:
    fits = _number(0)(value) is None and value <= 1
    return None if fits else 'must be a probability, from 0 to 1'


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else 'must be True or False'


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else 'must be a name'


def _shape(value: Any) -> str | None:
    fits = isinstance(value, tuple | list) and len(value) in (0, 1, 3)
    if fits and all(isinstance(side, int) and side > 0 for side in value):
        return None
    return (
        'must be (height, width, channels) of an image or (length,) of a row of tokens, in positive whole '
        'numbers, or () for not given'
    )


def _share(value: Any) -> str | None:
    return (
        None
        if _number(0, exclusive=True)(value) is None and value <= 1
        else 'must be more than 0 and at most 1'
    )


def _colours(minimum: float, exclusive: bool = False) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        fits = isinstance(value, tuple | list) and len(value) in (0, 1, 3)
        if fits and all(_number(minimum, exclusive)(v) is None for v in value):
            return None
        lower = 'more than' if exclusive else 'at least'
        return (
            f'must be one number a channel, of {lower} {minimum:g}, where pixels are 0 to 1; or () for none'
        )

    return check


def _epochs(value: Any) -> str | None:
    is_row = isinstance(value, tuple | list) and all(
        _number(0, exclusive=True, below=MAX_STEPS)(v) is None for v in value
    )
    if is_row and all(a < b for a, b in zip(value, value[1:], strict=False)):
        return None
    return 'must be epochs in rising order, such as (30, 60, 80), or () for none'


CHECKS: dict[str, Callable[[Any], str | None]] = {
    'seed': _integer(0, 2**32 - 1),
    'model': _name_or_import_path(tuple(BUILT_IN_MODELS)),
    'dtype': _one_of('float32', 'bfloat16'),
    'remat': _boolean,
    'batch_norm': _one_of('shard', 'global'),
    'loss': _name_or_import_path(tuple(BUILT_IN_LOSSES)),
    'label_smoothing': _number(0, below=1),
    'dataset': _text,
    'train_split': _text,
    'eval_split': _text,
    'num_train_examples': _integer(0),
    'num_eval_examples': _integer(0),
    'input_shape': _shape,
    'num_classes': _integer(0),
    'batch_size': _integer(1),
    'eval_batch_size': _integer(1),
    'num_epochs': _number(0, exclusive=True, below=MAX_STEPS),
    'accumulation_steps': _integer(1),
    'shards': _integer(0),
    'reduction': _one_of(*REDUCTIONS),
    'gradient_dtype': _one_of('float32', 'bfloat16'),
    'schedule': _one_of(*SCHEDULES),
    'learning_rate': _number(0),
    'learning_rate_scaling': _one_of('none', 'linear', 'sqrt'),
    'reference_batch_size': _integer(1),
    'warmup_epochs': _number(0, below=MAX_STEPS),
    'warmup_learning_rate': _number(0),
    'decay_epochs': _epochs,
    'decay_factor': _number(0, exclusive=True),
    'end_learning_rate': _number(0),
    'decay_power': _number(0, exclusive=True),
    'restart_epochs': _number(0, below=MAX_STEPS),
    'restart_multiplier': _number(1),
    'timescale_epochs': _number(0, below=MAX_STEPS),
    'cooldown_epochs': _number(0, below=MAX_STEPS),
    'optimizer': _one_of(*OPTIMIZERS),
    'momentum': _number(0, below=1),
    'nesterov': _boolean,
    'beta2': _number(0, below=1),
    'epsilon': _number(0),
    'trust_coefficient': _number(0, exclusive=True),
    'weight_decay': _number(0),
    'decay_norm_and_bias': _boolean,
    'gradient_clip_norm': _number(0),
    'ema_decay': _number(0, below=1),
    'image_size': _integer(0, 2**14),
    'random_resized_crop': _boolean,
    'crop_fraction': _share,
    'pixel_mean': _colours(0),
    'pixel_std': _colours(0, exclusive=True),
    'max_corrupt_examples': _integer(0),
    'random_crop_padding': _integer(0, 2**16),
    'random_flip': _boolean,
    'randaugment_layers': _integer(0, 14),
    'randaugment_magnitude': _number(0, below=31),
    'cutout_size': _integer(0, 2**16),
    'random_erasing': _probability,
    'mixup_alpha': _number(0, below=1e3),
    'cutmix_alpha': _number(0, below=1e3),
    'mix_probability': _probability,
    'log_every_steps': _integer(1),
    'eval_every_epochs': _number(0, below=MAX_STEPS),
    'checkpoint_every_epochs': _number(0, below=MAX_STEPS),
    'checkpoint_every_steps': _integer(0),
    'checkpoint_every_minutes': _number(0),
    'keep_checkpoints': _integer(1),
    'divergence_check_steps': _integer(0),
    'data_placement': _one_of('auto', 'device', 'host'),
    'steps_per_dispatch': _integer(1),
}
