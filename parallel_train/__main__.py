"""`python -m parallel_train COMMAND ...`"""

import sys

from parallel_train.cli import main
from parallel_train.ending import leave

if __name__ == '__main__':
    leave(main(sys.argv))
