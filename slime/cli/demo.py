"""Teach a tiny model to add, through the whole system, on two CPU cores: `slime demo`.

    slime demo [--seed 2] [--control] [--model qwen3-moe-tiny] [flags of the GRPO run]

It makes a model of a million parameters with random weights and two-digit sums, teaches the model the format of an
answer from a careless pupil's demonstrations, and lets it learn to add by GRPO: Ray, sglang-router, HTTP engines and
Megatron-core, as in any run. The share of right answers on held-out sums rises from under 0.45 to over 0.85.

It takes about 5 minutes on two idle cores: 2 for the supervised start, 2 for GRPO, the rest for starts and conversions.
Everything is written to outputs/demo-seed1/ in the current folder (an earlier demo there is replaced): curves.png,
metrics.jsonl, and the trained model as an HF directory.

--control shuffles the rewards between samples, so that there is nothing to learn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from slime.core.errors import RunError
from slime.plan.fit import load_run

MODELS = {"glm4-tiny": "glm4", "qwen3-moe-tiny": "qwen3_moe"}
"""The families of `arithmetic.make_task`, by the model's name in scripts/models/."""
FLAGS_OF_MODEL = {"glm4-tiny": (), "qwen3-moe-tiny": ("--use-routing-replay",)}
SLIME = (sys.executable, "-m", "slime")


@dataclass(frozen=True)
class Step:
    """A command of the demo. Its output goes to `log`, if that is not None, and else to the terminal."""

    words: tuple[str, ...]
    log: Path | None = None


@dataclass(frozen=True)
class Demo:
    """The choices of one demo: model, seed, whether rewards are shuffled, and further flags of the GRPO run."""

    model: str = "glm4-tiny"
    seed: int = 1
    control: bool = False
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the demo: demo, demo-control, demo-qwen3-moe, ..."""
        family = self.model.removesuffix("-tiny")
        return "demo" + ("" if family == "glm4" else f"-{family}") + ("-control" if self.control else "")

    @property
    def directory(self) -> Path:
        """Return the directory of all files, relative to the current folder."""
        return Path("outputs") / f"{self.name}-seed{self.seed}"


def stages(demo: Demo, configs: Path) -> list[tuple[str, list[Step]]]:
    """Return the stages, each with its title and commands; `configs` is the folder of sft.yaml and grpo.yaml."""
    out = demo.directory
    task, start, reference, trained = out / "task", out / "sft/hf", out / "sft_torch_dist", out / "trained_hf"
    seeds = ("--rollout-seed", str(demo.seed), "--seed", str(demo.seed))
    make = (sys.executable, "-m", "slime.cli.arithmetic.make_task", "--out", str(task), "--seed", str(demo.seed))
    shuffle = ("--custom-reward-post-process-path", "slime.cli.arithmetic.shuffled_rewards.shuffle")
    sft = (
        *(*SLIME, "train", str(configs / "sft.yaml"), "--hf-checkpoint", str(task / "model")),
        *("--ref-load", str(task / "model"), "--load", str(out / "sft"), "--save", str(out / "sft")),
        *("--save-hf", str(start), "--prompt-data", str(task / "demonstrations.jsonl"), *seeds),
    )
    grpo = (
        *(*SLIME, "train", str(configs / "grpo.yaml"), "--hf-checkpoint", str(start), "--ref-load", str(reference)),
        *("--load", str(out / "rl"), "--save", str(out / "rl"), "--prompt-data", str(task / "train.jsonl")),
        *("--rollout-num-gpus", "2", "--save-interval", "20"),
        *("--eval-config", str(task / "eval.yaml"), *seeds, *FLAGS_OF_MODEL[demo.model]),
        *(*(shuffle if demo.control else ()), *demo.more),
    )
    convert = (*SLIME, "convert", "--hf-checkpoint", str(start), "--save", str(reference))
    export = (*SLIME, "export", "--input-dir", str(out / "rl"), "--origin-hf-dir", str(start))
    compare = (*SLIME, "answers", "--before", str(start), "--after", str(trained))
    plot = (*SLIME, "plot", str(out / "metrics.jsonl"), "--out", str(out / "curves.png"))
    return [
        ("a tiny model, its tokenizer, and problems", [Step((*make, "--model", MODELS[demo.model]), out / "task.log")]),
        ("supervised start", [Step(sft)]),
        ("HF -> torch_dist", [Step(convert, out / "convert.log")]),
        ("GRPO", [Step(grpo)]),
        (
            "torch_dist -> HF, answers before and after, curves",
            [
                Step((*export, "--output-dir", str(trained)), out / "export.log"),
                Step((*compare, "--prompt-data", str(task / "eval.jsonl"))),
                Step((*plot, "--title", f"{demo.name}, seed {demo.seed}")),
            ],
        ),
    ]


def training_runs(demo: Demo, configs: Path) -> list[tuple[str, ...]]:
    """Return the words after `slime train` of the two training runs, in their order."""
    words = [step.words for _, steps in stages(demo, configs) for step in steps]
    return [found[len(SLIME) + 1 :] for found in words if found[: len(SLIME) + 1] == (*SLIME, "train")]


def run(demo: Demo) -> None:
    """Run all stages in the current folder.

    Raises:
        UsageError: the flags of the GRPO run are wrong; nothing has been started then, and no file changed.
        RunError: a command failed.
    """
    out = demo.directory
    times: list[tuple[str, float]] = []
    with as_file(files("slime.cli.arithmetic")) as configs:
        for words in training_runs(demo, configs):
            load_run([*words, "--dry-run"])
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for number, (title, steps) in enumerate(stages(demo, configs), 1):
            _heading(f"{number}/5 {title}")
            start = time.monotonic()
            for step in steps:
                if "plot" in step.words:
                    shutil.copy(out / "rl" / "metrics.jsonl", out / "metrics.jsonl")
                run_step(step)
            times.append((f"{number} {title}", time.monotonic() - start))
            print(f"--- {times[-1][1]:.0f} s", flush=True)
    _heading(f"{demo.name}, seed {demo.seed}")
    for title, seconds in [*times, ("all stages", sum(seconds for _, seconds in times))]:
        print(f"{title:<56} {seconds:5.0f} s")
    print(f"curves: {out}/curves.png   metrics: {out}/metrics.jsonl   trained model: {out}/trained_hf")


def _status_of(process: subprocess.Popen[bytes]) -> int:
    """Return a command's exit status. Signals to the demo end the command, which ends the processes that it started."""
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to the command as well
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _heading(text: str) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}=== {text}{plain}", flush=True)


def run_step(step: Step) -> None:
    """Run one command, and show the last line of its log, or the end of it if the command fails.

    Raises:
        RunError: it failed.
    """
    if step.log is None:
        status = _status_of(subprocess.Popen(step.words))
    else:
        with step.log.open("wb") as log:
            status = _status_of(subprocess.Popen(step.words, stdout=log, stderr=subprocess.STDOUT))
        lines = step.log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-40:] if status else lines[-1:]), flush=True)
    if status:
        where = "" if step.log is None else f"; its whole output is in {step.log}"
        raise RunError(f"a command of the demo has failed with status {status}: {' '.join(step.words)}{where}")


def main(argv: Sequence[str]) -> None:
    """Run the demo with the flags of `argv`; flags that are not its own go to the GRPO run.

    Raises:
        ValueError: a flag is wrong.
        RunError: a command failed.
    """
    parser = argparse.ArgumentParser(
        prog="slime demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="slime demo [--seed N] [--model MODEL] [--control] [flags of the GRPO run]",
    )
    parser.add_argument("--seed", type=int, default=1, help="of weights, demonstrations, data order and sampling")
    parser.add_argument("--model", choices=MODELS, default="glm4-tiny", help="qwen3-moe-tiny: a mixture of experts")
    parser.add_argument("--control", action="store_true", help="shuffle the rewards between samples")
    own, more = parser.parse_known_args(argv)
    if more and not more[0].startswith("--"):
        raise ValueError(f"{more[0]!r} does not follow a flag; the demo takes its own flags and those of the GRPO run")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run(Demo(model=own.model, seed=own.seed, control=own.control, more=tuple(more)))
