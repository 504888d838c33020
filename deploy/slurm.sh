#!/usr/bin/env bash
# One run on nodes that Slurm gives: the first holds the learner (4 GPUs), the others rollout actors (4 GPUs each).
#   sbatch deploy/slurm.sh                                              recipe gpu-cluster, run folder runs/ray-rl
#   sbatch --nodes=5 deploy/slurm.sh gpu-cluster rollout.num_actors=16
#   RUN_DIR=/scratch/me/first sbatch deploy/slurm.sh ...
# Submit it in the checkout, on a file system that all nodes see and where `make setup ACCELERATOR=cuda` was run. A job that was
# preempted comes back and goes on at the run's last checkpoint; one whose time was up goes on when it is submitted again.
#SBATCH --job-name=ray-rl
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if (($#)); then training=("$@"); else training=(gpu-cluster rollout.num_actors=8); fi
export RUN_DIR=${RUN_DIR:-$SLURM_SUBMIT_DIR/runs/$SLURM_JOB_NAME}
export PATH=$SLURM_SUBMIT_DIR/.venv/bin:$PATH
export PYTHONPATH=$SLURM_SUBMIT_DIR RAY_USAGE_STATS_ENABLED=0

# Whoever reaches Ray's ports could run code as this user: each job has a token of its own.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

# By number: a node's name may mean 127.0.1.1 to itself, and then every node takes itself for the head, or none does.
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r ip _ < <(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)
export ADDRESS=$ip:$((20000 + SLURM_JOB_ID % 10000))
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# `ray symmetric-run` exits with 0 where Ray did not start, too; whether the run came to its end is told by this file.
export DONE=$RUN_DIR.$SLURM_JOB_ID.done
mkdir -p "$(dirname "$RUN_DIR")"
rm -f "$DONE"

# On every node. The temporary folder's name is short, since paths of sockets are, and its own, since other users have one,
# too. It is no option: with --temp-dir, `ray symmetric-run` does not find the Ray that it has started, and waits for nodes in
# another one.
on_each_node() {
  export RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID
  mkdir -p "$RAY_TMPDIR"
  if ((SLURM_NODEID == 0)); then pool=learner; else pool=rollout; fi
  exec ray symmetric-run --address "$ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --labels="pool=$pool" \
    --dashboard-host=127.0.0.1 --disable-usage-stats -- \
    env RAY_ADDRESS="$ADDRESS" bash -c 'python -m ray_rl train "$@" --run-dir "$RUN_DIR" --continue && touch "$DONE"' bash "$@"
}
export -f on_each_node
# The CPUs once more, since steps do not inherit them; and a rollout node that dies does not end the others.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 bash -c 'on_each_node "$@"' bash "${training[@]}"

if [[ ! -e $DONE ]]; then
  echo "error: the run in $RUN_DIR did not come to its end; why, stands above. Submit the job again to go on with it" >&2
  exit 1
fi
rm -f "$DONE"
