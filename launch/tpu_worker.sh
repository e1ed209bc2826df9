#!/usr/bin/env bash
# Runs on every worker of a TPU, called by tpu_vm.sh: installs, starts the job so that it survives a lost
# connection, follows it, stops it.
#
#   tpu_worker.sh install [SETUP]     makes .venv with the extra `tpu`; then runs the shell command SETUP
#   tpu_worker.sh run COMMAND ...     starts `python -m parallel_train COMMAND ...`, or follows the one that runs
#   tpu_worker.sh logs                follows it, or shows the last one
#   tpu_worker.sh stop                SIGTERM: the job saves; waits until it has ended
#
# The exit code of run and logs is the job's, or 143 if it ended by `stop`.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly job=${JOB_DIR:-$HOME/.parallel_train_job} # holds: lock, log, pid, code
readonly lock=$job/lock
mkdir -p "$job"

# The job and what it starts hold the lock for as long as they live, however they end.
runs() { ! flock --shared --nonblock "$lock" true; }

install() {
  if ! command -v python3.11 python3.12 >/dev/null; then
    sudo apt-get update -qq
    sudo apt-get install -qq -y python3.11 python3.11-venv
  fi
  source launch/setup.sh
  setup_environment tpu,gcs
  if [[ ${1-} ]]; then
    bash -euo pipefail -c "$1"
  fi
}

start() {
  local python=${PYTHON:-$PWD/.venv/bin/python}
  rm -f "$job/code" "$job/pid" "$job/stopped"
  : >"$job/log"
  # shellcheck disable=SC2016  # to be expanded by the inner shell
  setsid --fork flock "$lock" bash -c '
    job=$1; shift
    "$@" & echo $! >"$job/pid"
    code=0; wait $! || code=$?
    echo "$code" >"$job/code.new" && mv "$job/code.new" "$job/code"
  ' bash "$job" "$python" -u -m parallel_train "$@" </dev/null >>"$job/log" 2>&1
  until runs || [[ -e $job/code ]]; do sleep 0.1; done
}

follow() {
  [[ -e $job/log ]] || { echo "error: $HOSTNAME: no job has run here" >&2 && exit 2; }
  # Who waits for the lock ends when the job does, and takes tail with it.
  flock --shared "$lock" true </dev/null >/dev/null 2>&1 &
  tail --lines=+1 --follow --sleep-interval=0.5 --pid=$! "$job/log" | sed -u "s/^/[$HOSTNAME] /"
  if [[ ! -e $job/code ]]; then
    echo "[$HOSTNAME] error: the job was killed with its shell" >&2
    exit 137
  fi
  [[ ! -e $job/stopped ]] || exit 143
  exit "$(<"$job/code")"
}

action=${1-}
shift || true
case $action in
  install) install "$@" ;;
  run)
    if runs; then
      echo "[$HOSTNAME] a job runs here already; this follows it" >&2
    else
      start "$@"
    fi
    follow
    ;;
  logs) follow ;;
  stop)
    if runs; then
      until [[ -e $job/pid ]]; do sleep 0.1; done
      touch "$job/stopped"
      kill -TERM "$(<"$job/pid")"
      flock --shared "$lock" true
      echo "[$HOSTNAME] stopped, exit code $(<"$job/code")"
    else
      echo "[$HOSTNAME] no job runs here"
    fi
    ;;
  *)
    echo "error: action '$action': must be install, run, logs or stop" >&2
    exit 2
    ;;
esac
