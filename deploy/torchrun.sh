#!/usr/bin/env bash
# The learner on several nodes. Run on each of them, with HEAD the same everywhere:
#   NODES=3 HEAD=node0 CONFIG=/shared/runs/mine/config.toml deploy/torchrun.sh
# A node that dies ends all of them; the same command again goes on from the last checkpoint.
set -euo pipefail
: "${NODES:?number of learner nodes}" "${HEAD:?host name of one of them}" "${CONFIG:?recipe or TOML file}"
GPUS="${GPUS:-8}" PORT="${PORT:-29500}" RUN="${RUN:-orz}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" TOKENIZERS_PARALLELISM=false
exec python -m torch.distributed.run \
    --nnodes "$NODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN" \
    -m orz_async.learner "$CONFIG" "$@"
