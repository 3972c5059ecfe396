"""Causal attention of packed sequences: FlashAttention-4, PyTorch's flash attention, or one SDPA call per sequence.

- Used by: `attention` calls `attend` after it has applied rotary positions, with and without context parallelism.
- Invariant: all kernels use the same mask: query i of a sequence with q queries and k >= q keys sees the keys
  0 .. i + k - q. This mask is aligned at the bottom right: a rank that has the last q tokens of a sequence needs it.
  No flash kernel repeats grouped key/value heads in memory.

`KERNELS` is the table. The first kernel that has no reason against a `Case` computes it; the log names the kernel and
the reasons against those before it, once per process. `--attention-backend` leaves kernels out:

    auto, flash       all of the table
    fused             PyTorch's flash attention, which is part of PyTorch, and what follows it
    unfused, local    one SDPA call per sequence

FlashAttention-4 (the package flash-attn-4, module flash_attn.cute) compiles its kernels at the first call in a process.
Its compiled variants depend on dtype, head size and heads per group, but not on lengths: `max_q` and `max_k` are not
passed on, because they would add variants for packs of very short sequences, and the kernels do not need them. PyTorch
can also call it, by activate_flash_attention_impl("FA4"), but this replaces its own kernel in the whole process, and
torch 2.13 expects another return value than flash-attn-4 4.0.0b36 has.

PyTorch's varlen_attn wraps the flash kernel that is called here directly. In torch 2.11 varlen_attn requires as many
key/value heads as query heads; the kernel does not (it sums the gradient over a group's heads itself). Its causal mask
is aligned at the bottom right (torch.nn.attention.bias builds causal_lower_right on that).

Shapes: _Q query tokens, _K key tokens of all sequences, _S sequences; h query heads, g key/value heads, d channels.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

LARGEST_FLASH_HEAD = 256
FA4_HEADS: Mapping[int, tuple[int, ...]] = {
    9: (64, 96, 128, 192, 256),
    10: (64, 96, 128),
    11: (64, 96, 128),
}
"""Channels of a head that FlashAttention-4 is used for, by the major compute capability.

Other sizes compile as well, but they have no tuned tiles. Capability 12 has only the kernels for Ampere.
"""
FA4_MODULE = "flash_attn.cute"


@dataclass(frozen=True)
class Case:
    """Everything that the choice of a kernel depends on."""

    capability: tuple[int, int] | None
    """The compute capability of the GPU; None on a CPU."""
    dtype: torch.dtype
    head: int
    """Channels of a head."""
    backend: str = "auto"
    """--attention-backend."""
    deterministic: bool = False
    """True if PyTorch's deterministic algorithms are on: the same inputs have to give the same bits."""


@dataclass(frozen=True)
class Kernel:
    """One row of the table."""

    name: str
    reason_against: Callable[[Case], str | None]
    """Returns why it cannot compute a case, or None if it can."""
    attend: Callable[..., Tensor]
    """Takes the arguments of the public `attend`, without the backend."""


def _against_flash(case: Case) -> str | None:
    """Return the reason against any flash kernel."""
    if case.backend in ("unfused", "local"):
        return f"--attention-backend {case.backend}"
    if case.capability is None:
        return "the tensors are on a CPU"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"the dtype is {str(case.dtype).removeprefix('torch.')}"
    return None


def _against_fa4(case: Case) -> str | None:
    if (why := _against_flash(case)) is not None:
        return why
    assert case.capability is not None
    if case.backend == "fused":
        return "--attention-backend fused"
    major, minor = case.capability
    if major not in FA4_HEADS:
        return f"it has no kernels of its own for compute capability {major}.{minor}"
    if case.head not in FA4_HEADS[major]:
        return f"a head has {case.head} channels"
    if case.deterministic:
        return "--deterministic: it adds gradients in the order in which blocks finish"
    return fa4()[1]


def _against_torch(case: Case) -> str | None:
    if (why := _against_flash(case)) is not None:
        return why
    assert case.capability is not None
    if case.capability < (8, 0):
        return "compute capability {}.{}".format(*case.capability)
    return f"a head has {case.head} channels" if case.head % 8 or case.head > LARGEST_FLASH_HEAD else None


@functools.cache
def fa4() -> tuple[Callable[..., Any] | None, str | None]:
    """Import FlashAttention-4: return its function for packed sequences, or None and the reason.

    A package that is not installed is a usual reason. One that is installed but cannot be imported is also logged as a
    warning, because the user expects it to be used.
    """
    try:
        return importlib.import_module(FA4_MODULE).flash_attn_varlen_func, None
    except ModuleNotFoundError as error:
        if error.name is not None and (FA4_MODULE + ".").startswith(error.name + "."):
            return None, "flash-attn-4 is not installed"
        broken: Exception = error
    except Exception as error:  # noqa: BLE001 (it loads CUDA libraries: errors of many kinds)
        broken = error
    text = " ".join(f"{type(broken).__name__}: {broken}".split())
    logger.warning("attention: FlashAttention-4 is installed, but cannot be imported: %s", text)
    return None, f"its import failed ({text})"


def choose(case: Case) -> tuple[Kernel, dict[str, str]]:
    """Return the kernel for a case, and for each kernel before it in the table its name and the reason against it."""
    reasons: dict[str, str] = {}
    for kernel in KERNELS:
        why = kernel.reason_against(case)
        if why is None:
            return kernel, reasons
        reasons[kernel.name] = why
    raise AssertionError("the last kernel of the table computes every case")


@functools.cache
def kernel_for(case: Case) -> Kernel:
    """Return `choose`'s kernel; the first call for a case logs it with the reasons."""
    kernel, reasons = choose(case)
    against = "".join(f"; not {name}: {why}" for name, why in reasons.items())
    logger.info("attention: %s%s", kernel.name, against)
    return kernel


def attend(
    query_Q: Tensor,
    key_K: Tensor,
    value_K: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    backend: str = "auto",
) -> Tensor:
    """Attend causally within each sequence, aligned at the bottom right: [Q, h, d], [K, g, d], [K, g, d] -> [Q, h, d].

    Args:
        cu_q, cu_k: [S + 1] int32, the position at which each sequence's queries and keys begin. A sequence has at least
            as many keys as queries.
        max_q, max_k: the longest of each.
        scale: the factor of the scores; None is 1 / sqrt(d).
        backend: --attention-backend, which leaves kernels out.
    """
    case = Case(
        capability=torch.cuda.get_device_capability(query_Q.device) if query_Q.is_cuda else None,
        dtype=query_Q.dtype,
        head=query_Q.size(-1),
        backend=backend,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return kernel_for(case).attend(query_Q, key_K, value_K, cu_q, cu_k, max_q, max_k, scale)


def attend_fa4(
    query_Q: Tensor,
    key_K: Tensor,
    value_K: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> Tensor:
    """Compute `attend` with FlashAttention-4; views with a stride are fine, and are not copied.

    Raises:
        RuntimeError: FlashAttention-4 cannot be imported.
    """
    function, why = fa4()
    if function is None:
        raise RuntimeError(f"FlashAttention-4: {why}")
    try:
        out, _ = function(
            query_Q,
            key_K,
            value_K,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            softmax_scale=scale,
            causal=True,
            return_lse=True,  # always: without gradients a call without them would be one more kernel to compile
        )
    except Exception as error:  # the driver may refuse what was compiled, and this is the first call that shows it
        error.add_note("in FlashAttention-4: --attention-backend fused uses PyTorch's flash attention instead")
        raise
    return out


@contextmanager
def _strictly_deterministic() -> Iterator[None]:
    """Where deterministic algorithms are on and others give a warning, let only deterministic ones run inside.

    PyTorch's flash attention has a deterministic backward pass, and uses it only if the other one would be an error.
    With warnings (`device.use_deterministic_algorithms`) it would add gradients in the order in which blocks finish.
    """
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


class _Flash(torch.autograd.Function):
    """The flash attention of PyTorch: aten::_flash_attention_forward and its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query_Q: Tensor,
        key_K: Tensor,
        value_K: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        scale: float | None,
    ) -> Tensor:
        out_Q, log_sums, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            query_Q, key_K, value_K, cu_q, cu_k, max_q, max_k, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(query_Q, key_K, value_K, out_Q, log_sums, cu_q, cu_k, rng_state, unused)
        ctx.options = max_q, max_k, scale
        return out_Q

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_Q, key_K, value_K, out_Q, log_sums, cu_q, cu_k, rng_state, unused = ctx.saved_tensors
        max_q, max_k, scale = ctx.options
        with _strictly_deterministic():
            of_query_Q, of_key_K, of_value_K = torch.ops.aten._flash_attention_backward(
                gradients[0].contiguous(),
                query_Q,
                key_K,
                value_K,
                out_Q,
                log_sums,
                cu_q,
                cu_k,
                max_q,
                max_k,
                0.0,
                True,
                rng_state,
                unused,
                scale=scale,
            )
        return of_query_Q, of_key_K, of_value_K, None, None, None, None, None


def attend_torch(
    query_Q: Tensor,
    key_K: Tensor,
    value_K: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> Tensor:
    """Compute `attend` with the flash attention that is part of PyTorch."""
    return _Flash.apply(query_Q, key_K, value_K, cu_q, cu_k, max_q, max_k, scale)  # pyright: ignore[reportReturnType]


def attend_each(
    query_Q: Tensor, key_K: Tensor, value_K: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None
) -> Tensor:
    """Compute `attend` with one SDPA call per sequence: correct everywhere, and slow.

    Deterministic algorithms on a GPU leave SDPA its plain implementation only: its memory-efficient one adds gradients
    in any order if others than deterministic ones merely give a warning.
    """
    plain = query_Q.is_cuda and torch.are_deterministic_algorithms_enabled()
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
        outputs: list[Tensor] = []
        for number in range(len(starts_q) - 1):
            rows = slice(starts_q[number], starts_q[number + 1])
            columns = slice(starts_k[number], starts_k[number + 1])
            q, k, v = (x.transpose(0, 1)[None] for x in (query_Q[rows], key_K[columns], value_K[columns]))
            length_q, length_k = q.size(2), k.size(2)
            if length_q == length_k:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            else:
                visible = torch.ones(length_q, length_k, dtype=torch.bool, device=q.device).tril(length_k - length_q)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)


def _each(
    query_Q: Tensor,
    key_K: Tensor,
    value_K: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> Tensor:
    return attend_each(query_Q, key_K, value_K, cu_q, cu_k, scale)


KERNELS = (
    Kernel("FlashAttention-4", _against_fa4, attend_fa4),
    Kernel("PyTorch's flash attention", _against_torch, attend_torch),
    Kernel("one SDPA call per sequence", lambda case: None, _each),
)
"""All kernels, the fastest first; the last one computes every case."""
