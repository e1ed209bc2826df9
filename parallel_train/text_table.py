"""How is a table of text laid out?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Columns = Mapping[str, Callable[[Any], str]]  # heading -> what stands there of a row


def table(title: str, rows: Sequence[Any], columns: Columns) -> str:
    """Returns a title and aligned lines, the first column to the left; '' without rows."""
    if not rows:
        return ''
    cells = [list(columns), *([text(row) for text in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        '  '.join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    ]
    return '\n'.join([title, *(f'  {line}' for line in lines)])
