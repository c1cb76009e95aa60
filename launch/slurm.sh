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
#   --grace=SECONDS    how long before the limit to save and stop (default: 120)
#   --dry-run          print the job, submit nothing
#   --                 what follows are the flags of conprediff_jax.main
#
# Before its time limit, and when it is preempted, the run saves and exits with 75; the job then puts
# itself into the queue again, under the same number. The workdir must be seen by all nodes.
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

options+=(
  --job-name="$job" --output="$log" --open-mode=append
  --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --cpus-per-task="$cpus"
  --requeue --signal="TERM@$grace"
)
# The signal goes to the processes; the shell around them only has to outlive them.
script="#!/usr/bin/env bash
trap : TERM
$setup
srun --kill-on-bad-exit=1 python -m conprediff_jax.main --distributed$(printf ' %q' "$@")
code=\$?
if [ \$code -eq 75 ]; then scontrol requeue \"\$SLURM_JOB_ID\"; fi
exit \$code"

printf '+ sbatch'; printf ' %q' "${options[@]}"; printf " <<'JOB'\n%s\nJOB\n" "$script"
$dry || sbatch "${options[@]}" <<<"$script"
