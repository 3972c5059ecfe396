"""The unchanged scripts for small machines, on random weights of true size: three steps, phases and memory."""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path

from slime.config.parse import load_args
from slime.plan.memory_model import engine_memory, train_memory
from slime.rollout.dump import read_dump
from tests.gpu.checks import Report, check
from tests.gpu.rounding import measure_rounding
from tests.gpu.runs import PLAIN_ENGINE, kept_directory, run, scratch, series, train, words_of

STEPS = 3
NEW_TOKENS = 1024
LETTERS = "abcdefghijklmnopqrstuvwxyz "
PHASES = ("generation", "offload", "training", "weight_sync", "idle", "step")


@check(gpus=2, minutes=12)
def glm4_9b_2gpu(report: Report) -> None:
    """Run GLM4-9B with all 40 layers, colocated at TP 2."""
    run_script(report, "run-glm4-9B-2gpu.sh", "scripts/models/glm4-9B.sh")


@check(gpus=1, minutes=7)
def qwen3_0_6b_1gpu(report: Report) -> None:
    """Run Qwen3-0.6B, colocated on one GPU."""
    run_script(report, "run-qwen3-0.6B-1gpu.sh", "scripts/models/qwen3-0.6B.sh")


def write_prompts(path: Path, number: int) -> None:
    rng = random.Random(0)
    texts = ("".join(rng.choices(LETTERS, k=100)) for _ in range(number))
    lines = (json.dumps({"prompt": [{"role": "user", "content": text}], "label": "0"}) + "\n" for text in texts)
    path.write_text("".join(lines))


def run_script(report: Report, script: str, model: str) -> None:
    """Run a script with additional flags that make it short: nothing is saved, and rewards are random."""
    log_dir = kept_directory(report, "run")
    with scratch() as directory:
        start = time.monotonic()
        run(["tools/make_random_checkpoint.py", "--from-args", model, "--out", str(directory / "hf")])
        report.row("seconds to make the checkpoint", time.monotonic() - start)
        write_prompts(directory / "prompts.jsonl", 64 * STEPS)
        variables = {"HF_DIR": str(directory / "hf"), "PROMPT_DATA": str(directory / "prompts.jsonl"), "SAVE_DIR": ""}
        words = words_of(script, variables)
        words += ["--num-rollout", str(STEPS), "--rm-type", "random", "--rollout-max-response-len", str(NEW_TOKENS)]
        words += ["--update-weight-disk-dir", str(directory / "engine-weights"), *PLAIN_ENGINE]
        words += ["--save-debug-rollout-data", str(directory / "rollout-{rollout_id}.jsonl")]
        args, _ = load_args([*words, "--dry-run"])
        start = time.monotonic()
        events = train(words, log_dir)
        report.row("seconds of the run, with all starts", time.monotonic() - start)
        # Use the first rollout's samples, which the weights on disk have generated. The run has ended; its GPU is free.
        samples = [sample for group in read_dump(directory / "rollout-0.jsonl") for sample in group]
        rounding = measure_rounding(directory / "hf", samples, args.rollout_temperature, device="cuda")
    steps = len(series(events, "train/loss"))
    report.row("steps", steps, STEPS, steps == STEPS)
    gap = max(series(events, "train/logprob_gap_mean"))
    limit = rounding.limit
    report.row("mean |log-prob of Hugging Face's bf16 - its fp32|", rounding.bf16)
    report.row(
        "mean |rollout log-prob - Hugging Face's fp32|", rounding.engine, f"<= {limit:.3g}", rounding.engine <= limit
    )
    report.row("largest mean |train - rollout log-prob|", gap, f"<= {limit:.3g}, twice that rounding", gap <= limit)
    report.row("control: bf16 at another temperature", rounding.wrong, f"> {limit:.3g}", rounding.wrong > limit)
    for phase in PHASES:
        found = series(events, f"time/{phase}")
        shown = " ".join(f"{seconds:.2f}" for seconds in found)
        report.row(f"seconds a step, median: {phase}", statistics.median(found or [0.0]), shown)
    for name in ("train/tokens_per_second", "rollout/tokens_per_second", "sync/seconds", "sync/gb_per_s"):
        report.row(f"{name}, median", statistics.median(series(events, name)))
    planned, engine = train_memory(args, on_cuda=True), engine_memory(args)
    for name in sorted({name for event in events for name in event if name.startswith("memory/")}):
        report.row(f"{name}, largest", max(series(events, name)))
    if planned is not None and engine is not None:
        report.row("planned: GB of a training rank at most, context not counted", planned.peak / 1e9)
        report.row("planned: GB of the engine's weights and its requests' KV", engine.peak / 1e9)
