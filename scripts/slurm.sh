#!/usr/bin/env bash
# Train on several machines under Slurm: sbatch scripts/slurm.sh experiment=celebahq data.root=/data/celebahq
# Whatever follows the name of this file goes to train.py, or to the script named first:
# sbatch scripts/slurm.sh sample.py ckpt=runs/celebahq num_samples=50000. The same line again continues.
# docs/clusters.md says more.
#SBATCH --job-name=ldm_lab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8        # one process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8          # of which data.num_workers load images
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120          # two minutes before the time is over: save, and ask for another turn
#SBATCH --requeue                  # and after a preemption or the failure of a machine, where Slurm asks itself
#SBATCH --open-mode=append         # the log goes on where the job does
#SBATCH --output=%x-%j.log
set -euo pipefail

stop() { echo "error: $*" >&2; exit 1; }

[ -n "${SLURM_JOB_ID:-}" ] || stop "this is not a Slurm job: start it with sbatch scripts/slurm.sh"
command -v srun > /dev/null || stop "srun is not on PATH: load Slurm's module (module load slurm, or as your site calls it)"
each=${SLURM_NTASKS_PER_NODE:?error: set --ntasks-per-node, one task for each GPU, and not --ntasks}
nodes=$SLURM_JOB_NUM_NODES
[ "$SLURM_NTASKS" -eq $((each * nodes)) ] || stop "$SLURM_NTASKS tasks do not fit $nodes nodes of $each: set --ntasks-per-node, not --ntasks"
[ "${SLURM_GPUS_ON_NODE:-$each}" -eq "$each" ] || stop "$each tasks a node for $SLURM_GPUS_ON_NODE GPUs: --ntasks-per-node must be --gpus-per-node"

script=train.py
case "${1:-}" in *.py) script=$1; shift ;; esac

cd "${SLURM_SUBMIT_DIR:-.}"
status=0
# If one process fails, all of them end: the others would wait for it.
srun --kill-on-bad-exit=1 python "$script" "$@" \
    trainer=ddp trainer.devices="$each" trainer.num_nodes="$nodes" || status=$?

# 128 + SIGUSR1: saved ahead of the time limit. SIGTERM is no reason: scancel sends it, too.
if [ "$status" -eq 138 ]; then
    echo "job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
