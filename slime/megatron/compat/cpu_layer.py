"""The layer that lets megatron-core run on a CPU. With CUDA, nothing here changes anything.

- Used by: `parallel.init_parallel` installs this before the first use of megatron-core, and every build, step, save and
  load runs inside `layer()`.
- Invariant: CUDA is redirected only inside `layer()`, and only in the thread that is inside.

megatron-core writes `device="cuda"` in many places. On a CPU this layer sends those tensors to the CPU, replaces
streams and events by objects that do nothing, and gives Megatron's RNG tracker the CPU generator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from slime.megatron.compat.apply import replace

_CPU = torch.device("cpu")
_installed = False


def _is_cuda(value: object) -> bool:
    if isinstance(value, str):
        return value.split(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


class _CudaOnCpu(TorchFunctionMode):
    """A function mode that sends `device="cuda"`, `.cuda()` and pinned memory to the CPU.

    `Tensor.type()` returns the CUDA spelling, because Megatron's optimizers compare against it. A function mode belongs
    to one thread: every thread that calls megatron-core enters `layer()`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _Stream:
    """A CUDA stream that has nothing to wait for: on a CPU everything is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> bool:
        return False


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def install() -> None:
    """Replace what megatron-core calls in CUDA, once in this process. No-op on a machine with CUDA."""
    global _installed
    if torch.cuda.is_available() or _installed:
        return
    stream = _Stream()
    replace("torch.cuda", "current_device", lambda: _CPU)
    replace("torch.cuda", "synchronize", lambda *args, **kwargs: None)
    replace("torch.cuda", "Stream", _Stream)
    replace("torch.cuda", "Event", _Event)
    replace("torch.cuda", "current_stream", lambda *args, **kwargs: stream)
    replace("torch.cuda", "default_stream", lambda *args, **kwargs: stream)
    replace("torch.cuda", "stream", lambda wanted=None: stream)
    # whoever imported megatron.core before slime.megatron has functions of torch.compile, which needs a C++ compiler
    torch.compiler.set_stance("force_eager")
    _install_rng()
    _install_uneven()
    _share_gloo_device()
    _installed = True


def _share_gloo_device() -> None:
    """Let all groups of this process share one gloo device, whose thread wakes a hundred times a second.

    torch gives every group a device of its own, and Megatron makes twenty groups.
    """
    gloo: Any = torch.distributed.ProcessGroupGloo
    original, devices = gloo.__init__, []

    def init(self: Any, store: Any, rank: int, size: int, *args: Any, **kwargs: Any) -> None:
        if args or set(kwargs) - {"timeout"}:
            original(self, store, rank, size, *args, **kwargs)
            return
        if not devices:
            devices.append(gloo.create_default_device())
        options = gloo._Options()
        options._devices = devices
        if "timeout" in kwargs:
            options._timeout = kwargs["timeout"]
        original(self, store, rank, size, options)

    replace("torch.distributed.ProcessGroupGloo", "__init__", init)


def _install_uneven() -> None:
    """Support splits of different sizes per rank (MoE), which gloo's all-gather and reduce-scatter do not take."""
    from megatron.core.tensor_parallel import mappings

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: len(input_)] = input_
        ranks = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(ranks, padded, group=group)
        return torch.cat([rank[:size] for rank, size in zip(ranks, sizes, strict=True)])

    def reduce_scatter(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(input_, group, input_split_sizes, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].contiguous()

    def on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """Convert to numpy if asked to, although the tensor is on the host: these are sizes of an all-to-all."""
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    replace("megatron.core.tensor_parallel.mappings", "_gather_along_first_dim", gather)
    replace("megatron.core.tensor_parallel.mappings", "_reduce_scatter_along_first_dim", reduce_scatter)
    replace("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", on_the_host)


def _install_rng() -> None:
    from megatron.core.tensor_parallel import random as mcore_random

    class CpuRNGStatesTracker(mcore_random.CudaRNGStatesTracker):
        """Megatron's named RNG states, on the CPU generator."""

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"RNG state {name!r} or seed {seed} is there already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    replace(
        "megatron.core.tensor_parallel.random", "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()
    )
    replace(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        lambda state, *args, **kwargs: torch.set_rng_state(state),
    )
    replace("megatron.core.tensor_parallel.random", "CudaRNGStatesTracker", CpuRNGStatesTracker)


def layer() -> contextlib.AbstractContextManager[object]:
    """Return the context around every use of megatron-core in this thread: `with cpu_layer.layer(): ...`."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    install()
    return _CudaOnCpu()
