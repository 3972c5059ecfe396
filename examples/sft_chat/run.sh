#!/usr/bin/env bash
# SFT on conversations on two CPU cores, in a few minutes: make the data, train with a validation loss, ask the model.
#     bash examples/sft_chat/run.sh            Variables: SEED, DIR. Further arguments go to the training run.
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")/../.."
SEED="${SEED:-1}"
DIR="${DIR:-outputs/sft-chat-seed${SEED}}"
export PYTHONPATH="${PWD}${PYTHONPATH:+:${PYTHONPATH}}"

python3 examples/sft_chat/make_conversations.py --out "${DIR}/task" --seed "${SEED}"

python3 train.py --config examples/sft_chat/sft.yaml \
   --hf-checkpoint "${DIR}/task/model" --ref-load "${DIR}/task/model" \
   --load "${DIR}/sft" --save "${DIR}/sft" --save-hf "${DIR}/sft/hf" \
   --prompt-data "${DIR}/task/train.jsonl" \
   --eval-prompt-data held-out "${DIR}/task/held_out.jsonl" --eval-interval 5 \
   --rollout-seed "${SEED}" --seed "${SEED}" \
   "$@"

python3 examples/sft_chat/ask.py --model "${DIR}/sft/hf" --data "${DIR}/task/held_out.jsonl"
python3 tools/plot_run.py "${DIR}/sft/metrics.jsonl" --out "${DIR}/curves.png" --title "SFT on conversations, seed ${SEED}"
