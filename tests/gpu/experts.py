"""Mixtures of experts, and a critic, on a GPU: against Hugging Face, against a CPU, and that they learn."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slime.config.args import Args
from slime.megatron.model import kernels
from slime.megatron.model.expert_products import Groups, why_not_grouped
from slime.megatron.model.stacked_experts import run_experts
from tests.gpu import trainer_speed
from tests.gpu.checks import Report, check
from tests.gpu.learn import TINY_ENGINE, learn
from tests.gpu.parity import DEVICE, LENGTHS, Outcome, bits_again, control, draw, inputs, megatron, worst
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


def drawn_experts(dtype: torch.dtype) -> list[Tensor]:
    """Return tokens, router weights, both matrices of the experts, and a gradient of their output."""
    experts, hidden, ffn, tokens = len(COUNTS), 512, 256, sum(COUNTS)
    shapes = ((tokens, hidden), (tokens,), (experts, 2 * ffn, hidden), (experts, hidden, ffn), (tokens, hidden))
    scales = (1.0, 1.0, hidden**-0.5, ffn**-0.5, 1.0)
    drawn = [draw(*shape, scale=scale, seed=i) for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))]
    return [tensor.float() if i == 1 else tensor.to(dtype) for i, tensor in enumerate(drawn)]


COUNTS = (0, 300, 1, 0, 777, 64, 130, 2048, 5, 0, 16, 511, 90, 33, 121, 0)
"""Tokens of each expert: none at both ends and twice in between, and few that are multiples of anything."""


def experts_step(dtype: torch.dtype, *, grouped: bool, shift: int = 0, micro_batches: int = 2) -> list[Tensor]:
    """Return outputs and gradients of equal micro-batches; in bf16 those of weights come from their fp32 buffers."""
    tokens, weights, first, second, upstream = drawn_experts(dtype)
    parameters: list[Any] = [torch.nn.Parameter(first), torch.nn.Parameter(second)]
    for parameter in parameters:
        if dtype == torch.bfloat16:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    inputs_of = [tokens.requires_grad_(), weights.requires_grad_()]
    groups = Groups.of(torch.tensor(COUNTS, device=DEVICE), tokens.device, grouped=grouped)
    if shift and groups.ends is not None:
        groups = Groups(None, (groups.ends + shift).clamp(max=sum(COUNTS)))
    out = torch.empty(0)
    for _ in range(micro_batches):
        out = run_experts(tokens, weights, parameters[0], parameters[1], groups)
        out.backward(upstream)
    summed = [parameter.main_grad if dtype == torch.bfloat16 else parameter.grad for parameter in parameters]
    return [out.detach(), *(tensor.grad for tensor in inputs_of if tensor.grad is not None), *summed]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@check(minutes=2)
def grouped(report: Report) -> None:
    """Compare grouped matrix products with the loop over experts, both in bf16, by their error against fp32."""
    names = ("output", "gradient of tokens", "gradient of router weights", "gradient, first", "gradient, second")
    exact = experts_step(torch.float32, grouped=False)
    loop = experts_step(torch.bfloat16, grouped=False)
    found = experts_step(torch.bfloat16, grouped=True)
    shifted = experts_step(torch.bfloat16, grouped=True, shift=1)
    for name, ours, own, wrong, truth in zip(names, found, loop, shifted, exact, strict=True):
        limit = relative(own, truth)
        error = relative(ours, truth)
        report.row(f"{name}: relative error", error, f"<= 1.5 x {limit:.3g}, the loop's", error <= 1.5 * limit)
        control(report, f"{name}: expert boundaries shifted by one", relative(wrong, truth), 1.5 * limit)
    empty = max(float(part[expert].abs().max()) for part in found[3:] for expert, n in enumerate(COUNTS) if not n)
    report.row("gradients of experts without tokens", empty, "= 0", empty == 0)
    bits_again(report, "grouped", lambda: experts_step(torch.bfloat16, grouped=True))
    reason = why_not_grouped(torch.float32, (512, 256)) or ""
    report.row("fp32: the reason for the loop", reason, "a reason", "bf16" in reason)
    no_reason = why_not_grouped(torch.bfloat16, (512, 256)) or "none"
    report.row("bf16: the reason for the loop", no_reason, "none", no_reason == "none")
    odd = why_not_grouped(torch.bfloat16, (512, 252)) or "none"
    report.row("bf16, 252 channels: the reason for the loop", odd, "a reason", "multiples" in odd)


def weighted_formula(gate_up: Tensor, weights: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up * weights[:, None]


@check(minutes=2)
def weighted_swiglu(report: Report) -> None:
    """Compare the gate of experts with its formula in float64, where a row has one block of channels, or several."""
    for dtype in (torch.bfloat16, torch.float32):
        for rows, channels in ((1, 8), (7, 768), (4096, 1408), (300, 2048)):
            leaves = draw(rows, 2 * channels, scale=2.0, dtype=dtype), draw(rows, dtype=torch.float32, seed=1)
            exact = [tensor.double() for tensor in with_gradients_of(weighted_formula, *map(Tensor.double, leaves))]
            found = with_gradients_of(kernels.weighted_swiglu, *leaves)
            value = worst(found, exact, (0.0, 0.0, channels**0.5))
            report.row(f"{dtype}, {rows} x {channels}", value, "<= 1", value <= 1)
        wrong = with_gradients_of(lambda x, w: kernels.weighted_swiglu(x, w.roll(1)), *leaves)
        control(report, f"{dtype}, the weights of other rows", worst(wrong, exact, (0.0, 0.0, channels**0.5)))
        bits_again(report, str(dtype), partial(with_gradients_of, kernels.weighted_swiglu, *leaves))


@check(minutes=1)
def row_sums(report: Report) -> None:
    """Compare the sums of each token's rows with those in float64."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, k, channels in ((1, 1, 8), (7, 2, 64), (1000, 8, 2048), (333, 6, 4100)):
            rows, generator = draw(tokens * k, channels, dtype=dtype), torch.Generator(DEVICE).manual_seed(3)
            rows_of = torch.randperm(tokens * k, generator=generator, device=DEVICE).view(tokens, k)
            exact, found = rows.double()[rows_of].sum(1), kernels.row_sums(rows, rows_of)
            value = worst([found], [exact], (k**0.5,))
            report.row(f"{dtype}, {tokens} x {k} rows of {channels}", value, "<= 1", value <= 1)
        wrong = kernels.row_sums(rows, rows_of.roll(1))
        control(report, f"{dtype}, rows of other tokens", worst([wrong], [exact], (k**0.5,)))


def with_gradients_of(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """Return the output, and the gradient of each input in its own dtype."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    upstream = draw(*out.shape, dtype=torch.float32, seed=9).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def waits(work: Callable[[], object]) -> str:
    """Return torch's complaint if `work` waits for the device, otherwise an empty text."""
    work()  # kernels are loaded once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def layer_step(args: Args, folder: str) -> Callable[[], object]:
    """Return a function that runs one layer of experts of a new model forward and backward."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from slime.megatron.model.attention import pack_sequences
    from slime.megatron.model.build import architecture_of, build_model
    from slime.megatron.parallel import init_parallel

    init_parallel(args, rank=0, world_size=1, init_method=f"file://{folder}/store")
    arch = architecture_of(args)
    model = build_model(args, wrap=False)
    layer: Any = next(module for module in model[0].modules() if isinstance(module, MoELayer))
    layer.router.given_pack = pack_sequences(LENGTHS, arch)
    tokens = draw(sum(LENGTHS), 1, arch.hidden_size).requires_grad_()
    upstream = torch.ones_like(tokens)

    def work() -> None:
        output, _ = layer(tokens)
        output.backward(upstream)

    return work


@check(minutes=3)
def grouped_does_not_wait(report: Report) -> None:
    """Run a layer of experts forward and backward in the mode in which torch refuses to wait for the device."""
    from slime.megatron.parallel import close_parallel

    with tempfile.TemporaryDirectory() as folder:
        for family in tiny.MIXTURES:
            args = tiny.make_args(tiny.hf_dir(Path(folder) / family, family), bf16=True)
            for form in (True, False):
                extra = {**args.megatron_extra, "moe_grouped_gemm": form}
                try:
                    place = tempfile.mkdtemp(dir=folder)
                    waited = waits(layer_step(replace(args, megatron_extra=extra), place))
                finally:
                    close_parallel()
                if form:
                    report.row(f"{family}, grouped: waits", waited or "never", "never", not waited)
                else:
                    what = f"control, has to be noticed: {family}, the loop waits"
                    report.row(what, waited or "never", "it does", bool(waited))


@check(minutes=8)
def speed(report: Report) -> None:
    """Measure 4 of the 48 layers of Qwen3-30B-A3B at 16,384 tokens, with a loop over experts and grouped."""
    trainer_speed.the_limit(report)
    flags = ("--num-layers 4 --max-tokens-per-gpu 16384",)
    measured: dict[str, dict[str, float]] = {}
    for name, more in (("loop", "--no-moe-grouped-gemm"), ("grouped", "--moe-grouped-gemm")):
        args = trainer_speed.args_of("qwen3-30B-A3B", *flags, more)
        what = f"Qwen3-30B-A3B x 4/48, 8 x 2048, {name}"
        measured[name] = trainer_speed.measure(report, what, args, [2048] * 8, at_least=None)
    ratio = measured["loop"]["seconds"] / measured["grouped"]["seconds"]
    report.row("a step, loop over grouped", ratio, ">= 3", ratio >= 3)
    for name in ("train/loss", "train/entropy", "train/grad_norm"):
        of_loop, of_grouped = measured["loop"][name], measured["grouped"][name]
        off = abs(of_grouped - of_loop) / max(abs(of_loop), 1e-3)
        report.row(f"{name} of the first step, relative difference", off, "<= 1e-2", off <= 1e-2)


@check(minutes=5)
def learns(report: Report) -> None:
    """Train the demo's mixture of experts, replaying the experts that SGLang chose for each token."""
    learn(report, ["--colocate", "--actor-num-gpus-per-node", "1", "--bf16", *TINY_ENGINE], model="qwen3-moe")


@check(minutes=5)
def critic_learns(report: Report) -> None:
    """Train the demo's GLM-4 with ppo; the critic shares the GPU."""
    critic = ["--advantage-estimator", "ppo", "--critic-lr", "1e-3", "--num-steps-per-rollout", "2"]
    learn(report, ["--colocate", "--actor-num-gpus-per-node", "1", "--bf16", *TINY_ENGINE, *critic])
