"""The device under training: CUDA with NCCL, or a CPU with gloo, and the layer that hides the difference.

- Used by: `parallel.init_parallel` installs this before the first use of megatron-core, and every build, step, save and
  load runs inside `layer()`.
- Invariant: on a machine with CUDA, nothing here changes anything.

megatron-core writes `device="cuda"` in many places. On a CPU this layer sends those tensors to the CPU, replaces
streams and events by objects that do nothing, and gives Megatron's RNG tracker the CPU generator.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from slime.megatron.compat.version import SUPPORTED_MEGATRON

_CPU = torch.device("cpu")
_installed = False


def on_cuda() -> bool:
    """True if this process sees a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this process's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else _CPU


def backend_name() -> str:
    """Return torch.distributed's backend for that device."""
    return "nccl" if on_cuda() else "gloo"


def set_threads(num_threads: int | None) -> None:
    """Set the threads of one torch operation on a CPU; None leaves torch's choice."""
    if num_threads is not None and not on_cuda():
        torch.set_num_threads(num_threads)


def use_deterministic_algorithms() -> None:
    """Make sums run in the same order every time; on CUDA an operation without such a kernel gives a warning."""
    if on_cuda():  # cuBLAS reads it when its first handle is made, and torch raises without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=on_cuda())
    # costs time, and nothing here reads such memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def local_device(rank: int) -> None:
    """Bind this process to its GPU: the only one that it sees, or number `rank` of the node's. No-op on a CPU."""
    if on_cuda():
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.set_float32_matmul_precision("highest")  # fp32 is fp32, not TF32, whatever the environment sets


def synchronize() -> None:
    """Wait until the device has finished all its work."""
    if on_cuda():
        torch.cuda.synchronize()


def lock_pages(array: torch.Tensor) -> bool:
    """Lock the array's host memory so that the device can read it directly; return whether it did (never on a CPU).

    Raises:
        RuntimeError: CUDA refuses.
    """
    if not on_cuda() or not array.numel():
        return False
    error = int(_runtime().cudaHostRegister(array.data_ptr(), array.nbytes, 0))
    if error:
        raise RuntimeError(
            f"CUDA cannot lock {array.nbytes / 1e9:.2f} GB of host memory (error {error}): leave "
            "--optimizer-cpu-offload out, or give the process more memory (ulimit -l)"
        )
    return True


def unlock_pages(array: torch.Tensor) -> None:
    """Undo `lock_pages`, before the memory is freed."""
    _runtime().cudaHostUnregister(array.data_ptr())


def _runtime() -> Any:
    return torch.cuda.cudart()


def empty_cache() -> None:
    """Give memory that is free inside this process back to the device.

    cuBLAS keeps a workspace that the next matrix product would allocate again. Such a small block inside gigabytes of
    free memory would keep all of them from going back, so the workspaces are cleared first.
    """
    if on_cuda():
        require_names(torch._C, "_cuda_clearCublasWorkspaces")
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def take_memory_peaks() -> dict[str, float]:
    """Return the peaks of memory since the last call in GB (1e9 bytes), and reset them.

    On CUDA: `peak` of this process's tensors; `reserved` by its allocator; `device`, the use of all processes including
    engines, as far as this process's own peak shows it. On a CPU: `peak` of the process's resident memory, if Linux
    counts it.
    """
    if not on_cuda():
        return _take_resident_peak()
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    reserved = torch.cuda.max_memory_reserved()
    peaks = {"peak": torch.cuda.max_memory_allocated(), "reserved": reserved, "device": others + reserved}
    torch.cuda.reset_peak_memory_stats()
    return {name: size / 1e9 for name, size in peaks.items()}


def _take_resident_peak() -> dict[str, float]:
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists() or not os.access(reset, os.W_OK):
        return {}
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    reset.write_text("5")
    return {"peak": int(line.split()[1]) * 1024 / 1e9}


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


def require_names(owner: Any, *names: str) -> None:
    """Check that private names of megatron-core and torch, which slime uses or replaces, exist."""
    for name in names:
        if not hasattr(owner, name):
            raise RuntimeError(
                f"{owner.__name__} has no {name!r}: slime is written for megatron-core {SUPPORTED_MEGATRON}; "
                f"install that version (pip install megatron-core=={SUPPORTED_MEGATRON})"
            )


def replace_name(owner: Any, name: str, value: Any) -> None:
    """Replace a name that must exist already."""
    require_names(owner, name)
    setattr(owner, name, value)


def install() -> None:
    """Replace what megatron-core calls in CUDA, once in this process. No-op on a machine with CUDA."""
    global _installed
    if on_cuda() or _installed:
        return
    stream = _Stream()
    replace_name(torch.cuda, "current_device", lambda: _CPU)
    replace_name(torch.cuda, "synchronize", lambda *args, **kwargs: None)
    replace_name(torch.cuda, "Stream", _Stream)
    replace_name(torch.cuda, "Event", _Event)
    replace_name(torch.cuda, "current_stream", lambda *args, **kwargs: stream)
    replace_name(torch.cuda, "default_stream", lambda *args, **kwargs: stream)
    replace_name(torch.cuda, "stream", lambda wanted=None: stream)
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
    require_names(gloo, "_Options", "create_default_device")
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

    gloo.__init__ = init


def _install_uneven() -> None:
    """Support splits of different sizes per rank (MoE), which gloo's all-gather and reduce-scatter do not take."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    require_names(mappings, "_gather_along_first_dim", "_reduce_scatter_along_first_dim")
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

    replace_name(mappings, "_gather_along_first_dim", gather)
    replace_name(mappings, "_reduce_scatter_along_first_dim", reduce_scatter)
    replace_name(token_dispatcher, "maybe_move_tensor_to_cpu", on_the_host)


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

    replace_name(mcore_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    replace_name(mcore_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    replace_name(mcore_random, "CudaRNGStatesTracker", CpuRNGStatesTracker)


def layer() -> contextlib.AbstractContextManager[object]:
    """Return the context around every use of megatron-core in this thread: `with device.layer(): ...`."""
    if on_cuda():
        return contextlib.nullcontext()
    install()
    return _CudaOnCpu()
