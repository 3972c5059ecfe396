#!/usr/bin/env bash
# run-glm4-tiny-cpu.sh with train_async.py: the next rollout is generated while the current one trains.
# It has the same variables and flags. Further arguments are passed on, and the last value of a flag wins.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
PROGRAM=train_async.py
SAVE_DIR="${SAVE_DIR:-outputs/demo-seed${SEED:-1}/rl-async}"
source "${SCRIPT_DIR}/run-glm4-tiny-cpu.sh"
