"""AdamW with its state in host memory (--optimizer-cpu-offload); each step streams it through the device in buckets.

- Used by: `optimizer` turns the Adam that Megatron built into this one; `step` takes steps with it, `save_load` saves
  and loads it.
- Invariant: every weight takes the same step as without offload, by the same kernel and to the last bit. When `step`
  returns, host memory holds the new state.

Gradients stay on the device, where their norm is computed. fp32 weights stay there, too: they are their own main
weights. Both moments and, for a bf16 model, the fp32 main weights are moved: 12 bytes per parameter, in and out.
While the kernel works on one bucket, the next one is copied in and the last one is copied out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from slime.megatron import device
from slime.megatron.compat import apply
from slime.megatron.optim.adam import OnePassAdamW, PlacedAdamW, count_steps, model_memory

BUCKET = 4 * 1024**2
"""The entries that pass through the device at a time; a multiple of ALIGNED."""
ALIGNED = 64
"""A bucket cuts a weight only at multiples of this many entries, so that kernels treat the parts like the whole."""
SLOTS = 3
"""The buckets on the device at once: one is copied in, one is computed with, one is copied out."""
MAIN, MOMENTS = "main", ("exp_avg", "exp_avg_sq")


class HostWeight(Tensor):
    """A main weight in host memory whose gradient is on the device, which a plain torch tensor does not allow."""

    # the result of a computation with it is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    _gradient: Tensor | None = None

    @property
    def grad(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._gradient

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        self._gradient = gradient


@dataclass(frozen=True)
class Piece:
    """The entries `begin` to `end` of the flat `weight`, which begin at `at` in their bucket."""

    weight: Tensor
    begin: int
    end: int
    at: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return this piece of a tensor that has the weight's shape."""
        return tensor.detach().view(-1)[self.begin : self.end]

    def staged(self, bucket: Tensor) -> Tensor:
        return bucket[self.at : self.at + self.end - self.begin]


class HostState:
    """Flat float32 arrays [length] in host memory: one for the main weights and one per moment, in the same order."""

    def __init__(self, mains: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self._starts: dict[Tensor, int] = {}
        self.length = self._place(mains, 0)
        self.arrays = {MAIN: self._locked(self.length)} if mains else {}
        self.length = self._place(others, self.length)
        self.buckets = list(self._cut())

    def start(self) -> None:
        """Allocate the moments, with zeros."""
        if MOMENTS[0] not in self.arrays:
            self.arrays |= {name: self._locked(self.length) for name in MOMENTS}

    def of(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight's own part of an array, in its shape."""
        start = self._starts[weight]
        return self.arrays[name][start : start + weight.numel()].view(weight.shape)

    def stream(self, update: Callable[[Sequence[Piece], Mapping[str, Tensor]], None]) -> None:
        """Copy each bucket to the device, let `update` change it there, and copy it back.

        Three streams overlap. With slots 0-2, bucket 3 takes slot 0 again, so its copy in waits for the event that ends
        bucket 0's copy out. Each bucket's update waits for its own copy in, and its copy out waits for its update.
        """
        size, slots = min(BUCKET, self.length), min(SLOTS, len(self.buckets))
        staged = [self._staging(size) for _ in range(slots)]
        free: list[Any] = [None] * slots
        compute, inward, outward = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
        inward.wait_stream(compute)  # earlier kernels may still use the memory that the buckets were given
        for number, pieces in enumerate(self.buckets):
            slot = number % slots
            pairs = list(self._pairs(number, staged[slot]))
            with torch.cuda.stream(inward):
                if free[slot] is not None:
                    inward.wait_event(free[slot])
                for there, here in pairs:
                    here.copy_(there, non_blocking=True)
                come = inward.record_event()
            compute.wait_event(come)
            update(pieces, staged[slot])
            computed = compute.record_event()
            with torch.cuda.stream(outward):
                outward.wait_event(computed)
                for there, here in pairs:
                    there.copy_(here, non_blocking=True)
                free[slot] = outward.record_event()
        compute.wait_stream(outward)
        compute.synchronize()

    def _staging(self, size: int) -> dict[str, Tensor]:
        return {name: torch.empty(size, dtype=torch.float32, device=device.device()) for name in self.arrays}

    def _pairs(self, number: int, staged: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the (host, device) parts of bucket `number`; after the main weights' end these are moments only."""
        for name, array in self.arrays.items():
            there = array[number * BUCKET : (number + 1) * BUCKET]
            if len(there):
                yield there, staged[name][: len(there)]

    def _place(self, weights: Sequence[Tensor], start: int) -> int:
        for weight in weights:
            self._starts[weight] = start
            start += -(-weight.numel() // ALIGNED) * ALIGNED
        return start

    def _cut(self) -> Iterator[list[Piece]]:
        pieces: list[list[Piece]] = [[] for _ in range(-(-self.length // BUCKET))]
        for weight, start in self._starts.items():
            end = start + weight.numel()
            for number in range(start // BUCKET, -(-end // BUCKET)):
                first, last = max(start, number * BUCKET), min(end, (number + 1) * BUCKET)
                if first < last:
                    pieces[number].append(Piece(weight, first - start, last - start, first - number * BUCKET))
        return iter(pieces)

    def _locked(self, length: int) -> Tensor:
        """Return [length] zeros in page-locked memory of exactly that size; torch would round up to a power of two."""
        array = torch.zeros(length, dtype=torch.float32, device="cpu")
        if device.lock_pages(array):
            weakref.finalize(self, device.unlock_pages, array)
        return array


class HostAdamW(PlacedAdamW):
    """AdamW over a HostState; `install` turns an existing AdamW into one."""

    host: HostState
    model_of: dict[Tensor, Tensor]
    """The model's memory that gets the rounded value of each main weight."""
    one_pass: bool
    """Whether the step without offload would be OnePassAdamW's; otherwise it is torch's fused one."""
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def start(self) -> None:
        self.host.start()
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight]["step"] = torch.zeros((), dtype=torch.float32, device=device.device())
                    for name in MOMENTS:
                        self.state[weight][name] = self.host.of(name, weight).zero_()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.start()
        updates: dict[Tensor, Callable[[Piece, Mapping[str, Tensor]], None]] = {}
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                updates |= dict(zip(weights, self._updates(group, weights), strict=True))

        def update(pieces: Sequence[Piece], staged: Mapping[str, Tensor]) -> None:
            for piece in pieces:
                if piece.weight in updates:
                    updates[piece.weight](piece, staged)

        self.host.stream(update)

    def _updates(
        self, group: dict[str, Any], weights: Sequence[Tensor]
    ) -> Iterator[Callable[[Piece, Mapping[str, Tensor]], None]]:
        """Count one more step of each weight, and yield the function that updates a piece of it."""
        counted = count_steps(self, weights, group)
        for place, weight in enumerate(weights):

            def update(piece: Piece, staged: Mapping[str, Tensor], place: int = place, weight: Tensor = weight) -> None:
                assert weight.grad is not None
                main = piece.staged(staged[MAIN]) if isinstance(weight, HostWeight) else piece.of(weight)
                moments = [piece.staged(staged[name]) for name in MOMENTS]
                model = self.model_of.get(weight)
                model = None if model is None else piece.of(model)
                if self.one_pass:
                    from slime.megatron.model.kernels import triton_adamw

                    exp_avg, exp_avg_sq = moments
                    memory = triton_adamw.Memory(
                        gradient=piece.of(weight.grad), weight=main, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, model=model
                    )
                    triton_adamw.adamw(memory, counted, place)
                    return
                step = self.state[weight]["step"]
                self._fused(group, piece.of(weight.grad), main, moments, step)
                if model is not None:
                    model.copy_(main)

            yield update

    def _fused(
        self, group: dict[str, Any], gradient: Tensor, weight: Tensor, moments: Sequence[Tensor], step: Tensor
    ) -> None:
        """Run torch's own fused step on a part of a weight."""
        exp_avg, exp_avg_sq = moments
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            [weight],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state as torch does, but into host memory; torch would move moments to their weight's device."""
        given: dict[int, dict[str, Tensor]] = state_dict["state"]
        steps = {number: {"step": state["step"]} for number, state in given.items()}
        super().load_state_dict({**state_dict, "state": steps})
        self.host.start()
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, weight in zip(numbers, weights, strict=True):
            if number in given:
                self.state[weight]["step"] = self.state[weight]["step"].to(device.device())
                for name in MOMENTS:
                    self.state[weight][name] = self.host.of(name, weight).copy_(given[number][name])


def install(part: MegatronOptimizer) -> None:
    """Make `part` keep its state in host memory.

    Raises:
        ValueError: it is not PyTorch's AdamW.
    """
    adam: Any = part.optimizer
    if type(adam) not in (torch.optim.AdamW, OnePassAdamW) or not _is_plain(adam):
        raise ValueError(
            f"--optimizer-cpu-offload: it requires PyTorch's fused AdamW, and Megatron built {type(adam).__module__}."
            f"{type(adam).__name__}; leave the flag out, or use an environment without TransformerEngine and Apex"
        )
    has_mains = isinstance(part, (Float16OptimizerWithFloat16Params, DistributedOptimizer))
    model_of = dict(model_memory(part)) if has_mains else {}
    others = [weight for group in adam.param_groups for weight in group["params"] if weight not in model_of]
    adam.one_pass = type(adam) is OnePassAdamW
    apply.change_class(adam, HostAdamW)
    adam.model_of = model_of
    adam.host = HostState(list(model_of), others)
    for main in model_of:
        main.data = adam.host.of(MAIN, main).copy_(main.data)
        apply.change_class(main, HostWeight)
    apply.replace_on(part, "init_state_fn", _start)
    if model_of:
        apply.replace_on(part, "_copy_main_params_to_model_params", lambda: None)  # the step has written them


def _is_plain(adam: torch.optim.AdamW) -> bool:
    return all(group["fused"] and not group["amsgrad"] and not group["maximize"] for group in adam.param_groups)


def _start(adam: HostAdamW, config: object = None) -> None:
    """Create the state that Megatron loads into; Megatron calls this before it loads."""
    adam.start()
