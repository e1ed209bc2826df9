"""`python -m parallel_train COMMAND ...`"""

import sys

from parallel_train.cli import main

if __name__ == '__main__':
    sys.exit(main(sys.argv))
