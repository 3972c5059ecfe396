#!/usr/bin/env bash
# The whole system on two CPU cores, in outputs/demo-seed<n>/: `slime demo`, which slime/cli/demo.py describes.
# `make demo SEED=n` calls it. CONTROL=1 shuffles the rewards between samples, MODEL=qwen3-moe-tiny uses a mixture of
# experts. Further arguments go to the GRPO run.
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
FLAGS=(--seed "${SEED:-1}" --model "${MODEL:-glm4-tiny}")
if [[ "${CONTROL:-0}" == 1 ]]; then
   FLAGS+=(--control)
fi
exec python3 -m slime demo "${FLAGS[@]}" "$@"
