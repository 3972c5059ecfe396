#!/usr/bin/env bash
# The tool example from nothing, on two CPU cores: make the task, supervised start, GRPO with the calculator.
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

# What the calculator writes counts as part of the response: 64 tokens hold two calls and the answer
SAVE_DIR="${DIR}/rl" bash scripts/run-glm4-tiny-cpu.sh \
   --custom-generate-function-path "${TOOL}.generate" \
   --rollout-max-response-len 64 \
   --num-rollout 20 --eval-interval 5 --save-interval 20 \
   "$@"

python3 tools/plot_run.py "${DIR}/rl/metrics.jsonl" --out "${DIR}/curves.png" --title "calculator, seed ${SEED}"
