# Sourced by the other scripts: makes the virtual environment .venv with the pinned packages, once.
# Usage: setup_environment EXTRAS   ('' or e.g. 'test'); sets $python.

# Prints the first Python that will do: $PYTHON alone if it is set, else what PATH has.
find_python() {
  local asked=${PYTHON:-} candidate without_venv=''
  local candidates=(python3.12 python3.11 python3)
  if [[ $asked ]]; then candidates=("$asked"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
        command -v "$candidate"
        return
      fi
      without_venv=${without_venv:-$candidate}
    fi
  done
  if [[ $without_venv ]]; then
    echo "error: $without_venv has no venv module; on Debian: apt install ${without_venv##*/}-venv"
  elif [[ $asked ]]; then
    echo "error: PYTHON=$asked: is not Python 3.11 or 3.12, or does not run; name another, or none"
  else
    echo "error: Python 3.11 or 3.12 is needed, and PATH has neither; install one, or name it:" \
      "PYTHON=/path/to/python3.12"
  fi >&2
  return 2
}

setup_environment() {
  local extras=$1 root venv wanted installed base program
  for program in cat cksum touch; do
    if ! command -v "$program" >/dev/null; then
      echo "error: there is no $program on PATH=$PATH" >&2
      return 2
    fi
  done
  root=$(CDPATH='' cd -- "${BASH_SOURCE[0]%/*}/.." && pwd)
  venv=${VENV:-$root/.venv}
  python=$venv/bin/python
  # Installed again when what is asked for changes, or when an installation was cut short.
  wanted=$(cat "$root/setup.cfg" "$root/constraints.txt" | cksum)
  wanted=${wanted// /-}
  installed=("$venv/.installed-$wanted-$extras"*) # with these extras, or more than none
  if [[ -x $python && -e ${installed[0]} ]]; then
    return
  fi
  if [[ ! -x $python ]] || ! "$python" -m pip --version >/dev/null 2>&1; then
    base=$(find_python) || return
    echo "making $venv with $("$base" --version)"
    "$base" -m venv --clear "$venv"
  fi
  echo "installing the pinned packages (once; about 2 GB)"
  (
    cd -- "$root" || exit # pip takes '.' however the folder is called
    "$python" -m pip install --quiet --disable-pip-version-check \
      --constraint constraints.txt --editable ".${extras:+[$extras]}"
  )
  touch "$venv/.installed-$wanted-$extras"
}
