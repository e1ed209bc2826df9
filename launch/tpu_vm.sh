#!/usr/bin/env bash
# Trains on Cloud TPU VMs: asks for them as a queued resource, installs this checkout on every worker, runs one
# process on each, starts again after a preemption or a fault, and deletes what it created.
#
#   launch/tpu_vm.sh run --name=NAME --zone=ZONE --accelerator_type=v5litepod-16 --runtime_version=V [flags] \
#       -- train --config=FILE --workdir=DIR [flags]
#
# Actions: run; or one step of it: create, install, delete; logs (follow the job), stop (it saves and exits 75),
# status.
# Flags: --name, --zone            of the queued resource; always needed
#        --project=P               default: gcloud's
#        --accelerator_type=T, --runtime_version=V, --slices=N, --spot, --reserved    to create it
#        --create_flag=FLAG        any other flag of `gcloud compute tpus queued-resources create`; may be repeated
#        --ssh_flag=FLAG           of `... ssh` and `... scp`, such as --tunnel-through-iap; may be repeated
#        --setup=COMMAND           shell command on every worker after the install, such as a mount
#        --max_restarts=N          starts again after exit 75, a fault or a preemption; default 20
#        --keep                    run: leave the TPU there at the end
#        --dry_run                 print the commands, run none
#        --poll_seconds=S          between looks at the state; default 30
#
# Codes 2 (wrong input) and 3 (diverged) are final. Whenever this script ends and a TPU is left, it says so.
# Keeps no secrets: gcloud has its own login.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}
say() { echo "tpu_vm.sh: $*" >&2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly here folder=parallel_train # where the workers keep the checkout, under their home
name='' zone='' project='' accelerator_type='' runtime_version='' slices=1 setup='' max_restarts=20
keep='' dry_run='' poll_seconds=30
tier=() create_flags=() ssh_flags=() job=()

parse() {
  local flag value
  while (($#)); do
    flag=${1%%=*} value=${1#*=}
    [[ $1 == *=* || $1 == --spot || $1 == --reserved || $1 == --keep || $1 == --dry_run || $1 == -- ]] ||
      die "$1: is no flag with a value, as in --name=NAME; see the head of this script"
    case $flag in
      --name) name=$value ;;
      --zone) zone=$value ;;
      --project) project=$value ;;
      --accelerator_type) accelerator_type=$value ;;
      --runtime_version) runtime_version=$value ;;
      --slices) slices=$value ;;
      --spot | --reserved) tier+=("$flag") ;;
      --create_flag) create_flags+=("$value") ;;
      --ssh_flag) ssh_flags+=("$value") ;;
      --setup) setup=$value ;;
      --max_restarts) max_restarts=$value ;;
      --poll_seconds) poll_seconds=$value ;;
      --keep) keep=yes ;;
      --dry_run) dry_run=yes ;;
      --)
        shift
        job=("$@")
        return
        ;;
      *) die "$flag: there is no such flag; see the head of this script" ;;
    esac
    shift
  done
}

check() {
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    die "name='$name': must be lower-case letters, digits and -, as in --name=my-tpu"
  [[ $zone ]] || die 'zone: is missing, as in --zone=us-central1-a'
  [[ $slices =~ ^[1-9][0-9]*$ ]] || die "slices=$slices: must be a whole number, at least 1"
  [[ $max_restarts =~ ^[0-9]+$ ]] || die "max_restarts=$max_restarts: must be a whole number"
  [[ $poll_seconds =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "poll_seconds=$poll_seconds: must be a number"
  if [[ $action == run ]]; then
    ((${#job[@]})) && [[ ${job[0]} != -* ]] || die 'command: is missing, as in: -- train --config=FILE --workdir=DIR'
  else
    ((${#job[@]} == 0)) || die "${job[0]}: only run takes a command"
  fi
}

# Runs `gcloud compute tpus queued-resources ACTION ...` on our resource; with --dry_run prints it.
tpu() {
  local command=(gcloud compute tpus queued-resources "$@" --zone="$zone")
  [[ ! $project ]] || command+=(--project="$project")
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

# Runs tpu_worker.sh on all workers of all slices at once, with arguments that arrive as they are. The exit code is
# that of a worker that failed. Without --batch-size the 65th worker would start when the first 64 have ended.
workers() {
  local remote
  remote=$(printf '%q ' bash "$folder/launch/tpu_worker.sh" "$@")
  tpu ssh "$name" --node=all --worker=all --batch-size=all --command="${remote% }" "${ssh_flags[@]}"
}

# ACTIVE, SUSPENDED, ...; ABSENT if there is no such resource.
state() {
  local shown
  if shown=$(tpu describe "$name" --format='value(state.state)' 2>&1); then
    echo "$shown"
  elif [[ $shown == *NOT_FOUND* || $shown == *'not found'* ]]; then
    echo ABSENT
  else
    echo "$shown" >&2
    return 1
  fi
}

# Sets `now` to the state, once it is one that stays.
settle() {
  local last='' failures=0
  while true; do
    now=ABSENT
    if [[ ! $dry_run ]] && ! now=$(state); then # the service may fail for a moment in days of waiting
      failures=$((failures + 1))
      ((failures < 5)) || die "$name: its state cannot be read"
      sleep "$poll_seconds"
      continue
    fi
    failures=0
    [[ $now == "$last" || $now == ABSENT ]] || say "$name: $now"
    last=$now
    case $now in ACTIVE | FAILED | SUSPENDED | ABSENT) break ;; esac
    sleep "$poll_seconds"
  done
}

create() {
  [[ $accelerator_type ]] || die 'accelerator_type: is missing, as in --accelerator_type=v5litepod-16'
  [[ $runtime_version ]] || die 'runtime_version: is missing, as in --runtime_version=v2-alpha-tpuv5-lite'
  local nodes=(--node-id="$name")
  if ((slices > 1)); then
    nodes=(--node-count="$slices" --node-prefix="$name")
  fi
  left=yes # from before the request on, for it may be heard although we fail
  tpu create "$name" --accelerator-type="$accelerator_type" --runtime-version="$runtime_version" \
    "${nodes[@]}" "${tier[@]}" "${create_flags[@]}"
  [[ ! $dry_run ]] || return 0
  settle
  [[ $now == ACTIVE ]] || die "$name: was created but is $now"
}

# Copies the files of this checkout, whether committed or not, to every worker.
install() {
  local archive=/tmp/$folder-$$.tar.gz
  if [[ $dry_run ]]; then
    echo "# the files of $here go into $archive"
  elif git -C "$here" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git -C "$here" ls-files --cached --others --exclude-standard -z |
      (cd "$here" && while IFS= read -rd '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done) |
      tar -C "$here" --null -czf "$archive" -T -
  else
    tar -C "$here" --exclude=.venv --exclude=runs --exclude=__pycache__ -czf "$archive" .
  fi
  tpu scp "$archive" "$name:$folder.tar.gz" --node=all --worker=all --batch-size=all "${ssh_flags[@]}"
  rm -f "$archive"
  tpu ssh "$name" --node=all --worker=all --batch-size=all "${ssh_flags[@]}" \
    --command="mkdir -p $folder && tar -C $folder -xzf $folder.tar.gz"
  workers install "$setup"
}

delete() {
  tpu delete "$name" --force --quiet
  left=
}

run() {
  local restarts=0 ours='' code
  while true; do
    settle
    [[ $now == ABSENT ]] || left=yes
    if [[ $now == FAILED || $now == SUSPENDED ]]; then # a preempted resource cannot be woken
      delete
      now=ABSENT
    fi
    if [[ $now == ABSENT ]]; then
      create
      ours=yes
      install
    elif ((restarts == 0)); then
      install
    fi
    code=0
    workers run "${job[@]}" || code=$?
    case $code in
      0 | 2 | 3 | 4) break ;;
      143) break ;; # by `tpu_vm.sh stop`
    esac
    ((restarts < max_restarts)) || break
    restarts=$((restarts + 1))
    say "exit code $code; starting again (restart $restarts of at most $max_restarts)"
    sleep "$poll_seconds" # a preemption shows in the state a little later
  done
  say "exit code $code"
  if [[ $ours && ! $keep ]]; then
    delete
  fi
  return "$code"
}

# Says what is left, however this script ends.
leave() {
  local code=$?
  if [[ $left && ! $dry_run ]]; then
    local flags="--name=$name --zone=$zone${project:+ --project=$project}"
    say "THE TPU $name IN $zone MAY STILL BE THERE, AND IS THEN BILLED. Look, delete it:"
    say "  $0 status $flags"
    say "  $0 delete $flags"
    if [[ $action == run || $action == logs ]]; then
      say "If the job still runs, it goes on. Follow it, or let it save and end:"
      say "  $0 logs $flags"
      say "  $0 stop $flags"
    fi
  fi
  exit "$code"
}

left=
action=${1-}
[[ ! $action ]] || shift
case $action in
  run | create | install | logs | stop | status | delete) ;;
  *) die "action '$action': must be run, create, install, logs, stop, status or delete" ;;
esac
parse "$@"
check
[[ $dry_run ]] || command -v gcloud >/dev/null || die 'gcloud: is not installed; it is part of the Google Cloud SDK'
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
case $action in
  create | run) "$action" ;;
  install | delete)
    left=yes
    "$action"
    ;;
  logs | stop)
    left=yes
    workers "$action"
    ;;
  status) state ;;
esac
