"""What is an example: an image, or a row of tokens? How does either lie in memory?

Images are uint8 [height, width, channels] with an int32 label. Tokens are [length], such as the bytes of a
text, and are their own label: the model predicts each of them from those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from parallel_train.errors import UserError

BYTES = 256  # so many classes, and fewer, lie in uint8


def is_tokens(input_shape: Sequence[int]) -> bool:
    return len(input_shape) == 1


def kind(input_shape: Sequence[int]) -> str:
    """Returns what the examples are, in words."""
    return 'rows of tokens' if is_tokens(input_shape) else 'images'


def unit_of(input_shape: Sequence[int]) -> str:
    """Returns what the examples of a second are counted in."""
    return 'rows' if is_tokens(input_shape) else 'images'


def token_dtype(num_classes: int) -> Any:
    return np.dtype(np.uint8 if num_classes <= BYTES else np.int32)


def layout(input_shape: Sequence[int], num_classes: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of one example's 'image' and 'label', as they lie in a split."""
    if is_tokens(input_shape):
        tokens = (tuple(input_shape), token_dtype(num_classes))
        return {'image': tokens, 'label': tokens}
    return {'image': (tuple(input_shape), np.dtype(np.uint8)), 'label': ((), np.dtype(np.int32))}


def noise(input_shape: Sequence[int], num_classes: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns so many examples of noise and their labels, where only the shape matters."""
    rng = np.random.default_rng(0)
    parts = layout(input_shape, num_classes)
    below = {'image': num_classes if is_tokens(input_shape) else 256, 'label': num_classes}
    images, labels = (
        rng.integers(0, below[name], (count, *shape), dtype=dtype) for name, (shape, dtype) in parts.items()
    )
    return images, images if is_tokens(input_shape) else labels


def tokens_of(name: str, split: str, given: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Returns the tokens that a dataset function gave, as they lie in a split, and how many there may be.

    Args:
      name: of the function.
      split: what it was called for.
      given: 'tokens', uint8 [n, length]; or of another integer dtype, then with their number, 'num_classes'.

    Raises:
      UserError: they are something else.
    """
    tokens = np.asarray(given['tokens'])
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f'dataset={name!r}: tokens are {tokens.dtype} {list(tokens.shape)}; they must be rows of '
            'integers, [n, length]'
        )
    if not tokens.size:
        raise UserError(f'dataset={name!r}: split {split!r} is empty')
    num_classes = given.get('num_classes', BYTES if tokens.dtype == np.uint8 else None)
    if not isinstance(num_classes, int):
        raise UserError(
            f"dataset={name!r}: tokens are {tokens.dtype}, so it must also return 'num_classes', how many "
            'different ones there may be'
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f'dataset={name!r}: split {split!r} has tokens {low}..{high}, outside 0..{num_classes - 1}'
        )
    return tokens.astype(token_dtype(num_classes), copy=False), num_classes
