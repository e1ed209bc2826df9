"""Which collectives does a compiled program hold?"""

from __future__ import annotations

import dataclasses
import math
import re

KINDS = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'ragged-all-to-all',
    'collective-permute',
    'collective-broadcast',
)
# `%name = TYPE KIND(` or `KIND-start(`, whose `-done` is the same operation's end. A type holds neither
# quotes nor `%`, so that names and metadata do not match.
_INSTRUCTION = re.compile(
    rf'^\s*(?:ROOT )?%?[\w.-]+ = ([^%"=\n]*?) ({"|".join(KINDS)})(-start)?\(', re.MULTILINE
)
ARRAY = re.compile(r'\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]')
COMMENT = re.compile(r'/\*.*?\*/')
_GROUPS = re.compile(r'replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program: how many, and the bytes of their data on one device.

    Of an all-gather that is what is gathered, of a reduce-scatter what is reduced. One inside a loop
    counts once.
    """

    kind: str
    count: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program's text, by kind.

    Args:
      text: optimized HLO, what `compiled.as_text()` gives.
    """
    found: dict[str, list[int]] = {}
    plain = COMMENT.sub('', text)
    for match in _INSTRUCTION.finditer(plain):
        result, kind, is_start = match.groups()
        line = plain[match.start() : plain.find('\n', match.end())]
        found.setdefault(kind, []).append(_data_bytes(result, kind, bool(is_start), line))
    return [Collective(kind, len(found[kind]), sum(found[kind])) for kind in KINDS if kind in found]


def _data_bytes(result: str, kind: str, is_start: bool, line: str) -> int:
    arrays = [(name, shape) for name, shape in ARRAY.findall(result)]
    if is_start and kind != 'all-reduce':  # its result is (operands, results, bookkeeping scalars)
        arrays = [(name, shape) for name, shape in arrays if shape or name not in ('u32', 's32')]
        arrays = arrays[len(arrays) // 2 :]
    size = sum(array_bytes(name, shape) for name, shape in arrays)
    groups = _GROUPS.search(line)
    if kind == 'reduce-scatter' and groups:
        size *= int(groups[2]) if groups[2] else groups[1].count(',') + 1
    return size


def array_bytes(name: str, shape: str) -> int:
    """Returns the size of an array of that element type ('f32') and shape ('128,64')."""
    bits = re.search(r'\d+', name)
    width = 1 if name == 'pred' or bits is None else max(1, int(bits[0]) // 8)
    return width * math.prod(int(side) for side in shape.split(',') if side)
