#!/usr/bin/env bash
# Trains on a Slurm cluster's GPUs, one process for each.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 --partition=gpu -- \
#       --config=configs/celebahq.py --workdir=/shared/runs/celebahq
#
# Flags:
#   --nodes=N          machines (default: 1)
#   --gpus=N           GPUs of each (default: 8)
#   --cpus=N           CPU cores for each GPU (default: 8)
#   --time=LIMIT       time limit of one stretch, as sbatch has it (default: the partition's)
#   --partition=NAME   --account=NAME   --qos=NAME   as sbatch has them
#   --job=NAME         name of the job (default: conprediff_jax)
#   --log=FILE         output (default: slurm-%j.log); stretches are appended
#   --setup=COMMANDS   shell commands before training, such as 'source .venv/bin/activate'
#   --sbatch=OPTION    any further option of sbatch; may be repeated
#   --grace=SECONDS    how long before the limit to save and stop, and how long the other processes
#                      may take once the first has ended (default: 120)
#   --dry-run          print the job, submit nothing
#   --                 what follows are the flags of conprediff_jax.main
#
# Before its time limit, and when it is preempted, the run saves and exits with 75. The job then
# puts itself into the queue again, under the same number; also when there was no time to save, and
# the run goes on from an older checkpoint. scancel JOB ends it for good, and scancel --signal=TERM
# JOB has it save and queue again. The workdir must be seen by all nodes.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "error: $*" >&2; exit 2; }

nodes=1 gpus=8 cpus=8 job=conprediff_jax log=slurm-%j.log setup=: grace=120 dry=false
options=()
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --time=* | --partition=* | --account=* | --qos=*) options+=("$1") ;;
    --job=*) job=${1#*=} ;;
    --log=*) log=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --sbatch=*) options+=("${1#*=}") ;;
    --grace=*) grace=${1#*=} ;;
    --dry-run) dry=true ;;
    -h | --help) usage; exit ;;
    --) shift; break ;;
    *) fail "unknown flag '$1'; see $0 --help" ;;
  esac
  shift
done
(($#)) || fail "nothing to run: give the flags of conprediff_jax.main after --"
for flag in nodes gpus cpus grace; do
  [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || fail "--$flag=${!flag}: it must be a number above 0"
done

options+=(
  --job-name="$job" --output="$log" --open-mode=append
  --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --cpus-per-task="$cpus"
  --requeue --signal="B:USR1@$grace"
)
# The warning goes to the job's shell, which remembers it and tells the processes. SIGTERM comes to
# the shell when the job is ended from outside: without a warning before it, by scancel.
# After a warning srun returns 75, or 128 and the signal that ended a process which was not ready to
# be told (15), had no time to save (9), or was left alone by the others (6).
# --kill-on-bad-exit would kill those that still save when the first exits, so --wait ends the rest.
script="#!/usr/bin/env bash
warned=false cancelled=false
trap 'warned=true; scancel --signal=TERM \"\$SLURM_JOB_ID\"' USR1
trap cancelled=true TERM
$setup
srun --cpus-per-task=$cpus --kill-on-bad-exit=0 --wait=$grace \\
  python -m conprediff_jax.main --distributed$(printf ' %q' "$@") &
step=\$!
while kill -0 \$step 2>/dev/null; do wait \$step; done # a signal ends a wait, not the step
wait \$step
code=\$?
case \$warned,\$cancelled,\$code in
  false,true,*) ;;
  *,75 | true,*,134 | true,*,137 | true,*,143) scontrol requeue \"\$SLURM_JOB_ID\" ;;
esac
exit \$code"

printf '+ sbatch'; printf ' %q' "${options[@]}"; printf " <<'JOB'\n%s\nJOB\n" "$script"
$dry || sbatch "${options[@]}" <<<"$script"
