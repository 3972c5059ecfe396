#!/usr/bin/env bash
# The guessing game on two CPU cores: make the task, supervised start on a careless player's games, then GRPO.
#     bash examples/guess_number/run.sh        Variables: SEED, DIR. Further arguments go to the GRPO run.
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")/../.."
export SEED="${SEED:-1}"
DIR="${DIR:-outputs/guess-number-seed${SEED}}"
export PYTHONPATH="${PWD}${PYTHONPATH:+:${PYTHONPATH}}"
export TASK_DIR="${DIR}/task" HF_DIR="${DIR}/sft/hf" REF_DIR="${DIR}/sft/hf"

python3 examples/guess_number/make_task.py --out "${TASK_DIR}" --seed "${SEED}"

# 200 steps of 32 games
SAVE_DIR="${DIR}/sft" bash scripts/run-glm4-tiny-sft-cpu.sh \
   --label-key completion \
   --rollout-batch-size 320 \
   --num-rollout 20 \
   --lr-wsd-decay-iters 60

# The environment judges its games; four guesses of two digits, with the end of each turn, are at most 12 tokens
SAVE_DIR="${DIR}/rl" bash scripts/run-glm4-tiny-cpu.sh \
   --custom-generate-function-path examples/guess_number/game.py:generate \
   --rollout-max-response-len 16 \
   --num-rollout 60 \
   --lr 1e-3 \
   "$@"

python3 tools/plot_run.py "${DIR}/rl/metrics.jsonl" --out "${DIR}/curves.png" --title "guess the number, seed ${SEED}"
