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

ROLLOUT_ARGS=(
   --rollout-function-path slime.rollout.sft_rollout.generate_rollout
   --rollout-num-gpus 0
   --prompt-data "${TASK_DIR}/demonstrations.jsonl"
   --input-key prompt
   --label-key response
   --apply-chat-template
   --num-rollout 60
   --rollout-batch-size 160
   --num-steps-per-rollout 10
   --balance-data
   --rollout-seed "${SEED}"
)

PERF_ARGS=(
   --tensor-model-parallel-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 512
)

SFT_ARGS=(
   --loss-type sft_loss
   --calculate-per-token-loss
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1.5e-3
   --lr-warmup-iters 20
   --lr-decay-style WSD
   --lr-wsd-decay-style linear
   --lr-wsd-decay-iters 180
   --weight-decay 0.01
   --adam-beta1 0.9
   --adam-beta2 0.98
   --clip-grad 1.0
   --seed "${SEED}"
)

cd "${SCRIPT_DIR}/.."
exec python3 train.py \
   --actor-num-nodes 1 \
   --actor-num-gpus-per-node 2 \
   "${MODEL_ARGS[@]}" \
   "${CKPT_ARGS[@]}" \
   "${ROLLOUT_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${SFT_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" \
   "$@"
