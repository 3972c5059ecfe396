"""GRPO on two-digit sums with TRL's GRPOTrainer, in TRL's own virtual environment; `loop` compares slime with it.

    .venv-trl/bin/python -m bench.trl_grpo --model DIR --data train.jsonl --out DIR --steps 16     (or by torchrun)

- Used by: `loop`, which starts it in turns with slime's run on the same task and reads `steps.jsonl`.
- Invariant: batch, sampling, loss, optimizer and reward function are those of slime's run. What TRL would spend on a
  CPU without need (gradient checkpointing, bf16 autocast, logging) is off, and saving is outside the measured time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

from slime.rollout.rewards.deepscaler import deepscaler

PROMPTS, SAMPLES, LONGEST = 32, 8, 40
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
"""torchrun sets the variable."""
OF_PROCESS = PROMPTS * SAMPLES // PROCESSES


def reward(completions: Sequence[list[dict[str, str]]], label: Sequence[str], **_: Any) -> list[float]:
    """Return the reward by slime's own rule. (The prompt ends in `<think>`, and the response is the text after it.)"""
    return [deepscaler(one[0]["content"], truth) for one, truth in zip(completions, label, strict=True)]


class Clock(TrainerCallback):
    """Measures the seconds of each step; saving stops the clock."""

    def __init__(self, out: Path, *, save_every: int) -> None:
        self._out, self._save_every = out, save_every
        self.inside: dict[str, float] = {}
        self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        record = {"step": state.global_step, "seconds": time.perf_counter() - self._start, **self.inside}
        record["length"] = self._tokens * PROCESSES / (PROMPTS * SAMPLES)  # those of the other processes are alike
        self.inside.clear()
        if not state.is_world_process_zero:
            self._start = time.perf_counter()
            return
        with (self._out / "steps.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if state.global_step % self._save_every == 0:
            model.save_pretrained(self._out / "hf" / str(state.global_step))
        self._start = time.perf_counter()

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Add the wall seconds of `owner.name` to each step's record."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside[part] = self.inside.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)

    def count(self, owner: Any, name: str) -> None:
        """Record how many tokens a generation made."""
        function: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._tokens = sum(map(len, result[0]))
            return result

        setattr(owner, name, counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=OF_PROCESS, help="samples of one forward")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    data = [json.loads(line) for line in given.data.read_text().splitlines()]
    clock = Clock(given.out, save_every=given.save_every)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, attn_implementation="sdpa"),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(data),
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=str(given.out / "trl"),
            per_device_train_batch_size=given.micro_batch,
            gradient_accumulation_steps=OF_PROCESS // given.micro_batch,
            steps_per_generation=OF_PROCESS // given.micro_batch,
            num_generations=SAMPLES,
            num_iterations=1,
            max_steps=given.steps,
            max_completion_length=LONGEST,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            loss_type="grpo",
            scale_rewards="group",
            epsilon=0.2,
            epsilon_high=0.28,
            learning_rate=4e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            use_cpu=True,
            ddp_backend="gloo" if PROCESSES > 1 else None,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_num_workers=0,
            save_strategy="no",
            logging_steps=given.steps,
            report_to="none",
            disable_tqdm=True,
            seed=given.seed,
        ),
    )
    clock.watch(trainer, "_generate", "generation")
    clock.count(trainer, "_generate_single_turn")
    clock.watch(trainer, "_calculate_rewards", "reward")
    trainer.train()


if __name__ == "__main__":
    main()
