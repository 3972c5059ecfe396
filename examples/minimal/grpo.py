#!/usr/bin/env python3
"""GRPO on one page: a tiny model learns to add two-digit numbers, in one process, in a minute or two on a CPU.

    python3 examples/minimal/grpo.py --seed 1

Read `learn` first: it is the loop that train.py runs on a cluster, prompt -> generate -> reward -> advantage -> loss ->
step -> weight sync. The data buffer, the engine and the reward are slime's own. The trainer is plain PyTorch with a
Hugging Face model, so that the whole path of the gradient is on this page.

What train.py adds, and this page leaves out: Megatron's parallel layouts and packing, engines behind HTTP and a router,
processes that are supervised and restarted, checkpoints and exact resume, partial rollout, off-policy corrections.

Shapes: N samples of a rollout (prompts x samples per prompt), G samples of one prompt, T tokens of the longest row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slime.config.parse import load_args
from slime.core.sample import Sample
from slime.engine.embedded.in_process import InProcessEngine
from slime.engine.protocol import SamplingParams
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.rewards.deepscaler import deepscaler

MAKE_TASK = Path(__file__).resolve().parents[1] / "arithmetic" / "make_task.py"
PROMPTS, G, MAX_NEW_TOKENS = 32, 8, 40  # G responses to each of the prompts of a rollout
LEARNING_RATE, CLIP_LOW, CLIP_HIGH = 4e-4, 0.2, 0.28  # PPO's clipping, with the wider upper end of DAPO


def generate(
    engine: InProcessEngine, samples: Sequence[Sample], tokenizer: Any, *, temperature: float, seed: int
) -> None:
    """Give each sample a response: tokens and log-probs as they were sampled, never tokenized again."""
    params = SamplingParams(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS)
    requests = engine.generate([sample.tokens for sample in samples], params, seed=seed)
    for sample, request in zip(samples, requests, strict=True):
        sample.tokens = request.input_ids + request.output_ids
        sample.response_length = len(request.output_ids)
        sample.rollout_log_probs = request.log_probs
        sample.response = tokenizer.decode(request.output_ids, skip_special_tokens=True)


def grpo_advantages(rewards_N: Tensor) -> Tensor:
    """Compare each response with the others to its prompt: if 3 of 8 are right, they get +1.21 and the others -0.72."""
    rewards_G = rewards_N.view(-1, G)
    advantages_G = (rewards_G - rewards_G.mean(-1, keepdim=True)) / (rewards_G.std(-1, keepdim=True) + 1e-6)
    return advantages_G.view(-1)


def next_token_log_probs(model: Any, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return [N, T] the log-prob of the token after each one, and a mask of those that belong to a response."""
    tokens = pad_sequence([torch.tensor(sample.tokens) for sample in samples], batch_first=True)
    logits = model(tokens[:, :-1]).logits  # padding is on the right, where causal attention never looks
    log_probs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    position = torch.arange(1, tokens.shape[1])
    total = torch.tensor([[len(sample.tokens)] for sample in samples])
    prompt = torch.tensor([[sample.prompt_length] for sample in samples])
    return log_probs, (prompt <= position) & (position < total)


def grpo_loss(model: Any, samples: Sequence[Sample], advantages_N: Tensor) -> Tensor:
    """PPO's clipped loss: the mean over the tokens of each response, then over the responses."""
    log_probs, mask = next_token_log_probs(model, samples)
    old_log_probs = torch.zeros_like(log_probs)
    old_log_probs[mask] = torch.tensor([value for sample in samples for value in sample.rollout_log_probs or ()])
    ratio = (log_probs - old_log_probs).exp()  # 1 in the first step after a weight sync, where only rounding differs
    advantages = advantages_N[:, None]  # one number for every token of the response
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)
    return -((gain * mask).sum(-1) / mask.sum(-1)).mean()


def supervised_start(model: Any, demonstrations: Sequence[Sample], *, steps: int = 200) -> None:
    """Imitate a careless pupil, who often guesses and forgets most carries: reinforcement learning can do better."""
    size = 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 20, 3 * (1 - step / steps)))
    for step in range(steps):
        log_probs, mask = next_token_log_probs(model, demonstrations[step * size : (step + 1) * size])
        take_step(optimizer, model, -(log_probs * mask).sum() / mask.sum())
        schedule.step()


def take_step(optimizer: torch.optim.Optimizer, model: Any, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def read_samples(path: Path, tokenizer: Any) -> list[Sample]:
    """Return the lines of a file as samples, with their responses if the file has them (demonstrations)."""
    samples: list[Sample] = []
    for row in map(json.loads, path.read_text().splitlines()):
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        response = tokenizer.encode(row["response"] + tokenizer.eos_token) if "response" in row else []
        prompt = tokenizer.encode(text)
        sample = Sample(tokens=prompt + response, prompt_length=len(prompt), response_length=len(response))
        samples.append(replace(sample, label=row.get("label")))
    return samples


def score(samples: Sequence[Sample]) -> Tensor:
    """Return [N] 1 for the right answer in the last box after the reasoning, else 0."""
    return torch.tensor([deepscaler(sample.response, sample.label or "") for sample in samples])


def learn(task: Path, *, seed: int, num_rollouts: int) -> float:
    """Run the supervised start and GRPO; return the share of held-out sums that greedy decoding gets right."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    start, hf = time.monotonic(), str(task / "model")
    flags = ["--hf-checkpoint", hf, "--prompt-data", str(task / "train.jsonl"), "--input-key", "prompt"]
    flags += ["--label-key", "label", "--apply-chat-template", "--rollout-shuffle", "--rollout-seed", str(seed)]
    flags += ["--rollout-batch-size", str(PROMPTS), "--n-samples-per-prompt", str(G), "--num-rollout", "1"]
    args, _ = load_args([*flags, "--rm-type", "deepscaler", "--colocate", "--dry-run"])
    tokenizer: Any = AutoTokenizer.from_pretrained(hf)
    model: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, use_safetensors=True)
    stop = model.config.eos_token_id
    engine = InProcessEngine(args.resolved.architecture, rows=PROMPTS * G, context=128, stop_token_ids=stop)

    supervised_start(model, read_samples(task / "demonstrations.jsonl", tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    buffer = DataBuffer(args, tokenizer)
    engine.update_weights(model.state_dict(), 0)
    for rollout_id in range(num_rollouts):
        groups = buffer.get_groups(PROMPTS, rollout_id=rollout_id)
        samples = [sample for group in groups for sample in group]
        generate(engine, samples, tokenizer, temperature=1.0, seed=seed + 1000 * rollout_id)
        rewards_N = score(samples)
        advantages_N = grpo_advantages(rewards_N)
        take_step(optimizer, model, grpo_loss(model, samples, advantages_N))
        engine.update_weights(model.state_dict(), rollout_id + 1)
        print(f"rollout {rollout_id:2d}  reward {rewards_N.mean():.3f}  {time.monotonic() - start:3.0f} s", flush=True)
    held_out = read_samples(task / "eval.jsonl", tokenizer)
    generate(engine, held_out, tokenizer, temperature=0.0, seed=0)
    return score(held_out).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-rollouts", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as task:
        subprocess.run([sys.executable, str(MAKE_TASK), "--out", task, "--seed", str(options.seed)], check=True)
        right = learn(Path(task), seed=options.seed, num_rollouts=options.num_rollouts)
    print(f"{right:.3f} of the held-out sums are right, greedy")


if __name__ == "__main__":
    main()
