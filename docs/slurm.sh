#!/bin/bash
# Pretraining on 2 nodes of 8 GPUs each, which requeues itself: sbatch docs/slurm.sh
#
# Five minutes before the time limit, or where the job is preempted, every rank gets SIGTERM, finishes its step and
# writes a checkpoint; the job then puts itself back into the queue and goes on from there, to the bit. Where a node
# fails, Slurm requeues the job itself, and it goes on from its newest checkpoint. Adjust what is marked ←.
#SBATCH --job-name=hardviews
#SBATCH --nodes=2                # ←
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8        # ←
#SBATCH --cpus-per-task=96       # ←
#SBATCH --time=24:00:00          # ←
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
#SBATCH --output=%x-%j.out

set -u
run=${RUN:-runs/synby-hard-deit-s}                       # ← on a file system that all nodes see
shards=${SHARDS:-/data/imagenet-shards}                  # ←
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A run that has a checkpoint is taken up again; one that was stopped before its first one starts anew.
if compgen -G "$run/checkpoints/step-*.json" >/dev/null; then
    how=--resume
elif [ -e "$run" ]; then
    how=--overwrite
else
    how=
fi

# --shutdown-timeout: how long torchrun waits for ranks that got a signal; its own 30 s may be less than a step and a
# checkpoint take. --max-restarts=0: a job that lost a rank ends, with the reason, rather than restarting in place.
# --: without it torchrun takes --run for one of its own flags.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --max-restarts=0 --shutdown-timeout=240 \
    -- "$(which hardviews)" pretrain synby-hard-deit-s --run "$run" --data.real "$shards" $how &
step=$!

stopped=
stop() {
    stopped=yes
    scancel --signal=TERM "$SLURM_JOB_ID"                # the job's steps, not this script
}
trap stop TERM
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do                    # a trap ends `wait`; the step still writes its checkpoint
    wait "$step"
    code=$?
done

if [ -n "$stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
