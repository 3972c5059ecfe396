#!/usr/bin/env bash
# Supervised start of the demo: 600 steps of 16 demonstrations, one pass over them, on two CPU processes.
# Variables: TASK_DIR (from examples/arithmetic/make_task.py), SAVE_DIR, SEED, MODEL (a file of models/, without
# .sh). Further arguments are passed on.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${SCRIPT_DIR}/models/${MODEL:-glm4-tiny}.sh"

SEED="${SEED:-1}"
TASK_DIR="${TASK_DIR:-outputs/demo-seed${SEED}/task}"
SAVE_DIR="${SAVE_DIR:-outputs/demo-seed${SEED}/sft}"

CKPT_ARGS=(
   --hf-checkpoint "${TASK_DIR}/model"
   --ref-load "${TASK_DIR}/model"
   --load "${SAVE_DIR}"
   --save "${SAVE_DIR}"
   --save-hf "${SAVE_DIR}/hf"
)

# sft.yaml has the flags of data, batch and optimizer; what follows it wins
cd "${SCRIPT_DIR}/.."
exec python3 train.py \
   --config slime/cli/arithmetic/sft.yaml \
   "${MODEL_ARGS[@]}" \
   "${CKPT_ARGS[@]}" \
   --prompt-data "${TASK_DIR}/demonstrations.jsonl" \
   --rollout-seed "${SEED}" \
   --seed "${SEED}" \
   "$@"
