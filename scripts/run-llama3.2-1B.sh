#!/bin/bash
# Llama-3.2-1B-Instruct on 4 GPUs: 2 train, 2 generate. Arguments of this script are added last and win:
#   bash scripts/run-llama3.2-1B.sh --dry-run
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${SCRIPT_DIR}/models/llama3.2-1B.sh"

CKPT_ARGS=(
   --hf-checkpoint /root/Llama-3.2-1B-Instruct
   --ref-load /root/Llama-3.2-1B-Instruct_torch_dist
   --load /root/Llama-3.2-1B-Instruct_slime/
   --save /root/Llama-3.2-1B-Instruct_slime/
   --save-interval 20
)

ROLLOUT_ARGS=(
   # All problems but the first 256, which are for evaluation
   --prompt-data /root/dapo-math-17k/dapo-math-17k.jsonl@[256:]
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle

   # The last \boxed{...} of the answer. (deepscaler requires a </think> before it, which this model does not write.)
   --rm-type math

   --num-rollout 500
   --rollout-batch-size 64
   --n-samples-per-prompt 8
   --rollout-max-response-len 4096
   --rollout-temperature 1.0

   # 512 samples, in two optimizer steps
   --num-steps-per-rollout 2
   --balance-data
)

EVAL_ARGS=(
   --eval-interval 20
   --eval-prompt-data held-out /root/dapo-math-17k/dapo-math-17k.jsonl@[0:256]
   --n-samples-per-eval-prompt 1
   --eval-temperature 0
)

PERF_ARGS=(
   # The whole model fits on one GPU: two data-parallel ranks
   --tensor-model-parallel-size 1
   --pipeline-model-parallel-size 1
   --context-parallel-size 1

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.001
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
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
   --rollout-num-gpus-per-engine 1
)

# If RAY_ADDRESS is the URL of Ray's job server (http://HOST:8265), the job is submitted to that cluster; otherwise
# train.py starts its own Ray. A dry run needs neither.
cd "${SCRIPT_DIR}/.."
SUBMIT=()
if [[ -n "${RAY_ADDRESS:-}" && " $* " != *" --dry-run "* ]]; then
   SUBMIT=(ray job submit --address "${RAY_ADDRESS}" --working-dir . --)
fi

exec "${SUBMIT[@]}" python3 train.py \
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
