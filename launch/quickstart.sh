#!/usr/bin/env bash
# From a fresh clone to a trained Fashion-MNIST model, on every device of this machine.
# Usage: ./launch/quickstart.sh [flags of `train`, such as --config.num_epochs=2 --devices=4; --from=DIR of `prepare`]
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,3s/^# //p' "$0" && exit ;; esac
case $0 in */*) cd -- "${0%/*}/.." ;; *) cd .. ;; esac
source launch/setup.sh
setup_environment "${EXTRAS:-}"

config=configs/fashion_mnist.py
# Other flags make another run, in a folder of its own; the same flags continue the one they began.
workdir=runs/fashion_mnist
if (($#)); then
  sum=$(printf '%s\n' "$@" | cksum)
  workdir+=-${sum%% *}
fi
prepare=()
train=(--workdir="$workdir") # of a flag given twice the last counts, so the user's own wins
for flag in "$@"; do
  case $flag in
    --config=*) config=${flag#*=} ;;
    --from=*) prepare+=("$flag") ;;
    --data_dir=* | --config.* | --noconfig.*) prepare+=("$flag") train+=("$flag") ;;
    *) train+=("$flag") ;;
  esac
done
"$python" -m parallel_train prepare --config="$config" ${prepare[@]+"${prepare[@]}"}
exec "$python" -m parallel_train train --config="$config" "${train[@]}"
