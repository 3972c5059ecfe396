"""The CPU layer: it redirects CUDA only inside its context."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.megatron.compat import cpu_layer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the layer is a no-op where CUDA is")


def test_cuda_is_the_cpu_inside() -> None:
    with cpu_layer.layer():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.device("cuda", 0)).cuda().to("cuda:0").device.type == "cpu"
        assert torch.zeros(2, pin_memory=True).sum() == 0
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"  # Megatron's optimizers compare with this
        assert torch.cuda.current_device() == torch.device("cpu")


def test_nothing_is_redirected_outside() -> None:
    with cpu_layer.layer():
        pass
    assert torch.zeros(2).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_another_thread_is_outside() -> None:
    seen: list[str] = []
    with cpu_layer.layer():
        thread = threading.Thread(target=lambda: seen.append(torch.zeros(1).type()))
        thread.start()
        thread.join()
    assert seen == ["torch.FloatTensor"]


def test_named_rng_states_are_separate() -> None:
    from megatron.core.tensor_parallel import random as mcore_random

    cpu_layer.install()
    tracker = mcore_random.CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with tracker.fork():
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected), "a fork leaves the outer generator alone"
    with tracker.fork():
        assert not torch.equal(torch.rand(3), inside), "a fork goes on where the last one ended"
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    with pytest.raises(ValueError, match="there already"):
        tracker.add("model-parallel-rng", 6)


def _gloo_loops() -> int:
    """Count the threads of this process in which a gloo device waits."""
    return sum(comm.read_text().startswith("gloo") for comm in Path("/proc/self/task").glob("*/comm"))


def _loops_inside(rank: int, world_size: int, init_method: str, args: Args) -> tuple[int, float]:
    with joined(args, rank, world_size, init_method) as topology:
        total = torch.ones(1)
        torch.distributed.all_reduce(total, group=topology.dp_cp_group)
        return _gloo_loops(), total.item()


@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="threads are named in /proc")
def test_all_groups_share_one_gloo_device(workers: WorkerPool, tmp_path: Path) -> None:
    """A device's thread wakes a hundred times a second, and Megatron makes twenty groups."""
    args = tiny.make_args(tiny.hf_dir(tmp_path / "model", "glm4"))
    once = workers.run(2, _loops_inside, args)
    again = workers.run(2, _loops_inside, args)
    assert once == again == [(1, 2.0)] * 2
