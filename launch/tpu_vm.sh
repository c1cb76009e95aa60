#!/usr/bin/env bash
# Trains on Cloud TPU VMs, on single machines or on pods; or runs another command there.
#
#   launch/tpu_vm.sh up --name=pod --zone=us-west4-a --type=v5litepod-16 --spot -- \
#       --config=configs/celebahq.py --workdir=gs://bucket/celebahq
#   launch/tpu_vm.sh run --name=pod --zone=us-west4-a -- \
#       sample --workdir=gs://bucket/celebahq --num=50000 --out=gs://bucket/samples
#
# Commands:
#   create     create the TPU VM, as a queued resource unless --no-queue; wait until it is there
#   install    copy this source tree to all workers and install it there
#   run        train on all workers and follow the log; start again when training exits with 75
#              (preempted)
#   stop       tell the training to save and end
#   logs       follow the log of one worker
#   delete     give the machines back
#   up         create, install and run; do all of it again when the machines are taken away
#
# Flags:
#   --name=NAME       name of the TPU VM and of its queued resource (required)
#   --zone=ZONE       zone of Google Cloud (required)
#   --type=TYPE       accelerator type, such as v5litepod-16 (create, up)
#   --version=VERSION runtime version (default: the one for PyTorch and JAX on that type)
#   --project=ID      project of Google Cloud (default: that of gcloud)
#   --spot            use cheaper machines that may be taken away at any time
#   --no-queue        ask for the machines directly, and fail if there are none now
#   --source=DIR      repository whose checked-out commit is installed (default: this one)
#   --python=VERSION  Python version on the workers (default: 3.12)
#   --max-restarts=N  how often up tries again after a failure on machines that are still there
#                     (default: 3)
#   --worker=N        worker whose log is followed (default: 0)
#   --poll=SECONDS    time between two looks at the queue (default: 30)
#   --dry-run         print the commands, and run nothing
#   --                everything after it is passed to conprediff_jax.main, or to the command of
#                     conprediff_jax whose name comes first, such as sample or precompute
#
# The workdir must be a bucket, or another place that all workers see. Training does not depend on
# the connection: when it is lost, or when you end this command, training continues, and the same
# command follows it again.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "error: $*" >&2; exit 2; }

command=${1:-} && shift || true
case $command in
  create | install | run | stop | logs | delete | up) ;;
  -h | --help) usage; exit ;;
  *) usage >&2; fail "the first argument is '$command': give one of the commands above" ;;
esac

name='' zone='' type='' version='' project='' spot=false queue=true
source=$(cd "$(dirname "$0")/.." && pwd) python=3.12 worker=0 poll=30 restarts=3 dry=false
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
    --max-restarts=*) restarts=${1#*=} ;;
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
[[ $restarts =~ ^[0-9]+$ ]] || fail "--max-restarts=$restarts: it must be a number"

if [[ $command == create || $command == up ]]; then
  [[ $type ]] || fail "--type is missing, such as v5litepod-16"
  # https://cloud.google.com/tpu/docs/runtimes
  case $version$type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-* | v5e-*) version=v2-alpha-tpuv5-lite ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    *) [[ $version ]] || fail "--type=$type is not known here: give its --version too" ;;
  esac
fi
if [[ $command == run || $command == up ]]; then
  module=main
  if (($#)) && [[ $1 != -* ]]; then module=$1; shift; fi
  [[ $module =~ ^[a-z_]+$ ]] || fail "'$module' is no command of conprediff_jax"
  (($#)) || fail "nothing to run: give the flags of conprediff_jax.$module after --"
fi

place=(--zone="$zone")
[[ $project ]] && place+=(--project="$project")

# Runs a command; with --dry-run, prints it instead.
step() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  $dry || "$@"
}

# When the connection is lost, gcloud connects again up to ten times, and repeats the command each
# time. So a repeated command must do no harm.
on_worker() { # which, command
  step gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" \
    --ssh-flag=-oServerAliveInterval=30 --command="$2"
}

# The state of the request for machines or, with --no-queue, of the machines. Listing something that
# does not exist is no error.
state() {
  local kind=queued-resources field=state.state now
  $queue || kind=tpu-vm field=state
  now=$(gcloud compute tpus "$kind" list "${place[@]}" \
    --filter="name~/$name\$" --format="value($field)") || now=UNKNOWN # gcloud has said why
  echo "${now:-MISSING}"
}

ask() {
  local options=("${place[@]}" --accelerator-type="$type")
  $spot && options+=(--spot)
  if $queue; then
    step gcloud compute tpus queued-resources create "$name" --node-id="$name" \
      --runtime-version="$version" "${options[@]}"
  else
    step gcloud compute tpus tpu-vm create "$name" --version="$version" "${options[@]}"
  fi
}

create() {
  if $dry; then
    ask
    return
  fi
  local now asked=false unknown=0
  while true; do
    now=$(state)
    echo "$name is $now"
    [[ $now == UNKNOWN ]] || unknown=0
    case $now in
      ACTIVE | READY) return ;;
      MISSING | FAILED | SUSPENDED | PREEMPTED | TERMINATED)
        if $asked; then
          echo "error: the request for $name is $now" >&2
          return 1
        fi
        if [[ $now != MISSING ]]; then delete || return; fi
        ask || return
        asked=true
        ;;
      UNKNOWN)
        if ((++unknown == 5)); then
          echo "error: gcloud does not say how $name is" >&2
          return 1
        fi
        ;;
    esac
    sleep "$poll"
  done
}

install() {
  local archive="${TMPDIR:-/tmp}/$name-source.tar.gz"
  step git -C "$source" archive --format=tar.gz --output="$archive" HEAD || return
  step gcloud compute tpus tpu-vm scp "$archive" "$name:source.tar.gz" "${place[@]}" --worker=all ||
    return
  on_worker all "set -e
mkdir -p train
flock --shared --nonblock train/lock true || { echo 'it trains already: left as it is'; exit; }
mkdir -p conprediff_jax && tar -xzf source.tar.gz -C conprediff_jax && cd conprediff_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python=$(printf %q "$python") .venv
python3 -m uv pip install --quiet --editable '.[gcs,tfds,tpu]'"
}

# Training holds train/lock on its worker. Every command that ssh runs there has an id. A command
# starts training, with two exceptions: training runs already, or train/ids lists the command's id,
# which means that it started or joined a training that has ended in the meantime. The command then
# follows the log until train/lock is free. Only the command that holds train/door decides, so that
# commands decide one after the other. Other commands look at train/lock, or wait for it, with
# --shared, which does not hide from anyone that the lock is free.
run() {
  local id
  id=$(date +%s)-$$-$RANDOM
  on_worker all "mkdir -p train && cd train && exec 8>door 9>lock || exit
flock 8
cat >new.sh <<'END'
echo \$1 >>ids
cd ../conprediff_jax
while true; do
  .venv/bin/python -m conprediff_jax.$module --distributed$(printf ' %q' "$@")
  code=\$?
  if [ \$code -ne 75 ] || [ -e ../train/stopped ]; then break; fi
done
echo \$code >../train/code
END
lines=20
if flock --shared --nonblock lock true; then
  if ! grep --quiet --no-messages --line-regexp $id ids; then
    mv new.sh run.sh
    rm -f code stopped ids
    touch log
    lines=+\$((\$(wc -l <log) + 1))
    flock 9
    setsid nohup bash run.sh $id >>log 2>&1 </dev/null 8>&- &
    echo \$! >pid
  fi
elif cmp --silent new.sh run.sh; then
  echo $id >>ids
else
  echo 'error: it trains already, with other flags: stop it first' >&2
  exit 2
fi
exec 8>&- 9>&-
flock --shared lock true &
tail --pid=\$! -n \$lines -f log # prints what there is left to print when that has ended
exit \$(cat code 2>/dev/null || echo 137) # killed, if it left no code"
}

stop() {
  on_worker all "cd train || exit
exec 8>door
flock 8
if flock --shared --nonblock lock true; then echo 'it does not train'; exit; fi
touch stopped
until pkill -TERM --parent \$(cat pid) || flock --shared --nonblock lock true; do sleep 1; done"
}

logs() { on_worker "$worker" "tail -n 100 -F train/log"; }

delete() {
  if $queue; then
    step gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    step gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

up() {
  local failures=0 code now
  while true; do
    code=0
    { create && install && run "$@"; } || code=$?
    # Training is done (0), was started wrongly (2), or was stopped by hand (75).
    if [[ $code == 0 || $code == 2 || $code == 75 ]]; then exit "$code"; fi
    now=$(state)
    case $now in
      SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED) # machines that are taken away are no failure
        failures=0
        echo "$name is $now: asking for another"
        ;;
      *)
        if ((++failures > restarts)); then
          echo "error: it ended with $code; $0 logs may say why" >&2
          exit "$code"
        fi
        echo "exit code $code, and $name is $now: trying again"
        sleep "$poll"
        ;;
    esac
  done
}

# Ctrl-C ends the command, and nothing is tried again.
trap 'exit 130' INT
"$command" "$@"
