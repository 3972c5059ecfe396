#!/usr/bin/env bash
# GRPO on two-digit sums: like run-glm4-9B.sh, at a size for two CPU cores.
# On a CPU, "GPUs" count worker processes: two train, two generate.
# Variables: TASK_DIR (from examples/arithmetic/make_task.py), HF_DIR and REF_DIR (the model to start from, as an HF
# directory and as torch_dist), SAVE_DIR, SEED, MODEL (a file of models/, without .sh). Further arguments are passed on, and the last value of a flag wins.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${SCRIPT_DIR}/models/${MODEL:-glm4-tiny}.sh"

SEED="${SEED:-1}"
TASK_DIR="${TASK_DIR:-outputs/demo-seed${SEED}/task}"
HF_DIR="${HF_DIR:-outputs/demo-seed${SEED}/sft/hf}"
REF_DIR="${REF_DIR:-outputs/demo-seed${SEED}/sft_torch_dist}"
SAVE_DIR="${SAVE_DIR:-outputs/demo-seed${SEED}/rl}"

CKPT_ARGS=(
   --hf-checkpoint "${HF_DIR}"
   --ref-load "${REF_DIR}"
   --load "${SAVE_DIR}"
   --save "${SAVE_DIR}"
   --save-interval 20
)

# grpo.yaml has the flags of rollouts, algorithm and optimizer; what follows it wins
cd "${SCRIPT_DIR}/.."
exec python3 "${PROGRAM:-train.py}" \
   --config slime/cli/arithmetic/grpo.yaml \
   --rollout-num-gpus 2 \
   "${MODEL_ARGS[@]}" \
   "${CKPT_ARGS[@]}" \
   --prompt-data "${TASK_DIR}/train.jsonl" \
   --eval-config "${TASK_DIR}/eval.yaml" \
   --rollout-seed "${SEED}" \
   --seed "${SEED}" \
   "$@"
