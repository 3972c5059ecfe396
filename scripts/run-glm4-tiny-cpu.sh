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

ROLLOUT_ARGS=(
   --prompt-data "${TASK_DIR}/train.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --rm-type deepscaler
   --num-rollout 50
   --rollout-batch-size 32
   --n-samples-per-prompt 8
   --rollout-max-response-len 40
   --rollout-temperature 1.0
   --num-steps-per-rollout 1
   --balance-data
   --rollout-seed "${SEED}"
)

# The held-out problems twice: sampled as in training, and greedy
EVAL_ARGS=(
   --eval-interval 10
   --eval-config "${TASK_DIR}/eval.yaml"
)

PERF_ARGS=(
   --tensor-model-parallel-size 1
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 3072
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 4e-4
   --lr-decay-style constant
   --weight-decay 0.0
   --adam-beta1 0.9
   --adam-beta2 0.98
   --clip-grad 1.0
   --seed "${SEED}"
)

SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 1
)

cd "${SCRIPT_DIR}/.."
exec python3 "${PROGRAM:-train.py}" \
   --actor-num-nodes 1 \
   --actor-num-gpus-per-node 2 \
   --rollout-num-gpus 2 \
   "${MODEL_ARGS[@]}" \
   "${CKPT_ARGS[@]}" \
   "${ROLLOUT_ARGS[@]}" \
   "${EVAL_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${GRPO_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" \
   "${SGLANG_ARGS[@]}" \
   "$@"
