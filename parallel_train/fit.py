"""What is the largest batch that fits?"""

from __future__ import annotations

from collections.abc import Callable


def largest_that_fits(measure: Callable[[int], tuple[bool, int]], start: int, most: int, limit: int) -> int:
    """Returns the largest size that fits, to within 1/32 of itself; 0 if not even 1 does.

    Memory grows about linearly, so each guess is where a line through the two nearest measurements meets
    the limit. Where that does not halve what is left (compilers recompute to save memory), the next does.

    Args:
      measure: from a size to whether it fits and the bytes that it needs. Each call takes a minute.
      start: the first guess.
      most: the largest size allowed.
      limit: the bytes that there are.
    """
    fitting, too_large = 0, most + 1
    needed: dict[int, int] = {}
    guess = min(max(start, 1), most)
    while True:
        width = too_large - fitting
        fits, needed[guess] = measure(guess)
        if fits:
            fitting = guess
        else:
            too_large = guess
        if too_large - fitting <= max(1, fitting // 32):
            return fitting
        if too_large in needed and too_large - fitting > width / 2:
            guess = (fitting + too_large) // 2
        else:
            guess = min(max(_where_line_meets(needed, limit), fitting + 1), too_large - 1)


def _where_line_meets(needed: dict[int, int], limit: int) -> int:
    """Returns the size at which memory reaches the limit, by the two measurements nearest to it."""
    by_distance = sorted(needed.items(), key=lambda item: abs(item[1] - limit))
    size, num_bytes = by_distance[0]
    slope = num_bytes / size
    if len(by_distance) > 1:
        other_size, other_bytes = by_distance[1]
        slope = (num_bytes - other_bytes) / (size - other_size)
    if slope <= 0:
        return 2 * max(needed)
    return int(size + (limit - num_bytes) / slope)
