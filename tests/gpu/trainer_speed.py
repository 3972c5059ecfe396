"""Training speed through the Trainer, with flags as a user gives them: loss, backward pass and optimizer included.

MFU counts 6 x parameters (with the output layer, without a table that is only looked up) x tokens, and causal attention
half; recomputation does not count. The peak is an H200's 989 TFLOP/s in bf16, dense. Next to each figure are the speed
of a matrix product in the same process, and the distribution of the GPU's time.

Weights are random, from the model's own initialisation, and the "rollout" has random tokens: neither changes what is
computed.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.core.packing import training_flops
from tests.gpu.checks import Report, check

ROOT = Path(__file__).parent.parent.parent
PEAK = 989e12
WARM_UP, STEPS = 3, 8

NO_KERNEL = ("ProfilerStep", "Optimizer.")
"""Names of ranges on the GPU's time line, which are no kernels; the kernels inside are counted by themselves."""

FLAGS = (
    "--bf16 --use-dynamic-batch-size --num-rollout 100 --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 "
    "--entropy-coef 0.001 --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98 "
    "--rollout-temperature 1.0"
)
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

GROUPS = {
    "attention": ("flash", "fmha"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "xmma"),
    "our kernels: heads, sums, norm, gate, logits": ("_forward", "_backward", "_turn", "_sums", "_gradient"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "copies, casts, sums": ("elementwise", "memcpy", "memset", "reduce", "cat", "index", "copy"),
}
"""Groups of CUDA kernels by a part of their names; the first that matches counts."""


def args_of(model: str, *flags: str) -> Args:
    """Return the Args of scripts/models/`model`.sh and these flags."""
    from slime.config.parse import load_args

    command = 'source "$1" && printf "%s\\0" "${MODEL_ARGS[@]}"'
    script = str(ROOT / f"scripts/models/{model}.sh")
    done = subprocess.run(["bash", "-euc", command, "bash", script], capture_output=True, text=True, check=True)
    words = [*done.stdout.split("\0")[:-1], *FLAGS.split(), *" ".join(flags).split(), "--dry-run"]
    return load_args(words, training=False)[0]


def batch_of(lengths: Sequence[int], vocab_size: int) -> TrainBatch:
    """Make one group of samples with random tokens, all but the first of them response, and different rewards."""
    generator = np.random.default_rng(0)
    totals = np.array(lengths)
    responses = totals - 1
    number = int(responses.sum())
    columns: dict[str, Any] = {
        "tokens": generator.integers(0, vocab_size, int(totals.sum())),
        "loss_mask": np.ones(number, dtype=np.float32),
        "rewards": (np.arange(len(lengths)) % 2).astype(np.float32),
        "group_indices": np.zeros(len(lengths), dtype=np.int64),
        "sample_indices": np.arange(len(lengths)),
        "rollout_log_probs": np.full(number, -np.log(vocab_size), dtype=np.float32),
    }
    return TrainBatch(totals, responses, columns)


@contextmanager
def trainer_of(args: Args) -> Iterator[Any]:
    from slime.megatron.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(args, rank=0, world_size=1, init_method=f"file://{folder}/store")
        try:
            yield trainer
        finally:
            trainer.close()


def matrix_product() -> float:
    """Return the FLOP/s of a bf16 8192^3 matrix product, the median of 20."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times: list[float] = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(times[5:])


def group_of(kernel: str) -> str:
    name = kernel.lower()
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), "all else")


def profiled_step(step: Any) -> tuple[dict[str, list[float]], float]:
    """Run a step under the profiler; return each kernel's times on the GPU in ms by name, and the step's seconds."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or []:
        if event.device_type == DeviceType.CUDA and not event.name.startswith(NO_KERNEL):
            kernels[event.name].append(float(event.self_device_time_total) / 1e3)
    return kernels, wall


def breakdown(report: Report, what: str, step: Any) -> None:
    """Report the GPU's time of one step by group, and the twelve kernels that take most of it."""
    kernels, wall = profiled_step(step)
    busy = sum(sum(times) for times in kernels.values())
    report.row(f"{what}: the GPU is busy for", f"{busy:.1f} ms of {wall * 1e3:.1f} ms, profiled")
    groups: dict[str, float] = defaultdict(float)
    for name, times in kernels.items():
        groups[group_of(name)] += sum(times)
    for group, spent in sorted(groups.items(), key=lambda item: -item[1]):
        report.row(f"{what}: {group}", f"{spent:.1f} ms, {spent / busy:.1%}")
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:12]:
        spent = sum(times)
        report.row(f"{what}: {spent / busy:.1%} in {len(times)} x", f"{spent:.2f} ms {name[:100]}")


def measure(
    report: Report, what: str, args: Args, lengths: Sequence[int], *, at_least: float | None, profiled: bool = True
) -> dict[str, float]:
    """Report speed, memory and breakdown of steps over samples of these lengths.

    Returns:
        The first step's metrics, and the median of the later steps' times as "seconds".
    """
    assert args.architecture is not None
    batch = batch_of(lengths, args.architecture.vocab_size)
    gc.collect()  # an earlier Trainer
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with trainer_of(args) as trainer:
        held = torch.cuda.memory_allocated() / 2**30
        times: list[float] = []
        first: dict[str, float] = {}
        for number in range(WARM_UP + STEPS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            metrics = trainer.train(number, batch)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            first = first or metrics
        seconds = statistics.median(times[WARM_UP:])
        flops = sum(map(training_flops(args.architecture), lengths))
        mfu = flops / seconds / PEAK
        spread = f"{min(times[WARM_UP:]) * 1e3:.0f}-{max(times[WARM_UP:]) * 1e3:.0f}"
        report.row(f"{what}: step", f"{seconds * 1e3:.1f} ms ({spread}), first {times[0]:.1f} s")
        report.row(f"{what}: speed", f"{sum(lengths) / seconds:,.0f} tokens/s, {flops / seconds / 1e12:.0f} TFLOP/s")
        ok = None if at_least is None else mfu >= at_least
        report.row(f"{what}: MFU", f"{mfu:.1%}", None if at_least is None else f">= {at_least:.0%}", ok)
        peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        report.row(f"{what}: memory", f"peak {peak:.1f} GiB, reserved {reserved:.1f}, before a step {held:.1f}")
        shown = {name: first[name] for name in ("train/loss", "train/grad_norm", "train/entropy") if name in first}
        report.row(f"{what}: the first step", ", ".join(f"{name} {value:.6g}" for name, value in shown.items()))
        if profiled:
            breakdown(report, what, lambda: trainer.train(99, batch))
    return {**first, "seconds": seconds}


def the_limit(report: Report) -> None:
    speed = matrix_product()
    report.row("bf16 8192^3 matrix product", f"{speed / 1e12:.0f} TFLOP/s, {speed / PEAK:.1%} of 989")


@check(minutes=8)
def qwen3_0_6b(report: Report) -> None:
    """Measure Qwen3-0.6B: eight samples of 2,048 tokens, a single sample of 16,384, and one of 65,536."""
    the_limit(report)
    tokens = "--max-tokens-per-gpu 16384"
    what = "Qwen3-0.6B, 8 x 2048"
    best = measure(report, what, args_of("qwen3-0.6B", tokens), [2048] * 8, at_least=0.45)
    # a group of one has no advantage, so use SFT's loss, which is computed from the same log-probs
    single = args_of("qwen3-0.6B", tokens, "--loss-type sft_loss")
    measure(report, "Qwen3-0.6B, 1 x 16384", single, [16384], at_least=0.45)
    long = args_of("qwen3-0.6B", "--max-tokens-per-gpu 65536 --max-position-embeddings 65536 --loss-type sft_loss")
    measure(report, "Qwen3-0.6B, 1 x 65536", long, [65536], at_least=0.45)
    fused = args_of("qwen3-0.6B", tokens, "--attention-backend fused")
    other = measure(report, f"{what}, PyTorch's attention", fused, [2048] * 8, at_least=None, profiled=False)
    agree(report, f"{what}: PyTorch's attention", best, other, limit=5e-3)
    mixed = [700, 4000, 1500, 3000, 900, 2500, 2000, 1784]
    args = args_of("qwen3-0.6B", tokens, "--use-distributed-optimizer")
    what = "Qwen3-0.6B, 8 of 700-4000, distributed optimizer"
    measure(report, what, args, mixed, at_least=None, profiled=False)


@check(minutes=6)
def glm4_9b_layers(report: Report) -> None:
    """Measure eight of GLM4-9B's forty layers at 8,192 tokens, with and without recomputation: the loss is equal."""
    the_limit(report)
    size = "--num-layers 8 --max-tokens-per-gpu 8192"
    kept = measure(report, "GLM4-9B x 8/40, 4 x 2048", args_of("glm4-9B", size), [2048] * 4, at_least=0.50)
    # as in a real step, where the optimizer is a smaller part
    what = "GLM4-9B x 8/40, a step of 4 micro-batches of 4 x 2048"
    measure(report, what, args_of("glm4-9B", size), [2048] * 16, at_least=0.60, profiled=False)
    again = measure(
        report,
        "the same, recomputed",
        args_of("glm4-9B", size, RECOMPUTE),
        [2048] * 4,
        at_least=None,
        profiled=False,
    )
    agree(report, "recomputed", kept, again, limit=1e-3)
    single = args_of("glm4-9B", size, "--loss-type sft_loss")
    measure(report, "GLM4-9B x 8/40, 1 x 8192", single, [8192], at_least=0.55, profiled=False)


def agree(report: Report, what: str, one: dict[str, float], other: dict[str, float], *, limit: float) -> None:
    """Compare the metrics of two first steps that must have computed the same."""
    for name in ("train/loss", "train/entropy", "train/grad_norm"):
        if name in one:
            off = abs(other[name] - one[name]) / max(abs(one[name]), 1e-3)
            report.row(f"{what}: {name} of the first step, relative difference", off, f"<= {limit:g}", off <= limit)
