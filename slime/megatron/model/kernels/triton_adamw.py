"""AdamW on a GPU in one pass: it reads gradient, weight and moments once, and writes the model's bf16 copy, too.

- Used by: `optim.adam` steps all weights of a group at once (`Weights`), `optim.cpu_offload` a part of one (`adamw`).
- Invariant: everything between load and store is float32. Decay and update of a weight are rounded once, together; the
  model's copy is the new weight, rounded.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from slime.megatron import device

if TYPE_CHECKING:
    from slime.megatron.optim.adam import Counted

BLOCK = 2048
BLOCKS = 32
"""The blocks of a chunk, which one program computes, where one launch covers many weights."""
ALIGNED_TO = 16
"""Bytes of an address, and entries of a weight: multiples of it are loaded four entries at a time."""


@triton.jit
def _step(
    gradient_ptr,
    weight_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    model_ptr,
    at,
    size,
    correction1,
    correction2,
    scale,
    skip,
    lr,
    decay,
    share1,
    share2,
    eps,
    WITH_MODEL: tl.constexpr,
):
    """Take the step of one block: the entries `at` of a weight of `size` entries."""
    here = at < size
    gradient = tl.load(gradient_ptr + at, mask=here, other=0.0)
    weight = tl.load(weight_ptr + at, mask=here, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + at, mask=here, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=here, other=0.0)
    gradient = gradient / scale
    # written as a step towards the new value, so that the rounding of 1 - beta does not add up over many steps
    exp_avg += share1 * (gradient - exp_avg)
    exp_avg_sq += share2 * (gradient * gradient - exp_avg_sq)
    update = lr * correction1 * exp_avg / (tl.sqrt(exp_avg_sq) * correction2 + eps)
    weight -= decay * weight + update
    there = at < tl.where(skip == 0.0, size, 0)  # only the stores wait for `skip`
    tl.store(weight_ptr + at, weight, mask=there)
    tl.store(exp_avg_ptr + at, exp_avg, mask=there)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=there)
    if WITH_MODEL:
        tl.store(model_ptr + at, weight.to(model_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["place"])
def _adamw(
    gradient_ptr,
    weight_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    model_ptr,
    corrections_ptr,
    place,
    scale_ptr,
    skip_ptr,
    size,
    lr,
    decay,
    share1,
    share2,
    eps,
    WITH_MODEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _step(
        gradient_ptr,
        weight_ptr,
        exp_avg_ptr,
        exp_avg_sq_ptr,
        model_ptr,
        at,
        size,
        tl.load(corrections_ptr + 2 * place),
        tl.load(corrections_ptr + 2 * place + 1),
        tl.load(scale_ptr),
        tl.load(skip_ptr),
        lr,
        decay,
        share1,
        share2,
        eps,
        WITH_MODEL,
    )


@triton.jit
def _adamw_many(
    table_ptr,
    chunks_ptr,
    corrections_ptr,
    scale_ptr,
    skip_ptr,
    lr,
    decay,
    share1,
    share2,
    eps,
    MODEL: tl.constexpr,
    WITH_MODEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # each program takes one chunk of BLOCKS blocks of one weight, whose row of the table has its addresses
    place = tl.load(chunks_ptr + 2 * tl.program_id(0))
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1) * BLOCK
    row = table_ptr + place * 6
    gradient_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    weight_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    exp_avg_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    model_ptr = tl.load(row + 4).to(tl.pointer_type(MODEL))
    size = tl.load(row + 5)
    if ALIGNED:  # then a thread loads four entries at once
        gradient_ptr = tl.multiple_of(gradient_ptr, 16)
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        exp_avg_ptr = tl.multiple_of(exp_avg_ptr, 16)
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_ptr, 16)
        model_ptr = tl.multiple_of(model_ptr, 16)
        size = tl.multiple_of(size, 16)
    correction1 = tl.load(corrections_ptr + 2 * place)
    correction2 = tl.load(corrections_ptr + 2 * place + 1)
    scale = tl.load(scale_ptr)
    skip = tl.load(skip_ptr)
    for first in range(start, tl.minimum(size, start + BLOCK * BLOCKS), BLOCK):
        _step(
            gradient_ptr,
            weight_ptr,
            exp_avg_ptr,
            exp_avg_sq_ptr,
            model_ptr,
            tl.multiple_of(first, BLOCK) + tl.arange(0, BLOCK),
            size,
            correction1,
            correction2,
            scale,
            skip,
            lr,
            decay,
            share1,
            share2,
            eps,
            WITH_MODEL,
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The tensors of one weight or of a part of it: contiguous float32 of one size, and the model's copy if any."""

    gradient: Tensor
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    model: Tensor | None
    """Gets the new weight, in its own dtype."""

    def addresses(self) -> tuple[int, ...]:
        """Return the row of the kernel's table: four addresses, the model's (the weight's if it has none), the size."""
        own = (self.gradient, self.weight, self.exp_avg, self.exp_avg_sq)
        model = self.weight if self.model is None else self.model
        return (*(tensor.data_ptr() for tensor in own), model.data_ptr(), self.weight.numel())

    def check(self) -> None:
        for tensor in (self.gradient, self.weight, self.exp_avg, self.exp_avg_sq):
            assert tensor.is_contiguous() and tensor.dtype == torch.float32
            assert tensor.numel() == self.weight.numel()
        assert self.model is None or (self.model.is_contiguous() and self.model.numel() == self.weight.numel())


def adamw(memory: Memory, counted: Counted, place: int) -> None:
    """Take one step of one weight, in place; `place` is its row in the corrections."""
    memory.check()
    weight, model = memory.weight, memory.model
    if not weight.numel():
        return
    _adamw[(triton.cdiv(weight.numel(), BLOCK),)](
        memory.gradient,
        weight,
        memory.exp_avg,
        memory.exp_avg_sq,
        weight if model is None else model,
        counted.corrections,
        place,
        counted.scale,
        counted.skip,
        weight.numel(),
        *_settings(counted),
        WITH_MODEL=model is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )


def _settings(counted: Counted) -> tuple[float, ...]:
    """Return what both kernels take last: lr, decay of a step, the shares of the new moments, eps."""
    lr, (beta1, beta2) = counted.lr, counted.betas
    return float(lr), float(lr * counted.weight_decay), 1.0 - beta1, 1.0 - beta2, float(counted.eps)


@dataclass(frozen=True)
class _Launch:
    """The weights that one launch covers: those with copies of one dtype, and aligned or not."""

    model: torch.dtype | None
    aligned: bool
    chunks: Tensor
    """[chunks, 2] int64 on the device: the weight's row in the table, and the chunk's first block."""


@dataclass
class Weights:
    """Steps all weights of a group in a few launches. Hundreds of small launches take longer than the pass itself.

    A table on the device has each weight's addresses. It is made again when one of them changes, which is rare: main
    gradients, weights and moments stay where they are.
    """

    _rows: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    _table: Tensor = field(default_factory=lambda: torch.empty(0, 6, dtype=torch.int64))
    _launches: list[_Launch] = field(default_factory=list[_Launch])

    def step(self, weights: Sequence[Memory], counted: Counted) -> None:
        """Take one step of each weight, in place; the corrections have a row for each."""
        rows = [weight.addresses() for weight in weights]
        if rows != self._rows:
            self._lay_out(weights, rows)
        for launch in self._launches:
            _adamw_many[(len(launch.chunks),)](
                self._table,
                launch.chunks,
                counted.corrections,
                counted.scale,
                counted.skip,
                *_settings(counted),
                MODEL=tl.float32 if launch.model is None else _TRITON[launch.model],
                WITH_MODEL=launch.model is not None,
                ALIGNED=launch.aligned,
                BLOCK=BLOCK,
                BLOCKS=BLOCKS,
                num_warps=8,
            )

    def _lay_out(self, weights: Sequence[Memory], rows: list[tuple[int, ...]]) -> None:
        kinds: dict[tuple[torch.dtype | None, bool], list[tuple[int, int]]] = {}
        for place, (weight, row) in enumerate(zip(weights, rows, strict=True)):
            weight.check()
            model = None if weight.model is None else weight.model.dtype
            kind = model, not any(value % ALIGNED_TO for value in row)
            kinds.setdefault(kind, []).extend((place, first) for first in _chunks(row[-1]))
        self._table = device.send(torch.tensor(rows, dtype=torch.int64))
        self._launches = [
            _Launch(model, aligned, device.send(torch.tensor(chunks, dtype=torch.int64)))
            for (model, aligned), chunks in kinds.items()
            if chunks
        ]
        self._rows = rows


_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _chunks(size: int) -> Iterator[int]:
    """Yield the first block of each chunk of a weight with `size` entries."""
    yield from range(0, triton.cdiv(size, BLOCK), BLOCKS)
