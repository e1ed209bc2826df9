"""The command line with a loader that hangs: `python -m tests.stuck_loader BATCH PROCESS train ...`.

The BATCH-th batch that process PROCESS gathers, from 0, never comes.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any


def main() -> int:
    from parallel_train import batches, cli, processes

    stuck_batch, stuck_process = int(sys.argv[1]), int(sys.argv[2])
    gather, calls = batches.gather, itertools.count()

    def sleep_in_loader() -> None:
        time.sleep(10_000)

    def gather_or_hang(*args: Any, **options: Any) -> Any:
        if next(calls) >= stuck_batch and processes.index() == stuck_process:
            sleep_in_loader()
        return gather(*args, **options)

    batches.gather = gather_or_hang
    return cli.main(['parallel_train', *sys.argv[3:]])


if __name__ == '__main__':
    sys.exit(main())
