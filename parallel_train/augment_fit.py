"""Do the augmentations fit the examples? If not: which field, and what would."""

from __future__ import annotations

from typing import Any

from parallel_train.errors import UserError

_FIELDS = (
    'random_crop_padding', 'random_flip', 'randaugment_layers', 'cutout_size', 'random_erasing',
    'mixup_alpha', 'cutmix_alpha',
)  # fmt: skip


def check_augmentation(config: Any) -> None:
    """Raises UserError if an augmentation is not for examples of `config.input_shape`."""
    shape = tuple(config.input_shape)
    for field in _FIELDS:
        if config[field] and len(shape) != 3:
            raise UserError(
                f'config.{field}={config[field]}: is for images, and examples of {config.dataset!r} are of '
                f'shape {shape}; leave it out'
            )
    for field in ('pixel_mean', 'pixel_std'):
        if len(config[field]) > 1 and len(config[field]) != shape[-1] and len(shape) == 3:
            raise UserError(
                f'config.{field}={tuple(config[field])}: is for {len(config[field])} channels, and images of '
                f'{config.dataset!r} have {shape[-1]}; give one number for each, or one for all'
            )
    for field in ('random_crop_padding', 'cutout_size'):
        if config[field] and config[field] >= min(shape[:2]):
            raise UserError(
                f'config.{field}={config[field]}: an image of {config.dataset!r} is {shape[0]}×{shape[1]} '
                f'pixels; must be less than {min(shape[:2])}'
            )
