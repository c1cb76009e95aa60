#!/usr/bin/env bash
# Trains on Cloud TPU VMs, single or pods.
#
#   launch/tpu_vm.sh up --name=pod --zone=us-west4-a --type=v5litepod-16 --spot -- \
#       --config=configs/celebahq.py --workdir=gs://bucket/celebahq
#
# Commands:
#   create     make the TPU VM, as a queued resource unless --no-queue; waits until it is there
#   install    copy this source tree to all its workers and install it
#   run        train on all of them, in the foreground; again when it exits with 75 (preempted)
#   logs       follow the log of one worker
#   delete     give the machines back
#   up         create, install and run; when spot machines are taken away, all of it anew
#
# Flags:
#   --name=NAME       of the TPU VM and of its queued resource (required)
#   --zone=ZONE       (required)
#   --type=TYPE       accelerator type, such as v5litepod-16 (create, up)
#   --version=VERSION runtime version (default: v2-alpha-tpuv5-lite)
#   --project=ID      project (default: gcloud's own)
#   --spot            cheaper machines that may be taken away at any time
#   --no-queue        ask for the machines now or never
#   --source=DIR      repository whose checked-out commit is installed (default: this one)
#   --python=VERSION  Python on the workers (default: 3.12)
#   --worker=N        whose log (default: 0)
#   --poll=SECONDS    between looks at the queue (default: 30)
#   --dry-run         print the commands, run nothing
#   --                what follows are the flags of conprediff_jax.main
#
# The workdir has to be a bucket, or another place that all workers see.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "error: $*" >&2; exit 2; }

command=${1:-} && shift || true
case $command in
  create | install | run | logs | delete | up) ;;
  -h | --help) usage; exit ;;
  *) usage >&2; fail "the first argument is '$command': give one of the commands above" ;;
esac

name='' zone='' type='' version=v2-alpha-tpuv5-lite project='' spot=false queue=true
source=$(cd "$(dirname "$0")/.." && pwd) python=3.12 worker=0 poll=30 dry=false
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --spot) spot=true ;;
    --no-queue) queue=false ;;
    --source=*) source=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --dry-run) dry=true ;;
    --) shift; break ;;
    *) fail "unknown flag '$1'; see $0 --help" ;;
  esac
  shift
done
[[ $name ]] || fail "--name is missing"
[[ $zone ]] || fail "--zone is missing"

place=(--zone="$zone")
[[ $project ]] && place+=(--project="$project")

# Runs a command, or says what it would be.
step() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  $dry || "$@"
}

on_worker() { # which, command
  step gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>/dev/null || echo MISSING
}

create() {
  [[ $type ]] || fail "--type is missing, such as v5litepod-16"
  local options=("${place[@]}" --accelerator-type="$type" --version="$version")
  if ! $queue; then
    $spot && options+=(--spot)
    step gcloud compute tpus tpu-vm create "$name" "${options[@]}"
    return
  fi
  options=("${place[@]}" --node-id="$name" --accelerator-type="$type" --runtime-version="$version")
  $spot && options+=(--spot)
  step gcloud compute tpus queued-resources create "$name" "${options[@]}"
  if $dry; then
    step gcloud compute tpus queued-resources describe "$name" "${place[@]}"
    return
  fi
  local now
  until now=$(state) && [[ $now == ACTIVE ]]; do
    [[ $now == FAILED || $now == SUSPENDED ]] && fail "the request for $name is $now"
    echo "$name is $now"
    sleep "$poll"
  done
}

install() {
  local archive="${TMPDIR:-/tmp}/$name-source.tar.gz"
  step git -C "$source" archive --format=tar.gz --output="$archive" HEAD
  step gcloud compute tpus tpu-vm scp "$archive" "$name:source.tar.gz" "${place[@]}" --worker=all
  on_worker all "set -e
mkdir -p conprediff_jax && tar -xzf source.tar.gz -C conprediff_jax && cd conprediff_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python=$(printf %q "$python") .venv
python3 -m uv pip install --quiet --editable '.[tpu]'"
}

run() {
  (($#)) || fail "nothing to run: give the flags of conprediff_jax.main after --"
  on_worker all "set -o pipefail; cd conprediff_jax
while true; do
  .venv/bin/python -m conprediff_jax.main --distributed$(printf ' %q' "$@") 2>&1 | tee -a ../train.log
  code=\$?
  [ \$code -eq 75 ] || exit \$code
done"
}

logs() { on_worker "$worker" "tail -n 100 -F train.log"; }

delete() {
  if $queue; then
    step gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    step gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

up() {
  (($#)) || fail "nothing to run: give the flags of conprediff_jax.main after --"
  create
  install
  until run "$@"; do
    [[ $queue == true && $(state) != ACTIVE ]] || fail "the run failed; $0 logs says why"
    echo "$name is $(state): taken away, asking for another"
    delete
    create
    install
  done
}

"$command" "$@"
