"""The device under training: CUDA with NCCL, or a CPU with gloo; its memory and its threads.

- Used by: everything that makes tensors for the model, or measures and frees their memory.
- Invariant: nothing here knows Megatron; `compat.cpu_layer` is what lets megatron-core run on a CPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def on_cuda() -> bool:
    """True if this process sees a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this process's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else torch.device("cpu")


def send(values: torch.Tensor) -> torch.Tensor:
    """Return a copy of a host tensor on the device; on a CPU the tensor itself.

    The host does not wait: it copies the values into locked memory, from which the device reads them in its turn.
    """
    if not on_cuda():
        return values
    return (values.pin_memory() if values.numel() else values).to(device(), non_blocking=True)


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
            f"CUDA cannot lock {array.nbytes / 1e9:.2f} GB of host memory (error {error}): give the process more "
            "memory (ulimit -l), or leave --optimizer-cpu-offload out if it is given"
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
