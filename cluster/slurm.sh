#!/bin/bash
# A sweep on a Ray cluster inside one Slurm job: sbatch cluster/slurm.sh sweeps/grok_wd_layers.py --preset small
#
# Submit it from the project's root, which all nodes must see, as they must the results. Two minutes before its time is
# over the sweep saves its state and the job goes back to the queue, from where the same command goes on.
#SBATCH --job-name=groundswell
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -euo pipefail
if [[ $# -lt 1 ]]; then
    echo "usage: sbatch cluster/slurm.sh SWEEP.py [OPTIONS OF THE SWEEP]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
# shellcheck disable=SC1091
source .venv/bin/activate
export OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0

# One token a job, on the shared file system: Ray listens on all interfaces, and others have jobs on these nodes, too.
umask 077
RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"

port=$((20000 + SLURM_JOB_ID % 20000))  # several jobs may share a node
temporary="/tmp/ray-$SLURM_JOB_ID"      # short: the paths of Ray's sockets end at 107 bytes
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --ip-address | awk '{print $1}')
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="$temporary")

srun --nodes=1 --ntasks=1 --nodelist="$head_node" --overlap \
    ray start --head --block --node-ip-address="$head_ip" --port="$port" --include-dashboard=false "${resources[@]}" &
ray_pids=($!)
for _ in $(seq 120); do  # until the head answers
    (exec 3<> "/dev/tcp/$head_ip/$port") 2> /dev/null && break
    sleep 1
done
workers=$((SLURM_JOB_NUM_NODES - 1))
if ((workers > 0)); then
    srun --nodes="$workers" --ntasks="$workers" --exclude="$head_node" --overlap \
        ray start --block --address="$head_ip:$port" "${resources[@]}" &
    ray_pids+=($!)
fi

finish() {
    kill "${ray_pids[@]}" 2> /dev/null || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT

requeue=false
save() {  # the driver saves the state of all runs when it is asked to end
    kill -INT "$driver_pid" 2> /dev/null || true  # not TERM: Ray ends the driver three seconds after it
}
trap 'requeue=true; save' USR1
trap save TERM  # scancel: saved, and not queued again

python "$@" --address "$head_ip:$port" &
driver_pid=$!
status=0
wait "$driver_pid" || status=$?
while kill -0 "$driver_pid" 2> /dev/null; do  # a signal ends `wait` before the driver has ended
    status=0
    wait "$driver_pid" || status=$?
done
if [[ $requeue == true && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
