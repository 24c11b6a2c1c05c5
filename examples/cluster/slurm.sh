#!/usr/bin/env bash
# Run a sweep on SLURM. The first node of the job runs Ray's head and the sweep, the others run Ray's
# workers. If the job is killed, requeued or submitted again, the sweep continues where it was.
#
#   sbatch examples/cluster/slurm.sh DESIGN.YAML OUT [options of `hf-familial sweep run`]
#
# OUT is a folder or URL that every node can reach. CPUS and GPUS are the resources of one run.
#SBATCH --job-name=sweep
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=128
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# a lost node ends its runs, but not the job
#SBATCH --no-kill
# SLURM sends USR1 to this script two minutes before the end of the time limit
#SBATCH --signal=B:USR1@120
set -euo pipefail

if (($# < 2)); then
  echo "usage: sbatch $0 DESIGN.YAML OUT [options of 'hf-familial sweep run']" >&2
  exit 2
fi
design=$1 out=$2
shift 2

cpus=${CPUS:-16} gpus=${GPUS:-1}
nodes=$SLURM_JOB_NUM_NODES
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# a name may mean 127.0.1.1 on its own node, and two jobs may share a node
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | awk '{print $1}')
address=$ip:$((20000 + SLURM_JOB_ID % 20000))

export RAY_USAGE_STATS_ENABLED=0
each=(--num-cpus="$SLURM_CPUS_PER_TASK" --block)

srun --overlap --nodes=1 --ntasks=1 --nodelist="$first" \
  ray start --head --node-ip-address="$ip" --port="${address##*:}" --include-dashboard=false \
  "${each[@]}" &
steps=($!)

for ((tried = 0; ; tried++)); do
  if timeout 2 bash -c "</dev/tcp/${address/://}" 2>/dev/null; then
    break
  elif ((tried == 60)) || ! kill -0 "${steps[0]}" 2>/dev/null; then
    echo "Ray's head did not start on $first ($address)" >&2
    exit 1
  fi
  sleep 2
done

if ((nodes > 1)); then
  # a node that comes late, or never, is no reason to wait: the sweep counts nodes anew all the time
  srun --overlap --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="$first" \
    --kill-on-bad-exit=0 ray start --address="$address" "${each[@]}" &
  steps+=($!)
fi

hf-familial sweep run "$design" --out "$out" --ray "$address" --cpus "$cpus" --gpus "$gpus" "$@" &
sweep=$!

finish() {
  kill "${steps[@]}" 2>/dev/null || true
  wait "${steps[@]}" 2>/dev/null || true
}
trap finish EXIT

# the sweep ends as on Ctrl-C, lets its lock go, and waits for its turn again
again() {
  echo "time is over: the job is queued again" >&2
  kill -INT "$sweep" 2>/dev/null || true
  wait "$sweep" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap again USR1

wait "$sweep"
