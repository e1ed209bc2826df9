"""How many bytes does a compiled program move between memory and chip?

XLA's own count, "bytes accessed", takes no account of where arrays lie: on a TPU most operands have been
copied into the chip's own memory (VMEM) before, and count again, up to three times in all. Here only what
lies in the main memory counts. The text of the program tells: layouts with `S(1)` are in VMEM.
"""

from __future__ import annotations

import dataclasses
import re

from parallel_train.hlo import ARRAY, COMMENT, array_bytes

_DEFINITION = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = (.*)$')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_LAYOUT = re.compile(r'\{[^{}]*\}')
_CALLED = re.compile(r'\b(?:body|calls|to_apply)=%?([\w.-]+)')
_TRIPS = re.compile(r'known_trip_count\W+n\W+(\d+)')
_NOTHING_MOVES = {
    'parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element', 'after-all', 'optimization-barrier',
    'partition-id', 'replica-id',
}  # fmt: skip
_COPIES = {'copy-start', 'slice-start', 'dynamic-slice-start', 'dynamic-update-slice-start'}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    kind: str
    result: str  # its type
    operands: tuple[str, ...]  # by name
    line: str


def hbm_bytes(text: str) -> int:
    """Returns the bytes that one run of a program moves to or from main memory, on one device.

    Each instruction reads its operands and writes its results, once; a loop does so as often as it runs. What
    an instruction reads only in part (a gather's table) counts whole.

    Args:
      text: optimized HLO, what `compiled.as_text()` gives.
    """
    computations, entry = _parse(COMMENT.sub('', text))
    return _bytes_of(computations, entry)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Returns the instructions of each computation, by name, and which computation is run."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = '', {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif definition := _DEFINITION.match(line):
            name, rest = definition.groups()
            result, rest = _split_type(rest)
            kind, _, rest = rest.partition('(')
            operands = re.findall(r'%([\w.-]+)', rest[: _closing(rest)])
            current[name] = _Instruction(kind, result, tuple(operands), line)
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """Splits 'TYPE KIND(...' after the type, which is one array's or, in parentheses, a tuple's."""
    if not text.startswith('('):
        result, _, rest = text.partition(' ')
        return result, rest
    end = _closing(text[1:]) + 2
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """Returns where the parenthesis closes that was opened just before `text`."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == '(') - (character == ')')
        if depth == 0:
            return i
    return len(text)


def _bytes_of(computations: dict[str, dict[str, _Instruction]], name: str) -> int:
    instructions = computations.get(name, {})
    total = 0
    for instruction in instructions.values():
        kind = instruction.kind
        called = _CALLED.search(instruction.line)
        if kind in _NOTHING_MOVES or kind.endswith(('-done', '-update')):
            continue
        if kind in ('while', 'call', 'async-start') and called:
            trips = _TRIPS.search(instruction.line) if kind == 'while' else None
            total += _bytes_of(computations, called[1]) * (int(trips[1]) if trips else 1)
        elif kind in _COPIES:  # (source, destination, bookkeeping), of which one may be a part of the other
            arrays = [array for array in _arrays(instruction.result) if array[0] > 4][:2]
            total += min(size for size, _ in arrays) * sum(in_hbm for _, in_hbm in arrays) if arrays else 0
        else:
            types = [
                instruction.result,
                *(instructions[o].result for o in instruction.operands if o in instructions),
            ]
            total += sum(size for text in types for size, in_hbm in _arrays(text) if in_hbm)
    return total


def _arrays(text: str) -> list[tuple[int, bool]]:
    """Returns the arrays of a type: how many bytes, and whether in main memory."""
    found = []
    for match in ARRAY.finditer(text):
        layout = _LAYOUT.match(text, match.end())
        found.append((array_bytes(*match.groups()), 'S(' not in (layout[0] if layout else '')))
    return found
