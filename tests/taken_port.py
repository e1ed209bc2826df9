"""The command line, where the coordinator's port is taken: `python -m tests.taken_port - - train ...`."""

from __future__ import annotations

import socket
import sys


def main() -> int:
    from parallel_train import cli

    values = dict(argument[2:].partition('=')[::2] for argument in sys.argv[3:] if argument.startswith('--'))
    if values['process_id'] == '0':
        host, _, port = values['coordinator'].partition(':')
        taken = socket.create_server((host, int(port)))  # noqa: F841, held to the end
    return cli.main(['parallel_train', *sys.argv[3:]])


if __name__ == '__main__':
    sys.exit(main())
