#!/usr/bin/env bash
# The whole system on two CPU cores: make a model and a task, supervised start, convert, GRPO, convert back.
# `make demo SEED=n` calls it. CONTROL=1 shuffles the rewards between samples, MODEL=qwen3-moe-tiny uses a mixture of
# experts. Further arguments go to the GRPO run.
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
export SEED="${SEED:-1}"
CONTROL="${CONTROL:-0}"
export MODEL="${MODEL:-glm4-tiny}"
FAMILY="${MODEL%-tiny}"
NAME=demo
[[ "${FAMILY}" == glm4 ]] || NAME="demo-${FAMILY}"
RL_ARGS=("$@")
if [[ "${CONTROL}" == 1 ]]; then
   NAME+=-control
   RL_ARGS+=(--custom-reward-post-process-path examples.arithmetic.shuffled_rewards.shuffle)
fi
DIR="outputs/${NAME}-seed${SEED}"
export TASK_DIR="${DIR}/task" HF_DIR="${DIR}/sft/hf" REF_DIR="${DIR}/sft_torch_dist"
export PYTHONPATH="${PWD}${PYTHONPATH:+:${PYTHONPATH}}"
rm -rf "${DIR}"
mkdir -p "${DIR}"

STAGES=()
SECONDS=0
stage() { # stage NUMBER TITLE COMMAND...: run it under a heading, and remember how long it took
   local number="$1" title="$2" start="${SECONDS}"
   shift 2
   printf '\n\033[1m=== %s/5 %s\033[0m\n' "${number}" "${title}"
   "$@"
   STAGES+=("$(printf '%-48s %5d s' "${number} ${title}" "$((SECONDS - start))")")
   printf -- '--- %s s\n' "$((SECONDS - start))"
}

quietly() { # quietly LOG COMMAND...: output goes to LOG, and to the terminal only if the command fails
   local log="$1"
   shift
   if ! "$@" >"${log}" 2>&1; then
      tail -n 40 "${log}" >&2
      echo "failed: $* (whole log: ${log})" >&2
      return 1
   fi
}

make_task() {
   quietly "${DIR}/make_task.log" python3 examples/arithmetic/make_task.py \
      --out "${TASK_DIR}" --seed "${SEED}" --model "${FAMILY//-/_}"
   tail -n 1 "${DIR}/make_task.log"
   head -n 2 "${TASK_DIR}/train.jsonl"
}

to_torch_dist() {
   source "scripts/models/${MODEL}.sh"
   quietly "${DIR}/to_torch_dist.log" python3 tools/convert_hf_to_torch_dist.py \
      "${MODEL_ARGS[@]}" --hf-checkpoint "${HF_DIR}" --save "${REF_DIR}"
   echo "${HF_DIR} -> ${REF_DIR}"
}

to_hf_and_compare() {
   local last
   last="$(printf '%s/rl/iter_%07d' "${DIR}" "$(<"${DIR}/rl/latest_checkpointed_iteration.txt")")"
   quietly "${DIR}/to_hf.log" python3 tools/convert_torch_dist_to_hf.py \
      --input-dir "${last}" --origin-hf-dir "${HF_DIR}" --output-dir "${DIR}/trained_hf"
   echo "${last} -> ${DIR}/trained_hf"
   python3 tools/show_answers.py --before "${HF_DIR}" --after "${DIR}/trained_hf" --prompt-data "${TASK_DIR}/eval.jsonl"
}

stage 1 "a tiny ${FAMILY}, its tokenizer, and problems" make_task
stage 2 "supervised start" env SAVE_DIR="${DIR}/sft" bash scripts/run-glm4-tiny-sft-cpu.sh
stage 3 "HF -> torch_dist" to_torch_dist
stage 4 "GRPO" env SAVE_DIR="${DIR}/rl" bash "scripts/run-${MODEL}-cpu.sh" "${RL_ARGS[@]}"
stage 5 "torch_dist -> HF, and answers before and after" to_hf_and_compare

printf '\n\033[1m=== %s, seed %s\033[0m\n' "${NAME}" "${SEED}"
cp "${DIR}/rl/metrics.jsonl" "${DIR}/metrics.jsonl"
python3 tools/plot_run.py "${DIR}/metrics.jsonl" --out "${DIR}/curves.png" --title "${NAME}, seed ${SEED}"
printf '%s\n' "${STAGES[@]}"
printf '%-48s %5d s\n' "all stages" "${SECONDS}"
echo "metrics: ${DIR}/metrics.jsonl   trained model: ${DIR}/trained_hf"
