#!/usr/bin/env bash
# Train on Slurm, in the project's folder with its .venv, on a disk shared by all nodes:
#   sbatch cluster/vm/slurm.sh --recipe paper --data /scratch/shards --out /scratch/runs/first --workers 2
# Exclusive nodes: `ray stop` at the end would also stop the Ray of another job on the same node.
#SBATCH --job-name=raylivecell
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --time=08:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
PATH=$PWD/.venv/bin:$PATH
export PATH

if ! [ -s ~/.ray/auth_token ]; then
  echo "no token at ~/.ray/auth_token: create one with \`ray get-auth-token --generate\`" >&2
  exit 2
fi
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# Python is loaded from a shared disk: the last node may start minutes after the first.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
ulimit -n "$(ulimit -Hn)"

# This script runs on the first node of the job, which becomes the head.
address=$(hostname -I | cut -d ' ' -f 1):6379
# RAY_ADDRESS only for the training, which would otherwise start another Ray. A job that Slurm requeues, also after
# the loss of a node, resumes from the run's latest checkpoint.
srun --kill-on-bad-exit=1 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus="$SLURM_CPUS_ON_NODE" --dashboard-host=127.0.0.1 --temp-dir="/tmp/ray-$SLURM_JOB_ID" \
  -- env RAY_ADDRESS="$address" python jobs/train.py --resume auto "$@"
