#!/usr/bin/env bash
# The whole tool example on two CPU cores: make the task, supervised start (2 minutes), GRPO with the calculator
# (1 to 2 minutes). With seed 1 the share of right answers on held-out problems went from 0.22 to 0.95 when sampled, and
# from 0.02 to 1.00 when greedy: the pupil at the start prefers to guess.
#     bash examples/tool_use/run.sh            Variables: SEED, DIR. Further arguments go to the GRPO run.
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")/../.."
export SEED="${SEED:-1}"
DIR="${DIR:-outputs/tool-use-seed${SEED}}"
export PYTHONPATH="${PWD}${PYTHONPATH:+:${PYTHONPATH}}"
export TASK_DIR="${DIR}/task" HF_DIR="${DIR}/sft/hf" REF_DIR="${DIR}/sft/hf"
TOOL=examples.tool_use.calculator

python3 examples/tool_use/make_task.py --out "${TASK_DIR}" --seed "${SEED}"

SAVE_DIR="${DIR}/sft" bash scripts/run-glm4-tiny-sft-cpu.sh \
   --custom-convert-samples-to-train-data-path "${TOOL}.without_outputs"

# The calculator's output is part of the response: 64 tokens are enough for two calls and the answer
SAVE_DIR="${DIR}/rl" bash scripts/run-glm4-tiny-cpu.sh \
   --custom-generate-function-path "${TOOL}.generate" \
   --rollout-max-response-len 64 \
   --num-rollout 20 \
   --eval-interval 5 \
   "$@"

python3 tools/plot_run.py "${DIR}/rl/metrics.jsonl" --out "${DIR}/curves.png" --title "calculator, seed ${SEED}"
