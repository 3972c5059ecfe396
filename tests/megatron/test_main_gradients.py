"""Vocabulary tables that add their gradients to the fp32 buffer, and the memory that the one-pass Adam writes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import runs
import tiny
import torch
from made_up import Run, make_args
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.core.batch import TrainBatch

pytestmark = pytest.mark.dist

BATCHES = [tiny.random_batch(seed=0)]
FLAGS: dict[str, Any] = {"bf16": True, "clip_grad": 0.0, "max_tokens_per_gpu": 40, "entropy_coef": 0.01}
"""Flags for several micro-batches and an unclipped gradient."""
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def train(
    rank: int, world_size: int, init_method: str, args: Args, batches: list[TrainBatch], mistake: str = ""
) -> runs.Arrays:
    """Return the tables' gradients. Mistakes: `none`, PyTorch sums them; `unmarked`, they are not marked as added."""
    from slime.megatron import logprobs
    from slime.megatron.model import main_gradients

    with ExitStack() as stack:
        if mistake == "none":
            for module in (main_gradients, logprobs):
                stack.enter_context(patch.object(module, "main_gradient", lambda weight: None))
        elif mistake == "unmarked":
            stack.enter_context(patch.object(logprobs, "added", torch.ones_like))
        found = runs.train(rank, world_size, init_method, args, batches).gradients
    return {name: gradient for name, gradient in found.items() if name in TABLES}


@pytest.mark.parametrize(
    ("family", "world_size", "layout"),
    [
        ("qwen2", 1, {}),  # tied: one weight is embedding and output layer
        ("qwen2", 2, {"pipeline_model_parallel_size": 2, "megatron_extra": {"overlap_grad_reduce": True}}),
        ("glm4", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ],
)
def test_tables_get_their_gradients(
    family: str, world_size: int, layout: dict[str, Any], workers: WorkerPool, tmp_path: Path
) -> None:
    args = tiny.make_args(tiny.hf_dir(tmp_path, family), **FLAGS, **layout)
    exact = workers.run(world_size, train, replace(args, bf16=False), BATCHES)[0]
    plain = workers.run(world_size, train, args, BATCHES, "none")[0]
    found = workers.run(world_size, train, args, BATCHES)[0]
    rounding = runs.difference(plain, exact)
    assert 0 < rounding < 0.2 and runs.difference(found, exact) <= 1.2 * rounding
    assert runs.difference(found, plain) > 0, "they are not the same sums"
    if world_size == 1:
        wrong = workers.run(1, train, args, BATCHES, "unmarked")[0]
        assert runs.difference(wrong, exact) > 0.5


def written(rank: int, world_size: int, init_method: str, args: Args) -> tuple[int, bool]:
    """Return the number of main weights, and whether Megatron's copy writes the same memory as the one pass."""
    from slime.megatron.optim.adam import model_memory, step_in_one_pass
    from slime.megatron.optim.optimizer_state import parts_of

    with joined(args, rank, world_size, init_method) as topology:
        [part] = parts_of(Run(args, topology).optimizer)
        assert not step_in_one_pass(part), "a CPU keeps PyTorch's"
        pairs = list(model_memory(part))
        mains = [main for group in part.optimizer.param_groups for main in group["params"]]
        assert {id(main) for main, _ in pairs} == {id(main) for main in mains}
        with torch.no_grad():
            for number, (main, model) in enumerate(pairs):
                assert model.is_contiguous() and model.numel() == main.numel() and model.dtype == torch.bfloat16
                main.fill_(number + 1)
                model.zero_()
        part._copy_main_params_to_model_params()  # pyright: ignore[reportAttributeAccessIssue]
        return len(pairs), all(bool((model == number + 1).all()) for number, (_, model) in enumerate(pairs))


@pytest.mark.parametrize("sharded", [False, True])
def test_one_pass_writes_where_megatron_copies_to(workers: WorkerPool, sharded: bool) -> None:
    args = make_args(None, bf16=True, use_distributed_optimizer=sharded)
    for number, right in workers.run(1 + sharded, written, args):
        assert number > 1 and right


def test_bias_corrections() -> None:
    from slime.megatron.optim.adam import bias_corrections

    found = bias_corrections(torch.tensor([1.0, 7.0]), (0.9, 0.98))
    exact = torch.tensor([[1 / (1 - b**s) ** p for b, p in ((0.9, 1), (0.98, 0.5))] for s in (1, 7)])
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
