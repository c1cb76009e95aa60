#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster, with one process for each GPU; or runs another command.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 --partition=gpu -- \
#       --config=configs/celebahq.py --workdir=/shared/runs/celebahq
#   launch/slurm.sh --nodes=2 --gpus=8 --time=2:00:00 -- \
#       evaluate --workdir=/shared/runs/celebahq --reference=/shared/celeba --num=50000
#
# Flags:
#   --nodes=N          number of machines (default: 1)
#   --gpus=N           GPUs of each machine (default: 8)
#   --cpus=N           CPU cores for each GPU (default: 8)
#   --time=LIMIT       time limit each time the job runs, in the form of sbatch (default: that of
#                      the partition)
#   --partition=NAME   --account=NAME   --qos=NAME   the options of sbatch of these names
#   --job=NAME         name of the job (default: conprediff_jax)
#   --log=FILE         file for the output (default: slurm-%j.log); later runs append to it
#   --setup=COMMANDS   shell commands that run before it, such as 'source .venv/bin/activate'
#   --sbatch=OPTION    any other option of sbatch; may be given several times
#   --grace=SECONDS    how long before the time limit the run saves and stops, and how long other
#                      processes may take once the first has ended (default: 120)
#   --dry-run          print the job, and submit nothing
#   --                 everything after it is passed to conprediff_jax.main, or to the command of
#                      conprediff_jax whose name comes first, such as sample or precompute
#
# Before its time limit, and when it is preempted, the run saves a checkpoint and exits with 75. The
# job then puts itself back into the queue, under the same number. It also does so when there was no
# time to save; the run then continues from an older checkpoint. scancel JOB ends the job for good.
# scancel --signal=TERM JOB tells the run to save, and puts the job back into the queue. All nodes
# must see the workdir.
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
module=main
if (($#)) && [[ $1 != -* ]]; then module=$1; shift; fi
[[ $module =~ ^[a-z_]+$ ]] || fail "'$module' is no command of conprediff_jax"
(($#)) || fail "nothing to run: give the flags of conprediff_jax.$module after --"
for flag in nodes gpus cpus grace; do
  [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || fail "--$flag=${!flag}: it must be a number above 0"
done

options+=(
  --job-name="$job" --output="$log" --open-mode=append
  --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --cpus-per-task="$cpus"
  --requeue --signal="B:USR1@$grace"
)
# Slurm sends its warning to the job's shell, which remembers it and passes it on to the processes.
# The shell gets SIGTERM when the job is ended from outside; without a warning before it, scancel
# has ended the job. After a warning, srun returns 75, or 128 plus the signal that ended a process:
# a process that was not ready for the signal (15), had no time to save (9), or was left alone by
# the others (6). --kill-on-bad-exit would kill processes that still save when the first one exits.
# --wait ends the remaining processes instead.
script="#!/usr/bin/env bash
warned=false cancelled=false
trap 'warned=true; scancel --signal=TERM \"\$SLURM_JOB_ID\"' USR1
trap cancelled=true TERM
$setup
srun --cpus-per-task=$cpus --kill-on-bad-exit=0 --wait=$grace \\
  python -m conprediff_jax.$module --distributed$(printf ' %q' "$@") &
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
