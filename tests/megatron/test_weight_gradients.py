"""Weight gradients that linear layers add to the fp32 buffer themselves: the code around the matrix product.

The product itself needs a GPU; here a CPU's replaces it, and adds to the same buffers.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import runs
import tiny
from torch import Tensor
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.core.batch import TrainBatch

pytestmark = pytest.mark.dist

BATCHES = [tiny.random_batch(seed=seed) for seed in range(2)]
FLAGS: dict[str, Any] = {"bf16": True, "clip_grad": 0.0, "max_tokens_per_gpu": 40, "entropy_coef": 0.01}
"""Flags for several micro-batches and an unclipped gradient."""


class CpuProduct:
    calls = 0

    @classmethod
    def wgrad_gemm_accum_fp32(cls, total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        cls.calls += 1
        main_grad.addmm_(grad_output.float().t(), total_input.float())


def train(
    rank: int, world_size: int, init_method: str, args: Args, batches: list[TrainBatch], spoil: bool = False
) -> tuple[runs.Outcome, int]:
    """Run `runs.train` and count the products. `spoil` is a bug: the buffer keeps what an earlier step put in."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.tensor_parallel import layers

    from slime.megatron.model import build

    CpuProduct.calls = 0
    with ExitStack() as stack:
        stack.enter_context(patch.object(layers, "_grad_accum_fusion_available", True))
        stack.enter_context(patch.object(layers, "fused_weight_gradient_mlp_cuda", CpuProduct, create=True))
        stack.enter_context(patch.object(build, "fuse_weight_gradients", lambda: True))
        if spoil:
            stack.enter_context(patch.object(DistributedDataParallel, "zero_grad_buffer"))
        return runs.train(rank, world_size, init_method, args, batches), CpuProduct.calls


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def test_nothing_is_missing_or_added_twice(workers: WorkerPool, tmp_path: Path) -> None:
    """In a tied model one weight is embedding and output layer; its gradient does not go through the product."""
    args = tiny.make_args(tiny.hf_dir(tmp_path, "qwen2"), **FLAGS, **RECOMPUTE)
    exact = workers.run(1, runs.train, replace(args, bf16=False), BATCHES)[0].gradients
    plain = workers.run(1, runs.train, args, BATCHES)[0].gradients
    found, calls = workers.run(1, train, args, BATCHES)[0]
    assert calls and calls % (2 * 4) == 0, "two layers of four products each, in every micro-batch"
    assert runs.difference(found.gradients, exact) < 2 * runs.difference(plain, exact) < 0.2
    spoiled, _ = workers.run(1, train, args, BATCHES, True)[0]
    assert runs.difference(spoiled.gradients, exact) > 0.5
    without = replace(args, megatron_extra={"gradient_accumulation_fusion": False})
    assert workers.run(1, train, without, BATCHES)[0][1] == 0
