#!/usr/bin/env bash
# run-glm4-tiny-cpu.sh with a mixture of experts: trained with the experts that the engines chose for each token.
# It has the same variables and flags. Further arguments are passed on, and the last value of a flag wins.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
MODEL=qwen3-moe-tiny
DIR="outputs/demo-qwen3-moe-seed${SEED:-1}"
TASK_DIR="${TASK_DIR:-${DIR}/task}"
HF_DIR="${HF_DIR:-${DIR}/sft/hf}"
REF_DIR="${REF_DIR:-${DIR}/sft_torch_dist}"
SAVE_DIR="${SAVE_DIR:-${DIR}/rl}"
set -- --use-routing-replay "$@"
source "${SCRIPT_DIR}/run-glm4-tiny-cpu.sh"
