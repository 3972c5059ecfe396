"""The demo's tiny GLM-4 learns on a GPU, in bf16, with SGLang; engine and trainer agree about its policy throughout."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from tests.gpu.checks import Report, check
from tests.gpu.runs import PLAIN_ENGINE, kept_directory, run, scratch, series, train, without, words_of

SFT_ROLLOUTS = 60
ROLLOUTS = 20
LARGEST_GAP = 0.01
SMALLEST_GAIN = 0.3
"""The least gain of the greedy reward on held-out problems. On a CPU in fp32 ten rollouts go from 0.28 to 0.99."""

TINY_ENGINE = (
    *PLAIN_ENGINE,
    *("--sglang-disable-cuda-graph", "--sglang-mem-fraction-static", "0.3", "--sglang-max-total-tokens", "262144"),
)


@check(gpus=1, minutes=6)
def colocated(report: Report) -> None:
    """Train: supervised start, then 20 rollouts of GRPO, on one GPU that trainer and SGLang share."""
    learn(report, ["--colocate", "--actor-num-gpus-per-node", "1", "--bf16", *TINY_ENGINE])


@check(gpus=2, minutes=6)
def decoupled(report: Report) -> None:
    """Train as `colocated` does, on two GPUs, with weight syncs over NCCL."""
    learn(report, ["--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1", "--bf16", *TINY_ENGINE])


@check(gpus=1, minutes=6)
def partial(report: Report) -> None:
    """Train as `colocated` does, with over-sampling and partial rollouts, which continue with later weights."""
    surplus = ["--over-sampling-batch-size", "48", "--partial-rollout"]
    placement = ["--colocate", "--actor-num-gpus-per-node", "1", "--bf16", *TINY_ENGINE]
    events = learn(report, [*placement, *surplus])
    shares = series(events, "train/offpolicy_tokens")
    report.row("share of tokens of older weights, largest of a rollout", max(shares), "> 0", max(shares) > 0)
    report.row("their importance weights, mean of a rollout", shown(series(events, "train/tis_weight")))


def shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def learn(
    report: Report,
    placement: Sequence[str],
    *,
    model: str = "glm4",
    sft_rollouts: int = SFT_ROLLOUTS,
    rollouts: int = ROLLOUTS,
) -> list[dict[str, Any]]:
    """Run both stages of one of the demo's models; `placement` are flags of the GRPO stage. Return its metrics."""
    precision = [word for word in placement if word in ("--bf16", "--no-bf16")]
    with scratch() as directory:
        task = ["--out", str(directory / "task"), "--seed", "1", "--model", model.replace("-", "_")]
        run(["examples/arithmetic/make_task.py", *task])
        variables = {"TASK_DIR": str(directory / "task"), "HF_DIR": str(directory / "sft/hf"), "SEED": "1"}
        variables["MODEL"] = f"{model}-tiny"
        start = time.monotonic()
        words = words_of("run-glm4-tiny-sft-cpu.sh", {**variables, "SAVE_DIR": str(directory / "sft")})
        words += ["--actor-num-gpus-per-node", "1", "--max-tokens-per-gpu", "4096", *precision]
        words += ["--num-rollout", str(sft_rollouts)]
        losses = series(train(words, kept_directory(report, "sft")), "train/loss")
        report.row("supervised start: seconds", time.monotonic() - start)
        report.row("supervised start: loss, first and last rollout", f"{losses[0]:.3f} to {losses[-1]:.3f}")

        start = time.monotonic()
        words = words_of(
            f"run-{model}-tiny-cpu.sh",
            {**variables, "REF_DIR": variables["HF_DIR"], "SAVE_DIR": str(directory / "rl")},
        )
        words = without(words, "--rollout-num-gpus", "--save-interval")
        words += ["--num-rollout", str(rollouts), "--max-tokens-per-gpu", "8192", "--check-weight-sync", *placement]
        events = train(words, kept_directory(report, "grpo"))
    report.row("GRPO: seconds", time.monotonic() - start)
    report.row(
        "engines' checksum after a sync = after loading the actor's export", "checked at the first sync", ok=True
    )

    for name in ("greedy", "sampled"):
        before, *_, after = series(events, f"eval/{name}/reward")
        enough = after - before >= SMALLEST_GAIN
        limit = f"+{SMALLEST_GAIN:g} or more" if name == "greedy" else None
        report.row(
            f"reward on held-out problems, {name}", f"{before:.3f} to {after:.3f}", limit, enough if limit else None
        )
    gap_rows(report, series(events, "train/logprob_gap_mean"), rollouts)
    report.row("largest |train - rollout log-prob| of a token", max(series(events, "train/logprob_gap_max")))
    for phase in ("generation", "training", "weight_sync", "idle", "step"):
        report.row(f"seconds a step, median: {phase}", statistics.median(series(events, f"time/{phase}")))
    return events


def gap_rows(report: Report, gaps: Sequence[float], rollouts: int) -> None:
    """Report the size of the gap, and whether it grows: its rise over the run and the standard error of that."""
    report.row("rollouts", len(gaps), rollouts, len(gaps) == rollouts)
    mean = statistics.mean(gaps)
    report.row("mean |train - rollout log-prob|, over the run", mean, f"<= {LARGEST_GAP:g}", mean <= LARGEST_GAP)
    report.row("its largest of a rollout", max(gaps), f"<= {LARGEST_GAP:g}", max(gaps) <= LARGEST_GAP)
    report.row("the same, rollout by rollout", " ".join(f"{gap * 1e3:.1f}" for gap in gaps) + " e-3")
    slope, intercept = statistics.linear_regression(range(len(gaps)), gaps)
    left = [gap - intercept - slope * step for step, gap in enumerate(gaps)]
    spread = sum((step - (len(gaps) - 1) / 2) ** 2 for step in range(len(gaps)))
    error = math.sqrt(sum(x * x for x in left) / max(len(gaps) - 2, 1) / spread)
    rise, error = slope * (len(gaps) - 1), error * (len(gaps) - 1)
    allowed = max(2 * error, 0.25 * mean)
    report.row("its rise over the run (linear fit)", f"{rise:.2e} ± {error:.1e}", f"<= {allowed:.1e}", rise <= allowed)
