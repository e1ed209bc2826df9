"""A command line with a fault, the first time alone: `python -m tests.once FOLDER PROGRAM A B train ...`.

The first start of each process is that of `python -m PROGRAM A B train ...` (tests/flip.py, for one), every
other that of `python -m parallel_train train ...`. FOLDER is where it is noted who was started.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    folder, program, first, second, *command = sys.argv[1:]
    [process] = [argument for argument in command if argument.startswith('--process_id=')]
    note = Path(folder) / f'started{process}'
    name, arguments = ('parallel_train', []) if note.exists() else (program, [first, second])
    note.touch()
    sys.argv[1:] = [*arguments, *command]
    runpy.run_module(name, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    main()
