"""Attention on a GPU: every kernel of the table against exact attention, which one is chosen, and how fast it is.

FlashAttention-4 compiles its kernels in each process, once for each dtype, head size and number of heads per group. So
the first call of a case takes seconds, and `chosen` checks that calls with other lengths do not.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slime.megatron.model import flash_attention
from slime.megatron.model.flash_attention import KERNELS, Case, Kernel, attend, attend_each, choose
from tests.gpu.checks import Report, check
from tests.gpu.parity import DEVICE, control, draw, gb_per_second, with_gradients

FA4, TORCH, EACH = KERNELS
BEST: Callable[..., Tensor] = attend
"""The kernel that the table gives."""
OUTPUT_LIMIT, GRADIENT_LIMIT = 1e-3, 3e-3
"""The relative errors in bf16 that are right even if SDPA's own are smaller."""
SLOWEST_LATER = 0.5
"""Seconds of a later call, forward and backward, that compiles nothing; a kernel takes more to compile."""

Inputs = tuple[list[Tensor], list[Tensor], tuple[int, int, None]]
"""Queries, keys and values; the beginnings of the sequences; the longest ones, and no scale."""


def attention_case(lengths_q: list[int], lengths_k: list[int], heads: int, groups: int, channels: int) -> Inputs:
    tensors = [
        draw(sum(lengths_q), heads, channels),
        draw(sum(lengths_k), groups, channels, seed=1),
        draw(sum(lengths_k), groups, channels, seed=2),
    ]
    cu_q, cu_k = (
        F.pad(torch.tensor(lengths, device=DEVICE).cumsum(0), (1, 0)).int() for lengths in (lengths_q, lengths_k)
    )
    return tensors, [cu_q, cu_k], (max(lengths_q), max(lengths_k), None)


def exact_attention(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, shift: int = 0) -> Tensor:
    """Compute attention step by step: scores, mask, softmax. `shift` moves the mask's edge."""
    outputs: list[Tensor] = []
    repeats = query.size(1) // key.size(1)
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for n in range(len(starts_q) - 1):
        q = query[starts_q[n] : starts_q[n + 1]].transpose(0, 1)
        k, v = (x[starts_k[n] : starts_k[n + 1]].repeat_interleave(repeats, 1).transpose(0, 1) for x in (key, value))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
        rows, columns = scores.shape[1:]
        visible = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows + shift)
        outputs.append((scores.masked_fill(~visible, -math.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Return, for each tensor, the norm of the error over the norm of the tensor."""
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, exact, strict=True)]


def relative(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the worst of `errors`; a NaN is worse than any number."""
    values = errors(found, exact)
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def case_of(dtype: torch.dtype, head: int, **changes: Any) -> Case:
    """Return the case of a head size on this machine."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return Case(capability, dtype, head, **changes)


def fitting(dtype: torch.dtype, head: int) -> Iterator[Kernel]:
    """Yield the kernels that have no reason against a head size on this machine."""
    case = case_of(dtype, head)
    yield from (kernel for kernel in KERNELS if kernel.reason_against(case) is None)


def attention_cases(report: Report, whole: list[int], ends: list[int], sizes: list[tuple[int, int, int]]) -> None:
    """Compare every kernel of the table with exact attention: whole sequences, and queries that are their ends."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for heads, groups, channels in sizes if dtype != torch.float16 else sizes[:1]:
            for lengths_q in (whole, ends):
                tensors, cu, rest = attention_case(lengths_q, whole, heads, groups, channels)
                tensors = [tensor.to(dtype) for tensor in tensors]
                exact = with_gradients(lambda *x, cu=cu: exact_attention(*x, *cu), *tensors, dtype=torch.float64)
                each = with_gradients(lambda *x, cu=cu: attend_each(x[0], x[1], x[2], cu[0], cu[1], None), *tensors)
                plain = relative(each, exact)
                for kernel in fitting(dtype, channels):
                    ours = with_gradients(lambda *x, cu=cu, k=kernel, r=rest: k.attend(*x, *cu, *r), *tensors)
                    found = errors(ours, exact)
                    if dtype == torch.float32:
                        rule, ok = "1e-5", max(found) <= 1e-5
                    else:
                        rule = f"<= 1.5 x {plain:.3g}, SDPA's, or {OUTPUT_LIMIT:g} and {GRADIENT_LIMIT:g}"
                        ok = max(found) <= 1.5 * plain
                        ok |= found[0] <= OUTPUT_LIMIT and max(found[1:]) <= GRADIENT_LIMIT
                    what = f"{heads} heads over {groups}, {channels} channels"
                    what += f", {'whole' if lengths_q is whole else 'ends'}"
                    shown = " ".join(f"{value:.2e}" for value in found)
                    report.row(f"{kernel.name}, {dtype}, {what}: output, dq, dk, dv", shown, rule, ok)
    for kernel in fitting(torch.bfloat16, sizes[0][2]):
        attention_controls(report, kernel, whole, ends, sizes[0])


def attention_controls(
    report: Report, kernel: Kernel, whole: list[int], ends: list[int], size: tuple[int, int, int]
) -> None:
    """Check that another mask or another boundary would be noticed."""
    tensors, cu, rest = attention_case(ends, whole, *size)
    ours = [kernel.attend(*tensors, *cu, *rest)]
    q, k, v = (tensor.double() for tensor in tensors)
    for shift in (-1, 1):
        off = exact_attention(q, k, v, cu[0], cu[1], shift).nan_to_num()
        control(report, f"{kernel.name}: the mask's edge off by {shift}", relative(ours, [off]), 0.02)
    moved = torch.where(cu[1] == cu[1][3], cu[1] + 1, cu[1])  # both sequences still have a key for each query
    other = exact_attention(q, k, v, cu[0], moved)
    control(report, f"{kernel.name}: a boundary of keys off by one", relative(ours, [other]), 0.02)


WHOLE, ENDS = [1, 7, 64, 129, 0, 300, 1025], [1, 3, 64, 100, 0, 17, 600]


@check(minutes=7)
def kernels(report: Report) -> None:
    """Check packed attention and its gradients: grouped heads, odd and empty sequences, queries at the end of keys."""
    sizes = [(16, 8, 128), (32, 2, 128), (4, 4, 64), (4, 2, 16), (3, 1, 96), (8, 2, 192), (8, 2, 256)]
    attention_cases(report, WHOLE, ENDS, sizes)
    many = [1 + number % 5 for number in range(300)]  # FlashAttention-4 looks sequences up in another way from 257 on
    tensors, cu, rest = attention_case(many, many, 16, 8, 128)
    exact = with_gradients(lambda *x: exact_attention(*x, *cu), *tensors, dtype=torch.float64)
    plain = relative(with_gradients(lambda *x: EACH.attend(*x, *cu, *rest), *tensors), exact)
    for kernel in fitting(torch.bfloat16, 128):
        found = relative(with_gradients(lambda *x, k=kernel: k.attend(*x, *cu, *rest), *tensors), exact)
        limit = f"<= 1.5 x {plain:.3g}, SDPA's"
        report.row(f"{kernel.name}, 300 sequences of 1 to 5 tokens", found, limit, found <= 1.5 * plain)


def installed_fa4() -> str | None:
    """Return the version of FlashAttention-4 by pip's own record, or the place of a copy without one."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        folders = (Path(folder or ".") / "flash_attn" / "cute" / "__init__.py" for folder in sys.path)
        return next((str(path) for path in folders if path.exists()), None)


def require_fa4(report: Report) -> None:
    """End the check where FlashAttention-4 is not installed, or has no kernels for this GPU."""
    if installed_fa4() is None:
        report.skip("flash-attn-4 is not installed")
    if torch.cuda.get_device_capability()[0] not in flash_attention.FA4_HEADS:
        report.skip("FlashAttention-4 is not used on this GPU")


@check(minutes=3)
def chosen(report: Report) -> None:
    """Check that FlashAttention-4 runs where it is installed, also on views, and compiles nothing for new lengths."""
    report.row("flash-attn-4", installed_fa4() or "not installed")
    require_fa4(report)
    for head in (64, 128):
        kernel, reasons = choose(case_of(torch.bfloat16, head))
        report.row(f"heads of {head}: the kernel", kernel.name, FA4.name, kernel is FA4)
        for name, why in reasons.items():
            report.row(f"heads of {head}: not {name}", why)
    for backend, wanted in (("flash", FA4), ("fused", TORCH), ("unfused", EACH)):
        name = choose(case_of(torch.bfloat16, 128, backend=backend))[0].name
        report.row(f"--attention-backend {backend}", name, wanted.name, name == wanted.name)
    lengths(report)
    tensors, cu, rest = attention_case([2048] * 2, [2048] * 2, 16, 8, 128)
    ours, wanted = BEST(*tensors, *cu, *rest), FA4.attend(*tensors, *cu, *rest)
    report.row("`attend` gives FlashAttention-4's bits", torch.equal(ours, wanted), True, torch.equal(ours, wanted))
    differ = int((TORCH.attend(*tensors, *cu, *rest) != wanted).sum())
    control(report, "entries of the output by PyTorch's kernel that differ", differ, 0)
    views(report)


def views(report: Report) -> None:
    """Check slices of one projection's output, and a gradient with other strides."""
    for heads, groups in ((16, 8), (4, 1)):
        sizes = [heads * 128, groups * 128, groups * 128]
        whole = draw(700, 1, sum(sizes))
        cu: list[Any] = [torch.tensor([0, 300, 700], dtype=torch.int32, device=DEVICE)] * 2

        def sliced(x: Tensor, *, copies: bool, sizes: list[int] = sizes, cu: list[Any] = cu) -> Tensor:
            parts = [part.unflatten(-1, (-1, 128))[:, 0] for part in x.split(sizes, -1)]
            q, k, v = (part.contiguous() for part in parts) if copies else parts
            # the gradient arrives transposed
            return FA4.attend(q, k, v, *cu, 400, 400, None).transpose(0, 1)

        ours, copied = (with_gradients(lambda x, c=c: sliced(x, copies=c), whole) for c in (False, True))
        off = relative(ours, copied)
        same = torch.equal(ours[0], copied[0])
        report.row(f"{heads}/{groups} heads, views: the output of copies", same, True, same)
        report.row(f"{heads}/{groups} heads, views: gradient against copies'", off, "<= 1e-4", off <= 1e-4)
    ones = attention_case([2048], [2048], 16, 8, 128)
    leaves = [tensor.requires_grad_() for tensor in ones[0]]
    expanded = torch.autograd.grad(FA4.attend(*leaves, *ones[1], *ones[2]).sum(), leaves)
    out = FA4.attend(*leaves, *ones[1], *ones[2])
    off = relative(list(expanded), list(torch.autograd.grad(out, leaves, torch.ones_like(out))))
    report.row("an expanded gradient, against a full one", off, "<= 1e-4", off <= 1e-4)


def seconds_of(lengths_q: list[int], lengths_k: list[int], *, grad: bool = True) -> float:
    """Return the seconds of forward and backward, launch to end."""
    tensors, cu, rest = attention_case(lengths_q, lengths_k, 16, 8, 128)
    leaves = [tensor.requires_grad_(grad) for tensor in tensors]
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = FA4.attend(*leaves, *cu, *rest)
    if grad:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.cuda.synchronize()
    return time.perf_counter() - start


def lengths(report: Report) -> None:
    """Check that calls with other lengths, other numbers of sequences or without gradients compile nothing."""
    first = seconds_of([513, 800], [513, 800])
    report.row("seconds of the first call, forward and backward, which compiles", first)
    packs = [[128 * number + 7, 1, number] for number in range(1, 17)]
    packs += [[16384], [1], [1, 1, 1], [8] * 200]
    times = {f"{len(pack)} of {max(pack)}": seconds_of(pack, pack) for pack in packs}
    times["queries that are the last 100 of 900"] = seconds_of([100, 5], [900, 5])
    times["without gradients"] = seconds_of([700], [700], grad=False)
    slowest = max(times, key=lambda name: times[name])
    what = f"{len(times)} calls with other lengths: the slowest in seconds ({slowest})"
    report.row(what, times[slowest], f"<= {SLOWEST_LATER:g}", times[slowest] <= SLOWEST_LATER)
    report.row("300 sequences, first call: seconds", seconds_of([5] * 300, [5] * 300))
    again = seconds_of([6] * 280, [6] * 280)
    report.row("280 sequences: seconds", again, f"<= {SLOWEST_LATER:g}", again <= SLOWEST_LATER)
    start = time.perf_counter()
    seconds_of_other_heads()
    control(report, "another number of heads per group compiles: seconds", time.perf_counter() - start, SLOWEST_LATER)


def seconds_of_other_heads() -> None:
    tensors, cu, rest = attention_case([300], [300], 32, 2, 128)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = FA4.attend(*leaves, *cu, *rest)
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.cuda.synchronize()


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def runs_that_differ(function: Callable[..., Tensor], tensors: list[Tensor], runs: int = 8) -> int:
    """Return in how many of `runs` further runs any bit of the output or of a gradient is another one."""
    first = with_gradients(function, *tensors)
    again = [with_gradients(function, *tensors) for _ in range(runs)]
    return sum(not all(map(torch.equal, first, other)) for other in again)


@check(minutes=3)
def repeats(report: Report) -> None:
    """Check that attention gives the same bits again under --deterministic, and count where it does not without."""
    for heads, groups in ((16, 8), (32, 2)):
        tensors, cu, rest = attention_case([2048] * 4, [2048] * 4, heads, groups, 128)
        what = f"{heads}/{groups} heads, 4 x 2048"
        with deterministic():
            name = choose(case_of(torch.bfloat16, 128, deterministic=True))[0].name
            report.row(f"{what}, deterministic: the kernel", name, TORCH.name, name == TORCH.name)
            differ = runs_that_differ(lambda *x, cu=cu, r=rest: BEST(*x, *cu, *r), tensors)
            report.row(f"{what}, deterministic: runs of 8 that differ", differ, 0, differ == 0)
            floats = [tensor.detach().float() for tensor in tensors]
            differ = runs_that_differ(lambda *x, cu=cu, r=rest: BEST(*x, *cu, *r), floats)
            report.row(f"{what}, float32, deterministic: runs of 8 that differ", differ, 0, differ == 0)
        for kernel in (kernel for kernel in fitting(torch.bfloat16, 128) if kernel is not EACH):
            differ = runs_that_differ(lambda *x, cu=cu, r=rest, k=kernel: k.attend(*x, *cu, *r), tensors)
            report.row(f"{what}, {kernel.name} as it is: runs of 8 that differ", differ)


@check(minutes=3)
def fa4_deterministic(report: Report) -> None:
    """Report whether FlashAttention-4's own deterministic backward pass gives the same bits, and its time."""
    require_fa4(report)
    function, _ = flash_attention.fa4()
    assert function is not None
    for heads, groups in ((16, 8), (32, 2)):
        tensors, cu, rest = attention_case([2048] * 4, [2048] * 4, heads, groups, 128)

        def ours(*x: Tensor, cu: list[Tensor] = cu, longest: tuple[int, int, None] = rest) -> Tensor:
            return function(
                *x,
                cu_seqlens_q=cu[0],
                cu_seqlens_k=cu[1],
                max_seqlen_q=longest[0],  # its semaphores are one for each block of the longest sequence
                max_seqlen_k=longest[1],
                causal=True,
                deterministic=True,
            )[0]

        what = f"{heads}/{groups} heads, 4 x 2048, its own deterministic mode"
        report.row(f"{what}: runs of 8 that differ", runs_that_differ(ours, tensors))
        report.row(f"{what}: forward and backward", "{:.2f} / {:.2f} ms".format(*both_ways(ours, tensors)))


def both_ways(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[float, float]:
    """Return the milliseconds of forward and of backward, when the GPU never waits for a launch."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    upstream = torch.ones_like(out)

    def milliseconds(call: Callable[[], object]) -> float:
        return 1 / gb_per_second(call, 10**6)

    return (
        milliseconds(lambda: function(*leaves)),
        milliseconds(lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)),
    )


def host_microseconds(function: Callable[..., Tensor], tensors: list[Tensor], calls: int = 50) -> float:
    """Return the host's time to launch a forward pass."""
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)  # cycles: the host does not wait for the GPU
    start = time.perf_counter()
    for _ in range(calls):
        function(*tensors)
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / calls * 1e6


SPEEDS = (
    (1, 16384, 16, 8, 128),
    (8, 2048, 16, 8, 128),
    (4, 2048, 32, 2, 128),
    (1, 8192, 32, 2, 128),
    (1, 16384, 16, 8, 64),
    (1, 65536, 16, 8, 128),
)


@check(minutes=4)
def speed(report: Report) -> None:
    """Time each flash kernel; FlashAttention-4 must not be slower than PyTorch's."""
    for count, length, heads, groups, head in SPEEDS:
        tensors, cu, rest = attention_case([length] * count, [length] * count, heads, groups, head)
        flops = 2 * 2 * heads * head * count * length**2 / 2
        found: dict[str, tuple[float, float]] = {}
        what = f"{count} x {length}, {heads} heads of {head} over {groups}"
        for kernel in (kernel for kernel in fitting(torch.bfloat16, head) if kernel is not EACH):

            def run(*x: Tensor, k: Kernel = kernel, cu: list[Tensor] = cu, r: Any = rest) -> Tensor:
                return k.attend(*x, *cu, *r)

            forward, backward = found[kernel.name] = both_ways(run, tensors)
            tera = f"{flops / forward / 1e9:.0f} / {2.5 * flops / backward / 1e9:.0f} TFLOP/s"
            tera += f", launched in {host_microseconds(run, tensors):.0f} us"
            report.row(f"{what}, {kernel.name}: forward / backward", f"{forward:.2f} / {backward:.2f} ms", tera)
        if FA4.name in found:
            ratios = [ours / theirs for ours, theirs in zip(found[FA4.name], found[TORCH.name], strict=True)]
            shown = " / ".join(f"{ratio:.2f}" for ratio in ratios)
            report.row(f"{what}: FlashAttention-4's time / PyTorch's", shown, "<= 1 each", max(ratios) <= 1)
