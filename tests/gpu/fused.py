"""The steps of a layer that are one kernel, and what a whole step does besides: waits, launches, memory.

Errors are measured as in `parity`: in units of one rounding.
"""

from __future__ import annotations

import ast
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu.checks import Report, check
from tests.gpu.parity import (
    EPS,
    Worst,
    bits_again,
    control,
    copy_speed,
    draw,
    exact_norm,
    exact_rotary,
    gb_per_second,
    with_gradients,
    worst,
)
from tests.gpu.trainer_speed import PEAK, RECOMPUTE, args_of, batch_of, profiled_step, trainer_of

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Heads:
    """The output of one QKV projection."""

    what: str
    heads: int
    groups: int
    channels: int
    turning: int
    norm: bool
    interleaved: bool = False

    @property
    def row(self) -> int:
        return (self.heads + 2 * self.groups) * self.channels

    def inputs(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], Tensor]:
        """Return the projection's output with the norms' weights, and the angles."""
        weights = [(1 + draw(self.channels, seed=seed).float() / 4).to(dtype) for seed in (1, 2) if self.norm]
        angles = draw(tokens, self.turning // 2, scale=3.0, dtype=torch.float32, seed=3)
        return [draw(tokens, self.row, dtype=dtype), *weights], angles

    def kernel(self, angles: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        from slime.megatron.model.kernels.triton_qkv import split_heads

        cos, sin = angles.double().cos().float(), angles.double().sin().float()

        def split(mixed: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return split_heads(
                mixed,
                cos,
                sin,
                (weights[0], weights[1]) if weights else None,
                num_heads=self.heads,
                num_groups=self.groups,
                eps=EPS,
                interleaved=self.interleaved,
            )

        return split

    def separate(self, angles: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """Return the same by a kernel for each step, with the copy of the queries that they need."""
        from slime.megatron.model.kernels import rms_norm, rotary

        cos, sin = angles.double().cos().float(), angles.double().sin().float()

        def split(mixed: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = self.parts(mixed)
            if weights:
                q, k = rms_norm(q, weights[0], EPS), rms_norm(k, weights[1], EPS)
            q, k = (rotary(x, cos, sin, interleaved=self.interleaved) for x in (q, k))
            return q, k, v

        return split

    def parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = mixed.unflatten(1, (self.groups, -1, self.channels))
        q = groups[:, :, :-2].reshape(len(mixed), self.heads, self.channels)
        return q, groups[:, :, -2], groups[:, :, -1]

    def exact(self, angles: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def split(mixed: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = self.parts(mixed)
            if weights:
                q, k = exact_norm(q, weights[0]), exact_norm(k, weights[1])
            return exact_rotary(q, angles, self.interleaved), exact_rotary(k, angles, self.interleaved), v

        return split


HEADS = [
    Heads("Qwen3-0.6B", 16, 8, 128, 128, norm=True),
    Heads("Qwen3-0.6B, TP 2", 8, 4, 128, 128, norm=True),
    Heads("Qwen3-30B-A3B", 32, 4, 128, 128, norm=True),
    Heads("64 heads", 64, 8, 128, 128, norm=True),
    Heads("Qwen2.5-0.5B", 14, 2, 64, 64, norm=False),
    Heads("Llama-3-8B", 32, 8, 128, 128, norm=False),
    Heads("GLM4-9B", 32, 2, 128, 64, norm=False, interleaved=True),
    Heads("GLM4-9B, TP 2", 16, 1, 128, 64, norm=False, interleaved=True),
    Heads("GLM-4.5", 96, 8, 128, 64, norm=True),
    Heads("a group a head", 7, 7, 80, 40, norm=True, interleaved=True),
    Heads("three heads of 96", 3, 1, 96, 48, norm=True, interleaved=True),
    Heads("one head of 80", 1, 1, 80, 80, norm=True),
    Heads("heads of 16", 4, 2, 16, 8, norm=True),
]


def joined(split: Callable[..., Tensors]) -> Callable[..., Tensor]:
    """Return a function with one result, for `with_gradients`."""
    return lambda *tensors: torch.cat([part.flatten(1) for part in split(*tensors)], 1)


def without_last(function: Callable[..., Tensor], inputs: Tensors, axis: int) -> list[Tensor]:
    """Return the gradients in float64 where the last token's outputs have none; otherwise as `with_gradients`."""
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    upstream = draw(*out.shape, seed=9).double()
    upstream.select(axis, -1).zero_()
    return list(torch.autograd.grad(out, leaves, upstream))


def milliseconds(function: Callable[[], object]) -> float:
    return 1.0 / gb_per_second(function, 10**6)  # 1 MB at 1 GB/s takes a millisecond


def compare(
    report: Report,
    what: str,
    ours: Callable[..., Tensors],
    separate: Callable[..., Tensors],
    inputs: Tensors,
    num_bytes: tuple[int, int],
    copy: str,
) -> None:
    """Report speed forward and backward, next to that of separate kernels; `num_bytes` must be moved in each pass."""
    times: list[list[float]] = []
    for function in (ours, separate):
        with torch.no_grad():
            forward = milliseconds(lambda f=function: f(*inputs))
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        outs = [out for out in function(*leaves) if out is not None]
        ups = [torch.ones_like(out) for out in outs]
        backward = milliseconds(lambda o=outs, x=leaves, u=ups: torch.autograd.grad(o, x, u, retain_graph=True))
        times.append([forward, backward])
    for name, fused, apart, size in zip(("forward", "backward"), *times, num_bytes, strict=True):
        value = f"{fused:.3f} ms, {size / fused / 1e6:,.0f} GB/s; separate kernels {apart:.3f} ms"
        report.row(f"{what}, {name}", value, f"less; {copy}", fused < apart)


@check(minutes=4)
def heads(report: Report) -> None:
    """Check split, norm and RoPE in one kernel with every family's heads, and odd ones."""
    for dtype in (torch.bfloat16, torch.float32):
        found = Worst()
        for case in HEADS:
            for tokens in (1, 33, 4099):
                inputs, angles = case.inputs(tokens, dtype)
                ours = with_gradients(joined(case.kernel(angles)), *inputs)
                exact = with_gradients(joined(case.exact(angles)), *inputs, dtype=torch.float64)
                found.add(worst(ours, exact), f"{tokens} tokens, {case.what}")
        found.report(report, f"heads, {dtype}, forward and backward")
    case = HEADS[0]
    inputs, angles = case.inputs(65)
    ours = with_gradients(joined(case.kernel(angles)), *inputs)
    exact = with_gradients(joined(case.exact(angles)), *inputs, dtype=torch.float64)
    groups = inputs[0].unflatten(1, (case.groups, -1, case.channels))
    in_order = torch.cat([groups[:, :, :-2].flatten(1), groups[:, :, -2].flatten(1), groups[:, :, -1].flatten(1)], 1)
    other = with_gradients(joined(case.kernel(angles)), in_order, *inputs[1:])
    control(report, "all query heads first, then keys, then values", worst(other[:1], exact[:1]))
    control(report, "no gradient of the keys' norm", worst([*ours[:3], torch.zeros_like(ours[3])], exact))
    fewer = without_last(joined(case.exact(angles)), inputs, axis=0)
    control(report, "a token is left out of the weights' gradients", worst(ours[2:], fewer[1:]))
    shifted = with_gradients(joined(case.exact(angles.roll(1, 0))), *inputs, dtype=torch.float64)
    control(report, "positions off by one", worst(ours, shifted))
    bits_again(report, "heads", lambda: with_gradients(joined(case.kernel(angles)), *inputs))
    copy = copy_speed()
    for case, tokens in ((HEADS[0], 16384), (HEADS[6], 8192), (HEADS[7], 16384), (HEADS[5], 8192)):
        inputs, angles = case.inputs(tokens)
        size = inputs[0].nbytes
        passes = 2 * size, (3 if case.norm else 2) * size
        what = f"{tokens} x {case.what}'s heads"
        compare(report, what, case.kernel(angles), case.separate(angles), inputs, passes, copy)


Sum = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


def sum_of(function: Sum, own: bool, following: bool) -> Callable[..., list[Tensor]]:
    """Return the function of x, the residual stream and the weights that there are."""

    def call(x: Tensor, residual: Tensor, *weights: Tensor) -> list[Tensor]:
        found = function(x, residual, weights[0] if own else None, weights[-1] if following else None)
        return [result for result in found if result is not None]

    return call


def kernel_sum(
    x: Tensor, residual: Tensor, own: Tensor | None, following: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from slime.megatron.model.kernels.triton_add_norm import add_and_norm

    return add_and_norm(x, residual, own, following, EPS)


def separate_sum(
    x: Tensor, residual: Tensor, own: Tensor | None, following: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from slime.megatron.model.kernels import rms_norm

    total = residual + (x if own is None else rms_norm(x, own, EPS))
    return total, None if following is None else rms_norm(total, following, EPS)


def exact_sum(rounded: Tensor) -> Sum:
    """Return the formula in which the second norm reads the sum as it was `rounded` to the kernel's dtype."""

    def function(
        x: Tensor, residual: Tensor, own: Tensor | None, following: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        total = residual + (x if own is None else exact_norm(x, own))
        read = total + (rounded.double() - total).detach()
        return total, None if following is None else exact_norm(read, following)

    return function


def stacked(function: Callable[..., Tensors]) -> Callable[..., Tensor]:
    return lambda *tensors: torch.stack([*function(*tensors)])


def sum_case(rows: int, channels: int, own: bool, following: bool, dtype: torch.dtype, scale: float) -> list[Tensor]:
    weights = [(1 + draw(channels, seed=seed).float() / 4).to(dtype) for seed in range(3, 3 + own + following)]
    return [draw(rows, 1, channels, scale=scale, dtype=dtype, seed=seed) for seed in (1, 2)] + weights


KINDS = ((False, True), (True, True), (True, False))
"""Whether there is a norm before the sum, and one after it."""


@check(minutes=4)
def sums(report: Report) -> None:
    """Check the sum of a sub-layer's output and the residual stream, with the norms before and after it."""
    for dtype in (torch.bfloat16, torch.float32):
        found = Worst()
        for rows, channels in ((1, 64), (7, 96), (33, 896), (4099, 1024), (300, 4096), (65, 5120), (3, 16384)):
            for own, following in KINDS:
                for scale in (0.03, 1.0, 30.0):
                    inputs = sum_case(rows, channels, own, following, dtype, scale)
                    ours = with_gradients(stacked(sum_of(kernel_sum, own, following)), *inputs)
                    formula = sum_of(exact_sum(ours[0][0]), own, following)
                    exact = with_gradients(stacked(formula), *inputs, dtype=torch.float64)
                    value = worst([*ours[0], *ours[1:]], [*exact[0], *exact[1:]])
                    found.add(value, f"{rows} x {channels}, norms {own} {following}, entries of {scale:g}")
        found.report(report, f"sum and norms, {dtype}, forward and backward")
    inputs = sum_case(65, 1024, True, True, torch.bfloat16, 1.0)
    call = stacked(sum_of(kernel_sum, True, True))
    ours = with_gradients(call, *inputs)
    exact = with_gradients(stacked(sum_of(exact_sum(ours[0][0]), True, True)), *inputs, dtype=torch.float64)
    for number, name in enumerate(("x", "the residual stream", "the first weight", "the second weight"), start=1):
        lost = [*ours]
        lost[number] = torch.zeros_like(ours[number])
        control(report, f"no gradient of {name}", worst(lost, exact))
    fewer = without_last(stacked(sum_of(exact_sum(ours[0][0]), True, True)), inputs, axis=1)
    control(report, "a row is left out of the weights' gradients", worst(ours[3:], fewer[2:]))
    bits_again(report, "sum and norms", lambda: with_gradients(call, *inputs))
    only = [tensor.detach().requires_grad_() for tensor in inputs]
    total, normed = kernel_sum(*only)
    assert normed is not None
    alone = torch.autograd.grad(normed, only, torch.ones_like(normed), retain_graph=True)
    both = torch.autograd.grad([total, normed], only, [torch.zeros_like(total), torch.ones_like(normed)])
    same = all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    report.row("a sum that nobody else reads: the same gradients", same, True, same)
    copy = copy_speed()
    for rows, channels, kinds in ((16384, 1024, KINDS[:1]), (8192, 4096, KINDS)):
        for own, following in kinds:
            inputs = sum_case(rows, channels, own, following, torch.bfloat16, 1.0)
            size = inputs[0].nbytes
            passes = (3 + following) * size, (2 + 2 * following + 2 * own) * size
            what = f"{rows} x {channels}, norms {'before' * own} {'after' * following}"
            compare(
                report,
                what,
                sum_of(kernel_sum, own, following),
                sum_of(separate_sum, own, following),
                inputs,
                passes,
                copy,
            )


READS = ("step.py:take_step", "step.py:_metrics", "nan_guard.py:check", "trainer.py:_longest")
"""Where a step reads its metrics, after all its work was launched."""


def waits(call: Callable[[], object]) -> list[str]:
    """Return the places at which the host waited for the device during `call`, as file:function."""
    synchronize, found = torch.cuda.synchronize, list[str]()

    def noted(*args: Any) -> None:
        caller = sys._getframe(1)
        found.append(place(Path(caller.f_code.co_filename), caller.f_lineno))
        synchronize(*args)

    synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    torch.cuda.synchronize = noted  # the mode does not see explicit calls
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.synchronize = synchronize
        torch.cuda.set_sync_debug_mode("default")
    seen = [warning for warning in caught if "synchronizing" in str(warning.message)]
    return found + [place(Path(warning.filename), warning.lineno) for warning in seen]


def place(path: Path, line: int) -> str:
    """Return the file and the innermost function with this line."""
    inside = [
        (node.lineno, node.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    return f"{path.name}:{max(inside)[1]}" if inside else f"{path.name}:{line}"


def forget() -> None:
    """Free the memory of an earlier Trainer."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@check(minutes=4)
def no_waiting(report: Report) -> None:
    """Check that the host never waits for the device before a step's metrics are read."""
    one = torch.ones(1, device="cuda")
    found = waits(lambda: (one.item(), torch.cuda.synchronize()))
    report.row("control: the places of two waits", ", ".join(found), "two places", len(found) == 2)
    mixture = "--num-layers 2 --max-tokens-per-gpu 4096 --moe-grouped-gemm"
    for model, flags in (
        ("qwen3-0.6B", "--max-tokens-per-gpu 4096"),
        ("qwen3-0.6B", "--max-tokens-per-gpu 4096 --use-distributed-optimizer"),
        ("glm4-9B", f"--num-layers 4 --max-tokens-per-gpu 4096 {RECOMPUTE}"),
        ("qwen3-30B-A3B", mixture),
    ):
        forget()
        args = args_of(model, flags)
        assert args.architecture is not None
        batch = batch_of([1024] * 8, args.architecture.vocab_size)  # two micro-batches
        with trainer_of(args) as trainer:
            for number in range(2):
                trainer.train(number, batch)
            found = waits(lambda trainer=trainer, batch=batch: trainer.train(2, batch))
        early = [where for where in found if where not in READS]
        value = (
            f"{len(early)} early: {', '.join(sorted({*early}))}" if early else f"only {', '.join(dict.fromkeys(found))}"
        )
        report.row(f"{model} {flags}: waits for the device", value, ", ".join(READS), not early)


@check(minutes=6)
def small_packs(report: Report) -> None:
    """Measure how busy the GPU is in steps of one small micro-batch, where launches may take longer than kernels."""
    from slime.core.packing import training_flops

    for model, what, flags in (
        ("qwen3-0.6B", "Qwen3-0.6B", "--max-tokens-per-gpu 8192"),
        ("glm4-9B", "GLM4-9B x 8/40", "--num-layers 8 --max-tokens-per-gpu 8192"),
    ):
        forget()
        args = args_of(model, flags)
        assert args.architecture is not None
        with trainer_of(args) as trainer:
            for size in (1024, 2048, 4096, 8192):
                batch = batch_of([size // 4] * 4, args.architecture.vocab_size)
                times: list[float] = []
                for number in range(13):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    trainer.train(number, batch)
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
                wall = statistics.median(times[3:]) * 1e3
                kernels, _ = profiled_step(lambda trainer=trainer, batch=batch: trainer.train(99, batch))
                busy, count = sum(map(sum, kernels.values())), sum(map(len, kernels.values()))
                flops = sum(map(training_flops(args.architecture), [size // 4] * 4))
                value = f"{wall:.1f} ms, the GPU is busy for {busy:.1f} ms ({busy / wall:.0%}) with {count} kernels"
                report.row(f"{what}, a step of {size} tokens", f"{value}; MFU {flops / wall / PEAK * 1e3:.1%}")


@check(minutes=5)
def memory(report: Report) -> None:
    """Check the plan's memory of a step against the peak, with and without recomputation."""
    from slime.plan.memory_model import train_memory

    selective = "--recompute-granularity selective"
    for model, what, flags in (
        ("qwen3-0.6B", "Qwen3-0.6B", ""),
        ("qwen3-0.6B", "Qwen3-0.6B, selective", selective),
        ("glm4-9B", "GLM4-9B x 8/40", "--num-layers 8"),
        ("glm4-9B", "GLM4-9B x 8/40, selective", f"--num-layers 8 {selective}"),
        ("glm4-9B", "GLM4-9B x 8/40, full", f"--num-layers 8 {RECOMPUTE}"),
    ):
        forget()
        args = args_of(model, flags, "--max-tokens-per-gpu 16384")
        assert args.architecture is not None
        planned: Any = train_memory(args, on_cuda=True)
        batch = batch_of([2048] * 8, args.architecture.vocab_size)
        with trainer_of(args) as trainer:
            for number in range(2):
                trainer.train(number, batch)
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            trainer.train(2, batch)
            peak = torch.cuda.max_memory_allocated()
        gib = 2**30
        value = (
            f"{peak / gib:.2f} GiB, {(peak - held) / gib:.2f} of it in the step only; planned {planned.peak / gib:.2f}"
        )
        report.row(f"{what}: peak", value, "within 15 % of the plan", abs(peak / planned.peak - 1) <= 0.15)
