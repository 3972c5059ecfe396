"""Mixtures of experts, and a critic, on a GPU: against Hugging Face, against a CPU, and that they learn."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.gpu.checks import Report, check
from tests.gpu.learn import TINY_ENGINE, learn
from tests.gpu.parity import DEVICE, LENGTHS, Outcome, control, inputs, megatron
from tests.gpu.runs import ROOT
from tests.megatron import tiny

FLAGS: dict[str, Any] = {"lr": 1e-2, "adam_eps": 1e-3, "clip_grad": 0.0, "max_tokens_per_gpu": 512}
GRADIENTS = """
import sys, numpy as np, torch
from tests.gpu.experts import gradients_of_a_step
family, folder, out = sys.argv[1:]
np.savez(out, **gradients_of_a_step(family, folder))
"""


def named_as_in_files(name: str, gradient: Tensor) -> dict[str, Tensor]:
    """Split transformers' tensor of all experts of a layer into one per expert, as in files and in our gradients."""
    head, _, kind = name.rpartition(".experts.")
    if kind == "gate_up_proj":
        return {
            f"{head}.experts.{expert}.{part}_proj.weight": half
            for expert, both in enumerate(gradient)
            for part, half in zip(("gate", "up"), both.chunk(2), strict=True)
        }
    if kind == "down_proj":
        return {f"{head}.experts.{expert}.down_proj.weight": part for expert, part in enumerate(gradient)}
    return {name: gradient}


def huggingface(family: str) -> Outcome:
    model: Any = tiny.hf_model(family).to(DEVICE)
    tokens, weights = inputs()
    logits = torch.cat([model(row[None]).logits[0] for row in tokens.split(LENGTHS)])
    (logits.log_softmax(-1) * weights).sum().backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients |= named_as_in_files(name, parameter.grad)
    return Outcome(logits, gradients)


@check(minutes=3)
def models(report: Report) -> None:
    """Compare logits and gradients of both families in fp32 with transformers."""
    with tempfile.TemporaryDirectory() as folder:
        for family in tiny.MIXTURES:
            hf = tiny.hf_dir(Path(folder) / family, family)
            exact = huggingface(family)
            found = megatron(hf, bf16=False)
            found.gradients = {name: found.gradients[name] for name in exact.gradients}
            largest, _, gradients = found.errors(exact)
            report.row(f"{family}, fp32: logits", largest, "<= 1e-4", largest <= 1e-4)
            report.row(f"{family}, fp32: gradients, relative", gradients, "<= 1e-4", gradients <= 1e-4)
            wrong, _, _ = megatron(hf, bf16=False, arch={"moe_router_topk": 3}).errors(found)
            control(report, f"{family}: three experts a token instead of two", wrong, 1e-3)


def gradients_of_a_step(family: str, folder: str) -> dict[str, np.ndarray]:
    """Return the gradients of a whole training step on this process's device."""
    from slime.megatron.model.build import named_parameters
    from slime.megatron.trainer import Trainer

    batch = tiny.random_batch(lengths=[40, 3, 180, 29, 401, 1, 77, 12])
    args = tiny.make_args(Path(folder) / family, bf16=False, **FLAGS)
    trainer = Trainer(args, rank=0, world_size=1, init_method=f"file://{folder}/store-{family}-{os.getpid()}")
    try:
        trainer.load()
        trainer.train(0, batch)
        found: dict[str, np.ndarray] = {}
        for name, parameter in named_parameters(trainer.model):
            main: Any = parameter  # Megatron's buffer puts gradients into an attribute of it
            found[name] = main.main_grad.float().cpu().numpy().copy()
        return found
    finally:
        trainer.close()


@check(minutes=3)
def steps(report: Report) -> None:
    """Compare a whole training step's gradients on the GPU with those on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        for family in tiny.MIXTURES:
            tiny.hf_dir(Path(folder) / family, family)
            out = f"{folder}/{family}.npz"
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, "-c", GRADIENTS, family, folder, out]
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
            exact, found = dict(np.load(out)), gradients_of_a_step(family, folder)
            assert exact.keys() == found.keys()
            size = math.sqrt(sum(float(np.square(exact[name], dtype=np.float64).sum()) for name in exact))
            wrong = sum(float(np.square(found[name] - exact[name], dtype=np.float64).sum()) for name in exact)
            value = math.sqrt(wrong) / size
            report.row(f"{family}: gradients on the GPU against the CPU's, relative", value, "<= 1e-5", value <= 1e-5)
            one = next(name for name in exact if "experts" in name and "shared" not in name)
            control(report, f"{family}: without {one}", float(np.linalg.norm(exact[one])) / size, 1e-5)


@check(minutes=5)
def learns(report: Report) -> None:
    """Train the demo's mixture of experts, replaying the experts that SGLang chose for each token."""
    learn(report, ["--colocate", "--actor-num-gpus-per-node", "1", "--bf16", *TINY_ENGINE], model="qwen3-moe")


@check(minutes=5)
def critic_learns(report: Report) -> None:
    """Train the demo's GLM-4 with ppo; the critic shares the GPU."""
    critic = ["--advantage-estimator", "ppo", "--critic-lr", "1e-3", "--num-steps-per-rollout", "2"]
    learn(report, ["--colocate", "--actor-num-gpus-per-node", "1", "--bf16", *TINY_ENGINE, *critic])
