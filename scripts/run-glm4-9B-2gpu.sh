#!/bin/bash
# GLM4-9B on two GPUs of 141 GB, shared by training and generation. Arguments of this script are added last and win:
#   bash scripts/run-glm4-9B-2gpu.sh --dry-run
# Variables: HF_DIR (the model; one made by tools/make_random_checkpoint.py also works), PROMPT_DATA, EVAL_DATA (none),
# SAVE_DIR (if empty, no checkpoint is saved).
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${SCRIPT_DIR}/models/glm4-9B.sh"

HF_DIR="$(realpath -m -- "${HF_DIR:-/root/GLM-Z1-9B-0414}")"
PROMPT_DATA="$(realpath -m -- "${PROMPT_DATA:-/root/dapo-math-17k/dapo-math-17k.jsonl}")"
SAVE_DIR="${SAVE_DIR-/root/GLM-Z1-9B-0414_slime/}"

CKPT_ARGS=(
   --hf-checkpoint "${HF_DIR}"
   # An HF directory works as it is, without conversion
   --ref-load "${HF_DIR}"
)
if [[ -n "${SAVE_DIR}" ]]; then
   SAVE_DIR="$(realpath -m -- "${SAVE_DIR}")"
   CKPT_ARGS+=(--load "${SAVE_DIR}" --save "${SAVE_DIR}" --save-interval 20 --keep-last-checkpoints 2)
else
   CKPT_ARGS+=(--save-interval 0)
fi

ROLLOUT_ARGS=(
   --prompt-data "${PROMPT_DATA}"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle

   # The text after </think> is judged
   --rm-type deepscaler

   --num-rollout 1000
   --rollout-batch-size 32
   --n-samples-per-prompt 8
   --rollout-max-response-len 8192
   --rollout-temperature 0.8

   --num-steps-per-rollout 1
)

EVAL_ARGS=()
if [[ -n "${EVAL_DATA:-}" ]]; then
   EVAL_ARGS+=(--eval-interval 20 --eval-prompt-data held-out "$(realpath -m -- "${EVAL_DATA}")")
fi

PERF_ARGS=(
   --bf16
   # Weights, gradients and Adam's state take 79 GiB of each GPU. There is one data-parallel rank: a distributed
   # optimizer would have nothing to distribute.
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1

   # No recomputation: by the plan (--dry-run) training takes 111 GiB without it. With it 85, and a third more time
   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --eps-clip 0.2
   --eps-clip-high 0.28
   --entropy-coef 0.00
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-6
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
)

SGLANG_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus-per-engine 2
   # The share of the GPU for weights and KV cache; the rest is for the trainer's CUDA context and weight buckets
   --sglang-mem-fraction-static 0.6
)

# train.py starts its own Ray, or joins the one at RAY_ADDRESS (HOST:6379). A dry run needs neither.
cd "${SCRIPT_DIR}/.."
exec python3 train.py \
   --colocate \
   --actor-num-nodes 1 \
   --actor-num-gpus-per-node 2 \
   "${MODEL_ARGS[@]}" \
   "${CKPT_ARGS[@]}" \
   "${ROLLOUT_ARGS[@]}" \
   "${EVAL_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${GRPO_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" \
   "${SGLANG_ARGS[@]}" \
   "$@"
