#!/usr/bin/env bash
# From a fresh clone to a green test suite. Usage: ./launch/test.sh [pytest arguments]
# Tests marked slow run too with: ./launch/test.sh -m 'not long'; all of them with -m ''
set -euo pipefail
case $0 in */*) cd -- "${0%/*}/.." ;; *) cd .. ;; esac
source launch/setup.sh
setup_environment test
# Two at a time: most of a test is start-up, which uses one core. In conftest.py's order.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow' "$@"
