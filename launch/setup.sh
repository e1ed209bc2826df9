# Sourced by the other scripts: makes the virtual environment .venv with the pinned packages, once.
# Usage: setup_environment EXTRAS   ('' or e.g. 'test'); sets $python.

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
        command -v "$candidate"
        return
      fi
      echo "error: $candidate has no venv module; on Debian: apt install $candidate-venv" >&2
    fi
  done
  echo 'error: Python 3.11 or 3.12 is needed; install one, or name it: PYTHON=/path/to/python3.12' >&2
  return 2
}

setup_environment() {
  local extras=$1 root venv wanted
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=${VENV:-$root/.venv}
  python=$venv/bin/python
  # Installed again when what is asked for changes, or when an installation was cut short.
  wanted=$(cat "$root/setup.cfg" "$root/constraints.txt" | cksum | tr ' ' '-')
  if compgen -G "$venv/.installed-$wanted-$extras*" >/dev/null; then  # with these extras, or more than none
    return
  fi
  if [[ ! -x $python ]] || ! "$python" -m pip --version >/dev/null 2>&1; then
    local base
    base=$(find_python) || return
    echo "making $venv with $("$base" --version)"
    "$base" -m venv --clear "$venv"
  fi
  echo "installing the pinned packages (once; about 2 GB)"
  "$python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/constraints.txt" --editable "$root${extras:+[$extras]}"
  touch "$venv/.installed-$wanted-$extras"
}
