"""Numerics on a GPU: each kernel against its formula in float64, the models against Hugging Face's.

Kernels compute in float32 and round once. So an error is measured in units of the error that this allows: half a unit
in the last place of the entry's dtype, plus 1e-5 of its tensor's largest entry for the float32 sums inside. A value of
at most 1 is right. Every group has a control, a wrong formula that has to be noticed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.checks import Report, check
from tests.megatron import tiny

DEVICE = "cuda"
EPS = 1e-6
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 0.0}
SUMS = 1e-5


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)


def with_gradients(function: Callable[..., Tensor], *tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the output, and the gradient of each input for a random gradient of the output, in the inputs' dtype."""
    own = tensors[0].dtype
    leaves = [(tensor if dtype is None else tensor.to(dtype)).detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    upstream = draw(*out.shape, dtype=own, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def units(found: Tensor, exact: Tensor, size: float) -> float:
    """Return the largest error in units of the allowed one; `size` is that of terms that cancel in the sums."""
    assert found.shape == exact.shape, (found.shape, exact.shape)
    exact = exact.double()
    allowed = HALF_ULP[found.dtype] * exact.abs() + SUMS * exact.abs().max().clamp(min=size) + 1e-30
    return float(((found.double() - exact).abs() / allowed).max())


def worst(found: list[Tensor], exact: list[Tensor], sizes: tuple[float, ...] = ()) -> float:
    sizes = sizes or (0.0,) * len(found)
    values = [units(a, b, size) for a, b, size in zip(found, exact, sizes, strict=True)]
    return math.nan if any(math.isnan(value) for value in values) else max(values)


class Worst:
    """The worst error of many cases, and its case; a NaN is worse than any number."""

    def __init__(self) -> None:
        self.value, self.case, self.cases = -1.0, "", 0

    def add(self, value: float, case: str) -> None:
        self.cases += 1
        if math.isnan(value) or (value > self.value and not math.isnan(self.value)):
            self.value, self.case = value, case

    def report(self, report: Report, what: str) -> None:
        report.row(f"{what}: worst of {self.cases} ({self.case})", self.value, "<= 1 rounding", self.value <= 1)


def control(report: Report, what: str, value: float, limit: float = 1.0) -> None:
    noticed = math.isnan(value) or value > limit
    report.row(f"control, has to be noticed: {what}", value, f"> {limit:g}", noticed)


def bits_again(report: Report, what: str, function: Callable[[], list[Tensor]]) -> None:
    """Check that a second run gives the same bits, because kernels use no atomics."""
    same = all(torch.equal(a, b) for a, b in zip(function(), function(), strict=True))
    report.row(f"{what}: the same bits again", same, True, same)


def gb_per_second(function: Callable[[], object], num_bytes: int, calls: int = 20) -> float:
    """Return the speed: bytes that have to be moved, over the mean time of calls that the GPU runs back to back.

    The GPU is kept busy until all calls are launched, so that the time of short kernels is not that of their launch.
    """
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(30_000_000)  # cycles
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return calls * num_bytes / start.elapsed_time(end) / 1e6


def copy_speed() -> str:
    """Return the GB/s of a plain copy of 1 GB, counting bytes read and written."""
    source = draw(2**29)
    target = torch.empty_like(source)
    return f"{gb_per_second(lambda: target.copy_(source), 2 * source.nbytes):,.0f} GB/s, a copy"


def speed(report: Report, what: str, function: Callable[..., Tensor], *inputs: Tensor, passes: int, copy: str) -> None:
    """Report forward and backward speed; `passes` is how often backward moves as many bytes as the first input has."""
    out = function(*inputs)
    forward = gb_per_second(lambda: function(*inputs), inputs[0].nbytes + out.nbytes)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    upstream = torch.ones_like(out)
    backward = gb_per_second(
        lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True), passes * inputs[0].nbytes
    )
    report.row(f"{what}, forward", f"{forward:,.0f} GB/s", copy)
    report.row(f"{what}, backward", f"{backward:,.0f} GB/s", copy)


# Kernels


def exact_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def norm_cases(report: Report, shapes: list[tuple[int, int]]) -> None:
    from slime.megatron.model.kernels.triton_norm import rms_norm

    for dtype in (torch.bfloat16, torch.float32):
        found = Worst()
        for rows, channels in shapes:
            for scale in (1e-3, 1.0, 30.0):
                x = draw(rows, channels, scale=scale, dtype=dtype)
                weight = (1 + draw(channels, seed=1).float() / 4).to(dtype)
                ours = with_gradients(lambda x, w: rms_norm(x, w, EPS), x, weight)
                exact = with_gradients(exact_norm, x, weight, dtype=torch.float64)
                # two terms of this size cancel in the gradient of x: with one channel, all but the epsilon's share
                term = float(weight.abs().max() * 5 / (x.double().square().mean() + EPS).sqrt())
                found.add(worst(ours, exact, (0.0, term, 0.0)), f"{rows} x {channels}, entries of {scale:g}")
        found.report(report, f"RMSNorm, {dtype}, forward and backward")
    # heads that are slices of a projection's output, as q and k norms get them
    whole, weight = draw(301, 1, 8, 640), 1 + draw(128, seed=1).float().bfloat16() / 4
    found = Worst()
    for first in (0, 256, 512):

        def part(x: Tensor, norm: Callable[[Tensor], Tensor], first: int = first) -> Tensor:
            return norm(x[..., first : first + 128])

        ours = with_gradients(lambda x, w: part(x, lambda x: rms_norm(x, w, EPS)), whole, weight)
        exact = with_gradients(lambda x, w: part(x, lambda x: exact_norm(x, w)), whole, weight, dtype=torch.float64)
        found.add(worst(ours, exact), f"slice at {first}")
    found.report(report, "RMSNorm of slices")
    x, weight = draw(64, 128, scale=1e-3), torch.ones(128, dtype=torch.bfloat16, device=DEVICE)
    ours = with_gradients(lambda x, w: rms_norm(x, w, EPS), x, weight)
    exact = with_gradients(lambda x, w: exact_norm(x, w, 2 * EPS), x, weight, dtype=torch.float64)
    control(report, "twice the epsilon", worst(ours, exact))
    bits_again(report, "RMSNorm", lambda: with_gradients(lambda x, w: rms_norm(x, w, EPS), draw(999, 96), draw(96)))


@check(minutes=4)
def norm(report: Report) -> None:
    """Check RMSNorm at odd sizes and at the models' own."""
    from slime.megatron.model.kernels.triton_norm import rms_norm

    sizes = (1, 64, 96, 128, 4096, 5120)
    norm_cases(report, [(rows, channels) for channels in sizes for rows in (1, 7, 16384)])
    copy = copy_speed()
    for rows, channels in ((16384, 1024), (16384 * 16, 128), (8192, 4096)):
        x, weight = draw(rows, channels), draw(channels)
        what = f"RMSNorm of {rows} x {channels}"
        speed(report, what, lambda x, w: rms_norm(x, w, EPS), x, weight, passes=3, copy=copy)


def exact_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_cases(report: Report, shapes: list[tuple[int, int]]) -> None:
    from slime.megatron.model.kernels.triton_swiglu import swiglu as kernel

    for dtype in (torch.bfloat16, torch.float32):
        found = Worst()
        for rows, channels in shapes:
            for scale in (1e-3, 1.0, 30.0):
                gate_up = draw(rows, 1, 2 * channels, scale=scale, dtype=dtype)
                ours = with_gradients(kernel, gate_up)
                exact = with_gradients(exact_gate, gate_up, dtype=torch.float64)
                found.add(worst(ours, exact), f"{rows} x {channels}, entries of {scale:g}")
        found.report(report, f"SwiGLU, {dtype}, forward and backward")
    gate_up = draw(64, 192)
    exact = with_gradients(exact_gate, gate_up, dtype=torch.float64)
    control(report, "gate and up exchanged", worst(with_gradients(lambda x: kernel(x.roll(96, -1)), gate_up), exact))
    bits_again(report, "SwiGLU", lambda: with_gradients(kernel, draw(99, 192)))


@check(minutes=3)
def swiglu(report: Report) -> None:
    """Check SwiGLU at odd sizes and at the models' own."""
    from slime.megatron.model.kernels.triton_swiglu import swiglu as kernel

    swiglu_cases(report, [(rows, channels) for channels in (1, 64, 96, 3072, 13696) for rows in (1, 7, 4096)])
    copy = copy_speed()
    for rows, channels in ((16384, 3072), (8192, 13696)):
        speed(report, f"SwiGLU of {rows} x 2 x {channels}", kernel, draw(rows, 2 * channels), passes=3, copy=copy)


def exact_rotary(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    half = angles.size(-1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    x1, x2 = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    turned = torch.stack([y1, y2], -1).flatten(-2) if interleaved else torch.cat([y1, y2], -1)
    return torch.cat([turned, rest], -1)


def rotary_cases(report: Report, cases: list[tuple[int, int, int, int]]) -> None:
    """Check RoPE for each case: tokens, heads, channels, and channels that rotate."""
    from slime.megatron.model.kernels.triton_rotary import rotary as kernel

    for dtype in (torch.bfloat16, torch.float32):
        found = Worst()
        for tokens, heads, channels, turning in cases:
            for interleaved in (False, True):
                angles = draw(tokens, turning // 2, scale=3.0, dtype=torch.float32, seed=2)
                x = draw(tokens, heads, channels, dtype=dtype)
                cos, sin = angles.double().cos().float(), angles.double().sin().float()

                def ours(x: Tensor, cos: Tensor = cos, sin: Tensor = sin, pairs: bool = interleaved) -> Tensor:
                    return kernel(x, cos, sin, interleaved=pairs)

                def exact(x: Tensor, angles: Tensor = angles, pairs: bool = interleaved) -> Tensor:
                    return exact_rotary(x, angles, pairs)

                value = worst(with_gradients(ours, x), with_gradients(exact, x, dtype=torch.float64))
                found.add(value, f"{tokens} tokens, {heads} heads of {channels}, {turning} turn, pairs {interleaved}")
        found.report(report, f"RoPE, {dtype}, forward and backward")
    angles, x = draw(33, 32, dtype=torch.float32, seed=2), draw(33, 4, 128)
    cos, sin = angles.cos(), angles.sin()
    shifted = with_gradients(lambda x: exact_rotary(x, angles.roll(1, 0), True), x, dtype=torch.float64)
    control(
        report,
        "positions off by one",
        worst(with_gradients(lambda x: kernel(x, cos, sin, interleaved=True), x), shifted),
    )
    whole = draw(33, 8, 640)  # slices of a projection's output, and gradients with other strides
    sliced = with_gradients(lambda x: kernel(x[..., 512:], cos, sin, interleaved=False).transpose(0, 1), whole)
    wanted = with_gradients(
        lambda x: exact_rotary(x[..., 512:], angles, False).transpose(0, 1), whole, dtype=torch.float64
    )
    value = worst(sliced, wanted)
    report.row("RoPE of slices", value, "<= 1 rounding", value <= 1)


@check(minutes=4)
def rotary(report: Report) -> None:
    """Check RoPE: whole and partial, in halves and in pairs, for 1 to 32 heads."""
    from slime.megatron.model.kernels.triton_rotary import rotary as kernel

    heads = [(7, heads, 128, 128) for heads in (1, 2, 3, 8, 14, 32)]
    rotary_cases(
        report, [(1, 4, 16, 16), (1, 4, 16, 8), (7, 2, 96, 48), (16384, 16, 128, 128), (4096, 32, 128, 64), *heads]
    )
    copy = copy_speed()
    for tokens, count, turning, pairs in ((16384, 16, 128, False), (8192, 32, 64, True)):
        angles = draw(tokens, turning // 2, dtype=torch.float32)
        cos, sin = angles.cos(), angles.sin()

        def ours(x: Tensor, cos: Tensor = cos, sin: Tensor = sin, pairs: bool = pairs) -> Tensor:
            return kernel(x, cos, sin, interleaved=pairs)

        what = f"RoPE of {tokens} x {count} x 128, {turning} turn"
        speed(report, what, ours, draw(tokens, count, 128), passes=2, copy=copy)


# Log-probs


def exact_log_probs(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    log_probs = (logits * scale).log_softmax(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(1)


def logits_cases(report: Report, cases: list[tuple[int, int]]) -> None:
    """Check the two passes over logits in the matrix product's dtype, for each case of tokens and vocabulary."""
    from slime.megatron.model.kernels import triton_logits

    for dtype in (torch.bfloat16, torch.float32):
        sums, gradients = Worst(), Worst()
        for tokens, size in cases:
            for scale in (1.0, 1.25):
                logits = draw(tokens, size, scale=6.0, dtype=dtype)
                targets = torch.randint(0, size, (tokens,), device=DEVICE)
                of_log_probs, of_entropy = (draw(tokens, dtype=torch.float32, seed=seed) for seed in (3, 4))
                leaf = logits.double().requires_grad_()
                log_probs, entropy = exact_log_probs(leaf, targets, scale)
                largest, exps, weighted, target = triton_logits.sums(logits, targets, 0, scale)
                ours = [target - largest - exps.log(), exps.log() - weighted / exps]
                case = f"{tokens} tokens of {size}, / {1 / scale:g}"
                sums.add(worst(ours, [log_probs.detach(), entropy.detach()]), case)
                for with_entropy in (False, True):
                    loss = (log_probs * of_log_probs).sum() + with_entropy * (entropy * of_entropy).sum()
                    [exact] = torch.autograd.grad(loss, leaf, retain_graph=True)
                    got = triton_logits.gradient_in_place(
                        logits.clone(),
                        targets,
                        (largest + exps.log()),
                        ours[1],
                        of_log_probs,
                        of_entropy if with_entropy else None,
                        0,
                        scale,
                    )
                    gradients.add(worst([got], [exact]), f"{case}, entropy {with_entropy}")
        sums.report(report, f"log-probs and entropy of {dtype} logits")
        gradients.report(report, f"gradient in their place, {dtype}")
    logits, targets = draw(16, 999), torch.randint(0, 999, (16,), device=DEVICE)
    largest, exps, _, target = triton_logits.sums(logits, targets, 0, 1.0)
    exact, _ = exact_log_probs(logits.double(), targets, 1.1)
    control(report, "another temperature", worst([target - largest - exps.log()], [exact]))


@check(minutes=2)
def weight_gradients(report: Report) -> None:
    """Check the weight gradient that a linear layer's matrix product adds to the fp32 buffer itself."""
    from slime.megatron.optim.multi_tensor import WeightGradients, fuse_weight_gradients

    report.row("weights' gradients add themselves", fuse_weight_gradients(), True, fuse_weight_gradients())
    for tokens, outputs, inputs in ((7, 16, 64), (1000, 96, 4096), (8192, 4608, 4096)):
        x, gradient = draw(tokens, 1, inputs).view(tokens, inputs), draw(tokens, outputs, seed=1)
        buffer = draw(3, outputs, inputs, dtype=torch.float32, seed=2)  # a slice of the data-parallel buffer
        total, before = buffer[1], buffer.clone()
        for _ in range(2):
            WeightGradients.wgrad_gemm_accum_fp32(x, gradient, total)
        exact = before[1].double() + 2 * (gradient.double().t() @ x.double())
        value = units(total, exact, 0.0)
        report.row(f"{tokens} tokens, {outputs} x {inputs}, twice", value, "<= 1", value <= 1)
        untouched = torch.equal(buffer[0], before[0]) and torch.equal(buffer[2], before[2])
        report.row(f"{tokens} tokens, {outputs} x {inputs}: neighbours untouched", untouched, True, untouched)
        control(report, "added once", units(total, exact - gradient.double().t() @ x.double(), 0.0))


def adam_of(sizes: list[int], *, decay: float) -> tuple[Any, list[Tensor]]:
    """Return an Adam that writes bf16 weights in its pass, in the middle of training, and those weights."""
    from slime.megatron.optim.adam import OnePassAdamW

    mains = [draw(size, dtype=torch.float32, seed=size).requires_grad_(False) for size in sizes]
    models = [main.bfloat16() for main in mains]
    adam: Any = torch.optim.AdamW(mains, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=decay, fused=True)
    adam.__class__ = OnePassAdamW
    adam.model_of, adam.together = dict(zip(mains, models, strict=True)), {}
    return adam, models


def adam_steps(sizes: list[int], *, decay: float, scale: float, late: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and both moments after five steps, of ours and of torch's in float64 (a control: `late` steps)."""
    from slime.megatron.optim.multi_tensor import scaled_as_read

    adam, models = adam_of(sizes, decay=decay)
    mains = adam.param_groups[0]["params"]
    exacts = [main.double() for main in mains]
    exact = torch.optim.AdamW(exacts, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=decay, foreach=False)
    on = mains[0].device
    for number in range(5):
        for place, (main, wanted) in enumerate(zip(mains, exacts, strict=True)):
            some = number != 2 or place != 0  # the first weight has no gradient once
            main.grad = draw(main.numel(), dtype=torch.float32, seed=100 * number + place) if some else None
            wanted.grad = main.grad.double() / scale if main.grad is not None else None
        with scaled_as_read([adam], torch.tensor(scale, device=on), torch.tensor(0.0, device=on)):
            adam.step()
        exact.step()
        if number == 0 and late:
            for state in exact.state.values():
                state["step"] += late
    before = [main.clone() for main in mains]
    with scaled_as_read([adam], torch.tensor(scale, device=on), torch.tensor(1.0, device=on)):
        adam.step()
    assert all(map(torch.equal, mains, before)), "a step that is to be skipped changes nothing"
    assert all(torch.equal(model, main.bfloat16()) for model, main in zip(models, mains, strict=True))
    assert [float(adam.state[main]["step"]) for main in mains] == [4.0] + [5.0] * (len(mains) - 1)
    states = [(adam.state[main], exact.state[wanted]) for main, wanted in zip(mains, exacts, strict=True)]
    names = ("exp_avg", "exp_avg_sq")
    return (
        [*mains, *(ours[name] for ours, _ in states for name in names)],
        [*exacts, *(theirs[name] for _, theirs in states for name in names)],
    )


def adamw_cases(report: Report, sizes: list[int]) -> None:
    found = Worst()
    for decay in (0.0, 0.1):
        for scale in (1.0, 7.5):
            found.add(worst(*adam_steps(sizes, decay=decay, scale=scale)), f"decay {decay}, gradients / {scale}")
    found.report(report, "AdamW against float64: weights and moments after 5 steps, bf16 copies as rounded")
    control(report, "bias corrections of another step", worst(*adam_steps(sizes, decay=0.1, scale=1.0, late=1)))


@check(minutes=3)
def adamw(report: Report) -> None:
    """Check the Adam that writes the model's weights in its own pass: odd sizes, then its speed."""
    adamw_cases(report, [1, 7, 2048, 5001, 1_000_003, 160_000, 4096])
    for what, sizes in (
        ("3.4e8 weights in two tensors, one of odd size", [2**28, 2**26 + 1]),
        ("3.4e8 weights in 80 tensors", [2**22] * 80),
        ("1,024 weights in 200 tensors of 1,024", [1024] * 200),
    ):
        adam, _ = adam_of(sizes, decay=0.1)
        for main in adam.param_groups[0]["params"]:
            main.grad = torch.ones_like(main)
        seconds = 30 * sum(sizes) / gb_per_second(adam.step, 30 * sum(sizes), 10) / 1e9
        speed = f"{seconds * 1e3:.3f} ms, {30 * sum(sizes) / seconds / 1e9:,.0f} GB/s"
        report.row(f"AdamW of {what}", speed, copy_speed())


@contextmanager
def one_rank() -> Iterator[dist.ProcessGroup]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            assert dist.group.WORLD is not None
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()


@check(minutes=4)
def log_probs(report: Report) -> None:
    """Check log-probs and entropy with gradients: the passes over logits, then all from hidden states to weights."""
    from slime.megatron.logprobs import response_log_probs

    logits_cases(report, [(1, 93), (7, 93), (3, 8192), (5, 8193), (300, 151936)])
    vocab, padded, hidden_size, tokens, targets_count = 151936, 152064, 1024, 2500, 2001
    weight, hidden = draw(padded, hidden_size, scale=0.1), draw(tokens, 1, hidden_size, seed=1)
    predicting = torch.randperm(tokens, device=DEVICE)[:targets_count]
    targets = torch.randint(0, vocab, (targets_count,), device=DEVICE)
    of_log_probs, of_entropy = (draw(targets_count, dtype=torch.float32, seed=seed) for seed in (3, 4))

    def exact(size: int, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        chosen, entropy = exact_log_probs((leaves[0][predicting, 0] @ leaves[1][:size].t()).double(), targets, 1.25)
        loss = (chosen * of_log_probs).sum() + (entropy * of_entropy).sum()
        return [chosen.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]

    def difference(found: list[Tensor], expected: list[Tensor]) -> float:
        """Return the relative root mean square error of the worst tensor."""
        pairs = zip(found, expected, strict=True)
        return max(float((a.double() - b).norm() / b.double().norm()) for a, b in pairs)

    wanted, wrong = exact(vocab, torch.float64), exact(padded, torch.float64)
    plain = difference(exact(vocab, torch.bfloat16), wanted)
    with one_rank() as group:

        def ours(dtype: torch.dtype, chunk: int) -> list[Tensor]:
            leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
            chosen, entropy = response_log_probs(
                leaves[0],
                leaves[1],
                predicting,
                targets,
                vocab_size=vocab,
                temperature=0.8,
                chunk_size=chunk,
                with_entropy=True,
                sequence_parallel=False,
                group=group,
            )
            assert entropy is not None
            loss = (chosen * of_log_probs).sum() + (entropy * of_entropy).sum()
            return [chosen.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]

        for chunk in (700, 4096):
            value = difference(ours(torch.float32, chunk), wanted)
            report.row(f"hidden states to gradients, fp32, chunks of {chunk}", value, 1e-4, value <= 1e-4)
            value = difference(ours(torch.bfloat16, chunk), wanted)
            limit = f"<= 1.2 x {plain:.3g}, bf16 products with all else in fp64"
            report.row(f"the same in bf16, chunks of {chunk}", value, limit, value <= 1.2 * plain)
        control(report, "padding in the softmax", difference(ours(torch.float32, 700), wrong), 1e-4)


# Models

LENGTHS = [33, 200, 7, 1, 333]


def inputs() -> tuple[Tensor, Tensor]:
    """Return tokens, and the weight in the loss of every vocabulary entry's log-prob."""
    tokens = torch.randint(0, tiny.VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    return tokens.to(DEVICE), draw(sum(LENGTHS), tiny.VOCAB, dtype=torch.float32, seed=4) / sum(LENGTHS)


class Outcome:
    """A model's logits, its gradients by HF name, and the log-probs of the batch's response tokens."""

    def __init__(self, logits: Tensor, gradients: dict[str, Tensor]) -> None:
        self.logits, self.gradients = logits.detach().float(), gradients

    def errors(self, exact: Outcome) -> tuple[float, float, float]:
        """Return the logits' largest and root mean square error, and the gradients' relative error in norm."""
        logits = (self.logits - exact.logits).double()
        assert self.gradients.keys() == exact.gradients.keys()
        names = list(exact.gradients)
        wrong = sum(float((self.gradients[n].double() - exact.gradients[n]).square().sum()) for n in names)
        total = sum(float(exact.gradients[n].double().square().sum()) for n in names)
        return float(logits.abs().max()), float(logits.square().mean().sqrt()), math.sqrt(wrong / total)


def huggingface(family: str, dtype: torch.dtype) -> Outcome:
    model: Any = tiny.hf_model(family).to(DEVICE, dtype)
    tokens, weights = inputs()
    logits = torch.cat([model(row[None]).logits[0] for row in tokens.split(LENGTHS)])
    (logits.float().log_softmax(-1) * weights).sum().backward()
    return Outcome(logits, {name: parameter.grad.float() for name, parameter in model.named_parameters()})


def megatron(hf: Path, **changes: Any) -> Outcome:
    from slime.megatron.model.attention import pack_sequences
    from slime.megatron.model.build import build_model, named_parameters, unwrap
    from slime.megatron.model.hf_weights import load_hf_into
    from slime.megatron.parallel import close_parallel, init_parallel
    from slime.models.families import weight_table
    from slime.models.hf_files import HFReader

    arch_changes = changes.pop("arch", {})
    args = tiny.make_args(hf, **changes)
    assert args.architecture is not None
    arch = replace(args.architecture, **arch_changes)
    args = replace(args, architecture=arch)
    with tempfile.TemporaryDirectory() as folder:
        init_parallel(args, rank=0, world_size=1, init_method=f"file://{folder}/store")
        try:
            model = build_model(args, wrap=False)
            load_hf_into(model, arch, HFReader(hf), args)
            tokens, weights = inputs()
            hidden = model[0](tokens[None], None, None, packed_seq_params=pack_sequences(LENGTHS, arch))
            logits = F.linear(hidden[:, 0], unwrap(model[0]).output_weight())[:, : tiny.VOCAB]
            (logits.float().log_softmax(-1) * weights).sum().backward()
            table = weight_table(arch)
            gradients: dict[str, Tensor] = {}
            for name, parameter in named_parameters(model):
                assert parameter.grad is not None, name
                gradients |= {hf_name: part.float() for hf_name, part in table.to_hf(name, parameter.grad)}
            return Outcome(logits, gradients)
        finally:
            close_parallel()


@check(minutes=5)
def models_fp32(report: Report) -> None:
    """Compare logits and gradients of the four families in fp32; TF32 would make the error a hundred times larger."""
    with tempfile.TemporaryDirectory() as folder:
        for family in tiny.FAMILIES:
            hf = tiny.hf_dir(Path(folder) / family, family)
            exact = huggingface(family, torch.float32)
            largest, _, gradients = megatron(hf, bf16=False).errors(exact)
            report.row(f"{family}, fp32: logits", largest, "<= 1e-4", largest <= 1e-4)
            report.row(f"{family}, fp32: gradients, relative", gradients, "<= 1e-4", gradients <= 1e-4)
            largest, _, _ = megatron(hf, bf16=False, recompute_granularity="full", **FULL).errors(exact)
            report.row(f"{family}, fp32, recomputed: logits", largest, "<= 1e-4", largest <= 1e-4)
        for what, change in (("RoPE's base", {"rotary_base": 1e6}), ("the norms' epsilon", {"norm_epsilon": 1e-3})):
            wrong, _, _ = megatron(Path(folder) / "qwen3", bf16=False, arch=change).errors(
                huggingface("qwen3", torch.float32)
            )
            control(report, f"another value for {what}", wrong, 1e-3)


FULL: dict[str, Any] = {"recompute_method": "uniform", "recompute_num_layers": 1}


@check(minutes=5)
def models_bf16(report: Report) -> None:
    """Check that our bf16 is no further from fp32 than Hugging Face's own bf16."""
    with tempfile.TemporaryDirectory() as folder:
        for family in tiny.FAMILIES:
            hf = tiny.hf_dir(Path(folder) / family, family)
            exact = huggingface(family, torch.float32)
            theirs, ours = huggingface(family, torch.bfloat16).errors(exact), megatron(hf, bf16=True).errors(exact)
            report.row(f"{family}, bf16: logits, largest error", ours[0], f"HF's own: {theirs[0]:.3g}")
            for what, found, own in zip(
                ("logits, rms error", "gradients, relative"), ours[1:], theirs[1:], strict=True
            ):
                limit = f"<= 1.5 x {own:.3g}, HF's own"
                report.row(f"{family}, bf16: {what}", found, limit, found <= 1.5 * own)
        exact = huggingface("glm4", torch.float32)
        own = huggingface("glm4", torch.bfloat16).errors(exact)[1]
        wrong = megatron(Path(folder) / "glm4", bf16=True, arch={"norm_epsilon": 0.05}).errors(exact)[1]
        control(report, "another epsilon, in bf16", wrong, 1.5 * own)


def response_log_probs_of(family: str, batch: Any, dtype: torch.dtype, temperature: float) -> Tensor:
    """Return transformers' log-probs of the batch's response tokens."""
    model: Any = tiny.hf_model(family).to(DEVICE, dtype)
    tokens = torch.from_numpy(batch.columns["tokens"]).to(DEVICE)
    found: list[Tensor] = []
    with torch.no_grad():
        rows = tokens.split(batch.total_lengths_N.tolist())
        for row, responses in zip(rows, batch.response_lengths_N.tolist(), strict=True):
            log_probs = (model(row[None]).logits[0].float() / temperature).log_softmax(-1)
            chosen = log_probs[:-1].gather(1, row[1:, None])[:, 0]
            found.append(chosen[-responses:])
    return torch.cat(found)


@check(minutes=5)
def trainer_log_probs(report: Report) -> None:
    """Check the Trainer's log-probs of a batch (packed, chunked, at a temperature), and one of its steps.

    In bf16 on a GPU linear layers add their weights' gradients to the buffer themselves; they are compared with fp32's.
    """
    from slime.megatron.model.build import named_parameters
    from slime.megatron.trainer import Trainer

    batch = tiny.random_batch(lengths=[40, 3, 180, 29, 401, 1, 77, 12])
    with tempfile.TemporaryDirectory() as folder:
        for family in tiny.FAMILIES:
            hf = tiny.hf_dir(Path(folder) / family, family)
            exact = response_log_probs_of(family, batch, torch.float32, 0.8)
            theirs = response_log_probs_of(family, batch, torch.bfloat16, 0.8) - exact
            in_fp32: dict[str, Tensor] = {}
            for bf16 in (False, True):
                args = tiny.make_args(hf, bf16=bf16, max_tokens_per_gpu=512, clip_grad=0.0)
                store = f"file://{folder}/{family}-{bf16}"
                trainer = Trainer(args, rank=0, world_size=1, init_method=store)
                try:
                    trainer.load()
                    error = torch.from_numpy(trainer.log_probs(batch)).to(DEVICE) - exact
                    largest, rms = float(error.abs().max()), float(error.square().mean().sqrt())
                    if bf16:
                        own = float(theirs.square().mean().sqrt())
                        limit = f"<= 1.5 x {own:.3g}, HF's own"
                        report.row(f"{family}, bf16: log-probs, rms error", rms, limit, rms <= 1.5 * own)
                    else:
                        report.row(f"{family}, fp32: log-probs", largest, "<= 1e-4", largest <= 1e-4)
                    metrics = trainer.train(0, batch)
                    parameters: Any = named_parameters(trainer.model)
                    gradients = {name: p.main_grad.double().clone() for name, p in parameters}
                    if bf16:
                        wrong = sum(float((gradients[name] - in_fp32[name]).square().sum()) for name in in_fp32)
                        size = sum(float(gradient.square().sum()) for gradient in in_fp32.values())
                        value = math.sqrt(wrong / size)
                        report.row(
                            f"{family}, bf16: a step's gradients, against fp32's", value, "<= 0.05", value <= 0.05
                        )
                        largest = max(in_fp32, key=lambda name: float(in_fp32[name].norm()))
                        control(report, f"without {largest}", float(in_fp32[largest].norm()) / math.sqrt(size), 0.05)
                    in_fp32 = in_fp32 or gradients
                    moved = float((torch.from_numpy(trainer.log_probs(batch)).to(DEVICE) - exact - error).abs().max())
                    norm = metrics["train/grad_norm"]
                    report.row(f"{family}, bf16 {bf16}: a step's gradient norm", norm, "> 0", 0 < norm < math.inf)
                    report.row(f"{family}, bf16 {bf16}: what it moved", moved, "> 1e-3", moved > 1e-3)
                finally:
                    trainer.close()
        shifted = response_log_probs_of("qwen3", batch, torch.float32, 0.9)
        control(report, "another temperature", float((shifted - exact).abs().max()), 1e-3)


@check(minutes=4)
def resume(report: Report) -> None:
    """Check in bf16 that two steps, a save, a load and a third step equal three steps without a stop, bit for bit."""
    batch = tiny.random_batch(lengths=[40, 3, 180, 29, 401, 1, 77, 12])
    for distributed in (False, True):
        what = "distributed optimizer" if distributed else "one optimizer"
        whole, control_of = resumed(batch, 3, 3, distributed), resumed(batch, 2, 3, distributed, forget=True)
        found = resumed(batch, 2, 3, distributed)
        differ = [name for name in whole if not torch.equal(whole[name], found[name])]
        report.row(f"{what}: tensors that differ", len(differ), f"0 of {len(whole)}", not differ)
        lost = sum(not torch.equal(whole[name], control_of[name]) for name in whole)
        control(report, f"{what}: without the moments", lost, 0)


def resumed(batch: Any, stop: int, steps: int, distributed: bool, *, forget: bool = False) -> dict[str, Tensor]:
    """Return the weights after `steps` steps, with a save and load after step `stop`; `forget`: no optimizer state."""
    from slime.megatron.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        hf = tiny.hf_dir(Path(folder) / "hf", "qwen3")
        args = tiny.make_args(
            hf, bf16=True, max_tokens_per_gpu=512, use_distributed_optimizer=distributed, num_rollout=4,
            load=f"{folder}/save", save=f"{folder}/save", no_load_optim=forget,
        )  # fmt: skip
        for begin, end in ((0, stop), (stop, steps)):
            trainer = Trainer(args, rank=0, world_size=1, init_method=f"file://{folder}/store-{begin}")
            try:
                trainer.load()
                for number in range(begin, end):
                    trainer.train(number, batch)
                if begin == 0:
                    trainer.save(stop - 1, {})
                weights = {name: tensor.clone() for name, tensor in trainer.iter_hf_tensors()}
            finally:
                trainer.close()
    return weights
